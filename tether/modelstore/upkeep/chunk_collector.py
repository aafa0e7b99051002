"""Maintains the chunk store: removes unreferenced chunks and verifies the others.

Several model stores may do so at the same time: see :mod:`tether.storage.chunk_lifecycle`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.keyrings import ModelKeyring
from tether.crypto.model_encryption import ChunkSeal
from tether.domain.chunking import digest_of
from tether.domain.manifest import DamagedChunk, StoreState
from tether.errors import CorruptChunk, DecryptionFailed, NoDecryptionKey, TetherError
from tether.modelstore.records.registry import Registry
from tether.process import lifecycle, metrics
from tether.storage.chunk_lifecycle import ChunkLifecycle, StoredChunk
from tether.storage.chunk_repair import ChunkLenders, Proof
from tether.storage.chunk_store import BoundedTaskGroup, plain_form
from tether.storage.object_meta import ChunkState

log = logging.getLogger(__name__)

FIRST_S = 300.0
"""Seconds from the start to the first collection and the first scrub."""

Note = Callable[[str, tuple[str, ...], str], None]
"""Receives a damaged chunk: its digest, the versions that reference it, and the worker that had a copy
(empty: none).
"""

_SIDE_BY_SIDE = 8
_MB = 1 << 20


class ReferencedChunk(NamedTuple):
    """A chunk that versions (``model:version``) reference."""

    size: int
    versions: tuple[str, ...]
    sealed: tuple[str, bytes] | None = None
    """For an encrypted model: its name, and the id of the data key."""


class ChunkCollector:
    """Collections and scrubs of one model store over the partitions in ``owned``; all without it.

    Damaged chunks are requested from ``lenders``; ``note`` receives the outcome.
    """

    def __init__(
        self,
        bus: Bus,
        registry: Registry,
        keyring: ModelKeyring,
        *,
        owned: Callable[[], Sequence[int]] | None = None,
        lenders: ChunkLenders | None = None,
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
        """Collect and scrub at their intervals and on request, until the block ends."""
        async with lifecycle.tasks() as tasks:
            collecting = self._again(self.collect, self.collect_now, self._settings.gc_interval_s, "collect")
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

    def _store(self, partition: int) -> ChunkLifecycle:
        return ChunkLifecycle(self._bus, self._bus.names.partition_bucket(partition))

    async def _named(self) -> dict[int, dict[str, ReferencedChunk]]:
        """Return every referenced chunk by partition."""
        found: dict[int, dict[str, ReferencedChunk]] = {number: {} for number in range(self._bus.names.partitions)}
        for manifest in await self._registry.manifests():
            version, chunks = f"{manifest.name}:{manifest.version}", found.setdefault(manifest.partition, {})
            sealed = None if manifest.sealed is None else (manifest.name, manifest.sealed.key_id)
            for file in manifest.files:
                for digest, size in file.sized_chunks():
                    before = chunks.get(digest, ReferencedChunk(size, (), sealed))
                    if version not in before.versions:
                        chunks[digest] = ReferencedChunk(size, (*before.versions, version), sealed)
        return found

    # collection

    async def collect(self) -> int:
        """Advance every unreferenced chunk one step; return the bytes removed.

        Raises:
            Unavailable: a manifest cannot be read, so its references are unknown; nothing was done.
            JetStreamError, BrokerUnavailable: it was not completed; completed steps stay.
        """
        began = self._bus.clock.monotonic()
        removed, unreferenced, outcome = 0, 0, "failed"
        try:
            for partition in self._owned():
                size, count = await self._collect(partition)
                removed, unreferenced = removed + size, unreferenced + count
            outcome = "ok"
            metrics.UNREFERENCED_CHUNKS.set(unreferenced)
        finally:
            seconds = self._bus.clock.monotonic() - began
            metrics.COLLECTIONS.labels(outcome).inc()
            metrics.COLLECTION_SECONDS.observe(seconds)
        log.info("removed %d bytes of chunks in %.2f s", removed, seconds, extra={"action": "collected"})
        return removed

    async def _collect(self, partition: int) -> tuple[int, int]:
        """Return bytes removed, and the number of unreferenced chunks."""
        store = self._store(partition)
        # before the snapshot: all chunks referenced by them were stored by then
        deleted = [left for left in await self._registry.deleted() if left.manifest.partition == partition]
        snapshot = await store.snapshot()
        # after the snapshot: a younger version claimed its chunks, which changed their meta messages
        named = (await self._named())[partition]
        removed, gone = 0, set[str]()

        async def step(chunk: StoredChunk) -> None:
            nonlocal removed
            if chunk.digest in named:
                await self._mark_alive(store, chunk, named[chunk.digest].size)
                return
            if size := await self._advance_removal(store, chunk, snapshot.now):
                removed += size
                gone.add(chunk.digest)

        async with BoundedTaskGroup(_SIDE_BY_SIDE) as window:
            for chunk in snapshot.chunks.values():
                await window.start(step(chunk))
        rest = snapshot.chunks.keys() - named.keys()
        for left in deleted:
            if all(digest not in rest - gone for file in left.manifest.files for digest, _ in file.sized_chunks()):
                await self._registry.collected(left)
        return removed, len(rest)

    async def _mark_alive(self, store: ChunkLifecycle, chunk: StoredChunk, size: int) -> None:
        if chunk.state is ChunkState.UNREFERENCED:
            await store.write_state(chunk, ChunkState.ALIVE, size=chunk.size or size)
        elif chunk.state is ChunkState.BARE and (found := await store.read(chunk.digest)) is not None:
            await store.write_state(chunk, ChunkState.ALIVE, size=len(found.data), stored=digest_of(found.data))

    async def _advance_removal(self, store: ChunkLifecycle, chunk: StoredChunk, now: float) -> int:
        age = now - chunk.since
        if chunk.state is ChunkState.BARE or (
            chunk.state is ChunkState.ALIVE and age >= self._settings.unreferenced_ttl_s
        ):
            await store.write_state(chunk, ChunkState.UNREFERENCED)
        elif chunk.state is not ChunkState.ALIVE and age >= self._settings.gc_grace_s:
            size = await store.remove(chunk)
            if size:
                metrics.COLLECTED_CHUNKS.inc()
                metrics.COLLECTED_BYTES.inc(size)
            return size
        return 0

    # verification

    async def scrub(self) -> int:
        """Read and verify every referenced chunk at ``scrub_mb_s`` at most; return the number of damaged ones.

        A damaged chunk is marked, and restored from a worker's cache, else by the next push that has it; one
        that proves to be intact is marked as such.

        Raises:
            Unavailable, JetStreamError, BrokerUnavailable: the scrub was not completed.
        """
        every = await self._named()
        began, read = self._bus.clock.monotonic(), 0
        for partition in self._owned():
            store, named = self._store(partition), every[partition]
            snapshot = await store.snapshot()
            for digest, entry in named.items():
                chunk = snapshot.chunks.get(digest, StoredChunk(digest, ChunkState.BARE, 0, 0.0, 0, has_data=False))
                size = await self._prove(store, chunk, entry)
                read += size
                metrics.SCRUBBED_BYTES.inc(size)
                ahead = read / (self._settings.scrub_mb_s * _MB) - (self._bus.clock.monotonic() - began)
                await asyncio.sleep(max(ahead, 0.0))
        state = await self.state()
        metrics.SCRUBS.inc()
        fields = {"action": "scrubbed"}
        log.info("read %d bytes of chunks; %d chunks are damaged", read, len(state.damaged), extra=fields)
        return len(state.damaged)

    async def _prove(self, store: ChunkLifecycle, chunk: StoredChunk, named: ReferencedChunk) -> int:
        found = await store.read(chunk.digest)
        right = found is not None and await self._right(chunk, named, found)
        if found is not None and right and chunk.state is not ChunkState.ALIVE:
            await store.write_state(chunk, ChunkState.ALIVE, size=len(found.data), stored=digest_of(found.data))
        elif not right:
            marked = (
                chunk.sequence
                if chunk.state is ChunkState.DAMAGED
                else await store.write_state(chunk, ChunkState.DAMAGED)
            )
            if not marked:
                return 0  # another writer is storing it
            state = "altered" if found else "missing"
            log.error("chunk %s is %s", chunk.digest, state, extra={"action": "chunk_damaged"})
            await self._repair(store, chunk._replace(state=ChunkState.DAMAGED, sequence=marked), named, found)
        return 0 if found is None else len(found.data)

    async def _right(self, chunk: StoredChunk, named: ReferencedChunk, found: StoredMessage) -> bool:
        """Return whether the stored bytes are the chunk; without an encrypted model's key, whether they match
        the recorded hash.
        """
        try:
            content = await plain_form(chunk.digest, found)
            proof = await self._proof(chunk.digest, named)
        except NoDecryptionKey:
            return chunk.stored_digest in ("", await asyncio.to_thread(digest_of, content))
        except CorruptChunk:
            return False
        return await asyncio.to_thread(proof, content)

    async def _proof(self, name: str, named: ReferencedChunk) -> Proof:
        """Return a function that checks whether content is the chunk of this name.

        Raises:
            NoDecryptionKey: it needs a key of an encrypted model that this model store cannot decrypt.
        """
        if named.sealed is None:
            return lambda content: digest_of(content) == name
        model, key_id = named.sealed
        return partial(_opens, ChunkSeal(await self._keyring.find(model, key_id), model), name)

    async def _repair(
        self, store: ChunkLifecycle, chunk: StoredChunk, named: ReferencedChunk, before: StoredMessage | None
    ) -> None:
        """Restore a chunk from a worker, in place of the data ``before``."""
        lent = await self._borrowed(chunk.digest, named)
        versions = named.versions
        if lent is not None and not await self._stored(store, chunk, named, lent[0], before):
            return  # another writer is storing it
        metrics.REPAIRED_CHUNKS.labels("repaired" if lent else "not_held").inc()
        self._note(chunk.digest, versions, lent[1] if lent else "")
        if lent is None:
            words, fields = "no worker has chunk %s; push %s again", {"action": "chunk_not_repaired"}
            log.error(words, chunk.digest, " or ".join(versions[:4]), extra=fields)
            return
        log.warning(
            "chunk %s restored from the cache of %s",
            *(chunk.digest, lent[1]),
            extra={"action": "chunk_repaired"},
        )

    async def _borrowed(self, name: str, named: ReferencedChunk) -> tuple[bytes, str] | None:
        """Return a worker's copy and its name; workers are not asked for chunks that cannot be verified."""
        if self._lenders is None:
            return None
        try:
            proof = await self._proof(name, named)
        except NoDecryptionKey as error:
            log.warning("chunk %s: %s", name, error, extra={"action": "chunk_not_proven", "code": error.code})
            return None
        return await self._lenders.borrow(name, named.versions, proof)

    async def _stored(
        self,
        store: ChunkLifecycle,
        chunk: StoredChunk,
        named: ReferencedChunk,
        content: bytes,
        before: StoredMessage | None,
    ) -> bool:
        if named.sealed is not None:
            return await store.restore(chunk, content, before)

        async def only() -> AsyncIterator[tuple[str, bytes]]:
            yield chunk.digest, content

        await store.put(only())
        return True

    async def state(self) -> StoreState:
        """Return the state of the store; damage is known as far as a push, a pull or a scrub found it.

        Raises:
            Unavailable, JetStreamError, BrokerUnavailable
        """
        snapshots = {number: await self._store(number).snapshot() for number in range(self._bus.names.partitions)}
        every = await self._named()
        named = [chunk for chunks in every.values() for chunk in chunks.values()]
        damaged = [chunk for number, found in snapshots.items() for chunk in _damaged(every[number], found.chunks)]
        metrics.DAMAGED_CHUNKS.set(len(damaged))
        return StoreState(
            chunks=sum(len(found.chunks) for found in snapshots.values()),
            stored_bytes=sum(found.stored_bytes for found in snapshots.values()),
            named_chunks=len(named),
            named_bytes=sum(chunk.size for chunk in named),
            unreferenced_chunks=sum(len(found.chunks.keys() - every[n].keys()) for n, found in snapshots.items()),
            damaged=tuple(damaged),
        )


def _opens(seal: ChunkSeal, name: str, content: bytes) -> bool:
    """Return whether content decrypts with this key and name to the named chunk."""
    try:
        return seal.name(digest_of(seal.decrypt(name, content))) == name
    except DecryptionFailed:
        return False


def _damaged(named: Mapping[str, ReferencedChunk], every: Mapping[str, StoredChunk]) -> tuple[DamagedChunk, ...]:
    """Return referenced chunks without data, or known to be damaged; not those that the next collection restores."""
    return tuple(
        DamagedChunk(digest, entry.versions)
        for digest, entry in named.items()
        if (chunk := every.get(digest)) is None
        or not chunk.has_data
        or chunk.state in (ChunkState.DAMAGED, ChunkState.LEAVING)
    )
