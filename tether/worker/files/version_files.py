"""Files of a worker's assigned versions: downloads, cache of chunks, eviction."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import ModelKeyring
from tether.crypto.model_encryption import ChunkSeal, opened_manifest
from tether.domain.manifest import Manifest, ModelFile, ModelRef
from tether.errors import DecryptionFailed, NoDecryptionKey, Unavailable
from tether.process import metrics
from tether.process.lifecycle import Tasks
from tether.process.tmpfs_folder import MemoryFolder
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.encrypted_chunk_store import SealedChunkStore
from tether.storage.model_files import Chunks, clear_leftovers, fetch_model, version_digest
from tether.worker.files.chunk_cache import ChunkCache, as_it_is, intact

log = logging.getLogger(__name__)

_MB = 1 << 20
_VERSION = re.compile(r"[0-9a-f]{64}")


class PlainEncoding:
    """Stores a version's chunks as plain bytes under their digests."""

    def name(self, digest: str) -> str:
        return digest

    def opened(self, name: str, kept: bytes) -> bytes | None:
        return intact(name, kept)

    def closed(self, digest: str, chunk: bytes) -> bytes | None:
        """Return the chunk in its stored form; None if it does not match its digest. Blocks."""
        return intact(digest, chunk)


class EncryptedEncoding(PlainEncoding):
    """Stores chunks encrypted with the model's data key, so that no disk has them in plain text."""

    def __init__(self, seal: ChunkSeal) -> None:
        self._seal = seal

    def name(self, digest: str) -> str:
        return self._seal.name(digest)

    def opened(self, name: str, kept: bytes) -> bytes | None:
        try:
            return self._seal.decrypt(name, kept)
        except DecryptionFailed:
            return None

    def closed(self, digest: str, chunk: bytes) -> bytes | None:
        return None if intact(digest, chunk) is None else self._seal.encrypt(self._seal.name(digest), chunk)


