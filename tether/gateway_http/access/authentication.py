"""Authentication by API key, from an in-memory index of the ``apikeys`` bucket by the hash of the key's text."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.bus.key_value.model_owners import OwnerBook
from tether.crypto import MessageType, Session
from tether.domain.api_key import SCOPES, ApiKey
from tether.domain.model_names import resolved, resolved_push, shown, shown_text, spelled_out
from tether.domain.tenant import EVERY_MODEL, Tenant, allows_model, allows_patterns, check_patterns
from tether.errors import Forbidden, Unauthenticated
from tether.gateway_http.access.key_usage import KeyUsage
from tether.gateway_http.access.sessions import CACHED, Sessions
from tether.gateway_http.access.tenants import Tenants
from tether.model.ownership import Asker, Right, push_refusal, refusal
from tether.wire import codec

ANY_SCOPE = "any"
"""Scope of a route that any valid key may use."""

_DECISIONS = 4096
"""Model names for which a caller's decision is cached; bounded, because clients choose the names."""


class Caller:
    """An API key with its tenant's rights, as a request uses them. Replaced when either changes.

    The models it may use follow from its patterns, its tenant's patterns and the owner of each model.
    """

    __slots__ = (
        "_decisions",
        "_owners",
        "_patterns",
        "admin",
        "expires_at",
        "id",
        "key",
        "scopes",
        "session",
        "tenant",
    )

    def __init__(self, key: ApiKey, tenant: Tenant, owners: OwnerBook, session: Session | None = None) -> None:
        self.key = key
        self._owners = owners
        self.id = key.id
        self.tenant = tenant.name
        self.expires_at = key.expires_at
        self.scopes = frozenset((*(SCOPES if "admin" in key.scopes else key.scopes), ANY_SCOPE))
        self.session = session
        self._patterns = [key.models, tenant.models]
        if session is not None:
            self.expires_at = min(session.expires_at, key.expires_at or session.expires_at)
            self.scopes &= {*session.scopes, ANY_SCOPE}
            self._patterns.append(session.models)
        self.admin = "admin" in self.scopes
        """True if it may act as the owner of every tenant's models that its patterns match."""
        self._decisions: dict[str, bool] = {}

    @property
    def asker(self) -> Asker:
        """The identity that requests to the model store are made for."""
        return Asker(self.tenant, self.admin, f"key:{self.id}")

    # names: every other method takes the platform's name of a model

    def named(self, written: str) -> str:
        """Return the platform's name of a model from the name that the caller wrote.

        Raises:
            BadName: it has a slash and is not tenant/model.
        """
        return resolved(written, self.tenant, self._owners.known)

    def named_push(self, written: str) -> str:
        """Return the platform's name of the model that a push under this name adds a version to.

        Raises:
            BadName
        """
        return resolved_push(written, self.tenant, self._owners.known, lambda name: self.right(name) >= Right.WRITE)

    def shown(self, model: str) -> str:
        """Return a platform's name as the caller writes it."""
        return shown(model, self.tenant, self._owners.known)

    def told(self, message: str) -> str:
        """Return a message with model names as the caller writes them."""
        return shown_text(message, self.tenant)

    # rights

    def may_use_model(self, model: str) -> bool:
        """Return True if key and tenant both allow the model's name and it is not private to another tenant."""
        return self._matches(model) and (self.admin or self._owners.right(model, self.tenant) is not Right.NONE)

    def right(self, model: str) -> Right:
        """Return the caller's right to a model; every right if there is no model of that name."""
        if not self._matches(model):
            return Right.NONE
        return Right.OWN if self.admin else self._owners.right(model, self.tenant)

    def _matches(self, model: str) -> bool:
        found = self._decisions.get(model)
        if found is None:
            if len(self._decisions) >= _DECISIONS:
                self._decisions.clear()
            found = all(allows_model(patterns, model, self.tenant) for patterns in self._patterns)
            self._decisions[model] = found
        return found

    def bound(self, models: tuple[str, ...] | None, tenant: str, *, field: str = "models") -> tuple[str, ...]:
        """Return the model patterns for ``tenant``, or for a key of it, which this caller creates or changes.

        These are ``models``, or the widest possible ones if None. No pattern may match a name that this
        caller may not use.

        Raises:
            InvalidRequest: a pattern is not valid.
            Forbidden: a pattern goes beyond the caller's own.
        """
        asked = [check_patterns(models, field=field)] if models is not None else [EVERY_MODEL, *self._as_of(tenant)]
        for patterns in asked:
            if all(allows_patterns(own, self.tenant, patterns, tenant) for own in self._patterns):
                return patterns
        own = ", ".join(self._patterns[0])
        raise Forbidden(f"this API key may use, and grant, only models that match {own[:200]}", field=field)

    def _as_of(self, tenant: str) -> list[tuple[str, ...]]:
        """Return this caller's patterns, as they are written for another tenant."""
        if tenant == self.tenant:
            return self._patterns
        return [tuple(spelled_out(patterns, self.tenant)) for patterns in self._patterns]

    def check_model(self, model: str, wanted: Right = Right.USE) -> None:
        """Reject a request that exceeds the caller's right to a model; hide a model that it may not use.

        Raises:
            BadName: no model can have this name.
            ModelNotFound: the caller may not use it.
            Forbidden: the caller may use it, but it belongs to another tenant.
        """
        if wanted is Right.USE and self.may_use_model(model):
            return  # fast path: every inference request checks this
        error = refusal(model, self.right(model), wanted)
        if error is not None:
            raise error

    def check_push(self, model: str) -> None:
        """Check a push; unlike :meth:`check_model`, report a name that another tenant owns.

        Raises:
            Conflict: the name is another tenant's.
            BadName, ModelNotFound, Forbidden
        """
        found = self.right(model)
        if self._matches(model):
            error = push_refusal(model, found if self._owners.known(model) else None, self.asker)
        else:
            error = refusal(model, found, Right.WRITE)
        if error is not None:
            raise error


