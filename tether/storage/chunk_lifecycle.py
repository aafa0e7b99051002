"""Reads the state of stored chunks, claims them for new versions, and removes unreferenced ones.

Every step of a chunk's life is a conditional write of its meta message, so any number of collectors may work
at once and beside pushes: one wins, the others see the conflict and leave the chunk alone. Data is deleted by
its sequence: a chunk stored again meanwhile has another one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from tether.bus.bus import StoredMessage
from tether.bus.errors import JetStreamError
from tether.domain.chunking import digest_of
from tether.errors import CorruptChunk, Unavailable, VersionConflict
from tether.storage.chunk_store import LOOKUP, WRITE_WINDOW, BoundedTaskGroup, ObjectChunkStore
from tether.storage.object_meta import ChunkState, describe, read_meta

_NO_SUCH_MESSAGE = frozenset({10037, 10043, 10057})
_TRIES = 8


class StoredChunk(NamedTuple):
    """A chunk as of a snapshot."""

    digest: str
    state: ChunkState
    sequence: int
    """Sequence of the meta message; 0 if there is none."""
    since: float
    """Time at which the broker stored the meta message, UTC seconds."""
    size: int
    """Size in bytes; 0 if unknown."""
    has_data: bool
    stored_digest: str = ""
    """Hex SHA-256 of the stored bytes, if recorded."""


class Snapshot(NamedTuple):
    """Every chunk of a bucket. ``now`` is the broker's time, UTC seconds; ``stored_bytes`` is the size of its stream."""

    now: float
    chunks: dict[str, StoredChunk]
    stored_bytes: int


