"""Handles alias updates and version deletions one after another, with the rules between them."""

from __future__ import annotations

import logging
import math
from functools import partial

from tether.crypto import Envelope
from tether.domain.manifest import (
    OWNER_CHANGES,
    STORE_CHANGES,
    Alias,
    Change,
    ChangeAnswer,
    ChangeRequest,
    Share,
    check_name,
)
from tether.domain.model_names import check_platform_name
from tether.errors import BadEncoding, Conflict, Forbidden, InvalidRequest, ModelNotFound, TetherError
from tether.model.ownership import Asker, Right
from tether.modelstore.records.model_owners import Owners
from tether.modelstore.records.registry import Registry
from tether.modelstore.records.version_metadata import VersionMetadataStore
from tether.modelstore.upkeep.chunk_collector import ChunkCollector
from tether.modelstore.upkeep.key_rotation import ModelKeyRotation
from tether.wire import codec

log = logging.getLogger(__name__)

ENDPOINT = "changeModel"
MOST_SHARES = 16


class ModelChangeHandler:
    """Handles ``changeModel``."""

    def __init__(
        self,
        registry: Registry,
        owners: Owners,
        keeper: ChunkCollector,
        notes: VersionMetadataStore,
        keys: ModelKeyRotation,
    ) -> None:
        self._owners = owners
        self._notes = notes
        self._keys = keys
        self._keeper = keeper
        self._registry = registry

    async def handle(self, envelope: Envelope) -> bytes:
        """Apply a request.

        Raises:
            InvalidRequest, BadName: the request itself is invalid.
            ModelNotFound: the version or alias does not exist, or the requester may not know of the model.
            Forbidden: the model belongs to another tenant.
            Conflict: an alias points at the version to delete; an alias without history cannot be rolled
        back.
            Unavailable: try again.
        """
        try:
            request = codec.decode(envelope.body, ChangeRequest)
        except BadEncoding as error:
            raise InvalidRequest(f"cannot decode the change: {error.message}") from error
        if request.change in STORE_CHANGES:
            return await self._kept(request)
        check_platform_name(request.model, field="name")
        fields = {"action": f"model_{request.change.value}", "model": request.model, "by": request.by[:64]}
        try:
            if request.change in OWNER_CHANGES:
                ownership = await self._owners.handle(request)
                log.info("the owner is '%s'", ownership.tenant, extra=fields)
                return codec.encode(ownership)
            asker = Asker(request.tenant, request.admin, request.by)
            if request.change is Change.ENCRYPT:
                await self._owners.may_encrypt(request.model, asker)
            else:
                await self._owners.require(request.model, asker, Right.WRITE)
            if request.change in (Change.ENCRYPT, Change.REKEY):
                return await self._keyed(request, fields)
            alias = await self._changed(request)
        except TetherError as error:
            log.info("change refused: %s", error, extra={**fields, "code": error.code})
            raise
        log.info("changed", extra={**fields, "alias": request.alias, "version": alias.version if alias else 0})
        return codec.encode(ChangeAnswer(alias))

    async def _keyed(self, request: ChangeRequest, fields: dict[str, str]) -> bytes:
        """Give a model a data key, or a new one."""
        work = self._keys.ensure if request.change is Change.ENCRYPT else self._keys.rekey
        generation = await work(request.model)
        log.info("has the data key number %d", generation, extra=fields)
        return codec.encode(ChangeAnswer(key_generation=generation))

    async def _kept(self, request: ChangeRequest) -> bytes:
        """Start the requested maintenance and return the state of the store, which covers every tenant's models."""
        if not request.admin:
            raise Forbidden("only an administrator may see the chunk store")
        if request.change is not Change.SHOW_STORE:
            asked = self._keeper.collect_now if request.change is Change.COLLECT else self._keeper.scrub_now
            asked.set()
            log.info("store maintenance requested", extra={"action": request.change.value, "by": request.by[:64]})
        return codec.encode(ChangeAnswer(store=await self._keeper.state()))

    async def _changed(self, request: ChangeRequest) -> Alias | None:
        if request.change is Change.DELETE_VERSION:
            return await self._delete_version(request.model, request.version)
        check_alias_name(request.alias)
        match request.change:
            case Change.SET_ALIAS:
                return await self._set(request)
            case Change.ROLLBACK:
                return await self._rollback(request)
            case _:
                return await self._registry.change(request.model, request.alias, partial(_gone, request))

    async def _set(self, request: ChangeRequest) -> Alias | None:
        version = check_split(request.split).version if request.split else request.version
        wanted = Alias(request.model, request.alias, version, split=request.split, sticky=request.sticky)
        for number in sorted(wanted.versions):
            await self._require(request.model, number)
        return await self._registry.change(
            request.model, request.alias, lambda current: self._registry.next_alias(current, wanted)
        )

    async def _require(self, model: str, version: int) -> None:
        if not await self._registry.exists(model, version):
            raise _no_version(model, version)

    async def _rollback(self, request: ChangeRequest) -> Alias | None:
        def back(current: Alias | None) -> Alias:
            if current is None:
                raise _no_alias(request)
            if not current.previous:
                raise Conflict(f"alias '{request.alias}' has no previous target", field="alias")
            last, *rest = current.previous
            return Alias(
                request.model,
                request.alias,
                last.version,
                previous=tuple(rest),
                revision=current.revision + 1,
                split=last.split,
                sticky=last.sticky,
                undone=(self._registry.as_move(current), *current.undone),
            )

        known = {alias.name: alias for alias in await self._registry.all_aliases(request.model)}.get(request.alias)
        for number in sorted(back(known).versions):
            await self._require(request.model, number)
        return await self._registry.change(request.model, request.alias, back)

    async def _delete_version(self, model: str, version: int) -> Alias | None:
        if not await self._registry.recorded(model, version):
            raise _no_version(model, version)
        naming = [alias.name for alias in await self._registry.all_aliases(model) if version in alias.versions]
        if naming:
            listed = ", ".join(f"'{name}'" for name in sorted(naming))
            raise Conflict(
                f"version {version} of model '{model}' is the target of alias {listed}; move or delete the alias first",
                field="version",
            )
        await self._registry.delete(model, version)
        await self._notes.forget(model, version)
        return None


def check_alias_name(name: str) -> None:
    """Check the name of an alias.

    Raises:
        BadName, InvalidRequest: it is not a name, or looks like a version number.
    """
    if check_name(name, field="alias").isdecimal():
        raise InvalidRequest("an alias cannot be a number: it would look like a version", field="alias")


def check_split(split: tuple[Share, ...]) -> Share:
    """Check a split; return the share with the largest weight.

    Raises:
        InvalidRequest: a repeated version, a weight that is not positive, or too many shares.
    """
    if len(split) > MOST_SHARES:
        raise InvalidRequest(f"an alias can be split between at most {MOST_SHARES} versions", field="split")
    if len({share.version for share in split}) != len(split):
        raise InvalidRequest("a split names a version twice", field="split")
    if not all(math.isfinite(share.weight) and 0 < share.weight <= 1e6 for share in split):
        raise InvalidRequest("each weight of a split must be more than 0 and at most 1000000", field="split")
    return max(split, key=lambda share: share.weight)


def _gone(request: ChangeRequest, alias: Alias | None) -> Alias | None:
    if alias is None:
        raise _no_alias(request)
    return None


def _no_version(model: str, version: int) -> ModelNotFound:
    return ModelNotFound(f"model '{model}' has no version {version}", field="version")


def _no_alias(request: ChangeRequest) -> ModelNotFound:
    return ModelNotFound(f"model '{request.model}' has no alias '{request.alias}'", field="alias")
