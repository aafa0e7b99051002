"""How many bytes of outputs one answer about jobs holds: many large results at once would take all memory of a gateway."""

from __future__ import annotations

from tether.domain.job import Outcome

ANSWER_BYTES = 16 << 20
"""Of the outputs of jobs in one answer. One job's are shown however large they are."""

AT_ONCE = 16
"""Jobs whose ends are read at a time: each may have as much as a message holds."""


class OutputRoom:
    """What is left of it while one answer is put together."""

    def __init__(self) -> None:
        self._left = ANSWER_BYTES
        self._first = True

    def takes(self, outcome: Outcome) -> bool:
        """Whether the outputs of a job are shown; they count from now on."""
        size = sum([len(tensor.data) for tensor in outcome.outputs])
        if size > self._left and not self._first:
            return False
        self._left -= size
        self._first = self._first and not size
        return True
