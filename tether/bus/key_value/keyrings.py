"""Data keys of sealed tenants and of encrypted models, followed by the identities that can decrypt them.

Gateways create and wrap those of tenants, :mod:`tether.modelstore.upkeep.key_rotation` those of models.
Bucket
``tenantkeys`` has one entry for each tenant that is or was sealed, signed by the gateway that wrote it last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Generic, NamedTuple, Protocol, TypeVar

import msgspec

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import Keyset, MessageType
from tether.crypto.model_encryption import ModelKeys, opened_manifest
from tether.crypto.payload_encryption import (
    DataKey,
    KeyOpener,
    TenantKeys,
    WrappedKey,
    brought_up_to_date,
    entitled,
    open_job,
    open_outcome,
    seal_job,
)
from tether.domain.job import LONGEST_DEADLINE_S, Failure, Job, JobState, Outcome
from tether.domain.manifest import Manifest
from tether.domain.tenant import Tenant
from tether.errors import BadEncoding, ConfigError, NoDecryptionKey, TetherError, Unavailable, VersionConflict
from tether.process.data_dir import Home, load_identity
from tether.wire import codec
from tether.wire.subjects import name_of, token

log = logging.getLogger(__name__)

T = TypeVar("T")
K = TypeVar("K", TenantKeys, ModelKeys)


class KeyBucket(NamedTuple, Generic[K]):
    """The bucket with the data keys of one kind of owner."""

    name: str
    message: MessageType
    entry: type[K]
    what: str
    """What the keys decrypt, in words for a person."""


_PATIENCE_S = 2.0
"""Seconds to wait for a missing key, which a gateway may be wrapping."""

_GIVEN_UP_S = 10.0
"""Seconds without another wait for a key that did not arrive."""

_LOOK_S = 1.0
_EXPIRY_LOOK_S = 60.0
"""Seconds between checks for expired identities."""

_TRIES = 8
_KEEP_MS = 3 * LONGEST_DEADLINE_S * 1000
"""Milliseconds to keep a replaced key: a job's longest deadline, its result, its dead letter."""


