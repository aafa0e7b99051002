"""Messages between dispatcher, workers and gateways: which worker hosts which version. Frozen, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from tether.domain.job import SHARED

BUNDLE_S = 0.1
"""Target run time of one durable bundle: a single worker processes all of its jobs, in its order."""


class Finding(msgspec.Struct, frozen=True):
    """Findings of workers about a version beyond its manifest, valid until the version is deleted."""

    mixed: str = ""
    """How a run mixed up rows: since then the version's jobs are not batched."""
    proven: bool = False
    """For a manifest without a basis for batching: its rows are independent."""
    unproven: str = ""
    """For such a manifest: why independence is not proven."""
    crashed: str = ""
    """How a run crashed a worker or exceeded its memory there: since then the version runs in its own
    process."""

    def __or__(self, other: Finding) -> Finding:
        """Combine findings; this one takes precedence."""
        return Finding(
            self.mixed or other.mixed,
            self.proven or other.proven,
            self.unproven or other.unproven,
            self.crashed or other.crashed,
        )


NO_FINDING = Finding()


class Route(msgspec.Struct, frozen=True):
    """The workers that host a version in a pool now, as seen by the dispatcher. A route implies that the
    lanes exist, even without a worker."""

    model: str
    version: int
    workers: tuple[str, ...]
    regions: tuple[str, ...] = ("local",)
    pool: str = SHARED
    reason: str = ""
    """Why fewer workers than desired host it; empty if none is missing."""
    finding: Finding = NO_FINDING
    """Findings of the pool's workers."""
    job_s: float = 0.0
    """Approximate run time of one job on its slowest worker, if relevant to the size of bundles; 0: unknown."""


class ModelRef(msgspec.Struct, frozen=True):
    """A version by name, in assignments and reports."""

    model: str
    version: int


class EndedLanes(msgspec.Struct, frozen=True):
    """The lanes of a deleted version in one region; the assigned worker fails the jobs that wait there."""

    model: str
    version: int
    region: str


class Assignment(msgspec.Struct, frozen=True):
    """The versions that a worker should host, and the pool it serves. ``epoch`` is the registration it is
    for."""

    worker: str
    epoch: int
    models: tuple[ModelRef, ...]
    pool: str = SHARED
    ended: tuple[EndedLanes, ...] = ()
    """Lanes to drain by ending every job in them."""
    revisions: tuple[tuple[str, int], ...] = ()
    """Current revision of each model's configuration."""
    levels: tuple[tuple[ModelRef, float], ...] = ()
    """Lowest capacity of each version, as in heartbeats."""
    findings: tuple[tuple[ModelRef, Finding], ...] = ()
    """Findings of the pool's workers about versions."""
    streams: str = ""
    """Changes whenever an infer stream of the cluster was recreated: pulls must restart."""


class StreamsMade(msgspec.Struct, frozen=True):
    """Creation times of a cluster's infer streams: a stream with a new time has lost its messages.

    Stored in the bucket ``routes`` under :attr:`KEY`, which no version has. Its first fields are those of a
    route without workers, for older dispatchers, which decode every entry there as a route.
    """

    KEY: ClassVar[str] = "=streams"

    made: tuple[tuple[str, str], ...]
    """Names of streams, with their creation times as reported by the broker."""
    model: str = KEY
    version: int = 0
    workers: tuple[str, ...] = ()
    regions: tuple[str, ...] = ("local",)


class Registration(msgspec.Struct, frozen=True):
    """A worker's request for an epoch."""

    worker: str
    region: str
    slots: int
    platforms: tuple[str, ...]
    labels: Mapping[str, str] = {}
    memory: int = 0
    """Bytes for models; 0: no limit."""
    epoch: int = 0
    """The worker's current epoch, if it only asks whether that is valid; 0: it asks for a new one."""


class Epoch(msgspec.Struct, frozen=True):
    """The dispatcher's reply: heartbeats with this epoch are valid, those with older ones are not."""

    epoch: int


class Heartbeat(msgspec.Struct, frozen=True):
    """A worker's heartbeat. ``failed`` maps ``model:version`` to the reason of a failed load."""

    worker: str
    epoch: int
    region: str
    ready: tuple[ModelRef, ...]
    failed: tuple[tuple[str, str], ...]
    running: int
    """Jobs the worker is processing."""
    slots: int
    sent_at: float
    pool: str = SHARED
    """Pool that the worker serves."""
    labels: Mapping[str, str] = {}
    memory: int = 0
    """Bytes for models, as in the registration."""
    levels: tuple[tuple[ModelRef, float], ...] = ()
    """Measured capacity, in jobs per second, of each version whose jobs are shared by capacity."""
    findings: tuple[tuple[ModelRef, Finding], ...] = ()
    """Findings of this worker about versions, and those received from others."""
    paces: tuple[tuple[ModelRef, float], ...] = ()
    """Usual run time of a job in seconds, for versions whose full bundles run long."""
