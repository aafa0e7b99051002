"""Encrypted models in a gateway: encrypts chunks on upload, decrypts them on download; callers see plain
digests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.crypto.model_encryption import ChunkSeal, opened_manifest, seal_files
from tether.crypto.payload_encryption import DataKey
from tether.domain.manifest import Change, ChangeAnswer, ChangeRequest, Manifest, ModelFile, SealedDigests
from tether.errors import EnvelopeError, NoDecryptionKey
from tether.model.ownership import Asker
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.encrypted_chunk_store import SealedChunkStore
from tether.wire import codec
from tether.wire.subjects import token

_KEY_S = 10.0
_KNOWN = 64
"""Decrypted manifests that are cached: decrypting one costs a hash per chunk."""


class PushTarget(NamedTuple):
    """Destination of a push's chunks; ``key`` encrypts them, None stores plaintext."""

    store: ObjectChunkStore | SealedChunkStore
    key: DataKey | None

    def described(self, model: str, files: Sequence[ModelFile]) -> tuple[tuple[ModelFile, ...], SealedDigests | None]:
        """Return the files as they are sent to the model store."""
        return (tuple(files), None) if self.key is None else seal_files(self.key, model, files)


class EncryptedModels:
    """Keys and decrypted manifests of encrypted models."""

    def __init__(self, bus: Bus, keyring: ModelKeyring) -> None:
        self._bus = bus
        self.keyring = keyring
        self._known: OrderedDict[tuple[str, int], tuple[Manifest, Manifest]] = OrderedDict()

    async def encrypts(self, model: str, wanted: bool | None) -> bool:
        """Return True if a push is to be encrypted: as ``wanted``, or as the model already is.

        Raises:
            Unavailable: unknown.
        """
        if wanted is not None:
            return wanted
        if self.keyring.stored(model) is None:
            await self._refresh(model)  # another gateway may have just encrypted it
        return self.keyring.stored(model) is not None

    async def target(self, model: str, wanted: bool | None, asker: Asker) -> PushTarget:
        """Return the destination of a push by ``asker``; create the model's first key if it is to be
        encrypted.

        Raises:
            NoDecryptionKey: the model has a key that this gateway may not decrypt.
            Conflict, Forbidden: it has none, and the model is another tenant's.
            Unavailable: it has none, and the model store does not answer.
        """
        bucket = self._bus.names.chunk_bucket(model)
        if not await self.encrypts(model, wanted):
            return PushTarget(ObjectChunkStore(self._bus, bucket), None)
        key = self.keyring.newest(model)
        if key is None:
            await self.ask(Change.ENCRYPT, model, asker)
            key = self.keyring.newest(model)
        if key is None:
            raise NoDecryptionKey(f"'{self._bus.signer.name}' has no key for the encrypted model '{model}'")
        return PushTarget(SealedChunkStore(self._bus, bucket, ChunkSeal(key, model)), key)

    async def ask(self, change: Change, model: str, asker: Asker) -> int:
        """Ask the model store to create or rotate the model's key; return the key's generation.

        Raises:
            ModelNotFound: the model is not encrypted.
            Conflict, Forbidden: it is another tenant's.
            Unavailable: the model store does not answer.
        """
        request = codec.encode(ChangeRequest(change, model, **asker._asdict()))
        kinds = (MessageType.CHANGE, MessageType.CHANGED)
        partition = self._bus.names.partition(model)
        answer = await ask_owner(
            self._bus, "changeModel", partition, kinds[0], request, answers=kinds[1], timeout=_KEY_S
        )
        await self._refresh(model)
        return codec.decode(answer, ChangeAnswer).key_generation

    async def _refresh(self, model: str) -> None:
        body = await self.keyring.bucket.require(token(model))
        if body is not None:
            self.keyring.changed(token(model), body)

    def generation(self, manifest: Manifest) -> int:
        """Return the generation of a version's key; 0 if it is not encrypted, or the key is not accessible."""
        key = None if manifest.sealed is None else self.keyring.known(manifest.name, manifest.sealed.key_id)
        return 0 if key is None else key.generation

    def shown(self, manifest: Manifest) -> Manifest:
        """Return a manifest for display; with encrypted digests if they cannot be decrypted."""
        try:
            return self.plain(manifest)
        except EnvelopeError:
            return manifest

    def plain(self, manifest: Manifest) -> Manifest:
        """Return a manifest with the plain digests of its files, encrypted or not.

        Raises:
            NoDecryptionKey: this gateway may not decrypt it.
            DecryptionFailed: it was changed.
        """
        if manifest.sealed is None:
            return manifest
        place = manifest.name, manifest.version
        before, opened = self._known.get(place, (None, manifest))
        if before is not manifest:
            opened = opened_manifest(self._key(manifest, manifest.sealed), manifest)
            self._known[place] = (manifest, opened)
        self._known.move_to_end(place)
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return opened

    def store(self, manifest: Manifest) -> ObjectChunkStore | SealedChunkStore:
        """Return the store of a version's chunks, addressed by plain digest.

        Raises:
            NoDecryptionKey
        """
        bucket = self._bus.names.partition_bucket(manifest.partition)
        if manifest.sealed is None:
            return ObjectChunkStore(self._bus, bucket)
        seal = ChunkSeal(self._key(manifest, manifest.sealed), manifest.name)
        return SealedChunkStore(self._bus, bucket, seal)

    def _key(self, manifest: Manifest, sealed: SealedDigests) -> DataKey:
        key = self.keyring.known(manifest.name, sealed.key_id)
        if key is None:
            raise NoDecryptionKey(f"'{self._bus.signer.name}' has no key for the encrypted model '{manifest.name}'")
        return key