class ApiKeys:
    """Looks keys up by the SHA-256 of their text, so that a wrong key costs the same as a valid one."""

    def __init__(self, bus: Bus, tenants: Tenants, owners: OwnerBook) -> None:
        self._owners = owners
        self.bucket = SignedBucket(bus, "apikeys", MessageType.API_KEY)
        self.uses = KeyUsage(bus)
        self.sessions = Sessions(bus)
        self._now: Callable[[], float] = bus.clock.utc
        self._tenants = tenants
        self._callers: dict[bytes, Caller] = {}
        self._in_session: dict[bytes, Caller] = {}
        self._by_id: dict[str, ApiKey] = {}
        self._doubtful: set[bytes] = set()
        """Hashes of keys whose tenant's record cannot be verified."""
        tenants.on_change(self._tenant_changed)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        async with self.bucket.watch(self._changed, withdraw=True):
            yield

    def _changed(self, key: str, body: bytes | None) -> None:
        record = None if body is None else codec.decode(body, ApiKey)
        old = self._by_id.pop(key, None)
        if old is not None:
            self._callers.pop(bytes.fromhex(old.hash), None)
            self._doubtful.discard(bytes.fromhex(old.hash))
        self._in_session.clear()
        if record is not None and record.id == key:
            self._by_id[key] = record
            self._admit(record)

    def _admit(self, record: ApiKey) -> None:
        digest = bytes.fromhex(record.hash)
        self._callers.pop(digest, None)
        self._doubtful.discard(digest)
        if record.revoked:
            return
        if self._tenants.doubtful(record.tenant):
            self._doubtful.add(digest)
        else:
            self._callers[digest] = Caller(record, self._tenants.get(record.tenant), self._owners)

    def _tenant_changed(self, name: str) -> None:
        self._in_session.clear()
        for record in self._by_id.values():
            if record.tenant == name:
                self._admit(record)

    def known(self) -> list[ApiKey]:
        return sorted(self._by_id.values(), key=lambda record: record.created_at)

    def others(self, tenant: str) -> bool:
        """Return True if another tenant has a record or an unrevoked key; administrators' keys do not count."""
        records = any(record.name != tenant for record in self._tenants.known())
        keys = [key for key in self._by_id.values() if not key.revoked and "admin" not in key.scopes]
        return records or any(key.tenant != tenant for key in keys)

    def find(self, key_id: str) -> ApiKey | None:
        return self._by_id.get(key_id)

    async def store(self, record: ApiKey) -> None:
        """Store a key. This gateway accepts it at once, others within their watch's delay.

        Raises:
            BrokerUnavailable: the key may have been stored all the same.
        """
        body = codec.encode(record)
        await self.bucket.put(record.id, body)
        self._changed(record.id, body)

    async def revoke(self, record: ApiKey) -> ApiKey:
        """Revoke a key and return its new record.

        Raises:
            BrokerUnavailable: the key may have been revoked all the same.
        """
        revoked = msgspec.structs.replace(record, revoked=True)
        await self.store(revoked)
        return revoked

    def authenticate(self, text: str, scope: str) -> Caller:
        """Return the caller of a key that has ``scope``.

        Raises:
            Unauthenticated: a missing, unknown, wrong, revoked or expired key; all give the same message.
            RateLimited: too many forged session tokens arrived, and this one was not verified before.
            Forbidden: the key lacks the scope, or the record of its tenant cannot be verified.
        """
        digest = hashlib.sha256(text.encode()).digest()
        caller = self._callers.get(digest) or self._of_session(text, digest)
        now = self._now()
        if caller is None and digest in self._doubtful:
            raise _doubtful()
        if caller is None or 0.0 < caller.expires_at <= now:
            raise Unauthenticated("Invalid API key")
        if scope not in caller.scopes:
            raise Forbidden(f"this API key lacks the scope '{scope}'", field="scope")
        self.uses.noted[caller.id] = now
        return caller

    def _of_session(self, text: str, digest: bytes) -> Caller | None:
        """Return the caller of a session token: its API key, restricted to the session's rights."""
        session = self.sessions.open(text, digest)
        if session is None:
            return None
        caller = self._in_session.get(digest)
        if caller is None:
            key = self._by_id.get(session.key)
            if key is None or key.revoked or key.tenant != session.tenant:
                return None
            if self._tenants.doubtful(key.tenant):
                raise _doubtful()
            if len(self._in_session) >= CACHED:
                self._in_session.clear()
            caller = self._in_session[digest] = Caller(key, self._tenants.get(key.tenant), self._owners, session)
        return caller


def _doubtful() -> Forbidden:
    return Forbidden("the record of this key's tenant cannot be verified; ask an administrator to sign it again")
