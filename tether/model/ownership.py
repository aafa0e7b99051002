"""Ownership of models, and the rights of other tenants. Pure."""

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
"""The tenant of a grant to every tenant, present and future."""

MOST_GRANTS = 1000

_SUFFIX = ".owner"


class Right(IntEnum):
    """Right of a tenant to a model; each includes those before it."""

    NONE = 0
    """The model is hidden."""
    USE = 1
    """Run it; read its signature, aliases and configuration."""
    WRITE = 2
    """Push versions; change, load, unload and delete; read its files."""
    OWN = 3
    """Grant these rights to others."""


class Asker(NamedTuple):
    """On whose behalf a gateway calls the model store; ``by`` is the API key, as ``key:<id>``."""

    tenant: str
    admin: bool = False
    by: str = ""


class Ownership(msgspec.Struct, frozen=True):
    """A model's owner and grants, signed by the model store. ``writes`` are tenants with WRITE, ``uses``
    those with USE.

    Stored beside the configuration. No field is called ``model``, so it cannot be decoded as one.
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
    """Return the key of a model's ownership in the bucket ``configs``; its configuration has
    ``token(model)``."""
    return token(model) + _SUFFIX


def owned_model(key: str) -> str | None:
    """Return the model whose ownership has this key of the bucket ``configs``; None for a configuration's
    key."""
    return name_of(key.removesuffix(_SUFFIX)) if key.endswith(_SUFFIX) else None


def first_ownership(model: str, tenant: str) -> Ownership:
    """Return the ownership that a model's first push creates."""
    return Ownership(model, tenant, uses=(EVERYBODY,) if tenant == DEFAULT_TENANT else ())


def implied_ownership(manifests: Iterable[Manifest]) -> Ownership | None:
    """Return the ownership of a model that has versions but no record (yet); None if it has no version.

    Versions from after the introduction of owners name theirs. Of a model with older versions only, the
    tenant of the oldest is the owner, and every tenant may use it, as before.
    """
    ordered = sorted(manifests, key=lambda manifest: manifest.version)
    for manifest in ordered:
        if manifest.owner:
            return first_ownership(manifest.name, manifest.owner)
    if not ordered:
        return None
    return Ownership(ordered[0].name, ordered[0].tenant or DEFAULT_TENANT, uses=(EVERYBODY,))


def granted(ownership: Ownership, tenant: str, right: Right) -> Ownership:
    """Return the ownership with ``right`` (USE or WRITE) of ``tenant`` in place of its earlier one; NONE
    revokes it.

    Raises:
        InvalidRequest: WRITE for every tenant, a grant to the owner, or too many grants.
        BadName: it is not a tenant's name.
    """
    if tenant != EVERYBODY:
        check_tenant_name(tenant)
    elif right > Right.USE:
        raise InvalidRequest("only the right 'use' can be granted to every tenant ('*')", field="right")
    if tenant == ownership.tenant:
        raise InvalidRequest(f"tenant '{tenant}' owns model '{ownership.owned}', so it needs no grant", field="tenant")
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
    """Return the ownership with another owner; the previous one keeps only the rights granted to all.

    Raises:
        BadName: it is not a tenant's name.
    """
    check_tenant_name(tenant)
    uses = tuple(name for name in ownership.uses if name != tenant)
    writes = tuple(name for name in ownership.writes if name != tenant)
    return msgspec.structs.replace(ownership, tenant=tenant, uses=uses, writes=writes)


# refusals, with the same messages in gateway and model store


def no_such_model(model: str) -> ModelNotFound:
    """Return the error for a model that does not exist, or that the caller may not see.

    Raises:
        BadName: no model can have this name.
    """
    check_platform_name(model, field="model")
    return ModelNotFound(f"there is no model '{model}'", field="model")


def refusal(model: str, found: Right, wanted: Right) -> TetherError | None:
    """Return why the right ``found`` does not suffice for ``wanted``; None if it does."""
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
    """Return why a push is refused, or None; ``found`` is None if no model has the name.

    In another tenant's namespace the error does not reveal whether the model exists; elsewhere it says that
    the name is taken, but not by whom.

    Raises:
        BadName: no new model can have this name.
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
            f"only tenant '{space}' and administrators may push models to its namespace; push this one as '{own}'",
            field="name",
        )
    elif found is None:
        return None
    else:
        error = Conflict(f"the name '{model}' is taken; push the model under another name", field="name")
    error.hidden = found is not None
    return error
