"""Stores the owner and grants of each model, and checks them before every action on a model."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from tether.audit import Kind, clean
from tether.audit.writer import AuditLog
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import EntryRevision, SignedBucket
from tether.crypto import MessageType
from tether.domain.manifest import Change, ChangeRequest, Manifest, PushRequest
from tether.domain.model_names import namespace
from tether.errors import (
    BadEncoding,
    BrokerUnavailable,
    Forbidden,
    InvalidRequest,
    TetherError,
    Unavailable,
    VersionConflict,
)
from tether.model.ownership import (
    Asker,
    Ownership,
    Right,
    first_ownership,
    granted,
    handed_over,
    implied_ownership,
    no_such_model,
    owner_key,
    push_refusal,
    refusal,
)
from tether.modelstore.records.registry import Registry
from tether.wire import codec

log = logging.getLogger(__name__)

TRIES = 16
"""Consecutive lost conditional writes before giving up."""

_GRANTABLE = (Right.NONE, Right.USE, Right.WRITE)


class Owners:
    """The ownership records in the bucket ``configs``, as the model store writes them."""

    def __init__(self, bus: Bus, registry: Registry, audit: AuditLog) -> None:
        self._bus = bus
        self._registry = registry
        self._audit = audit
        self._bucket = SignedBucket(bus, "configs", MessageType.CONFIG)

    async def of(self, model: str) -> Ownership | None:
        """Return a model's ownership; None if it has no versions and never had an owner.

        Raises:
            Unavailable: its record cannot be verified, so the owner is unknown.
            BrokerUnavailable
        """
        return (await self._latest(model))[0]

    async def require(self, model: str, asker: Asker, wanted: Right) -> None:
        """Check that the requester has the right ``wanted`` on a model.

        Raises:
            ModelNotFound: the model does not exist, or the requester may not know of it.
            Forbidden: it has a lesser right; or the request names no tenant.
            Unavailable, BrokerUnavailable
        """
        found = await self.of(model)
        if found is None:
            raise no_such_model(model)
        self._refuse(model, asker, refusal(model, self._right(found, asker), wanted))

    async def may_push(self, request: PushRequest) -> str:
        """Check that a push may make a version; return the tenant that owns the model, or will.

        Raises:
            BadName: a new model may not have this name.
            Conflict: the name belongs to a tenant that granted the requester nothing.
            Forbidden: the requester may only use the model, or the model is new and in another tenant's
        namespace; or
                the request names no tenant.
            Unavailable, BrokerUnavailable
        """
        found = await self._may_push(request.name, Asker(request.tenant, request.admin, request.publisher))
        return namespace(request.name) if found is None else found.tenant or request.tenant

    async def _may_push(self, model: str, asker: Asker) -> Ownership | None:
        self._known(asker)
        found = await self.of(model)
        right = None if found is None else self._right(found, asker)
        self._refuse(model, asker, push_refusal(model, right, asker))
        return found

    async def may_encrypt(self, model: str, asker: Asker) -> None:
        """Check as :meth:`require` with WRITE; a new model is allowed."""
        await self._may_push(model, asker)

    async def claim(self, request: PushRequest) -> None:
        """Record the tenant of a new model's namespace as its owner, before a version is visible.

        Raises:
            Conflict, Forbidden: another tenant was first.
            Unavailable, BrokerUnavailable
        """
        first = first_ownership(request.name, namespace(request.name))
        for _ in range(TRIES):
            found, latest = await self._latest(request.name)
            if found is not None and latest.body is not None:
                break
            made = first if found is None or not found.tenant else found
            if await self._stored(self._stamped(made, request.publisher), latest):
                break
        await self.may_push(request)

    async def handle(self, request: ChangeRequest) -> Ownership:
        """Show, grant, revoke or transfer; return the resulting ownership.

        Raises:
            ModelNotFound, Forbidden: the requester does not own the model.
            InvalidRequest, BadName: the grant is invalid.
            Unavailable, BrokerUnavailable
        """
        asker = Asker(request.tenant, request.admin, request.by)
        await self.require(request.model, asker, Right.OWN)
        if request.change is Change.SHOW_OWNER:
            return await self._now(request.model)
        if request.change is Change.HAND_OVER:
            if not request.admin:
                raise self._noted(request.model, asker, Forbidden("only an administrator can transfer a model"))
            return await self._change(request, lambda found: handed_over(found, request.grantee))
        if request.right not in _GRANTABLE:
            raise InvalidRequest("only 'use' and 'write' can be granted", field="right")
        return await self._change(request, lambda found: granted(found, request.grantee, Right(request.right)))

    async def migrate(self, partition: int) -> None:
        """Record the owner of every model of a partition whose versions predate ownership.

        Raises:
            Unavailable: another model store owns the partition by now.
            BrokerUnavailable
        """
        recorded = set(await self._bucket.raw.entries())
        models: dict[str, list[Manifest]] = {}
        for manifest in await self._registry.readable(partition):
            models.setdefault(manifest.name, []).append(manifest)
        for model, manifests in models.items():
            implied = implied_ownership(manifests)
            if owner_key(model) in recorded or implied is None:
                continue
            self._registry.check()
            if await self._bucket.create(owner_key(model), codec.encode(self._stamped(implied, ""))):
                log.info("belongs to '%s' now", implied.tenant, extra={"action": "model_owner", "model": model})

    # decisions

    def _known(self, asker: Asker) -> None:
        if not asker.tenant:
            raise Forbidden("the request names no tenant: the gateway is older than this model store; upgrade it")

    def _right(self, found: Ownership, asker: Asker) -> Right:
        self._known(asker)
        return Right.OWN if asker.admin else found.right(asker.tenant)

    def _refuse(self, model: str, asker: Asker, error: TetherError | None) -> None:
        if error is not None:
            raise self._noted(model, asker, error)

    def _noted(self, model: str, asker: Asker, error: TetherError) -> TetherError:
        self._audit.record(
            Kind.ACCESS,
            asker.tenant,
            actor=clean(asker.by),
            action="model of another tenant",
            outcome=Forbidden.code,
            model=model,
        )
        return error

    # the bucket

    async def _now(self, model: str) -> Ownership:
        found = await self.of(model)
        if found is None:
            raise no_such_model(model)
        return found

    async def _latest(self, model: str) -> tuple[Ownership | None, EntryRevision]:
        latest = await self._bucket.latest(owner_key(model))
        if latest.body is None:
            if latest.sequence:
                await self._bucket.require(owner_key(model))
            return await self._implied(model), latest
        try:
            found = codec.decode(latest.body, Ownership)
        except BadEncoding as error:
            raise Unavailable(f"cannot verify the owner record of model '{model}'") from error
        if found.owned != model:
            raise Unavailable(f"cannot decode the owner record of model '{model}'")
        return found, latest

    async def _implied(self, model: str) -> Ownership | None:
        """Derive the owner from the versions. If no version is readable the model has no owner: only
        administrators may act on it.
        """
        found = implied_ownership(await self._registry.of_model(model))
        if found is None and await self._registry.any_recorded(model):
            return Ownership(model, "")
        return found

    async def _change(self, request: ChangeRequest, decide: Callable[[Ownership], Ownership]) -> Ownership:
        for _ in range(TRIES):
            found, latest = await self._latest(request.model)
            if found is None:
                raise no_such_model(request.model)
            wanted = decide(found)
            if wanted == found and latest.body is not None:
                return found
            stamped = self._stamped(msgspec.structs.replace(wanted, revision=found.revision + 1), request.by)
            if await self._stored(stamped, latest):
                self._told(request, stamped)
                await self._audit.settled()
                return stamped
        raise Unavailable(f"the owner of model '{request.model}' is being changed by others; try again")

    def _stamped(self, ownership: Ownership, by: str) -> Ownership:
        return msgspec.structs.replace(ownership, changed_at=self._bus.clock.utc(), changed_by=clean(by))

    async def _stored(self, ownership: Ownership, latest: EntryRevision) -> bool:
        self._registry.check()
        try:
            await self._bucket.replace(owner_key(ownership.owned), codec.encode(ownership), latest)
        except VersionConflict:
            # The conflicting write may be our own, whose acknowledgement was lost.
            return await self.of(ownership.owned) == ownership
        except BrokerUnavailable:
            if not await self._bus.wait_connected(10):
                raise
            return await self.of(ownership.owned) == ownership
        return True

    def _told(self, request: ChangeRequest, ownership: Ownership) -> None:
        self._audit.record(
            Kind.MODEL,
            request.tenant,
            actor=clean(request.by),
            action=request.change.value,
            outcome="ok",
            model=request.model,
            detail=f"tenant {clean(request.grantee)}; right {Right(request.right).name.lower()}; "
            f"revision {ownership.revision}",
        )