class CachedChunkSource:
    """Chunks from the cache if intact, otherwise from the chunk store."""

    def __init__(self, cache: ChunkCache, store: Chunks, form: PlainEncoding) -> None:
        self._cache = cache
        self._store = store
        self._form = form

    async def get(self, digests: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """Yield the chunks in order. Close the iterator if you stop early.

        Raises:
            CorruptChunk: a chunk is in neither; ``field`` is its name in the store.
            DeadlineExceeded, BrokerUnavailable: it took too long.
        """
        names = {digest: self._form.name(digest) for digest in digests}
        held = await asyncio.to_thread(self._cache.held, names.values())
        from_broker, from_cache = metrics.CHUNKS_BYTES.labels("broker"), metrics.CHUNKS_BYTES.labels("cache")
        others = [digest for digest in digests if names[digest] not in held]
        async with aclosing(self._store.get(others)) as fetched:
            for digest in digests:
                here = names[digest] in held
                chunk = await asyncio.to_thread(self._read, names[digest]) if here else await anext(fetched)
                if chunk is not None:
                    (from_cache if here else from_broker).inc(len(chunk))
                    yield chunk
                    continue
                async with aclosing(self._store.get([digest])) as again:
                    async for chunk in again:
                        from_broker.inc(len(chunk))
                        yield chunk

    def _read(self, name: str) -> bytes | None:
        return self._cache.read(name, self._form.opened)


@dataclass(frozen=True)
class AssembledFiles:
    """Location of an assigned version's files. ``manifest`` has their plain digests."""

    manifest: Manifest
    directory: Path
    seal: ChunkSeal | None = None

    @property
    def digest(self) -> str:
        return self.directory.name

    @property
    def form(self) -> PlainEncoding:
        return PlainEncoding() if self.seal is None else EncryptedEncoding(self.seal)


class WorkerFiles:
    """Assembled versions below one folder, and the cache of their chunks beside them.

    Files of assigned versions stay; others are evicted, least recently used first. Encrypted versions are
    assembled in ``memory`` while they are assigned.
    """

    def __init__(
        self, bus: Bus, folder: Path, keyring: ModelKeyring | None = None, memory: MemoryFolder | None = None
    ) -> None:
        settings = bus.settings
        self._bus = bus
        self._keyring = keyring
        self._memory = memory or MemoryFolder(settings.decrypted_model_dir, folder, bus.signer.name)
        self._folder = folder
        self._budget = settings.model_files_mb * _MB
        self._reserve = settings.cache_reserve_mb * _MB
        self._held: dict[ModelRef, AssembledFiles] = {}
        self._changing = asyncio.Lock()
        self.graphs = folder / "graphs"
        """Where runtimes may store files that they derive from a version."""
        self._tasks = Tasks()
        self.cache = ChunkCache(folder / "chunks", settings.chunk_cache_mb * _MB, self._reserve)

    async def sweep(self) -> None:
        """Delete leftovers of killed processes, and versions above the budget."""
        async with self._changing:
            await asyncio.to_thread(self._memory.sweep)
            await asyncio.to_thread(self._sweep)
            await asyncio.to_thread(self._make_room, self._pinned(), 0, self._budget)

    async def place(self, ref: ModelRef, manifest: Manifest) -> Path:
        """Return the folder for a version's files, with space reserved; its content is not verified yet.

        It stays until :meth:`release`.

        Raises:
            NoDecryptionKey, DecryptionFailed: this worker may not decrypt an encrypted version.
            TmpfsUnavailable: there is no memory for an encrypted version.
        """
        held = await self._described(manifest)
        try:
            self._held[ref] = held
            await (self._room_on_disk(held) if held.seal is None else self._room_in_memory(held))
            await asyncio.to_thread(held.directory.mkdir, 0o700, exist_ok=True)
        except BaseException:
            self.release(ref)
            raise
        return held.directory

    async def fetch(self, ref: ModelRef, manifest: Manifest) -> Path:
        """Return the folder with a version's files, complete and verified; it stays until :meth:`release`.

        Raises:
            CorruptChunk: a chunk is missing or altered in the store, and not in the cache either.
            Unavailable: the disk is full and nothing more can be deleted, or the broker does not answer.
            TetherError: as :meth:`place` does, if it was not called before.
        """
        if ref not in self._held:
            await self.place(ref, manifest)
        held = self._held[ref]
        try:
            directory = await (self._onto_disk(held) if held.seal is None else self._into_memory(held, held.seal))
            await asyncio.to_thread(os.utime, directory)
        except BaseException:
            self.release(ref)
            raise
        finally:
            await asyncio.to_thread(self.cache.rest)
        return directory

    async def _described(self, manifest: Manifest) -> AssembledFiles:
        if manifest.sealed is None:
            return AssembledFiles(manifest, self._folder / version_digest(manifest))
        if self._keyring is None:
            raise NoDecryptionKey(f"worker '{self._bus.signer.name}' has no key for encrypted models")
        key = await self._keyring.find(manifest.name, manifest.sealed.key_id)
        plain = await asyncio.to_thread(opened_manifest, key, manifest)
        folder = await asyncio.to_thread(self._memory.path)
        return AssembledFiles(plain, folder / version_digest(plain), ChunkSeal(key, manifest.name))

    def _pinned(self) -> frozenset[str]:
        return frozenset(held.digest for held in self._held.values() if held.seal is None)

    async def _room_on_disk(self, held: AssembledFiles) -> None:
        async with self._changing:
            is_new = not await asyncio.to_thread(held.directory.exists)
            coming = held.manifest.size * is_new
            await asyncio.to_thread(self._make_room, self._pinned(), coming, self._budget)

    async def _room_in_memory(self, held: AssembledFiles) -> None:
        if not held.directory.exists():
            await asyncio.to_thread(self._memory.room, held.manifest.size)

    async def _into_memory(self, held: AssembledFiles, seal: ChunkSeal) -> Path:
        store = SealedChunkStore(self._bus, self._bus.names.partition_bucket(held.manifest.partition), seal)
        chunks = CachedChunkSource(self.cache, store, held.form)
        folder = held.directory.parent
        return await fetch_model(self._bus, chunks, held.manifest, folder, partial(self._keep, held.form))

    def release(self, ref: ModelRef) -> None:
        """Release a version that is not assigned: files in memory are deleted, others may be evicted."""
        held = self._held.pop(ref, None)
        if held is None:
            return
        with suppress(OSError):
            if held.seal is None:
                os.utime(held.directory)
            elif all(other.digest != held.digest for other in self._held.values()):
                gone = held.directory.with_name(f".{secrets.token_hex(8)}")
                held.directory.rename(gone)
                self._tasks.spawn(asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True), "free-memory")

    async def remember(self, manifest: Manifest, directory: Path) -> None:
        """Store the chunks of a fetched version for later versions that share them."""
        held = self._held.get(ModelRef(manifest.name, manifest.version))
        if held is None:
            if manifest.sealed is not None:
                return
            held = AssembledFiles(manifest, directory)
        for file in held.manifest.files:
            await asyncio.to_thread(self._keep, held.form, file, directory / file.path)
        await asyncio.to_thread(self.cache.rest)

    def lend(self, name: str) -> bytes | None:
        """Return a verified cached chunk in its stored form, for a chunk repair. Blocks.

        None if it is not cached, or is encrypted with a key of no assigned version.
        """
        forms = [PlainEncoding(), *(held.form for held in tuple(self._held.values()) if held.seal is not None)]
        kept = self.cache.read(name, as_it_is)
        self.cache.rest()
        right = kept is not None and any(form.opened(name, kept) is not None for form in forms)
        return kept if right else None

    async def close(self) -> None:
        await asyncio.to_thread(self.cache.close)
        await self._tasks.cancel()
        await asyncio.to_thread(self._memory.close)

    async def _onto_disk(self, held: AssembledFiles) -> Path:
        """Download to disk; if the disk is full, first delete everything that can be downloaded again."""
        manifest = held.manifest
        store = ObjectChunkStore(self._bus, self._bus.names.partition_bucket(manifest.partition))
        chunks = CachedChunkSource(self.cache, store, held.form)
        try:
            return await fetch_model(self._bus, chunks, manifest, self._folder, partial(self._keep, held.form))
        except Unavailable as error:
            if not isinstance(error.__cause__, OSError):
                raise
            log.warning(
                "disk full, deleting cached files: %s",
                error,
                extra={"action": "cache_disk_full", "model": manifest.name},
            )
        async with self._changing:
            await asyncio.to_thread(self.cache.drop, "disk")
            await asyncio.to_thread(self._make_room, self._pinned(), 0, 0)
        return await fetch_model(self._bus, chunks, manifest, self._folder)

    def _keep(self, form: PlainEncoding, file: ModelFile, path: Path) -> None:
        names = {digest: form.name(digest) for digest in file.chunks}
        held = self.cache.held(names.values())
        wanted = {digest: name for digest, name in names.items() if name not in held}
        with suppress(OSError):
            self.cache.keep(_chunks(file, path, form, wanted), opened=as_it_is)

    def _sweep(self) -> None:
        for path in self._folder.iterdir():
            if path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._versions():
            clear_leftovers(path)
            with suppress(OSError):
                path.rmdir()  # only if it is empty

    def _make_room(self, pinned: frozenset[str], coming: int, budget: int) -> None:
        """Delete versions, and the chunk cache if needed, until ``coming`` bytes fit budget and disk."""
        sizes = {path: _size(path) for path in self._versions()}
        total = sum(sizes.values()) + coming
        for path in sorted(sizes, key=lambda path: path.stat().st_mtime_ns):
            if total <= budget and self._free() >= coming + self._reserve:
                break
            if path.name not in pinned:
                self._evict(path)
                total -= sizes[path]
        if self._free() < coming:
            self.cache.drop("disk")

    def _evict(self, path: Path) -> None:
        """Delete a version's files in one step, so that no partial version is found."""
        gone = path.with_name(f".{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        metrics.VERSIONS_EVICTED.inc()
        log.info("evicted a version's files", extra={"action": "version_evicted"})

    def _versions(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir()]

    def _free(self) -> int:
        return shutil.disk_usage(self._folder).free


def _chunks(file: ModelFile, path: Path, form: PlainEncoding, wanted: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Yield name and stored form of the intact chunks of a file that are ``wanted``, by digest."""
    with path.open("rb") as content:
        for digest, size in file.sized_chunks():
            if digest not in wanted:
                content.seek(size, os.SEEK_CUR)
            elif (kept := form.closed(digest, content.read(size))) is not None:
                yield wanted[digest], kept


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
