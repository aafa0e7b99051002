"""Stores model configurations in their bucket: each change applies to the newest revision and increments it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from tether.audit import Kind, clean
from tether.audit.writer import AuditLog
from tether.bus.bus import Bus
from tether.bus.key_value.bucket import EntryRevision, SignedBucket
from tether.crypto import Envelope, MessageType
from tether.domain.manifest import Manifest
from tether.domain.model_names import check_platform_name
from tether.errors import (
    BadEncoding,
    BrokerUnavailable,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    TetherError,
    Unavailable,
    VersionConflict,
)
from tether.model.config import ModelConfig, default_config
from tether.model.config_patch import ANY_REVISION, STAMPS, ConfigAction, ConfigRequest, check_against, patched, reset
from tether.model.ownership import Asker, Right
from tether.modelstore.records.model_owners import Owners
from tether.modelstore.records.registry import Registry
from tether.modelstore.records.version_metadata import VersionMetadataStore
from tether.wire import codec
from tether.wire.subjects import token

log = logging.getLogger(__name__)

TRIES = 16
"""Consecutive lost conditional writes before giving up."""


class ModelConfigStore:
    """Handles ``configureModel``, and the configuration in a push."""

    def __init__(
        self, bus: Bus, registry: Registry, audit: AuditLog, notes: VersionMetadataStore, owners: Owners
    ) -> None:
        self._bus = bus
        self._owners = owners
        self._notes = notes
        self._registry = registry
        self._audit = audit
        self._bucket = SignedBucket(bus, "configs", MessageType.CONFIG)

    async def handle(self, envelope: Envelope) -> bytes:
        """Apply a request and return the resulting configuration.

        Raises:
            InvalidRequest, BadName: naming the invalid field.
            ModelNotFound: the model was never pushed, or the requester may not know of it.
            Forbidden: the model belongs to another tenant.
            Conflict: the revision is not the one in the request.
            Unavailable: try again.
        """
        try:
            request = codec.decode(envelope.body, ConfigRequest)
        except BadEncoding as error:
            raise InvalidRequest(f"cannot decode the change: {error.message}") from error
        check_platform_name(request.model, field="name")
        asker = Asker(request.tenant, request.admin, request.by)
        wanted = Right.USE if request.action is ConfigAction.SHOW else Right.WRITE
        await self._owners.require(request.model, asker, wanted)
        if request.action is ConfigAction.SHOW:
            return codec.encode(await self.get(request.model))
        if request.action is ConfigAction.NOTE:
            return codec.encode(await self._notes.change(request.model, request.version, request.patch, request.by))
        try:
            config, changed = await self._change(request)
        except TetherError as error:
            self._note(request, outcome=error.code)
            raise
        self._note(request, detail=f"revision {config.revision}: {', '.join(changed) or 'nothing'} changed")
        await self._audit.settled()
        return codec.encode(config)

    async def get(self, model: str) -> ModelConfig:
        """Return a model's configuration as stored.

        Raises:
            BrokerUnavailable
        """
        return await self._decoded(model, await self._bucket.latest(token(model)))

    async def given(self, manifest: Manifest, patch: Mapping[str, Any], by: str) -> None:
        """Apply the configuration of a push before its version becomes visible.

        Raises:
            InvalidRequest, Unavailable, BrokerUnavailable: as :meth:`handle`; nothing was changed.
        """
        request = ConfigRequest(ConfigAction.CHANGE, manifest.name, dict(patch), by=by)
        config, changed = await self._change(request, beside=manifest)
        self._note(request, detail=f"revision {config.revision}: {', '.join(changed) or 'nothing'} changed by a push")

    async def _change(
        self, request: ConfigRequest, beside: Manifest | None = None
    ) -> tuple[ModelConfig, tuple[str, ...]]:
        """Return the configuration after the change, and the names of the changed fields."""
        manifests = await self._registry.of_model(request.model)
        if beside is not None and all(manifest.version != beside.version for manifest in manifests):
            manifests.append(beside)
        if not manifests:
            raise ModelNotFound(f"there is no model '{request.model}'", field="model")
        aliases = await self._registry.all_aliases(request.model)
        for _ in range(TRIES):
            latest = await self._bucket.latest(token(request.model))
            before = await self._decoded(request.model, latest)
            if request.revision not in (ANY_REVISION, before.revision):
                raise Conflict(
                    f"the configuration of model '{request.model}' is at revision {before.revision}, "
                    f"not {request.revision}; read it again",
                    field="revision",
                )
            config = reset(before) if request.action is ConfigAction.RESET else patched(before, request.patch)
            check_against(config, before, manifests, aliases)
            changed = _changed(before, config)
            if not changed:
                return before, ()
            stamped = msgspec.structs.replace(
                config,
                revision=before.revision + 1,
                changed_at=self._bus.clock.utc(),
                changed_by=clean(request.by),
            )
            self._registry.check()
            if await self._stored(stamped, latest):
                return stamped, changed
        raise Unavailable(f"the configuration of model '{request.model}' is being changed by others; try again")

    async def _stored(self, config: ModelConfig, latest: EntryRevision) -> bool:
        try:
            await self._bucket.replace(token(config.model), codec.encode(config), latest)
        except VersionConflict:
            # The conflicting write may be our own, whose acknowledgement was lost.
            return await self.get(config.model) == config
        except BrokerUnavailable:
            if not await self._bus.wait_connected(10):
                raise
            return await self.get(config.model) == config
        return True

    async def _decoded(self, model: str, latest: EntryRevision) -> ModelConfig:
        """Decode an entry. An unreadable one counts as absent, and the next change replaces it.

        Raises:
            Unavailable: it cannot be verified, so the base of a change is unknown.
        """
        if latest.body is None:
            if latest.sequence:
                await self._bucket.require(token(model))
            return default_config(model)
        try:
            config = codec.decode(latest.body, ModelConfig)
        except BadEncoding as error:
            log.warning(
                "ignored an unreadable configuration: %s", error, extra={"action": "entry_refused", "model": model}
            )
            return default_config(model)
        return config if config.model == model else default_config(model)

    def _note(self, request: ConfigRequest, *, outcome: str = "ok", detail: str = "") -> None:
        fields = {"action": f"config_{request.action.value}", "model": request.model, "by": request.by[:64]}
        log.info("%s", detail or f"refused: {outcome}", extra={**fields, "code": outcome})
        self._audit.record(
            Kind.MODEL,
            "",
            actor=clean(request.by),
            action=f"config {request.action.value}",
            outcome=outcome,
            model=request.model,
            detail=detail,
        )


def _changed(before: ModelConfig, after: ModelConfig) -> tuple[str, ...]:
    fields = [field.name for field in msgspec.structs.fields(ModelConfig) if field.name not in STAMPS]
    return tuple(name for name in fields if getattr(before, name) != getattr(after, name))
