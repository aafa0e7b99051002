"""Creates, distributes and replaces the data keys of encrypted models.

Bucket ``modelkeys`` has one entry for each model that was ever encrypted. Every model store maintains all of
them; the first conditional write wins. A model with a new key is re-encrypted version by version in the
background; this resumes after a restart, because it depends on stored state only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress

import msgspec

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.bus.key_value.keyrings import ModelKeyring
from tether.crypto import Keyset, MessageType
from tether.crypto.model_encryption import (
    ChunkSeal,
    ModelKeys,
    model_holders,
    opened_manifest,
    passed_on,
    seal_files,
    with_new_key,
)
from tether.crypto.payload_encryption import DataKey
from tether.domain.chunking import digest_of
from tether.domain.manifest import Manifest, ModelFile
from tether.errors import (
    BadEncoding,
    CorruptChunk,
    ModelNotFound,
    NoDecryptionKey,
    TetherError,
    Unavailable,
    VersionConflict,
)
from tether.modelstore.records.assigned_workers import Assigned
from tether.modelstore.records.registry import Registry
from tether.storage.chunk_lifecycle import ChunkLifecycle
from tether.storage.encrypted_chunk_store import SealedChunkStore
from tether.wire import codec
from tether.wire.subjects import token

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_EVERY_S = 60.0
"""Seconds between checks of unchanged entries: an identity may have expired, or an attempt failed."""
_TRIES = 8


class ModelKeyRotation:
    """Creates and maintains the keys of every encrypted model."""

    def __init__(self, bus: Bus, keyring: ModelKeyring, registry: Registry) -> None:
        self._bus = bus
        self.assigned = Assigned(bus)
        self._keyring = keyring
        self._registry = registry
        self._models = SignedBucket(bus, "models", MessageType.MANIFEST)
        self.keyset: Callable[[], Keyset] = lambda: bus.verifier.keyset
        """The current keyset."""
        self._kept: dict[str, tuple[object, ...]] = {}

    async def ensure(self, model: str) -> int:
        """Ensure that a model has a key that this model store can decrypt; return its newest generation.

        Raises:
            Unavailable: other writers won every time, or this identity may not have keys.
            BrokerUnavailable
        """
        found = await self._changed(model, lambda now: now if self._newest(now) else self._renewed(now))
        return found.keys[-1].generation

    async def rekey(self, model: str) -> int:
        """Give a model a new key, unless re-encryption under the newest is in progress; return its generation.

        Raises:
            ModelNotFound: the model is not encrypted.
            Unavailable, BrokerUnavailable
        """
        versions = [manifest for manifest in await self._registry.manifests() if manifest.name == model]
        used = {manifest.sealed.key_id for manifest in versions if manifest.sealed is not None}

        def renewed(now: ModelKeys) -> ModelKeys:
            if not now.keys:
                raise ModelNotFound(
                    f"model '{model}' is not encrypted, so it has no key; push it with encrypt", field="name"
                )
            under_way = bool(used - {now.keys[-1].id}) and self._newest(now) is not None
            return now if under_way else self._renewed(now)

        return (await self._changed(model, renewed)).keys[-1].generation

    def _newest(self, keys: ModelKeys) -> DataKey | None:
        return self._keyring.opener.open(keys.keys[-1]) if keys.keys else None

    def _holders(self, model: str) -> dict[bytes, bytes]:
        return model_holders(self.keyset().identities, self._bus.clock.utc_ms(), self.assigned.to(model))

    def _renewed(self, keys: ModelKeys) -> ModelKeys:
        holders = self._holders(keys.model)
        if not any(kid in self._keyring.opener for kid in holders):
            raise Unavailable(
                "this model store is not in the keyset, so it cannot make a key; see 'tether identity list'"
            )
        return with_new_key(keys, holders, keyset_version=self.keyset().version, now_ms=self._bus.clock.utc_ms())

    async def _changed(self, model: str, decide: Callable[[ModelKeys], ModelKeys]) -> ModelKeys:
        """Replace a model's entry by the result of ``decide``."""
        key, bucket = token(model), self._keyring.bucket
        for _ in range(_TRIES):
            latest = await bucket.latest(key)
            stored = None if latest.body is None else _decoded(latest.body)
            # an entry of a revoked writer is invalid, but its last verified content is still known here
            current = stored or self._keyring.stored(model)
            if current is None and latest.sequence:
                raise Unavailable(f"the keys of model '{model}' cannot be verified; see 'tether identity resign'")
            current = current or ModelKeys(model, 0, ())
            wanted = decide(current)
            body = codec.encode(wanted)
            if stored is None or wanted is not stored:
                try:
                    await bucket.replace(key, body, latest)
                except VersionConflict:
                    continue
                log.info("wrote the keys of an encrypted model", extra={"action": "model_key_written", "model": model})
            self._keyring.changed(key, body)
            return wanted
        raise Unavailable(f"the keys of model '{model}' are being changed by others; try again")

    async def keep(self) -> None:
        """Keep the keys of every encrypted model, and the chunks under them, up to date."""
        while True:
            self.assigned.news.clear()
            for model in self._keyring.owners():
                await self._keep_one(model)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self.assigned.news.wait()

    async def _keep_one(self, model: str) -> None:
        part = int(self._bus.clock.monotonic() // _EVERY_S)
        told = self.assigned.to(model)
        seen = (self.keyset(), self._keyring.stored(model), part, told)
        if self._kept.get(model) == seen:
            return
        self._keyring.refresh()
        fields = {"action": "model_key_failed", "model": model}
        try:
            keys = await self._changed(model, self._passed_on)
            if len(keys.keys) > 1 and await self._move(model, keys):
                return  # there is more to do
        except TetherError as error:
            log.warning("keys of an encrypted model: %s", error, extra={**fields, "code": error.code})
        except Exception:
            log.exception("keys of an encrypted model", extra=fields)
        self._kept[model] = (self.keyset(), self._keyring.stored(model), part, told)

    def _passed_on(self, keys: ModelKeys) -> ModelKeys:
        return passed_on(keys, self._holders(keys.model), self._keyring.opener, keyset_version=self.keyset().version)

    # re-encryption

    async def _move(self, model: str, keys: ModelKeys) -> bool:
        """Re-encrypt every version under the newest key, then drop unused keys; return whether there was work.

        A key is kept as long as a push that began before the newest key may take to become a version.
        """
        newest = self._newest(keys)
        if newest is None:
            raise NoDecryptionKey(f"this model store has no key for the encrypted model '{model}'")
        moved = False
        for manifest in await self._registry.manifests():
            if manifest.name == model and manifest.sealed is not None and manifest.sealed.key_id != newest.id:
                await self._moved(manifest, newest)
                moved = True
        age_ms = self._bus.clock.utc_ms() - keys.keys[-1].made_at
        if not moved and age_ms >= self._bus.settings.gc_grace_s * 1000:
            left = msgspec.structs.replace(keys, keys=keys.keys[-1:])
            await self._changed(model, lambda now: left if now == keys else now)
        return moved

    async def _moved(self, manifest: Manifest, newest: DataKey) -> None:
        """Re-encrypt a version's chunks, then write its manifest; chunks already there are skipped."""
        name = manifest.name
        key = self._bus.names.version_key(name, manifest.version)
        latest = await self._models.latest(key)
        if latest.body is None or codec.decode(latest.body, Manifest) != manifest or manifest.sealed is None:
            return  # deleted, or already done by another model store
        old = await self._keyring.find(name, manifest.sealed.key_id)
        plain = opened_manifest(old, manifest).files
        bucket = self._bus.names.partition_bucket(manifest.partition)
        source, target = (SealedChunkStore(self._bus, bucket, ChunkSeal(one, name)) for one in (old, newest))
        for file in plain:
            await target.put(_chunks(source, file, await target.missing(file.chunks)))
        files, sealed = seal_files(newest, name, plain)
        keeper = ChunkLifecycle(self._bus, bucket)
        fresh_s = self._bus.settings.unreferenced_ttl_s / 2
        await keeper.claim((chunk for file in files for chunk in file.sized_chunks()), fresh_s=fresh_s)
        body = codec.encode(msgspec.structs.replace(manifest, files=files, sealed=sealed))
        await self._models.replace(key, body, latest)
        fields = {"action": "model_rekeyed", "model": name, "version": manifest.version}
        log.info("version re-encrypted under a new key", extra=fields)


async def _chunks(source: SealedChunkStore, file: ModelFile, digests: list[str]) -> AsyncIterator[tuple[str, bytes]]:
    chunks: AsyncGenerator[bytes, None]
    async with aclosing(source.get(digests)) as chunks:
        for digest in digests:
            chunk = await anext(chunks)
            if await asyncio.to_thread(digest_of, chunk) != digest:
                raise CorruptChunk(f"a chunk of '{file.path}' does not match the push; push the model again")
            yield digest, chunk


def _decoded(body: bytes) -> ModelKeys | None:
    try:
        return codec.decode(body, ModelKeys)
    except BadEncoding as error:
        log.warning("ignored an unreadable entry: %s", error, extra={"action": "entry_refused"})
        return None
