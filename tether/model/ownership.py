"""Who owns a model, and what another tenant may do with it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import msgspec

from tether.domain.manifest import Manifest
from tether.domain.model_names import DEFAULT_TENANT as DEFAULT_TENANT  # noqa: PLC0414 - handed on
from tether.domain.model_names import check_new_name, check_platform_name, namespace
from tether.domain.tenant import check_tenant_name
from tether.errors import Conflict, Forbidden, InvalidRequest, ModelNotFound, TetherError
from tether.wire.subjects import name_of, token

EVERYBODY = "*"
"""As the tenant of a grant: every tenant there is and will be."""

MOST_GRANTS = 1000

_SUFFIX = ".owner"


class Right(IntEnum):
    """What a tenant may do with a model; each includes those before it."""

    NONE = 0
    """Not even know of it."""
    USE = 1
    """Run it, look at its signature, aliases and configuration."""
    WRITE = 2
    """Push versions, change, load, unload and delete what there is, read its files."""
    OWN = 3
    """Grant all of this to others."""


class Asker(NamedTuple):
    """For whom a gateway asks the model store; ``by`` is the API key, as ``key:<id>``."""

    tenant: str
    admin: bool = False
    by: str = ""


class Ownership(msgspec.Struct, frozen=True):
    """A model's owner and grants, as the model store signed them. Tenants in ``writes`` have WRITE, those in ``uses`` USE.

    It is kept beside the configuration. No field is called ``model``, so nothing takes it for one.
    """

    owned: str
    """The model's name."""
    tenant: str
    uses: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    revision: int = 1
    changed_at: float = 0.0
    """UTC seconds."""
    changed_by: str = ""

    def right(self, tenant: str) -> Right:
        if tenant == self.tenant:
            return Right.OWN
        if tenant in self.writes:
            return Right.WRITE
        return Right.USE if tenant in self.uses or EVERYBODY in self.uses else Right.NONE


def owner_key(model: str) -> str:
    """The key of a model's ownership in the bucket ``configs``, where the model's configuration has ``token(model)``."""
    return token(model) + _SUFFIX


def owned_model(key: str) -> str | None:
    """The model whose ownership a key of the bucket ``configs`` is for; None: it is a configuration's key."""
    return name_of(key.removesuffix(_SUFFIX)) if key.endswith(_SUFFIX) else None


def first_ownership(model: str, tenant: str) -> Ownership:
    """What the first push of a model makes."""
    return Ownership(model, tenant, uses=(EVERYBODY,) if tenant == DEFAULT_TENANT else ())


def implied_ownership(manifests: Iterable[Manifest]) -> Ownership | None:
    """Who owns a model that has versions and no record (yet); None: it has no version.

    Versions that were pushed since models have owners name theirs. Of a model with older versions only, the tenant of the
    oldest is the owner, and every tenant may use it, as before.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.version)
    for manifest in ordered:
        if manifest.owner:
            return first_ownership(manifest.name, manifest.owner)
    if not ordered:
        return None
    return Ownership(ordered[0].name, ordered[0].tenant or DEFAULT_TENANT, uses=(EVERYBODY,))


def granted(ownership: Ownership, tenant: str, right: Right) -> Ownership:
    """The ownership after ``tenant`` got ``right`` (USE or WRITE) in place of what it had; NONE takes all away.

    Raises:
        InvalidRequest: everybody cannot write; the owner needs no grant; there are too many grants.
        BadName: it is no tenant's name.
    """
    if tenant != EVERYBODY:
        check_tenant_name(tenant)
    elif right > Right.USE:
        raise InvalidRequest("every tenant together ('*') can be granted use only", field="right")
    if tenant == ownership.tenant:
        raise InvalidRequest(f"tenant '{tenant}' owns model '{ownership.owned}' and needs no grant", field="tenant")
    uses = tuple(name for name in ownership.uses if name != tenant)
    writes = tuple(name for name in ownership.writes if name != tenant)
    if right == Right.USE:
        uses = (*uses, tenant)
    elif right == Right.WRITE:
        writes = (*writes, tenant)
    if len(uses) + len(writes) > MOST_GRANTS:
        raise InvalidRequest(f"a model has at most {MOST_GRANTS} grants; revoke one first", field="tenant")
    return msgspec.structs.replace(ownership, uses=tuple(sorted(uses)), writes=tuple(sorted(writes)))


def handed_over(ownership: Ownership, tenant: str) -> Ownership:
    """The ownership after another tenant became the owner; the one before keeps no right but those granted to all.

    Raises:
        BadName: it is no tenant's name.
    """
    check_tenant_name(tenant)
    uses = tuple(name for name in ownership.uses if name != tenant)
    writes = tuple(name for name in ownership.writes if name != tenant)
    return msgspec.structs.replace(ownership, tenant=tenant, uses=uses, writes=writes)


# refusals, the same words in the gateway and in the model store


def no_such_model(model: str) -> ModelNotFound:
    """The refusal of a model that is not there, and of one that the asker may not know of.

    Raises:
        BadName: no model could have this name.
    """
    check_platform_name(model, field="model")
    return ModelNotFound(f"there is no model '{model}'", field="model")


def refusal(model: str, found: Right, wanted: Right) -> TetherError | None:
    """Why who has the right ``found`` may not do what takes ``wanted``; None: it may."""
    if found >= wanted:
        return None
    if found == Right.NONE:
        error = no_such_model(model)
        error.hidden = True
        return error
    if wanted == Right.OWN:
        return Forbidden(f"only the tenant that owns model '{model}', or an administrator, may do this", field="model")
    return Forbidden(
        f"model '{model}' belongs to another tenant; its owner can allow this with "
        f"'tether model grant {model} --tenant TENANT --write'",
        field="model",
    )


def push_refusal(model: str, found: Right | None, asker: Asker) -> TetherError | None:
    """:func:`refusal` of a push; ``found`` is None where there is no model of the name yet. Where only its namespace's tenant may
    make one, it does not say whether there is one, and otherwise that the name cannot be had, and not whose it is.

    Raises:
        BadName: no new model could have this name.
    """
    if found is None:
        check_new_name(model, field="name")
    elif found > Right.NONE:
        return refusal(model, found, Right.WRITE)
    space = namespace(model)
    error: TetherError
    if not asker.admin and space != asker.tenant:
        own = model.rpartition("/")[2]
        error = Forbidden(
            f"only tenant '{space}' and administrators make the models of its namespace; push this one as '{own}'",
            field="name",
        )
    elif found is None:
        return None
    else:
        error = Conflict(f"the name '{model}' is taken; push the model under another name", field="name")
    error.hidden = found is not None
    return error
