"""Encrypts models: holders of a model's data keys, encrypted chunks, and names that hide their content.

A model has **data keys** like a sealed tenant's (:mod:`tether.crypto.payload_encryption`), one for each
re-keying. A chunk's name is a keyed hash of its SHA-256, so that equal chunks of one model are stored once
and others cannot tell their content. It is encrypted with XChaCha20-Poly1305 and a random nonce, bound to the
model, the key and that name. A version's plain digests are encrypted too, bound to the files in its manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from tether.crypto.keyset import IdentityRecord
from tether.crypto.payload_encryption import DataKey, KeyOpener, WrappedKey, boxes_for, new_data_key, rewrapped
from tether.crypto.roles import Role
from tether.domain.chunking import Bytes, compressed, decompressed
from tether.domain.manifest import Manifest, ModelFile, SealedDigests
from tether.errors import BadEncoding, CorruptChunk, DecryptionFailed
from tether.wire import codec

CHUNK_DOMAIN = b"tether/model-piece/v1\0"
FILES_DOMAIN = b"tether/model-files/v1\0"
CHUNK_PERSON = b"tether-piece"
FILE_PERSON = b"tether-file"

_DIGEST_BYTES = 32
_AS_IT_IS, _ZSTD = b"\0", b"\1"
"""First byte inside an encrypted chunk: the chunk follows, or a Zstandard frame of it."""

HOLDERS = frozenset({Role.MODELSTORE, Role.GATEWAY})
"""Roles that may decrypt: the model store inspects a pushed model, gateways receive and return it. Of the
workers, only those assigned to it.
"""


class ModelKeys(msgspec.Struct, frozen=True):
    """A model's data keys, oldest first. ``keyset_version`` is that of the keyset that determined the holders."""

    model: str
    keyset_version: int
    keys: tuple[WrappedKey, ...]

    @property
    def owner(self) -> str:
        return self.model


def model_holders(
    identities: Iterable[IdentityRecord], now_ms: int, workers: Collection[str] | None = ()
) -> dict[bytes, bytes]:
    """Return key id and X25519 key of every identity that may decrypt a model. ``workers``: names of assigned ones;
    None: all.
    """
    return {
        record.kid: record.x25519
        for record in identities
        if now_ms < record.expires_at and (record.role in HOLDERS or _is_told(record, workers))
    }


def _is_told(record: IdentityRecord, workers: Collection[str] | None) -> bool:
    return record.role is Role.WORKER and (workers is None or record.name in workers)


def passed_on(
    current: ModelKeys, holders: Mapping[bytes, bytes], opener: KeyOpener, *, keyset_version: int
) -> ModelKeys:
    """Return the same keys, each with a box for every current holder and no others.

    A writer with an older keyset than the last one, or that is not a holder, changes nothing: an expired
    keyset removes no keys.
    """
    if current.keyset_version > keyset_version or not any(kid in opener for kid in holders):
        return current
    keys = tuple(rewrapped(key, holders, opener) for key in current.keys)
    return current if keys == current.keys else ModelKeys(current.model, keyset_version, keys)


def with_new_key(current: ModelKeys, holders: Mapping[bytes, bytes], *, keyset_version: int, now_ms: int) -> ModelKeys:
    """Return the keys and a new one, which encrypts everything stored from now on."""
    made = new_data_key(current.keys[-1].generation + 1 if current.keys else 1)
    wrapped = WrappedKey(made.id, made.generation, now_ms, boxes_for(made, holders))
    return ModelKeys(current.model, max(keyset_version, current.keyset_version), (*current.keys, wrapped))


