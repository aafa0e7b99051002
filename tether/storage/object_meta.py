"""Encodes and reads a stored chunk's meta message (NATS ADR-20), which includes the chunk's state.

Alive, then unreferenced (no version references it), then leaving (its data is about to be removed), then
gone. Only an alive chunk counts as stored; a deleted one without a note was found damaged.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from enum import StrEnum

import msgspec

_NOTE = "tether"
_SIZE = "size"
_DIGEST = "digest"
_HASH = "SHA-256="
_DIGITS = 16


class ChunkState(StrEnum):
    """State of a chunk in its newest meta message."""

    ALIVE = "alive"
    UNREFERENCED = "unreferenced"
    LEAVING = "leaving"
    DAMAGED = "damaged"
    BARE = "bare"
    """No meta message: the upload of the chunk was interrupted, or is in progress."""


class Meta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Meta message as in ADR-20; times are RFC 3339."""

    name: str
    bucket: str
    nuid: str
    size: int
    mtime: str
    chunks: int
    digest: str
    deleted: bool = False
    metadata: dict[str, str] = {}

    @property
    def state(self) -> ChunkState:
        if not self.deleted:
            return ChunkState.ALIVE
        noted = self.metadata.get(_NOTE)
        return ChunkState(noted) if noted in (ChunkState.UNREFERENCED, ChunkState.LEAVING) else ChunkState.DAMAGED

    @property
    def chunk_size(self) -> int:
        """Size of the chunk in bytes, also if it is deleted; 0 if unknown."""
        kept = self.metadata.get(_SIZE, "0") if self.deleted else str(self.size)
        return int(kept) if kept.isdecimal() and len(kept) < _DIGITS else 0

    @property
    def stored_digest(self) -> str:
        """Hex SHA-256 of the stored bytes, if the chunk is stored compressed or encrypted and so its name
        differs; empty if unknown.
        """
        text = self.metadata.get(_DIGEST, "") if self.deleted else self.digest
        try:
            found = base64.urlsafe_b64decode(text.removeprefix(_HASH)) if text.startswith(_HASH) else b""
        except ValueError:
            return ""
        return found.hex() if len(found) == hashlib.sha256().digest_size else ""


def describe(bucket: str, name: str, size: int, state: ChunkState, now: float, *, digest: str = "") -> bytes:
    """Return the meta message of a chunk whose stored form has ``size`` bytes; ``now`` is UTC seconds.
    ``digest`` is the hex
    SHA-256 of that form, if it differs from the chunk's name.
    """
    alive = state is ChunkState.ALIVE
    noted = state in (ChunkState.UNREFERENCED, ChunkState.LEAVING)
    hashed = _HASH + base64.urlsafe_b64encode(bytes.fromhex(digest or name)).decode()
    meta = Meta(
        name=name,
        bucket=bucket,
        nuid=name,
        size=size if alive else 0,
        mtime=datetime.fromtimestamp(now, UTC).isoformat().replace("+00:00", "Z"),
        chunks=1 if alive else 0,
        digest=hashed if alive else "",
        deleted=not alive,
        metadata={_NOTE: state.value, _SIZE: str(size), _DIGEST: hashed} if noted else {},
    )
    return msgspec.json.encode(meta)


def read_meta(data: bytes) -> Meta | None:
    """Decode a meta message; None if it is not one."""
    try:
        return msgspec.json.decode(data, type=Meta)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def state_of(data: bytes) -> ChunkState:
    """Return the chunk state in a meta message; an unreadable one proves nothing."""
    meta = read_meta(data)
    return ChunkState.DAMAGED if meta is None else meta.state
