"""Re-signs stored entries of a key with another identity, because entries outlive the key that signed them.

Revoking a key invalidates the API keys, tenants, manifests and aliases that it signed. Those stored before
the key leaked are re-signed by an identity whose key is in this home. The time of the leak comes from a
person, and is compared with the broker's own time of each entry, because a thief can sign any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from tether.audit.reader import historical, keysets
from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.bucket import EntryRevision, SignedBucket
from tether.bus.key_value.keyset_sync import TrustedKeyset, standing
from tether.bus.session import connect
from tether.crypto import Envelope, Historical, MessageType, Role, kid_of
from tether.errors import EnvelopeError, NotFound
from tether.identity.keys import own_identities
from tether.process.clock import SystemClock
from tether.process.data_dir import Home
from tether.settings import Settings

SIGNED_BY: Mapping[Role, tuple[tuple[str, MessageType], ...]] = {
    Role.ADMIN: (("apikeys", MessageType.API_KEY), ("tenants", MessageType.TENANT)),
    Role.MODELSTORE: (
        ("models", MessageType.MANIFEST),
        ("aliases", MessageType.ALIAS),
        ("configs", MessageType.CONFIG),
        ("notes", MessageType.CONFIG),
        ("modelkeys", MessageType.MODEL_KEY),
    ),
    Role.GATEWAY: (("tenantkeys", MessageType.TENANT_KEY),),
}
"""Buckets whose entries cannot be created again, and the role that re-signs them."""


@dataclass
class Resigned:
    """Outcome for the entries that the given keys had signed, as ``bucket/key``."""

    signed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Stored too late, or not allowed for the key: they become invalid once it is revoked."""
    nobody: list[str] = field(default_factory=list)
    """Buckets that no other identity of this home may sign."""


def keys_of(home: Home, who: str) -> set[bytes]:
    """Return the ids of the keys, in force or revoked, of an identity, or of the one key whose id begins with
    ``who``.

    Raises:
        NotFound: there is none.
        ConfigError, KeysetError: the keyset cannot be used.
    """
    keyset = TrustedKeyset.load(home).keyset
    every = [(record.kid, record.name) for record in keyset.identities]
    every += [(gone.kid, gone.name) for gone in keyset.revoked]
    found = {kid for kid, name in every if name == who}
    if not found and len(who) >= 8:
        found = {kid for kid, _ in every if kid.hex().startswith(who)}
    if not found:
        raise NotFound(f"no identity or key '{who[:64]}'; 'tether identity list' shows all")
    return found


async def resign(settings: Settings, home: Home, kids: set[bytes], before_ms: int) -> Resigned:
    """Re-sign entries that ``kids`` signed and the broker stored before ``before_ms`` (UTC milliseconds).

    Raises:
        BrokerUnavailable, VersionConflict: some are signed; a second run does the rest.
        ConfigError, KeysetError: keys or keyset cannot be used.
    """
    done = Resigned()
    for role, buckets in SIGNED_BY.items():
        name = _signer(home, role, kids)
        if not name:
            done.nobody += [bucket for bucket, _ in buckets]
            continue
        async with connect(settings, home, name, follow=False) as bus:
            past = historical(await keysets(bus, home), home.root_public.read_bytes())
            work = _Work(bus, past, kids, before_ms)
            for bucket, kind in buckets:
                await work.through(SignedBucket(bus, bucket, kind), done)
    return done


def _signer(home: Home, role: Role, kids: set[bytes]) -> str:
    """Return an identity of this home with a valid key that is not in ``kids``; empty if there is none."""
    keyset, now = TrustedKeyset.load(home).keyset, SystemClock().utc_ms()
    for identity in own_identities(home):
        fits = identity.role is role and identity.kid not in kids and home.nats_seed(identity.name).exists()
        if fits and standing(keyset, identity.kid, identity.name, now) is None:
            return identity.name
    return ""


@dataclass(frozen=True)
class _Work:
    bus: Bus
    past: Historical
    kids: set[bytes]
    before_ms: int

    async def through(self, bucket: SignedBucket, done: Resigned) -> None:
        raw = bucket.raw
        async for item in self.bus.direct_scan(raw.stream, raw.subject(">")):
            if item.headers.get("KV-Operation") or _signed_by(item.data) not in self.kids:
                continue
            key = item.subject.removeprefix(raw.subject(""))
            envelope = self._safe(item, bucket.kind)
            if envelope is None:
                done.left.append(f"{raw.name}/{key}")
                continue
            await bucket.replace(
                key, envelope.body, EntryRevision(envelope.body, item.sequence, envelope.header.issued_at)
            )
            done.signed.append(f"{raw.name}/{key}")

    def _safe(self, item: StoredMessage, kind: MessageType) -> Envelope | None:
        """Return the entry, if the key could sign it and did so in time."""
        try:
            envelope = self.past.open(item.data, subject=item.subject, types=(kind,))
        except EnvelopeError:
            return None
        return envelope if max(envelope.header.issued_at, _stored_ms(item)) < self.before_ms else None


def _signed_by(frame: bytes) -> bytes:
    try:
        return kid_of(frame)
    except EnvelopeError:
        return b""


def _stored_ms(item: StoredMessage) -> int:
    return int(datetime.fromisoformat(item.headers["Nats-Time-Stamp"]).timestamp() * 1000)
