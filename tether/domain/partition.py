"""Partitions of the store of chunks: which model store looks after each, and who may take it over.

A model store gives signs of life, and takes a partition whose owner gave none for a while. Whoever looks measures that with its own clock,
from when it saw the last change, so no two clocks are compared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import msgspec


class Lease(msgspec.Struct, frozen=True):
    """Who looks after a partition. ``epoch`` is another one after every change of hands; requests carry it in their subject."""

    partition: int
    epoch: int
    owner: str = ""
    """One run of one model store; empty: nobody."""


class StoreHeartbeat(msgspec.Struct, frozen=True):
    """One run of one model store was there."""

    instance: str
    beat: int


class ChunkRequest(msgspec.Struct, frozen=True):
    """Model store to worker: send this chunk as it is kept, if it is in the cache and intact."""

    digest: str
    """Its name in the store, which is a keyed digest where the model is encrypted."""


def plan(own: str, partitions: int, owners: Mapping[int, str], living: Collection[str]) -> tuple[list[int], list[int]]:
    """The partitions that ``own`` takes, and those it gives up, so that all have an equal share.

    ``owners``: whom each partition's lease names. ``living`` names those whose leases count; ``own`` is one of them.
    """
    share = math.ceil(partitions / max(len({*living, own}), 1))
    held = [partition for partition in range(partitions) if owners.get(partition) == own]
    free = [partition for partition in range(partitions) if owners.get(partition, "") not in {*living, own}]
    return free[: max(share - len(held), 0)], held[share:]
