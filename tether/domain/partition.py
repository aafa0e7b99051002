"""Partitions of the chunk store: ownership by leases, and takeover by other model stores.

A model store sends heartbeats, and takes over a partition whose owner has sent none for a while, measured on
its own clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import msgspec


class Lease(msgspec.Struct, frozen=True):
    """The owner of a partition. ``epoch`` changes with the owner and is part of the subject of requests."""

    partition: int
    epoch: int
    owner: str = ""
    """Id of one run of one model store; empty: none."""


class StoreHeartbeat(msgspec.Struct, frozen=True):
    """Heartbeat of one run of one model store."""

    instance: str
    beat: int


class ChunkRequest(msgspec.Struct, frozen=True):
    """Model store to worker: send this chunk as stored, if it is cached and intact."""

    digest: str
    """Its name in the store: a keyed digest if the model is encrypted."""


def plan(own: str, partitions: int, owners: Mapping[int, str], living: Collection[str]) -> tuple[list[int], list[int]]:
    """Return the partitions that ``own`` takes over, and those it gives up, so that all have an equal share.

    ``owners`` are the owners by partition; ``living`` are the model stores with valid leases, ``own``
    included.
    """
    share = math.ceil(partitions / max(len({*living, own}), 1))
    owned = [partition for partition in range(partitions) if owners.get(partition) == own]
    free = [partition for partition in range(partitions) if owners.get(partition, "") not in {*living, own}]
    return free[: max(share - len(owned), 0)], owned[share:]
