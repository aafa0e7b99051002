"""What services need from the world, as narrow Protocols; ``bus`` has the NATS form of each."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from tether.envelope import Envelope, MessageType
from tether.job import SHARED, Lane
from tether.tensor import Array

if TYPE_CHECKING:
    from tether.pieces import Bytes


class Clock(Protocol):
    """Time, passed in. ``monotonic`` is for durations inside a process, ``utc`` for what crosses processes (seconds)."""

    def monotonic(self) -> float: ...

    def utc(self) -> float: ...


class Delivery(Protocol):
    """A message and the right to settle it, once. ``attempt`` counts from 1."""

    @property
    def subject(self) -> str: ...

    @property
    def frame(self) -> bytes: ...

    @property
    def attempt(self) -> int: ...

    async def ack(self) -> None: ...

    async def give_back(self) -> None: ...


class JobQueue(Protocol):
    """Where gateways put bundles."""

    async def enqueue(self, lane: Lane, frame: bytes, *, message_id: str, ttl_s: float | None) -> None:
        """Return when the broker holds the bundle. A second call with the same ``message_id`` adds nothing.

        Raises:
            QueueFull: the lane's stream is at its limit. Nothing was stored.
            BrokerUnavailable: no answer in time; the bundle may or may not be stored.
        """


class ResultLog(Protocol):
    """How durable jobs ended: one entry a job, the first one wins."""

    async def commit(self, job: str, frame: bytes, *, scope: str = SHARED) -> bool:
        """Store the end of a job; False when the job had already ended."""

    async def find(self, jobs: Sequence[str], *, scope: str = SHARED) -> dict[str, bytes]:
        """The stored frames of those jobs of a scope that have ended."""


class Bucket(Protocol):
    """Named values. ``None`` means there is none."""

    async def get(self, key: str) -> bytes | None: ...

    async def put(self, key: str, value: bytes) -> None: ...

    async def create(self, key: str, value: bytes) -> bool:
        """Store only if there is none; False when there is."""

    async def delete(self, key: str) -> None: ...

    async def entries(self) -> dict[str, bytes]: ...


class ChunkStore(Protocol):
    """Content-addressed pieces of model files; a digest is the hex SHA-256 of its piece."""

    async def missing(self, digests: Sequence[str]) -> list[str]: ...

    async def put(self, pieces: AsyncIterator[tuple[str, Bytes]], known: AbstractSet[str] | None = None) -> int:
        """Store pieces, several in flight; returns the bytes that were not there before, or are not ``known``."""

    def get(self, digests: Sequence[str]) -> AsyncIterator[bytes]:
        """The pieces in order, as they are stored: whoever uses them compares.

        Raises:
            CorruptChunk: one is missing.
        """


class Sealer(Protocol):
    """Signs what this process sends."""

    def seal(self, kind: MessageType, subject: str, body: bytes, *, message_id: str = "") -> bytes: ...


class Opener(Protocol):
    """Verifies what this process received."""

    def open(self, frame: bytes, *, subject: str, types: tuple[MessageType, ...]) -> Envelope: ...


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