class ChunkSeal:
    """Encrypts chunks with one data key of one model. ``digest`` is the hex SHA-256 of a plain chunk,
    ``name`` its stored name.
    """

    def __init__(self, key: DataKey, model: str) -> None:
        self._key = key
        self._model = model

    def name(self, digest: str) -> str:
        """Return the stored name of a chunk: 64 hex digits."""
        return self._key.keyed(bytes.fromhex(digest), CHUNK_PERSON).hex()

    def encrypt(self, name: str, chunk: Bytes) -> bytes:
        """Return the chunk encrypted for storage under its name, compressed if that helps. Blocks: about 2 ms
        per MiB.
        """
        packed = compressed(chunk)
        return self._key.close(self._bound(name), _AS_IT_IS + chunk if packed is None else _ZSTD + packed)

    def decrypt(self, name: str, stored: bytes) -> bytes:
        """Decrypt the result of :meth:`encrypt`; blocks likewise.

        Raises:
            DecryptionFailed: it was changed, or is another chunk, or has another key.
        """
        wrong = f"chunk {name} cannot be decrypted: it was changed"
        inner = self._key.reveal(self._bound(name), stored, wrong)
        form, content = inner[:1], inner[1:]
        if form == _AS_IT_IS:
            return content
        try:
            if form == _ZSTD:
                return decompressed(content)
        except CorruptChunk as error:
            raise DecryptionFailed(wrong) from error
        raise DecryptionFailed(f"chunk {name} has an encrypted form that this release does not support")

    def _bound(self, name: str) -> bytes:
        return CHUNK_DOMAIN + codec.pack((self._model, self._key.id, name))

    def whole(self, digest: str) -> str:
        """Return the value in a manifest in place of a whole file's SHA-256."""
        return self._key.keyed(bytes.fromhex(digest), FILE_PERSON).hex()


def seal_files(key: DataKey, model: str, files: Sequence[ModelFile]) -> tuple[tuple[ModelFile, ...], SealedDigests]:
    """Return files for a public manifest, and their digests encrypted for key holders."""
    seal = ChunkSeal(key, model)
    hidden = tuple(
        msgspec.structs.replace(
            file, digest=seal.whole(file.digest), chunks=tuple(seal.name(digest) for digest in file.chunks)
        )
        for file in files
    )
    plain = codec.pack([[bytes.fromhex(file.digest), bytes.fromhex("".join(file.chunks))] for file in files])
    return hidden, SealedDigests(key.id, key.close(_bound_files(key, model, hidden), plain))


def open_files(key: DataKey, model: str, files: Sequence[ModelFile], sealed: SealedDigests) -> tuple[ModelFile, ...]:
    """Return the files with their plain digests.

    Raises:
        DecryptionFailed: the digests were changed, or the stored names do not follow from them.
    """
    plain = key.reveal(
        _bound_files(key, model, files),
        sealed.box,
        "the digests of an encrypted version cannot be decrypted: they were changed",
    )
    try:
        opened = tuple(_opened(file, *row) for file, row in zip(files, codec.unpack(plain), strict=True))
    except (BadEncoding, ValueError, TypeError) as error:
        raise DecryptionFailed("the digests of an encrypted version are not those of its files") from error
    again, _ = seal_files(key, model, opened)
    if again != tuple(files):
        raise DecryptionFailed("the names of an encrypted version's chunks do not follow from their digests")
    return opened


def _opened(file: ModelFile, digest: bytes, chunks: bytes) -> ModelFile:
    parts = [chunks[start : start + _DIGEST_BYTES] for start in range(0, len(chunks), _DIGEST_BYTES)]
    if len(digest) != _DIGEST_BYTES or len(parts) != len(file.chunks) or len(chunks) != len(parts) * _DIGEST_BYTES:
        raise ValueError("digests of another length")
    return msgspec.structs.replace(file, digest=digest.hex(), chunks=tuple(part.hex() for part in parts))


def _bound_files(key: DataKey, model: str, files: Sequence[ModelFile]) -> bytes:
    rows = [[file.path, file.size, file.digest, *file.chunks, *file.sizes] for file in files]
    return FILES_DOMAIN + hashlib.sha256(codec.pack((model, key.id, rows))).digest()


def opened_manifest(key: DataKey, manifest: Manifest) -> Manifest:
    """Return an encrypted version's manifest with its plain digests; any other unchanged.

    Raises:
        DecryptionFailed
    """
    if manifest.sealed is None:
        return manifest
    files = open_files(key, manifest.name, manifest.files, manifest.sealed)
    return msgspec.structs.replace(manifest, files=files)
