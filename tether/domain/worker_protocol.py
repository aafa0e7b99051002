"""What dispatcher and workers tell one another, and the gateways: who serves which version. Frozen values without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from tether.domain.job import SHARED

BUNDLE_S = 0.1
"""About how long the jobs of one durable bundle should run together: one worker has all of them, and they are in its order."""


class Finding(msgspec.Struct, frozen=True):
    """What workers found out about a version that its manifest does not say. It counts until the version is deleted."""

    mixed: str = ""
    """What a run showed that does not keep rows apart: its jobs are not joined any more."""
    proven: bool = False
    """Of a version whose manifest names no basis for batching: its rows do not depend on one another."""
    unproven: str = ""
    """Of such a version: why that is not proven."""
    crashed: str = ""
    """How a run of it ended a worker, or took more than it may in a worker's own process: since then it runs in one of its own."""

    def __or__(self, other: Finding) -> Finding:
        """Both together; where they say different things, what this one says."""
        return Finding(
            self.mixed or other.mixed,
            self.proven or other.proven,
            self.unproven or other.unproven,
            self.crashed or other.crashed,
        )


NO_FINDING = Finding()


class Route(msgspec.Struct, frozen=True):
    """Which workers answer for a version in a pool just now, as the dispatcher saw it. A route means that the lanes are
    there, even when it names no worker."""

    model: str
    version: int
    workers: tuple[str, ...]
    regions: tuple[str, ...] = ("local",)
    pool: str = SHARED
    reason: str = ""
    """Why it is on fewer workers than it should be; empty when it is not."""
    finding: Finding = NO_FINDING
    """What workers of the pool found out about it."""
    job_s: float = 0.0
    """About how long its slowest worker runs for one job, as far as that matters to the size of bundles; 0: not known."""


class ModelRef(msgspec.Struct, frozen=True):
    """A version by name: what a worker is told to hold, and what it says it holds."""

    model: str
    version: int


class EndedLanes(msgspec.Struct, frozen=True):
    """The lanes in one region of a version that was deleted: whoever is assigned them tells the jobs that wait there."""

    model: str
    version: int
    region: str


class Assignment(msgspec.Struct, frozen=True):
    """What one worker should hold, and whose lanes it serves. ``epoch`` is the registration it is meant for."""

    worker: str
    epoch: int
    models: tuple[ModelRef, ...]
    pool: str = SHARED
    ended: tuple[EndedLanes, ...] = ()
    """Lanes to work off by ending every job in them."""
    revisions: tuple[tuple[str, int], ...] = ()
    """Which revision of its configuration counts for each model that has one."""
    levels: tuple[tuple[ModelRef, float], ...] = ()
    """What the least able worker says of each version, as in its heartbeat."""
    findings: tuple[tuple[ModelRef, Finding], ...] = ()
    """What workers of the pool found out about versions."""
    streams: str = ""
    """Another text whenever an infer stream of the cluster was made again: pulls are to begin again."""


class StreamsMade(msgspec.Struct, frozen=True):
    """When the streams of a cluster's infer lanes were created: a stream with another time than before lost what was in it.

    It is in the bucket ``routes`` under :attr:`KEY`, which no version has. Its first fields are those of a route without workers,
    for dispatchers of before, which read every entry there as a route.
    """

    KEY: ClassVar[str] = "=streams"

    made: tuple[tuple[str, str], ...]
    """Names of streams, and the broker's word when they were created."""
    model: str = KEY
    version: int = 0
    workers: tuple[str, ...] = ()
    regions: tuple[str, ...] = ("local",)


class Registration(msgspec.Struct, frozen=True):
    """What a worker says of itself when it asks for an epoch."""

    worker: str
    region: str
    slots: int
    platforms: tuple[str, ...]
    labels: Mapping[str, str] = {}
    memory: int = 0
    """Bytes for models; 0: as many as come."""
    epoch: int = 0
    """The one that the worker has, when it only asks whether that still counts; 0: it asks for another one."""


class Epoch(msgspec.Struct, frozen=True):
    """The dispatcher's answer: heartbeats that carry this number count, older ones do not."""

    epoch: int


class Heartbeat(msgspec.Struct, frozen=True):
    """A worker's sign of life. ``failed`` maps ``model:version`` to why it could not be loaded."""

    worker: str
    epoch: int
    region: str
    ready: tuple[ModelRef, ...]
    failed: tuple[tuple[str, str], ...]
    running: int
    """Jobs in the worker's hands."""
    slots: int
    sent_at: float
    pool: str = SHARED
    """Whose lanes the worker serves."""
    labels: Mapping[str, str] = {}
    memory: int = 0
    """Bytes for models, as in the registration."""
    levels: tuple[tuple[ModelRef, float], ...] = ()
    """Jobs a second that it could do of each version whose jobs are shared by capacity, as far as it has measured that."""
    findings: tuple[tuple[ModelRef, Finding], ...] = ()
    """What this worker found out about versions, or was told that others did."""
    paces: tuple[tuple[ModelRef, float], ...] = ()
    """Seconds that a job of a version usually runs; of those whose full bundles run for long."""
