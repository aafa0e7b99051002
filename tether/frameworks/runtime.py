"""The interface of a model in a worker, for every framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from tether.domain.tensor import Array


class Runtime(Protocol):
    """A model in memory. Called from a thread, one call at a time; it must not touch the event loop."""

    @property
    def output_names(self) -> Sequence[str]: ...

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run once; ``outputs`` names the requested outputs, empty for all in the model's order.

        Raises:
            InferenceFailed: the model refused its input.
        """

    def close(self) -> None: ...


@runtime_checkable
class Endable(Runtime, Protocol):
    """A runtime whose run can be terminated from another thread."""

    def allow_runs(self) -> None:
        """Allow runs again. Only while none is in progress."""

    def end_run(self) -> None:
        """Terminate the current run, and fail later ones until :meth:`allow_runs`. Does not wait."""
