"""Encrypts the payloads of sealed tenants' jobs for gateways and workers; the broker cannot read them.

A tenant has **data keys**, one for each generation. Each is wrapped (libsodium's sealed box, X25519) for
every entitled identity. A payload is encrypted with the newest one (XChaCha20-Poly1305, a random nonce of 24
bytes), bound to its purpose, job, tenant and key, so that it decrypts nowhere else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import StrEnum

import msgspec
import nacl.bindings
import nacl.exceptions
import nacl.public

from tether.crypto.keyset import Identity, IdentityRecord
from tether.crypto.roles import Role
from tether.domain.job import Job, Outcome, Sealed
from tether.errors import DecryptionFailed
from tether.wire import codec

SEAL_DOMAIN = b"tether/sealed/v1\0"
DATA_KEY_DOMAIN = b"tether/data-key/v1\0"
SECRET_BYTES = 32
NONCE_BYTES = 24


class Purpose(StrEnum):
    """Purpose of an encrypted payload, so that one kind cannot pass for another."""

    INPUTS = "inputs"
    OUTCOME = "outcome"


class DataKey:
    """One generation of a tenant's key. ``nonces`` returns 24 bytes that are unique per payload of this key."""

    __slots__ = ("_nonces", "_secret", "generation", "id")

    def __init__(
        self, secret: bytes, generation: int, nonces: Callable[[], bytes] = lambda: os.urandom(NONCE_BYTES)
    ) -> None:
        self.id = data_key_id(secret)
        self.generation = generation
        self._secret = secret
        self._nonces = nonces

    def __repr__(self) -> str:
        return f"DataKey(id={self.id.hex()}, generation={self.generation}, secret=<secret>)"

    def encrypt(self, purpose: Purpose, job: str, tenant: str, plain: bytes) -> bytes:
        """Encrypt: nonce (24 bytes), then the ciphertext with its tag."""
        return self.close(self._bound(purpose, job, tenant), plain)

    def decrypt(self, purpose: Purpose, job: str, tenant: str, sealed: bytes) -> bytes:
        """Decrypt the result of :meth:`encrypt`.

        Raises:
            DecryptionFailed: it was changed, or encrypted for another purpose, job, tenant or key.
        """
        return self.reveal(
            self._bound(purpose, job, tenant),
            sealed,
            "a sealed payload cannot be decrypted: it was changed, or belongs to another job",
        )

    def close(self, bound: bytes, plain: bytes) -> bytes:
        """Encrypt: nonce (24 bytes), then the ciphertext with its tag; it decrypts with the same ``bound`` only."""
        nonce = self._nonces()
        closed = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(plain, bound, nonce, self._secret)
        return nonce + bytes(closed)

    def reveal(self, bound: bytes, sealed: bytes, otherwise: str) -> bytes:
        """Decrypt the result of :meth:`close`.

        Raises:
            DecryptionFailed: with the text ``otherwise``.
        """
        nonce, closed = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
        try:
            return bytes(nacl.bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(closed, bound, nonce, self._secret))
        except (nacl.exceptions.CryptoError, ValueError, TypeError) as error:
            raise DecryptionFailed(otherwise) from error

    def keyed(self, content: bytes, person: bytes) -> bytes:
        """Return a 32-byte keyed hash of ``content`` that only key holders can compute; ``person`` separates
        purposes.
        """
        return hashlib.blake2b(content, digest_size=32, key=self._secret, person=person).digest()

    def _bound(self, purpose: Purpose, job: str, tenant: str) -> bytes:
        return SEAL_DOMAIN + codec.pack((purpose.value, job, tenant, self.id))

    def digest(self, digest: str) -> str:
        """Return a keyed form of ``digest`` for storage: without the key, no input can be guessed from it."""
        return f"{self.id.hex()}:{self.keyed(digest.encode(), b'tether-digest').hex()}"

    def wrapped(self, box_public: bytes) -> bytes:
        """Return the key, encrypted for the owner of an X25519 key."""
        return bytes(nacl.public.SealedBox(nacl.public.PublicKey(box_public)).encrypt(self._secret))


def data_key_id(secret: bytes) -> bytes:
    """Return the 16-byte id of a data key: the start of its SHA-256."""
    return hashlib.sha256(DATA_KEY_DOMAIN + secret).digest()[:16]


def new_data_key(generation: int) -> DataKey:
    return DataKey(os.urandom(SECRET_BYTES), generation)


class Box(msgspec.Struct, frozen=True):
    """A data key, encrypted for the identity with key id ``kid``."""

    kid: bytes
    sealed: bytes


class WrappedKey(msgspec.Struct, frozen=True):
    """One generation of a tenant's data key. ``made_at`` is UTC milliseconds."""

    id: bytes
    generation: int
    made_at: int
    boxes: tuple[Box, ...]

    def holders(self) -> frozenset[bytes]:
        return frozenset(box.kid for box in self.boxes)


class TenantKeys(msgspec.Struct, frozen=True):
    """A tenant's data keys, oldest first. ``keyset_version`` is that of the keyset that determined the holders."""

    tenant: str
    keyset_version: int
    keys: tuple[WrappedKey, ...]

    @property
    def owner(self) -> str:
        return self.tenant


