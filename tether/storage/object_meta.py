"""The meta message of a stored chunk (NATS ADR-20), and what it says of the chunk's life.

Alive, then unreferenced (no version names it), then leaving (its data is about to be removed), then nothing. Only an
alive chunk counts as stored; a deleted one without a note was found damaged.
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
    """What a chunk's newest meta message says."""

    ALIVE = "alive"
    UNREFERENCED = "unreferenced"
    LEAVING = "leaving"
    DAMAGED = "damaged"
    BARE = "bare"
    """There is none: the upload of the chunk broke off, or is under way."""


class Meta(msgspec.Struct, frozen=True, omit_defaults=True):
    """As ADR-20 has it; times are RFC 3339."""

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
        """Bytes of the chunk, also of one that is deleted; 0 when nobody knows."""
        kept = self.metadata.get(_SIZE, "0") if self.deleted else str(self.size)
        return int(kept) if kept.isdecimal() and len(kept) < _DIGITS else 0

    @property
    def stored_digest(self) -> str:
        """Hex SHA-256 of the stored bytes, which a chunk that is not stored as it is has not as its name; empty when
        nobody knows."""
        text = self.metadata.get(_DIGEST, "") if self.deleted else self.digest
        try:
            found = base64.urlsafe_b64decode(text.removeprefix(_HASH)) if text.startswith(_HASH) else b""
        except ValueError:
            return ""
        return found.hex() if len(found) == hashlib.sha256().digest_size else ""


def describe(bucket: str, name: str, size: int, state: ChunkState, now: float, *, digest: str = "") -> bytes:
    """The meta message of a chunk whose stored form has ``size`` bytes; ``now`` is UTC seconds. ``digest`` is the hex
    SHA-256 of that form, where it is not the chunk's name."""
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
    """What a meta message says; None when it is none."""
    try:
        return msgspec.json.decode(data, type=Meta)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def state_of(data: bytes) -> ChunkState:
    """What a meta message says of its chunk; one that cannot be read vouches for nothing."""
    meta = read_meta(data)
    return ChunkState.DAMAGED if meta is None else meta.state
