"""The files of the versions a worker holds: where they come from, what is kept for the next version, what makes room."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

from tether import metrics
from tether.bus.chunks import ObjectChunkStore
from tether.bus.connection import Bus
from tether.bus.model_files import Pieces, clear_leftovers, fetch_model, version_digest
from tether.errors import Unavailable
from tether.model import Manifest, ModelFile, ModelRef
from tether.worker.chunk_cache import ChunkCache

log = logging.getLogger(__name__)

_MB = 1 << 20
_VERSION = re.compile(r"[0-9a-f]{64}")


class CachedPieces:
    """Pieces from the cache where it has them intact, all others from the store."""

    def __init__(self, cache: ChunkCache, store: Pieces) -> None:
        self._cache = cache
        self._store = store

    async def get(self, digests: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """The pieces in order. Close the iterator when you stop early.

        Raises:
            CorruptChunk: one is neither here nor there; ``field`` is its digest.
            DeadlineExceeded, BrokerUnavailable: it took too long.
        """
        held = await asyncio.to_thread(self._cache.held, digests)
        from_broker, from_cache = metrics.CHUNKS_BYTES.labels("broker"), metrics.CHUNKS_BYTES.labels("cache")
        async with aclosing(self._store.get([digest for digest in digests if digest not in held])) as others:
            for digest in digests:
                piece = await asyncio.to_thread(self._cache.read, digest) if digest in held else await anext(others)
                if piece is not None:
                    (from_cache if digest in held else from_broker).inc(len(piece))
                    yield piece
                    continue
                async with aclosing(self._store.get([digest])) as again:
                    async for piece in again:
                        from_broker.inc(len(piece))
                        yield piece


class WorkerFiles:
    """Assembled versions below one folder, and the cache of their pieces beside them.

    Versions that are held stay; others make room, that first which was not used for the longest time.
    """

    def __init__(self, bus: Bus, folder: Path) -> None:
        settings = bus.settings
        self._bus = bus
        self._folder = folder
        self._budget = settings.cache_versions_mb * _MB
        self._reserve = settings.cache_reserve_mb * _MB
        self._pins: dict[ModelRef, str] = {}
        self._changing = asyncio.Lock()
        self.graphs = folder / "graphs"
        """Where runtimes may keep what they made of a version's files."""
        self.cache = ChunkCache(folder / "chunks", settings.cache_mb * _MB, self._reserve)

    async def sweep(self) -> None:
        """Delete what killed processes left, and versions above the budget."""
        async with self._changing:
            await asyncio.to_thread(self._sweep)
            await asyncio.to_thread(self._make_room, frozenset(self._pins.values()), 0, self._budget)

    async def fetch(self, ref: ModelRef, manifest: Manifest) -> Path:
        """The folder with a version's files, whole and verified; it stays until :meth:`release`.

        Raises:
            CorruptChunk: a piece is missing in the store, or altered, and not in the cache either.
            Unavailable: the disk has no room whatever is deleted, or the broker does not answer.
        """
        digest = version_digest(manifest)
        try:
            async with self._changing:
                self._pins[ref] = digest
                is_new = not await asyncio.to_thread((self._folder / digest).exists)
                await asyncio.to_thread(
                    self._make_room, frozenset(self._pins.values()), manifest.size * is_new, self._budget
                )
            directory = await self._fetched(manifest)
            await asyncio.to_thread(os.utime, directory)
        except BaseException:
            self.release(ref)
            raise
        finally:
            await asyncio.to_thread(self.cache.rest)
        return directory

    def release(self, ref: ModelRef) -> None:
        """The version is not held any more: its files may make room for others."""
        if (digest := self._pins.pop(ref, None)) is not None:
            with suppress(OSError):
                os.utime(self._folder / digest)

    async def remember(self, manifest: Manifest, directory: Path) -> None:
        """Keep the pieces of a version that was fetched, for the next one that shares some of them."""
        for file in manifest.files:
            await asyncio.to_thread(self._keep, file, directory / file.path)
        await asyncio.to_thread(self.cache.rest)

    async def close(self) -> None:
        await asyncio.to_thread(self.cache.close)

    async def _fetched(self, manifest: Manifest) -> Path:
        """On a disk that is full, everything that can be fetched again is given up first."""
        store = ObjectChunkStore(self._bus, self._bus.names.chunk_bucket(manifest.name))
        pieces = CachedPieces(self.cache, store)
        try:
            return await fetch_model(self._bus, pieces, manifest, self._folder, self._keep)
        except Unavailable as error:
            if not isinstance(error.__cause__, OSError):
                raise
            log.warning("the disk is full: %s", error, extra={"action": "cache_disk_full", "model": manifest.name})
        async with self._changing:
            await asyncio.to_thread(self.cache.drop, "disk")
            await asyncio.to_thread(self._make_room, frozenset(self._pins.values()), 0, 0)
        return await fetch_model(self._bus, pieces, manifest, self._folder)

    def _keep(self, file: ModelFile, path: Path) -> None:
        held = self.cache.held(file.chunks)
        with suppress(OSError):
            self.cache.keep(_pieces(file, path, held))

    def _sweep(self) -> None:
        for path in self._folder.iterdir():
            if path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
        for path in self._versions():
            clear_leftovers(path)
            with suppress(OSError):
                path.rmdir()  # only if it is empty

    def _make_room(self, pinned: frozenset[str], coming: int, budget: int) -> None:
        """Delete versions until ``coming`` more bytes fit the budget and the disk; if need be, the cache of pieces too."""
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
        """In one step, so that no half of a version is ever found."""
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


def _pieces(file: ModelFile, path: Path, held: set[str]) -> Iterator[tuple[str, bytes]]:
    """A file's pieces without those that are held."""
    with path.open("rb") as content:
        for digest, size in file.pieces():
            if digest in held:
                content.seek(size, os.SEEK_CUR)
            else:
                yield digest, content.read(size)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