class DataKeyring(Generic[K]):
    """The data keys of tenants or models that this identity can decrypt.

    A gateway follows the keys of ``every`` owner; a worker those of tenants whose encrypted jobs it received,
    and of models that it hosts, because it may not list the others.
    """

    def __init__(self, bus: Bus, home: Home, of: KeyBucket[K], *, every: bool) -> None:
        self._bus = bus
        self._every = every
        self._of: KeyBucket[K] = of
        self._followed = AsyncExitStack()
        self._following: dict[str, asyncio.Task[None]] = {}
        self.bucket = SignedBucket(bus, of.name, of.message)
        self._file = home.identity(bus.signer.name)
        self.opener = KeyOpener(load_identity(self._file))
        self._keys: dict[tuple[str, bytes], DataKey] = {}
        self._newest: dict[str, DataKey] = {}
        self._opened: dict[str, dict[WrappedKey, DataKey | None]] = {}
        self._stored: dict[str, K] = {}
        self._given_up: dict[tuple[str, bytes], float] = {}
        self._heard = asyncio.Event()

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async with self._followed:
            if self._every:
                await self._followed.enter_async_context(self.bucket.watch(self.changed))
            yield

    async def _follow(self, tenant: str) -> None:
        """Follow the tenant's keys from now on.

        Raises:
            BrokerUnavailable, PermissionDenied
        """
        if self._every:
            return
        task = self._following.get(tenant)
        if task is None:
            watch = self.bucket.watch(self.changed, key=token(tenant))
            task = asyncio.create_task(self._followed.enter_async_context(watch), name=f"keys-{tenant}")
            self._following[tenant] = task
        try:
            await asyncio.shield(task)
        except TetherError:
            self._following.pop(tenant, None)
            raise

    def refresh(self) -> None:
        """Adopt the key in the identity's file; earlier keys still decrypt their payloads."""
        try:
            found = load_identity(self._file)
        except ConfigError as error:
            log.warning("identity file not reloaded: %s", error, extra={"action": "identity_unread"})
            return
        if found.kid not in self.opener:
            self.opener.add(found)
            for tenant, stored in list(self._stored.items()):
                self.changed(token(tenant), codec.encode(stored))

    def changed(self, key: str, body: bytes | None) -> None:
        """Adopt a tenant's keys from its entry."""
        tenant = name_of(key)
        known = self._opened.pop(tenant, {})
        self._stored.pop(tenant, None)
        for old in known.values():
            if old is not None:
                self._keys.pop((tenant, old.id), None)
        self._newest.pop(tenant, None)
        stored = None if body is None else _decoded(body, self._of.entry)
        if stored is not None and stored.owner == tenant:
            opened = {wrapped: known.get(wrapped) or self.opener.open(wrapped) for wrapped in stored.keys}
            self._opened[tenant], self._stored[tenant] = opened, stored
            self._keys.update({(tenant, found.id): found for found in opened.values() if found is not None})
            last = opened[stored.keys[-1]] if stored.keys else None
            if last is not None:
                self._newest[tenant] = last
        self._heard.set()
        self._heard = asyncio.Event()

    def stored(self, tenant: str) -> K | None:
        """Return an owner's entry as this process last saw it."""
        return self._stored.get(tenant)

    def owners(self) -> list[str]:
        """Owners that are followed and have keys."""
        return list(self._stored)

    def newest(self, tenant: str) -> DataKey | None:
        """Return the newest key, for encryption; None if this identity cannot decrypt it."""
        return self._newest.get(tenant)

    def known(self, tenant: str, key_id: bytes) -> DataKey | None:
        """Return a key by its id; None if this identity cannot decrypt it."""
        return self._keys.get((tenant, key_id))

    async def find(self, tenant: str, key_id: bytes) -> DataKey:
        """Return the key that a payload names; wait a moment for one that has not arrived yet.

        Raises:
            NoDecryptionKey: this identity cannot decrypt it.
            BrokerUnavailable: no broker to ask.
        """
        wanted = (tenant, key_id)
        if wanted not in self._keys:
            self.refresh()
            await self._follow(tenant)
        end = self._bus.clock.monotonic() + _PATIENCE_S
        while (found := self._keys.get(wanted)) is None:
            now = self._bus.clock.monotonic()
            if now >= end or now - self._given_up.get(wanted, float("-inf")) < _GIVEN_UP_S:
                self._give_up(wanted, now)
                raise NoDecryptionKey(f"'{self._bus.signer.name}' has no key for {self._of.what}")
            heard = self._heard
            try:
                async with asyncio.timeout(end - now):
                    await heard.wait()
            except TimeoutError:
                continue
        return found

    def _give_up(self, wanted: tuple[str, bytes], now: float) -> None:
        past = [key for key, at in self._given_up.items() if now - at >= _GIVEN_UP_S]
        for key in past:
            del self._given_up[key]
        self._given_up.setdefault(wanted, now)

    async def open_job(self, job: Job) -> Job:
        """Return the job with its inputs, decrypted if needed.

        Raises:
            NoDecryptionKey, DecryptionFailed, BadEncoding
        """
        return job if job.sealed is None else open_job(await self.find(job.tenant, job.sealed.key_id), job)

    async def open_outcome(self, tenant: str, outcome: Outcome) -> Outcome:
        """Return the outcome, decrypted if needed; one that fails to decrypt becomes a failure with the reason."""
        if outcome.sealed is None:
            return outcome
        try:
            return open_outcome(await self.find(tenant, outcome.sealed.key_id), tenant, outcome)
        except TetherError as error:
            log.warning("outcome not decrypted: %s", error, extra={"action": "seal_refused", "code": error.code})
            failure = Failure(error.code, error.message)
            return msgspec.structs.replace(outcome, state=JobState.FAILED, outputs=(), error=failure, sealed=None)


class Keyring(DataKeyring[TenantKeys]):
    """The data keys of tenants."""

    def __init__(self, bus: Bus, home: Home, *, every: bool) -> None:
        of = KeyBucket("tenantkeys", MessageType.TENANT_KEY, TenantKeys, "this sealed payload")
        super().__init__(bus, home, of, every=every)


class ModelKeyring(DataKeyring[ModelKeys]):
    """The data keys of models."""

    def __init__(self, bus: Bus, home: Home, *, every: bool) -> None:
        of = KeyBucket("modelkeys", MessageType.MODEL_KEY, ModelKeys, "this encrypted model")
        super().__init__(bus, home, of, every=every)

    async def opened(self, manifest: Manifest) -> Manifest:
        """Return a manifest with the plain digests of its files, decrypted if needed.

        Raises:
            NoDecryptionKey: this identity cannot decrypt it.
            DecryptionFailed: it was changed.
            BrokerUnavailable: no broker to ask.
        """
        if manifest.sealed is None:
            return manifest
        return opened_manifest(await self.find(manifest.name, manifest.sealed.key_id), manifest)


class Directory(Protocol):
    """Source of the tenants' records."""

    def find(self, name: str) -> Tenant | None: ...

    def known(self) -> list[Tenant]: ...


