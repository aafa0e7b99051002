"""What dispatcher and workers tell one another, and the gateways: who serves which version. Frozen values without I/O."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tether.job import SHARED


class Route(msgspec.Struct, frozen=True):
    """Which workers answer for a version in a scope just now, as the dispatcher saw it. A route means that the lanes are
    there, even when it names no worker."""

    model: str
    version: int
    workers: tuple[str, ...]
    regions: tuple[str, ...] = ("local",)
    scope: str = SHARED
    reason: str = ""
    """Why it is on fewer workers than it should be; empty when it is not."""


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
    scope: str = SHARED
    ended: tuple[EndedLanes, ...] = ()
    """Lanes to work off by ending every job in them."""
    revisions: tuple[tuple[str, int], ...] = ()
    """Which revision of its configuration counts for each model that has one."""
    levels: tuple[tuple[ModelRef, float], ...] = ()
    """What the least able worker says of each version, as in its heartbeat."""


class Registration(msgspec.Struct, frozen=True):
    """What a worker says of itself when it asks for an epoch."""

    worker: str
    region: str
    slots: int
    platforms: tuple[str, ...]
    labels: Mapping[str, str] = {}
    memory: int = 0
    """Bytes for models; 0: as many as come."""


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
    scope: str = SHARED
    """Whose lanes the worker serves."""
    labels: Mapping[str, str] = {}
    memory: int = 0
    """Bytes for models, as in the registration."""
    levels: tuple[tuple[ModelRef, float], ...] = ()
    """Jobs a second that it could do of each version whose jobs are shared by capacity, as far as it has measured that."""
