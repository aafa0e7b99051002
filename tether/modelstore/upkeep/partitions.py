"""The partitions that one model store looks after: taken, served, kept by signs of life, and given up.

It counts as their owner until ``partition_lease_s`` have passed since it began to give the last sign of life that was stored. Others count
from when they saw that one, which is later, so two never both count themselves as the owner.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

from tether.bus.bus import Bus
from tether.bus.key_value.leases import LeaseBucket, LeaseState
from tether.domain.partition import Lease, StoreHeartbeat, plan
from tether.errors import TetherError, Unavailable
from tether.process import lifecycle, metrics
from tether.process.data_dir import private_folder
from tether.process.os_process import locked

log = logging.getLogger(__name__)

BEATS = 6
"""Signs of life in ``partition_lease_s``, one a second at least. Whoever did not look for half of that time cannot tell who is silent, so there
must be several in it."""
_MARGIN = 0.9
"""How much of ``partition_lease_s`` an owner counts on: a clock may run a little faster than another."""

Serve = Callable[[Lease], AbstractAsyncContextManager[None]]


class StoreInstance:
    """One run of one model store, and a private folder of its own below ``scratch``.

    The folder is locked while the process lives, so what others left is found, and deleted: ``dead`` has their names.
    """

    def __init__(self, scratch: Path) -> None:
        self.name = secrets.token_hex(8)
        self.folder = scratch / self.name
        private_folder(scratch)
        self.dead = frozenset(path.name for path in scratch.iterdir() if _clear(path))
        self.folder.mkdir(mode=0o700)
        self._lock = _locked(self.folder)

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder; None when another process holds it."""
    return locked(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))


