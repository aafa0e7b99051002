"""Names of models; each tenant has its own namespace. Pure.

Subjects, keys, manifests, logs and metrics use a model's platform name. In the namespace of tenant
``default``, which also has all models from before namespaces, it is plain (``resnet``); in every other it
starts with the tenant (``acme/resnet``). Callers write a plain name, which is looked up in their own tenant's
namespace first, or the exact ``tenant/model``. A plain name has no slash, so it cannot be mistaken for
another tenant's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from tether.domain.job import SHARED
from tether.domain.manifest import NAME_PATTERN, check_name
from tether.errors import BadName

DEFAULT_TENANT = "default"
"""The tenant of the first administrator's key. Its models are shared with every tenant, unless it revokes
that."""

LONGEST = 100
"""Maximum length of ``tenant/model``: lane consumers are named after it, and a broker allows 255 characters."""

WRITTEN = r"^(?:[^/]{0,64}|[^/]{1,64}/[^/]{1,64})$"
"""Matches text that is no longer than a name that a caller may write, or empty."""

RESERVED = frozenset(
    {"aliases", "chunks", "config", "files", "generate", "generate_stream", "grants", "infer", "load", "logging"}
    | {"owner", "ready", "rekey", "rollback", "shadows", "stats", "trace", "unload", "versions"}
)
"""Words that may follow a model in a path of the HTTP interface. No model outside namespace ``default`` may
have such a name, so that ``/v2/models/acme/ready`` is unambiguous, however a proxy encodes the slash."""

Known = Callable[[str], bool]
"""Returns True if a model of a platform name exists or existed."""


def platform_name(tenant: str, model: str) -> str:
    """Return the platform name of a model in a tenant's namespace."""
    return model if tenant == DEFAULT_TENANT else f"{tenant}/{model}"


def namespace(name: str) -> str:
    """Return the tenant whose namespace a platform name is in; the model's owner may be another."""
    tenant, found, _ = name.partition("/")
    return tenant if found else DEFAULT_TENANT


def check_platform_name(name: str, *, field: str) -> str:
    """Return ``name`` if it is a valid platform name.

    Raises:
        BadName: with the violated rule.
    """
    tenant, found, model = name.partition("/")
    if not found:
        return check_name(name, field=field)
    try:
        check_name(tenant, field=field)
        check_name(model, field=field)
    except BadName as error:
        raise BadName(
            f"{field} {_printable(name)} is not tenant/model, each matching {NAME_PATTERN}", field=field
        ) from error
    if tenant in (DEFAULT_TENANT, SHARED):
        raise BadName(f"{field} {_printable(name)}: no namespace is called '{tenant}'", field=field)
    if len(name) > LONGEST:
        raise BadName(
            f"{field} {_printable(name)} has {len(name)} characters; tenant and model have at most {LONGEST}",
            field=field,
        )
    return name


def check_new_name(name: str, *, field: str) -> None:
    """Check that a new model may get a platform name.

    Raises:
        BadName
    """
    check_platform_name(name, field=field)
    _, found, model = name.partition("/")
    if found and model in RESERVED:
        raise BadName(
            f"{field}: a tenant's model cannot be called '{model}', which is a word of the HTTP interface", field=field
        )


def _printable(name: str) -> str:
    return repr(name[: LONGEST + 1].encode("ascii", "backslashreplace").decode())


def resolved(written: str, tenant: str, known: Known) -> str:
    """Return the platform name of the model that a caller of ``tenant`` writes: its own tenant's, else the
    plain one.

    Raises:
        BadName: it has a slash and is not tenant/model. Plain names are not checked.
    """
    if "/" in written:
        return _exact(written)
    if tenant != DEFAULT_TENANT and known(own := f"{tenant}/{written}"):
        return own
    return written


@lru_cache(maxsize=4096)
def _exact(written: str) -> str:
    tenant, _, model = written.partition("/")
    return check_name(model, field="model") if tenant == DEFAULT_TENANT else check_platform_name(written, field="model")


def resolved_push(written: str, tenant: str, known: Known, writable: Known) -> str:
    """Return the platform name that a push adds a version to.

    A plain name is in the tenant's own namespace, unless that has no such model and there is a plain one that
    the tenant may write.

    Raises:
        BadName: as :func:`resolved`.
    """
    name = resolved(written, tenant, known)
    if "/" in written or name != written or (known(name) and writable(name)):
        return name
    return platform_name(tenant, written)


def shown(name: str, tenant: str, known: Known) -> str:
    """Return a platform name as a caller of ``tenant`` writes it; the inverse of :func:`resolved`."""
    if tenant == DEFAULT_TENANT:
        return name
    space, found, model = name.partition("/")
    if found:
        return model if space == tenant else name
    return f"{DEFAULT_TENANT}/{name}" if known(f"{tenant}/{name}") else name


def shown_text(text: str, tenant: str) -> str:
    """Return a message with models of the tenant's namespace as the tenant writes them."""
    return text if tenant == DEFAULT_TENANT else text.replace(f"model '{tenant}/", "model '")


def spelled_out(patterns: Iterable[str], tenant: str) -> list[str]:
    """Return model patterns with explicit namespaces; one without means the tenant's own and the plain
    models."""
    found: list[str] = []
    for pattern in patterns:
        if pattern == "*" or "/" in pattern:
            found.append(pattern)
        else:
            found += [f"{space}/{pattern}" for space in dict.fromkeys((DEFAULT_TENANT, tenant))]
    return found
