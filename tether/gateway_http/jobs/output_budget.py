"""Limits the bytes of outputs in one response about jobs, so that large results do not exhaust memory."""

from __future__ import annotations

from tether.domain.job import Outcome

ANSWER_BYTES = 16 << 20
"""Output bytes in one response. The first job's outputs are included whatever their size."""

AT_ONCE = 16
"""Jobs whose results are read at a time: each may be as large as a message."""


class OutputRoom:
    """Remaining output bytes of one response."""

    def __init__(self) -> None:
        self._left = ANSWER_BYTES
        self._first = True

    def takes(self, outcome: Outcome) -> bool:
        """Charge a job's outputs to the budget; return False if they do not fit."""
        size = sum([len(tensor.data) for tensor in outcome.outputs])
        if size > self._left and not self._first:
            return False
        self._left -= size
        self._first = self._first and not size
        return True