def _clear(path: Path) -> bool:
    """Delete what a process left that was killed; False when it lives."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return False
    lock = _locked(path)
    if lock is None:
        return False
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
    return True


class Partitions:
    """One model store's share. ``serve`` is entered for each lease that it gets, and left when it has it no more."""

    def __init__(self, bus: Bus, instance: str, serve: Serve, dead: Collection[str] = ()) -> None:
        self._bus = bus
        self._own = instance
        self._serve = serve
        self._dead = set(dead)
        self._lease_s = bus.settings.partition_lease_s
        self._beat_s = min(1.0, self._lease_s / BEATS)
        self._bucket = LeaseBucket(bus)
        self._tasks = lifecycle.Tasks()
        self._held: dict[int, Lease] = {}
        self._leave: dict[int, asyncio.Event] = {}
        self._leaving: set[int] = set()
        self._until = float("-inf")
        self._looked = float("-inf")
        self._last: dict[str, tuple[int, float]] = {}
        """Of each instance: the sequence of its last sign of life, and when that was first seen."""
        self._beat = 0
        self._unowned = list(range(bus.names.partitions))

    # what others ask

    def owned(self) -> list[int]:
        """The partitions that it looks after just now."""
        return sorted(self._held) if self._bus.clock.monotonic() < self._until else []

    def check(self, lease: Lease) -> None:
        """Prove that it may write entries of models in a partition; a lease that it got anew meanwhile is another one.

        Raises:
            Unavailable: it looks after it no more, or cannot know.
        """
        if self._held.get(lease.partition) != lease or self._bus.clock.monotonic() >= self._until:
            raise Unavailable(f"partition {lease.partition} is another model store's by now; try again", retry_after=2)

    def checks(self) -> dict[str, str]:
        """For readiness: whether every partition has an owner, and whether what this one writes is stored."""
        listed = ", ".join(map(str, self._unowned[:8]))
        late = self._bus.clock.monotonic() >= self._until
        return {
            "partitions": f"nobody looks after {listed}" if listed else "ok",
            "leases": "the broker has not stored its last signs of life" if late else "ok",
        }

    # the work

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Take part until the block ends, then hand over what it has."""
        try:
            async with lifecycle.tasks() as tasks:
                await self._rebalance()
                tasks.spawn(self._go_on(), "partitions")
                yield
        finally:
            await self._hand_over()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            await self._rebalance()

    async def _rebalance(self) -> None:
        try:
            async with asyncio.timeout(self._lease_s):
                await self._sign()
                await self._share(await self._bucket.look())
        except (TetherError, TimeoutError) as error:
            log.warning("partitions: %s", error or "no answer in time", extra={"action": "lease_failed"})
        metrics.PARTITIONS.set(len(self.owned()))

    async def _sign(self) -> None:
        began = self._bus.clock.monotonic()
        self._beat += 1
        await self._bucket.sign(StoreHeartbeat(self._own, self._beat))
        self._until = began + self._lease_s * _MARGIN

    async def _share(self, seen: LeaseState) -> None:
        """Bring what it has in line with what the bucket says, then take or give up some."""
        living = self._living(seen)
        owners = {number: lease.owner for number, (_, lease) in seen.leases.items() if lease is not None}
        for number, lease in list(self._held.items()):
            if seen.leases.get(number, (0, None))[1] != lease and number not in self._leaving:
                self._drop(number)
        for number in [number for number, owner in owners.items() if owner == self._own and number not in self._held]:
            del owners[number]  # taken by a write whose answer was lost: it takes it anew
        take, leave = plan(self._own, self._bus.names.partitions, owners, living)
        for number in take:
            sequence = seen.leases.get(number, (0, None))[0]
            taken = await self._bucket.transfer(number, self._own, sequence)
            if taken is not None:
                self._take(taken, owners.get(number, ""))
        for number in leave:
            if number in self._leave:
                self._leave[number].set()
        served = {number for number, owner in owners.items() if owner in living} | self._held.keys()
        self._unowned = [number for number in range(self._bus.names.partitions) if number not in served]

    def _living(self, seen: LeaseState) -> set[str]:
        """Whose leases count: who gave a sign of life that is younger than ``partition_lease_s`` here, or was not looked at for so long."""
        now = self._bus.clock.monotonic()
        blind = now - self._looked > self._lease_s / 2
        self._looked = now
        owners = {lease.owner for _, lease in seen.leases.values() if lease is not None and lease.owner}
        for name in (owners | seen.signs.keys()) - self._dead:
            sequence = seen.signs.get(name, 0)
            if blind or self._last.get(name, (-1, 0.0))[0] != sequence:
                self._last[name] = (sequence, now)
        self._last = {name: last for name, last in self._last.items() if name in owners or name in seen.signs}
        return {name for name, (_, since) in self._last.items() if now - since < self._lease_s} | {self._own}

    def _take(self, lease: Lease, before: str) -> None:
        self._held[lease.partition] = lease
        self._leave[lease.partition] = asyncio.Event()
        self._tasks.spawn(self._hold_lease(lease, self._leave[lease.partition]), f"partition-{lease.partition}")
        fields = {"action": "partition_taken", "partition": lease.partition, "epoch": lease.epoch}
        log.info(
            "takes over partition %d%s", lease.partition, " from one that is silent" if before else "", extra=fields
        )

    def _drop(self, number: int) -> None:
        """Somebody else has it: what is under way fails at its next write."""
        del self._held[number]
        self._leave.pop(number).set()
        log.warning("lost partition %d to another model store", number, extra={"action": "partition_lost"})

    async def _hold_lease(self, lease: Lease, leave: asyncio.Event) -> None:
        """Serve until it is to be given up, finish what is in hand, and let the next one have it."""
        number = lease.partition
        try:
            async with self._serve(lease):
                await leave.wait()
        finally:
            if self._held.get(number) == lease:
                self._leaving.add(number)
                try:
                    await self._give_back(lease)
                finally:
                    del self._held[number], self._leave[number]
                    self._leaving.discard(number)

    async def _give_back(self, lease: Lease) -> None:
        """Without a broker others take it when its time has passed."""
        with suppress(TetherError):
            seen = await self._bucket.look()
            sequence, current = seen.leases.get(lease.partition, (0, None))
            if current == lease:
                await self._bucket.transfer(lease.partition, "", sequence)
        log.info(
            "gave up partition %d", lease.partition, extra={"action": "partition_left", "partition": lease.partition}
        )

    async def _hand_over(self) -> None:
        for event in self._leave.values():
            event.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._bus.settings.shutdown_timeout_s + self._lease_s):
                while len(self._tasks):
                    await self._tasks.finish(self._beat_s)
                    with suppress(TetherError):
                        await self._sign()
        await self._tasks.cancel()
        with suppress(TetherError):
            await self._bucket.forget(self._own)
