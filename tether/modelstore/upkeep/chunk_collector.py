"""Looks after the store of pieces: removes what no version names, and proves what is there.

Several model stores may do so at the same time: see :mod:`tether.storage.chunk_lifecycle`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

from tether.bus.bus import Bus, Stored
from tether.bus.key_value.keyrings import ModelKeyring
from tether.crypto.model_encryption import PieceSeal
from tether.domain.chunking import digest_of
from tether.domain.manifest import DamagedPiece, StoreState
from tether.errors import BadSeal, CorruptChunk, NotEntitled, TetherError
from tether.modelstore.records.registry import Registry
from tether.process import lifecycle, metrics
from tether.storage.chunk_lifecycle import Piece, PieceKeeper
from tether.storage.chunk_repair import Lenders, Proof
from tether.storage.chunk_store import Window, plain_form
from tether.storage.object_meta import State

log = logging.getLogger(__name__)

FIRST_S = 300.0
"""Time after the start before the first collection and the first pass."""

Note = Callable[[str, tuple[str, ...], str], None]
"""Told of a damaged piece: its digest, the versions that name it, and the worker that had it (empty: none)."""

_SIDE_BY_SIDE = 8
_MB = 1 << 20


class Named(NamedTuple):
    """A piece that versions (``model:version``) name."""

    size: int
    versions: tuple[str, ...]
    sealed: tuple[str, bytes] | None = None
    """Of an encrypted model: its name, and the id of the data key."""


class Keeper:
    """One model store's collections and passes, over the partitions that ``owned`` names: all, without it.

    What a pass finds damaged it asks ``lenders`` for; ``note`` is told how that ended.
    """

    def __init__(
        self,
        bus: Bus,
        registry: Registry,
        keyring: ModelKeyring,
        *,
        owned: Callable[[], Sequence[int]] | None = None,
        lenders: Lenders | None = None,
        note: Note = lambda *_: None,
    ) -> None:
        self._bus = bus
        self._keyring = keyring
        self._lenders = lenders
        self._note = note
        self._owned = owned or (lambda: range(bus.names.partitions))
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

    def _store(self, partition: int) -> PieceKeeper:
        return PieceKeeper(self._bus, self._bus.names.partition_bucket(partition))

    async def _named(self) -> dict[int, dict[str, Named]]:
        """Every piece that a version names, by the partition it is in."""
        found: dict[int, dict[str, Named]] = {number: {} for number in range(self._bus.names.partitions)}
        for manifest in await self._registry.manifests():
            version, pieces = f"{manifest.name}:{manifest.version}", found.setdefault(manifest.partition, {})
            sealed = None if manifest.sealed is None else (manifest.name, manifest.sealed.key_id)
            for file in manifest.files:
                for digest, size in file.pieces():
                    before = pieces.get(digest, Named(size, (), sealed))
                    if version not in before.versions:
                        pieces[digest] = Named(size, (*before.versions, version), sealed)
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
            for partition in self._owned():
                size, count = await self._collect(partition)
                removed, unreferenced = removed + size, unreferenced + count
            outcome = "ok"
            metrics.UNREFERENCED_PIECES.set(unreferenced)
        finally:
            seconds = self._bus.clock.monotonic() - began
            metrics.COLLECTIONS.labels(outcome).inc()
            metrics.COLLECTION_SECONDS.observe(seconds)
        log.info("removed %d bytes of pieces in %.2f s", removed, seconds, extra={"action": "collected"})
        return removed

    async def _collect(self, partition: int) -> tuple[int, int]:
        """Bytes removed, and the pieces that no version named."""
        store = self._store(partition)
        # before the snapshot: what they named was stored then
        deleted = [left for left in await self._registry.deleted() if left.manifest.partition == partition]
        snapshot = await store.snapshot()
        # after the snapshot: a version that is younger claimed its pieces, which changed their meta messages
        named = (await self._named())[partition]
        removed, gone = 0, set[str]()

        async def step(piece: Piece) -> None:
            nonlocal removed
            if piece.digest in named:
                await self._bring_back(store, piece, named[piece.digest].size)
                return
            if size := await self._put_away(store, piece, snapshot.now):
                removed += size
                gone.add(piece.digest)

        async with Window(_SIDE_BY_SIDE) as window:
            for piece in snapshot.pieces.values():
                await window.start(step(piece))
        rest = snapshot.pieces.keys() - named.keys()
        for left in deleted:
            if all(digest not in rest - gone for file in left.manifest.files for digest, _ in file.pieces()):
                await self._registry.collected(left)
        return removed, len(rest)

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

        A damaged piece is marked, and stored anew from the cache of a worker that has it, else by the next push that does; one
        that turns out to be right after all is marked as that.

        Raises:
            Unavailable, JetStreamError, BrokerUnavailable: the pass was not made to the end.
        """
        every = await self._named()
        began, read = self._bus.clock.monotonic(), 0
        for partition in self._owned():
            store, named = self._store(partition), every[partition]
            snapshot = await store.snapshot()
            for digest, entry in named.items():
                piece = snapshot.pieces.get(digest, Piece(digest, State.BARE, 0, 0.0, 0, has_data=False))
                size = await self._prove(store, piece, entry)
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
        elif not right:
            marked = piece.sequence if piece.state is State.DAMAGED else await store.write_state(piece, State.DAMAGED)
            if not marked:
                return 0  # somebody stores it just now
            state = "altered" if found else "missing"
            log.error("piece %s is %s", piece.digest, state, extra={"action": "piece_damaged"})
            await self._repair(store, piece._replace(state=State.DAMAGED, sequence=marked), named, found)
        return 0 if found is None else len(found.data)

    async def _right(self, piece: Piece, named: Named, found: Stored) -> bool:
        """Whether what is stored is the piece; without the key of an encrypted model, whether it is what was noted."""
        try:
            content = await plain_form(piece.digest, found)
            proof = await self._proof(piece.digest, named)
        except NotEntitled:
            return piece.stored_digest in ("", await asyncio.to_thread(digest_of, content))
        except CorruptChunk:
            return False
        return await asyncio.to_thread(proof, content)

    async def _proof(self, name: str, named: Named) -> Proof:
        """What tells whether some content is the piece of this name.

        Raises:
            NotEntitled: it takes the key of an encrypted model, which this model store cannot open.
        """
        if named.sealed is None:
            return lambda content: digest_of(content) == name
        model, key_id = named.sealed
        return partial(_opens, PieceSeal(await self._keyring.find(model, key_id), model), name)

    async def _repair(self, store: PieceKeeper, piece: Piece, named: Named, before: Stored | None) -> None:
        """Store a piece again that a worker has, in place of the data ``before``."""
        lent = await self._borrowed(piece.digest, named)
        versions = named.versions
        if lent is not None and not await self._stored(store, piece, named, lent[0], before):
            return  # somebody else stores it just now
        metrics.REPAIRED_PIECES.labels("repaired" if lent else "not_held").inc()
        self._note(piece.digest, versions, lent[1] if lent else "")
        if lent is None:
            words, fields = "no worker has piece %s; push %s again", {"action": "piece_not_repaired"}
            log.error(words, piece.digest, " or ".join(versions[:4]), extra=fields)
            return
        log.warning(
            "piece %s was in the cache of %s and is stored again",
            *(piece.digest, lent[1]),
            extra={"action": "piece_repaired"},
        )

    async def _borrowed(self, name: str, named: Named) -> tuple[bytes, str] | None:
        """What a worker has, and which; nobody is asked for what could not be proven."""
        if self._lenders is None:
            return None
        try:
            proof = await self._proof(name, named)
        except NotEntitled as error:
            log.warning("piece %s: %s", name, error, extra={"action": "piece_not_proven", "code": error.code})
            return None
        return await self._lenders.borrow(name, named.versions, proof)

    async def _stored(
        self, store: PieceKeeper, piece: Piece, named: Named, content: bytes, before: Stored | None
    ) -> bool:
        if named.sealed is not None:
            return await store.restore(piece, content, before)

        async def only() -> AsyncIterator[tuple[str, bytes]]:
            yield piece.digest, content

        await store.put(only())
        return True

    async def state(self) -> StoreState:
        """What is in the store just now; what is damaged as far as a push, a pull or a pass has found it.

        Raises:
            Unavailable, JetStreamError, BrokerUnavailable
        """
        snapshots = {number: await self._store(number).snapshot() for number in range(self._bus.names.partitions)}
        every = await self._named()
        named = [piece for pieces in every.values() for piece in pieces.values()]
        damaged = [piece for number, found in snapshots.items() for piece in _damaged(every[number], found.pieces)]
        metrics.DAMAGED_PIECES.set(len(damaged))
        return StoreState(
            pieces=sum(len(found.pieces) for found in snapshots.values()),
            stored_bytes=sum(found.stored_bytes for found in snapshots.values()),
            named_pieces=len(named),
            named_bytes=sum(piece.size for piece in named),
            unreferenced_pieces=sum(len(found.pieces.keys() - every[n].keys()) for n, found in snapshots.items()),
            damaged=tuple(damaged),
        )


def _opens(seal: PieceSeal, name: str, content: bytes) -> bool:
    """Whether it was closed with this key, for this name, and is what the name stands for."""
    try:
        return seal.name(digest_of(seal.open(name, content))) == name
    except BadSeal:
        return False


def _damaged(named: Mapping[str, Named], every: Mapping[str, Piece]) -> tuple[DamagedPiece, ...]:
    """Named pieces without data, or known not to be right. One that is brought back at the next collection is neither."""
    return tuple(
        DamagedPiece(digest, entry.versions)
        for digest, entry in named.items()
        if (piece := every.get(digest)) is None or not piece.has_data or piece.state in (State.DAMAGED, State.LEAVING)
    )
