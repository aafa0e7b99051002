"""Looking after stored pieces: which there are, what state they are in, and the end of those that nobody names.

Every step of a piece's life is a conditional write of its meta message, so any number of keepers may work at once and
beside pushes: one wins, the others see the conflict and leave the piece alone. Data is deleted by its sequence: a piece
that was stored anew meanwhile has another one.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from tether.bus.bus import Stored
from tether.bus.errors import JetStreamError
from tether.domain.chunking import digest_of
from tether.errors import CorruptChunk, Unavailable, VersionConflict
from tether.storage.chunk_store import LOOKUP, WRITE_WINDOW, ObjectChunkStore, Window
from tether.storage.object_meta import State, describe, read_meta

_NO_SUCH_MESSAGE = frozenset({10037, 10043, 10057})
_TRIES = 8


class Piece(NamedTuple):
    """A piece as it was when somebody looked."""

    digest: str
    state: State
    sequence: int
    """Of the meta message; 0 when there is none."""
    since: float
    """When the broker took the meta message, UTC seconds."""
    size: int
    """Bytes; 0 when nobody knows."""
    has_data: bool
    stored_digest: str = ""
    """Hex SHA-256 of the stored bytes, where somebody noted one."""


class Snapshot(NamedTuple):
    """Every piece of a bucket. ``now`` is the broker's time, UTC seconds; ``stored_bytes`` is the size of its stream."""

    now: float
    pieces: dict[str, Piece]
    stored_bytes: int