class ChunkLifecycle(ObjectChunkStore):
    """The chunks of a bucket, for collectors and pushes."""

    async def snapshot(self) -> Snapshot:
        """Read the state of every chunk; no data is read.

        Raises:
            JetStreamError, BrokerUnavailable
        """
        metas: dict[str, StoredMessage] = {}
        every = self._bus.names.object_meta(self.bucket, "*")
        async for item in self._bus.direct_scan(self._stream, every):
            digest = _digest_of(item.subject[len(every) - 1 :])
            if digest:
                metas[digest] = item
        # data is listed after the metas, because an upload writes data first: none appears to lack data
        data, info = await self._data_subjects()
        chunks = {digest: _chunk(digest, item, digest in data) for digest, item in metas.items()}
        for digest in data - chunks.keys():
            chunks[digest] = StoredChunk(digest, ChunkState.BARE, 0, 0.0, 0, has_data=True)
        return Snapshot(_seconds(info["ts"]), chunks, int(info["state"]["bytes"]))

    async def now(self) -> float:
        """Return the broker's time, UTC seconds."""
        return _seconds((await self._bus.api(f"STREAM.INFO.{self._stream}"))["ts"])

    async def _data_subjects(self) -> tuple[set[str], dict[str, Any]]:
        every = self._bus.names.object_chunk(self.bucket, "*")
        found: set[str] = set()
        seen, total = 0, 1
        info: dict[str, Any] = {}
        while seen < total:
            info = await self._bus.api(f"STREAM.INFO.{self._stream}", {"subjects_filter": every, "offset": seen})
            subjects = info["state"].get("subjects") or {}
            found.update(subject[len(every) - 1 :] for subject in subjects)
            seen, total = seen + len(subjects), int(info.get("total", 0)) if subjects else 0
        return found, info

    async def write_state(self, chunk: StoredChunk, state: ChunkState, *, size: int = 0, stored: str = "") -> int:
        """Set a chunk's state and return the sequence of its new meta message; 0 if its meta message is no
        longer the one in ``chunk``. ``size`` and ``stored``: bytes and hash of its data, if ``chunk`` may not
        have them.
        """
        now, stored = self._bus.clock.utc(), stored or chunk.stored_digest
        payload = describe(self.bucket, chunk.digest, size or chunk.size, state, now, digest=stored)
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(chunk.sequence)}
        subject = self._meta_subject(chunk.digest)
        try:
            ack = await self._patiently(lambda: self._bus.publish_acked(subject, payload, headers=dict(headers)))
        except VersionConflict:
            return 0
        return ack.sequence

    async def read(self, digest: str) -> StoredMessage | None:
        """Return a chunk's data message; None if there is none."""
        subject = self._bus.names.object_chunk(self.bucket, digest)
        return await self._patiently(lambda: self._bus.direct_get(self._stream, subject))

    async def restore(self, chunk: StoredChunk, content: bytes, before: StoredMessage | None) -> bool:
        """Store a chunk's content unchanged, in place of the data ``before``; return False if another writer
        stores it now.

        Encrypting a chunk twice gives different bytes. Neither message replaces another writer's, so the meta
        message always describes the data that is left.
        """
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(before.sequence if before else 0)}
        subject = self._bus.names.object_chunk(self.bucket, chunk.digest)
        try:
            limit = self._patience_s
            await self._patiently(
                lambda: self._bus.publish_acked(subject, content, headers=dict(headers), timeout=limit)
            )
        except VersionConflict:
            return False
        stored = await asyncio.to_thread(digest_of, content)
        return bool(await self.write_state(chunk, ChunkState.ALIVE, size=len(content), stored=stored))

    async def remove(self, chunk: StoredChunk) -> int:
        """Remove the data and then the meta message of a chunk that is not alive; return the bytes of data removed.

        Data younger than the meta message in ``chunk`` stays: the chunk is being stored again.
        """
        found = await self.read(chunk.digest)
        if found is not None and found.sequence > chunk.sequence:
            await self.write_state(chunk, ChunkState.UNREFERENCED)
            return 0
        leaving = chunk.sequence
        if chunk.state is not ChunkState.LEAVING:
            leaving = await self.write_state(chunk, ChunkState.LEAVING)
        if not leaving:
            return 0
        removed = found is not None and await self._delete(found.sequence)
        await self._delete(leaving)
        return len(found.data) if removed and found is not None else 0

    async def _delete(self, sequence: int) -> bool:
        """Delete one message; return False if it is already gone."""
        try:
            await self._patiently(
                lambda: self._bus.api(f"STREAM.MSG.DELETE.{self._stream}", {"seq": sequence, "no_erase": True})
            )
        except JetStreamError as error:
            if error.err_code not in _NO_SUCH_MESSAGE:
                raise
            return False
        return True

    async def claim(self, chunks: Iterable[tuple[str, int]], *, fresh_s: float) -> None:
        """Claim chunks (digest and bytes) for a new version: no collector removes them in the next
        ``fresh_s`` seconds.

        Raises:
            CorruptChunk: a chunk is not stored, or damaged, or about to be removed; ``field`` is its digest.
            BrokerUnavailable
        """
        wanted = list(dict(chunks).items())
        now = await self.now()
        async with BoundedTaskGroup(WRITE_WINDOW) as window:
            for start in range(0, len(wanted), LOOKUP):
                part = wanted[start : start + LOOKUP]
                subjects = [self._meta_subject(digest) for digest, _ in part]
                found = await self._metas(subjects)
                for subject, (digest, size) in zip(subjects, part, strict=True):
                    await window.start(self._claim(digest, size, found.get(subject), now - fresh_s))

    async def _metas(self, subjects: list[str]) -> dict[str, StoredMessage]:
        return await self._patiently(lambda: self._bus.direct_batch(self._stream, subjects))

    async def _claim(self, digest: str, size: int, item: StoredMessage | None, fresh: float) -> None:
        for _ in range(_TRIES):
            chunk = _chunk(digest, item, has_data=True)
            if chunk.state is ChunkState.ALIVE and chunk.since > fresh:
                return
            if chunk.state not in (ChunkState.ALIVE, ChunkState.UNREFERENCED):
                raise CorruptChunk(f"chunk {digest} is not in the store; push the model again", field=digest)
            if await self.write_state(chunk, ChunkState.ALIVE, size=chunk.size or size):
                return
            subject = self._meta_subject(digest)
            item = (await self._metas([subject])).get(subject)
        raise Unavailable(f"chunk {digest} is being changed by others; try again", retry_after=2)


def _chunk(digest: str, item: StoredMessage | None, has_data: bool) -> StoredChunk:
    if item is None:
        return StoredChunk(digest, ChunkState.BARE, 0, 0.0, 0, has_data)
    meta = read_meta(item.data)
    since = _seconds(item.headers["Nats-Time-Stamp"])
    if meta is None:
        return StoredChunk(digest, ChunkState.DAMAGED, item.sequence, since, 0, has_data)
    return StoredChunk(digest, meta.state, item.sequence, since, meta.chunk_size, has_data, meta.stored_digest)


def _digest_of(encoded: str) -> str:
    try:
        return base64.urlsafe_b64decode(encoded).decode("ascii")
    except (binascii.Error, ValueError):
        return ""


def _seconds(text: str) -> float:
    return msgspec.convert(text, datetime).timestamp()