class KeyOpener:
    """Decrypts wrapped keys for one identity, with each key that it has had in this process."""

    def __init__(self, identity: Identity) -> None:
        self._boxes: dict[bytes, nacl.public.SealedBox[nacl.public.PrivateKey]] = {}
        self.add(identity)

    def add(self, identity: Identity) -> None:
        """Add another key of the identity."""
        self._boxes[identity.kid] = nacl.public.SealedBox(nacl.public.PrivateKey(identity.box_seed))

    def __contains__(self, kid: bytes) -> bool:
        return kid in self._boxes

    def open(self, wrapped: WrappedKey) -> DataKey | None:
        """Return the data key; None if this identity is not entitled to it, or the box holds another key."""
        own = [box for box in wrapped.boxes if box.kid in self._boxes]
        # a new signing key keeps the box key: earlier wrapped keys still decrypt
        for box in own or wrapped.boxes:
            openers = [self._boxes[box.kid]] if box.kid in self._boxes else list(self._boxes.values())
            for opener in openers:
                try:
                    secret = bytes(opener.decrypt(box.sealed))
                except (nacl.exceptions.CryptoError, ValueError, TypeError):
                    continue
                if len(secret) == SECRET_BYTES and data_key_id(secret) == wrapped.id:
                    return DataKey(secret, wrapped.generation)
        return None


def entitled(identities: Iterable[IdentityRecord], pool_tenant: str, now_ms: int) -> dict[bytes, bytes]:
    """Return key id and X25519 key of every identity that may decrypt a tenant's payloads: gateways, and its
    workers.

    ``pool_tenant`` is the isolated tenant's name, or empty for one that shares its workers.
    """
    return {
        record.kid: record.x25519
        for record in identities
        if now_ms < record.expires_at
        and (record.role is Role.GATEWAY or (record.role is Role.WORKER and record.tenant == pool_tenant))
    }


def brought_up_to_date(
    current: TenantKeys,
    holders: Mapping[bytes, bytes],
    opener: KeyOpener,
    *,
    keyset_version: int,
    now_ms: int,
    keep_ms: int,
    believed: Collection[bytes] = (),
) -> TenantKeys:
    """Return the tenant's keys as they should be for the current holders (see :func:`entitled`).

    A new generation is made if there is none, if ``opener`` cannot decrypt the newest, or if a holder of the
    newest is no longer entitled. Older ones get boxes for new holders and lose those of former ones, except
    of identities that are still ``believed``: they must still run jobs accepted before. A generation that was
    replaced more than ``keep_ms`` ago is dropped. A writer with an older keyset than the last one, or that is
    not entitled, changes nothing.
    """
    if current.keyset_version > keyset_version or not any(kid in opener for kid in holders):
        return current
    newest = current.keys[-1] if current.keys else None
    kept = [
        rewrapped(key, holders, opener, believed)
        for key, later in zip(current.keys, (*current.keys[1:], None), strict=False)
        if later is None or now_ms - later.made_at < keep_ms
    ]
    if newest is None or opener.open(newest) is None or not newest.holders() <= holders.keys():
        made = new_data_key(1 if newest is None else newest.generation + 1)
        kept.append(WrappedKey(made.id, made.generation, now_ms, boxes_for(made, holders)))
    keys = tuple(kept)
    return current if keys == current.keys else TenantKeys(current.tenant, keyset_version, keys)


def rewrapped(
    wrapped: WrappedKey, holders: Mapping[bytes, bytes], opener: KeyOpener, believed: Collection[bytes] = ()
) -> WrappedKey:
    """Return the same key with a box for every holder, and for others only if still ``believed``; boxes that
    ``opener`` cannot make are missing.
    """
    boxes = tuple(box for box in wrapped.boxes if box.kid in holders or box.kid in believed)
    missing = {kid: public for kid, public in holders.items() if kid not in wrapped.holders()}
    key = opener.open(wrapped) if missing else None
    if key is not None:
        boxes += boxes_for(key, missing)
    return wrapped if boxes == wrapped.boxes else msgspec.structs.replace(wrapped, boxes=boxes)


def boxes_for(key: DataKey, holders: Mapping[bytes, bytes]) -> tuple[Box, ...]:
    """Return the key, wrapped for each of ``holders`` (key id and X25519 key)."""
    return tuple(Box(kid, key.wrapped(public)) for kid, public in sorted(holders.items()))


def seal_job(key: DataKey, job: Job) -> Job:
    """Return the job for sending: inputs and names of requested outputs are only inside the ciphertext."""
    closed = key.encrypt(Purpose.INPUTS, job.id, job.tenant, codec.encode_inputs(job))
    return msgspec.structs.replace(job, inputs=(), outputs=(), sealed=Sealed(key.id, closed))


def open_job(key: DataKey, job: Job) -> Job:
    """Return a sealed job with its decrypted inputs. It stays encrypted wherever it is written.

    Raises:
        DecryptionFailed, BadEncoding
    """
    if job.sealed is None:
        return job
    inputs, outputs = codec.decode_inputs(key.decrypt(Purpose.INPUTS, job.id, job.tenant, job.sealed.box))
    return msgspec.structs.replace(job, inputs=inputs, outputs=outputs)


def seal_outcome(key: DataKey, tenant: str, outcome: Outcome) -> Outcome:
    """Return the outcome for sending: outputs and failure reason are only inside the ciphertext."""
    closed = key.encrypt(Purpose.OUTCOME, outcome.job, tenant, codec.encode_end(outcome))
    return msgspec.structs.replace(outcome, outputs=(), error=None, sealed=Sealed(key.id, closed))


def open_outcome(key: DataKey, tenant: str, outcome: Outcome) -> Outcome:
    """Return a sealed outcome with its decrypted outputs or reason.

    Raises:
        DecryptionFailed, BadEncoding
    """
    if outcome.sealed is None:
        return outcome
    outputs, error = codec.decode_end(key.decrypt(Purpose.OUTCOME, outcome.job, tenant, outcome.sealed.box))
    return msgspec.structs.replace(outcome, outputs=outputs, error=error, sealed=None)