class PieceKeeper(ObjectChunkStore):
    """A bucket's pieces, for who looks after them."""

    async def snapshot(self) -> Snapshot:
        """Look at every piece; no data is read.

        Raises:
            JetStreamError, BrokerUnavailable
        """
        metas: dict[str, Stored] = {}
        every = self._bus.names.object_meta(self.bucket, "*")
        async for item in self._bus.direct_scan(self._stream, every):
            digest = _digest_of(item.subject[len(every) - 1 :])
            if digest:
                metas[digest] = item
        # data is looked at after the metas: an upload writes them the other way round, so none looks as if it had none
        data, info = await self._data_subjects()
        pieces = {digest: _piece(digest, item, digest in data) for digest, item in metas.items()}
        for digest in data - pieces.keys():
            pieces[digest] = Piece(digest, State.BARE, 0, 0.0, 0, has_data=True)
        return Snapshot(_seconds(info["ts"]), pieces, int(info["state"]["bytes"]))

    async def now(self) -> float:
        """The broker's time, UTC seconds."""
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

    async def write_state(self, piece: Piece, state: State, *, size: int = 0, stored: str = "") -> int:
        """Let the piece be in ``state``, unless its meta message is not the one in ``piece`` any more: then 0, else the
        sequence of the new one. ``size`` and ``stored``: bytes and hash of what lies there, where ``piece`` may not know."""
        now, stored = self._bus.clock.utc(), stored or piece.stored_digest
        payload = describe(self.bucket, piece.digest, size or piece.size, state, now, digest=stored)
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(piece.sequence)}
        subject = self._meta_subject(piece.digest)
        try:
            ack = await self._patiently(lambda: self._bus.publish_acked(subject, payload, headers=dict(headers)))
        except VersionConflict:
            return 0
        return ack.sequence

    async def read(self, digest: str) -> Stored | None:
        """A piece's data message; None when there is none."""
        subject = self._bus.names.object_chunk(self.bucket, digest)
        return await self._patiently(lambda: self._bus.direct_get(self._stream, subject))

    async def restore(self, piece: Piece, content: bytes, before: Stored | None) -> bool:
        """Store a piece's content as it is, in place of the data ``before``; False when somebody else stores it just now.

        Closed twice, a piece is not the same bytes twice. Neither message is written after another writer's, so whichever data
        is left, its meta message describes it.
        """
        headers = {"Nats-Rollup": "sub", "Nats-Expected-Last-Subject-Sequence": str(before.sequence if before else 0)}
        subject = self._bus.names.object_chunk(self.bucket, piece.digest)
        try:
            limit = self._patience_s
            await self._patiently(
                lambda: self._bus.publish_acked(subject, content, headers=dict(headers), timeout=limit)
            )
        except VersionConflict:
            return False
        stored = await asyncio.to_thread(digest_of, content)
        return bool(await self.write_state(piece, State.ALIVE, size=len(content), stored=stored))

    async def remove(self, piece: Piece) -> int:
        """Remove the data and then the meta message of a piece that is not alive; returns the bytes of data removed.

        Data that is younger than the meta message in ``piece`` stays: somebody is storing the piece anew.
        """
        found = await self.read(piece.digest)
        if found is not None and found.sequence > piece.sequence:
            await self.write_state(piece, State.UNREFERENCED)
            return 0
        leaving = piece.sequence
        if piece.state is not State.LEAVING:
            leaving = await self.write_state(piece, State.LEAVING)
        if not leaving:
            return 0
        removed = found is not None and await self._delete(found.sequence)
        await self._delete(leaving)
        return len(found.data) if removed and found is not None else 0

    async def _delete(self, sequence: int) -> bool:
        """Delete one message; False when it is gone already."""
        try:
            await self._patiently(
                lambda: self._bus.api(f"STREAM.MSG.DELETE.{self._stream}", {"seq": sequence, "no_erase": True})
            )
        except JetStreamError as error:
            if error.err_code not in _NO_SUCH_MESSAGE:
                raise
            return False
        return True

    async def claim(self, pieces: Iterable[tuple[str, int]], *, fresh_s: float) -> None:
        """Make sure of pieces (digest and bytes) that a version is about to name: none of them is removed in the
        ``fresh_s`` seconds that follow, whatever keepers are about.

        Raises:
            CorruptChunk: a piece is not stored, or known to be damaged, or about to be removed; ``field`` is its digest.
            BrokerUnavailable
        """
        wanted = list(dict(pieces).items())
        now = await self.now()
        async with Window(WRITE_WINDOW) as window:
            for start in range(0, len(wanted), LOOKUP):
                part = wanted[start : start + LOOKUP]
                subjects = [self._meta_subject(digest) for digest, _ in part]
                found = await self._metas(subjects)
                for subject, (digest, size) in zip(subjects, part, strict=True):
                    await window.start(self._claim(digest, size, found.get(subject), now - fresh_s))

    async def _metas(self, subjects: list[str]) -> dict[str, Stored]:
        return await self._patiently(lambda: self._bus.direct_batch(self._stream, subjects))

    async def _claim(self, digest: str, size: int, item: Stored | None, fresh: float) -> None:
        for _ in range(_TRIES):
            piece = _piece(digest, item, has_data=True)
            if piece.state is State.ALIVE and piece.since > fresh:
                return
            if piece.state not in (State.ALIVE, State.UNREFERENCED):
                raise CorruptChunk(f"piece {digest} is not in the store; push the model again", field=digest)
            if await self.write_state(piece, State.ALIVE, size=piece.size or size):
                return
            subject = self._meta_subject(digest)
            item = (await self._metas([subject])).get(subject)
        raise Unavailable(f"piece {digest} is written by others all the time; try again", retry_after=2)


def _piece(digest: str, item: Stored | None, has_data: bool) -> Piece:
    if item is None:
        return Piece(digest, State.BARE, 0, 0.0, 0, has_data)
    meta = read_meta(item.data)
    since = _seconds(item.headers["Nats-Time-Stamp"])
    if meta is None:
        return Piece(digest, State.DAMAGED, item.sequence, since, 0, has_data)
    return Piece(digest, meta.state, item.sequence, since, meta.piece_size, has_data, meta.stored_digest)


def _digest_of(encoded: str) -> str:
    try:
        return base64.urlsafe_b64decode(encoded).decode("ascii")
    except (binascii.Error, ValueError):
        return ""


def _seconds(text: str) -> float:
    return msgspec.convert(text, datetime).timestamp()
