"""What a model is to a worker, whatever framework it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from tether.domain.tensor import Array


class Runtime(Protocol):
    """A model in memory. Called from a thread, one call at a time; nothing here may touch the event loop."""

    @property
    def output_names(self) -> Sequence[str]: ...

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names what is wanted, empty for all in the model's order.

        Raises:
            InferenceFailed: the model refused its input.
        """

    def close(self) -> None: ...


@runtime_checkable
class Endable(Runtime, Protocol):
    """A runtime whose run can be ended from another thread."""

    def allow_runs(self) -> None:
        """Runs begin again. Only while none goes on."""

    def end_run(self) -> None:
        """End the run that goes on, and fail each that begins, until :meth:`allow_runs`. Does not wait."""
