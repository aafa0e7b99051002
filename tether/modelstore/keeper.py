"""Looks after the store of pieces: removes what no version names, and proves what is there.

Several model stores may do so at the same time: see :mod:`tether.bus.keeping`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from tether import lifecycle, metrics
from tether.bus.chunk_meta import State
from tether.bus.chunks import Window, plain_form
from tether.bus.connection import Bus, Stored
from tether.bus.keeping import Piece, PieceKeeper, Snapshot
from tether.bus.tenant_keys import ModelKeyring
from tether.envelope.model_seal import PieceSeal
from tether.errors import BadSeal, CorruptChunk, NotEntitled, TetherError
from tether.model import DamagedPiece, StoreState
from tether.modelstore.registry import Registry
from tether.pieces import digest_of

log = logging.getLogger(__name__)

FIRST_S = 300.0
"""Time after the start before the first collection and the first pass."""

_SIDE_BY_SIDE = 8
_MB = 1 << 20


class Named(NamedTuple):
    """A piece that versions (``model:version``) name."""

    size: int
    versions: tuple[str, ...]
    sealed: tuple[str, bytes] | None = None
    """Of an encrypted model: its name, and the id of the data key."""


class Keeper:
    """One model store's collections and passes."""

    def __init__(self, bus: Bus, registry: Registry, keyring: ModelKeyring) -> None:
        self._bus = bus
        self._keyring = keyring
        self._settings = bus.settings
        self._registry = registry
        self.collect_now = asyncio.Event()
        self.scrub_now = asyncio.Event()

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Collect and scrub at their intervals and when asked, until the block ends."""
        async with lifecycle.tasks() as tasks:
            collecting = self._again(self.collect, self.collect_now, self._settings.collect_interval_s, "collect")
            scrubbing = self._again(self.scrub, self.scrub_now, self._settings.scrub_interval_s, "scrub")
            tasks.spawn(collecting, "collect")
            tasks.spawn(scrubbing, "scrub")
            yield

    async def _again(self, work: Callable[[], Awaitable[object]], now: asyncio.Event, every: float, what: str) -> None:
        pause = min(every, FIRST_S)
        while True:
            try:
                async with asyncio.timeout(pause or None):
                    await now.wait()
            except TimeoutError:
                pass
            now.clear()
            pause = every
            try:
                await work()
            except TetherError as error:
                log.warning("%s: %s", what, error, extra={"action": f"{what}_failed", "code": error.code})

    def _stores(self) -> list[PieceKeeper]:
        return [PieceKeeper(self._bus, bucket) for bucket in self._bus.names.chunk_buckets()]

    async def _named(self) -> dict[str, Named]:
        """Every piece that a version names, whichever bucket it is in."""
        found: dict[str, Named] = {}
        for manifest in await self._registry.manifests():
            version = f"{manifest.name}:{manifest.version}"
            sealed = None if manifest.sealed is None else (manifest.name, manifest.sealed.key_id)
            for file in manifest.files:
                for digest, size in file.pieces():
                    before = found.get(digest, Named(size, (), sealed))
                    if version not in before.versions:
                        found[digest] = Named(size, (*before.versions, version), sealed)
        return found

    # collection

    async def collect(self) -> int:
        """Bring every piece one step further that no version names; returns the bytes removed.

        Raises:
            Unavailable: a manifest cannot be read, so that nobody knows what it names; nothing was done.
            JetStreamError, BrokerUnavailable: it was not done to the end; what was done counts.
        """
        began = self._bus.clock.monotonic()
        removed, unreferenced, outcome = 0, 0, "failed"
        try:
            for store in self._stores():
                size, count = await self._collect(store)
                removed, unreferenced = removed + size, unreferenced + count
            outcome = "ok"
            metrics.UNREFERENCED_PIECES.set(unreferenced)
        finally:
            seconds = self._bus.clock.monotonic() - began
            metrics.COLLECTIONS.labels(outcome).inc()
            metrics.COLLECTION_SECONDS.observe(seconds)
        log.info("removed %d bytes of pieces in %.2f s", removed, seconds, extra={"action": "collected"})
        return removed

    async def _collect(self, store: PieceKeeper) -> tuple[int, int]:
        """Bytes removed, and the pieces that no version named."""
        snapshot = await store.snapshot()
        # after the snapshot: a version that is younger claimed its pieces, which changed their meta messages
        named = await self._named()
        removed = 0

        async def step(piece: Piece) -> None:
            nonlocal removed
            if piece.digest in named:
                await self._bring_back(store, piece, named[piece.digest].size)
                return
            size = await self._put_away(store, piece, snapshot.now)
            removed += size

        async with Window(_SIDE_BY_SIDE) as window:
            for piece in snapshot.pieces.values():
                await window.start(step(piece))
        return removed, len(snapshot.pieces.keys() - named.keys())

    async def _bring_back(self, store: PieceKeeper, piece: Piece, size: int) -> None:
        if piece.state is State.UNREFERENCED:
            await store.write_state(piece, State.ALIVE, size=piece.size or size)
        elif piece.state is State.BARE and (found := await store.read(piece.digest)) is not None:
            await store.write_state(piece, State.ALIVE, size=len(found.data), stored=digest_of(found.data))

    async def _put_away(self, store: PieceKeeper, piece: Piece, now: float) -> int:
        age = now - piece.since
        if piece.state is State.BARE or (piece.state is State.ALIVE and age >= self._settings.upload_ttl_s):
            await store.write_state(piece, State.UNREFERENCED)
        elif piece.state is not State.ALIVE and age >= self._settings.collect_grace_s:
            size = await store.remove(piece)
            if size:
                metrics.COLLECTED_PIECES.inc()
                metrics.COLLECTED_BYTES.inc(size)
            return size
        return 0

    # proof

    async def scrub(self) -> int:
        """Read and compare every piece that a version names, no faster than ``scrub_mb_s``; returns how many are damaged.

        A damaged piece is marked, so that the next push that has it stores it anew; one that turns out to be right after
        all is marked as that.

        Raises:
            Unavailable, JetStreamError, BrokerUnavailable: the pass was not made to the end.
        """
        named = await self._named()
        began, read = self._bus.clock.monotonic(), 0
        for store in self._stores():
            snapshot = await store.snapshot()
            for digest in snapshot.pieces:
                if digest in named:
                    size = await self._prove(store, snapshot.pieces[digest], named[digest])
                    read += size
                    metrics.SCRUBBED_BYTES.inc(size)
                    ahead = read / (self._settings.scrub_mb_s * _MB) - (self._bus.clock.monotonic() - began)
                    await asyncio.sleep(max(ahead, 0.0))
        state = await self.state()
        metrics.SCRUBS.inc()
        fields = {"action": "scrubbed"}
        log.info("read %d bytes of pieces; %d pieces are damaged", read, len(state.damaged), extra=fields)
        return len(state.damaged)

    async def _prove(self, store: PieceKeeper, piece: Piece, named: Named) -> int:
        found = await store.read(piece.digest)
        right = found is not None and await self._right(piece, named, found)
        if found is not None and right and piece.state is not State.ALIVE:
            await store.write_state(piece, State.ALIVE, size=len(found.data), stored=digest_of(found.data))
        elif not right and piece.state is not State.DAMAGED and await store.write_state(piece, State.DAMAGED):
            log.error(
                "piece %s is %s; push %s again",
                piece.digest,
                "altered" if found else "missing",
                " or ".join(named.versions[:4]),
                extra={"action": "piece_damaged"},
            )
        return 0 if found is None else len(found.data)

    async def _right(self, piece: Piece, named: Named, found: Stored) -> bool:
        """Whether what is stored is the piece; without the key of an encrypted model, whether it is what was noted."""
        try:
            content = await plain_form(piece.digest, found)
            if named.sealed is None:
                return await asyncio.to_thread(digest_of, content) == piece.digest
            model, key_id = named.sealed
            seal = PieceSeal(await self._keyring.find(model, key_id), model)
            plain = await asyncio.to_thread(seal.open, piece.digest, content)
        except NotEntitled:
            return piece.stored_digest in ("", await asyncio.to_thread(digest_of, content))
        except (BadSeal, CorruptChunk):
            return False
        return seal.name(await asyncio.to_thread(digest_of, plain)) == piece.digest

    async def state(self) -> StoreState:
        """What is in the store just now; what is damaged as far as a push, a pull or a pass has found it.

        Raises:
            Unavailable, JetStreamError, BrokerUnavailable
        """
        snapshots = [await store.snapshot() for store in self._stores()]
        named = await self._named()
        every = {digest: piece for snapshot in snapshots for digest, piece in snapshot.pieces.items()}
        damaged = _damaged(named, every)
        metrics.DAMAGED_PIECES.set(len(damaged))
        return StoreState(
            pieces=len(every),
            stored_bytes=_stored(snapshots),
            named_pieces=len(named),
            named_bytes=sum(piece.size for piece in named.values()),
            unreferenced_pieces=len(every.keys() - named.keys()),
            damaged=damaged,
        )


def _stored(snapshots: list[Snapshot]) -> int:
    return sum(snapshot.stored_bytes for snapshot in snapshots)


def _damaged(named: Mapping[str, Named], every: Mapping[str, Piece]) -> tuple[DamagedPiece, ...]:
    """Named pieces without data, or known not to be right. One that is brought back at the next collection is neither."""
    return tuple(
        DamagedPiece(digest, entry.versions)
        for digest, entry in named.items()
        if (piece := every.get(digest)) is None or not piece.has_data or piece.state in (State.DAMAGED, State.LEAVING)
    )