class TenantSeals:
    """Encrypts jobs of sealed tenants at a gateway, and distributes their keys to entitled identities.

    Every gateway maintains the keys of all tenants; the first conditional write wins.
    """

    def __init__(self, bus: Bus, keyring: Keyring, tenants: Directory) -> None:
        self._bus = bus
        self.keyring = keyring
        self._tenants = tenants
        self.keyset: Callable[[], Keyset] = lambda: bus.verifier.keyset
        """The current keyset."""
        self._kept: dict[str, tuple[object, ...]] = {}
        self._look = asyncio.Event()

    def sealed(self, tenant: str) -> bool:
        found = self._tenants.find(tenant)
        return found is not None and found.sealed

    def seal(self, job: Job) -> Job:
        """Return the job as it may be sent: encrypted if its tenant is sealed.

        Raises:
            Unavailable: the tenant's key is not there yet; nothing is sent in plain.
        """
        return seal_job(self._newest(job.tenant), job) if self.sealed(job.tenant) else job

    def digest(self, tenant: str, digest: str) -> str:
        """Return a digest of inputs for storage; for a sealed tenant a keyed one that only its key holders
        can compute.

        Raises:
            Unavailable: as :meth:`seal`.
        """
        return self._newest(tenant).digest(digest) if digest and self.sealed(tenant) else digest

    async def same_digest(self, tenant: str, stored: str, digest: str) -> bool:
        """Return whether a stored digest is of the inputs with ``digest``, under any key of the tenant."""
        key_id, keyed, _ = stored.partition(":")
        if not keyed:
            return stored == digest
        try:
            return (await self.keyring.find(tenant, bytes.fromhex(key_id))).digest(digest) == stored
        except (NoDecryptionKey, ValueError):
            return False

    def _newest(self, tenant: str) -> DataKey:
        key = self.keyring.newest(tenant)
        if key is None:
            self._look.set()
            raise Unavailable("the key of this sealed tenant is not there yet; try again")
        return key

    async def keep(self) -> None:
        """Keep the keys of every sealed tenant up to date with tenants and keyset."""
        while True:
            self._look.clear()
            for tenant in self._tenants.known():
                if tenant.sealed:
                    await self._keep_one(tenant)
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._look.wait()
            except TimeoutError:
                continue

    async def _keep_one(self, tenant: Tenant) -> None:
        minute = int(self._bus.clock.monotonic() // _EXPIRY_LOOK_S)
        seen = (tenant, self.keyset(), self.keyring.stored(tenant.name), minute)
        if self._kept.get(tenant.name) == seen:
            return
        self.keyring.refresh()
        try:
            await self._ensure(tenant)
        except TetherError as error:
            log.warning("keys of a sealed tenant: %s", error, extra={"action": "tenant_key_failed", "code": error.code})
            return
        except Exception:
            log.exception("keys of a sealed tenant", extra={"action": "tenant_key_failed", "tenant": tenant.name})
            return
        self._kept[tenant.name] = seen

    async def _ensure(self, tenant: Tenant) -> None:
        key, bucket = token(tenant.name), self.keyring.bucket
        for _ in range(_TRIES):
            latest = await bucket.latest(key)
            stored = None if latest.body is None else _decoded(latest.body, TenantKeys)
            # an entry of a revoked writer is invalid, but its last verified content is still known here
            current = stored or self.keyring.stored(tenant.name) or TenantKeys(tenant.name, 0, ())
            wanted = self._wanted(tenant, current)
            if stored is not None and wanted is stored:
                self.keyring.changed(key, codec.encode(stored))
                return
            body = codec.encode(wanted)
            try:
                await bucket.replace(key, body, latest)
            except VersionConflict:
                continue
            log.info("wrote the keys of a sealed tenant", extra={"action": "tenant_key_written", "tenant": tenant.name})
            self.keyring.changed(key, body)
            return
        raise Unavailable(f"the keys of tenant '{tenant.name}' are being changed by others")

    def _wanted(self, tenant: Tenant, current: TenantKeys) -> TenantKeys:
        keyset, now_ms = self.keyset(), self._bus.clock.utc_ms()
        holders = entitled(keyset.identities, tenant.name if tenant.isolated else "", now_ms)
        return brought_up_to_date(
            current,
            holders,
            self.keyring.opener,
            keyset_version=keyset.version,
            now_ms=now_ms,
            keep_ms=_KEEP_MS,
            believed={record.kid for record in keyset.identities if now_ms < record.expires_at},
        )


def _decoded(body: bytes, kind: type[T]) -> T | None:
    try:
        return codec.decode(body, kind)
    except BadEncoding as error:
        log.warning("ignored an unreadable entry: %s", error, extra={"action": "entry_refused"})
        return None
