"""Names of models: each tenant has a namespace of its own. Pure.

A model has one platform's name, which subjects, keys, manifests, logs and metrics use. It is plain (``resnet``) in the namespace of tenant
``default``, where models from before there were namespaces are too, and begins with the tenant in every other (``acme/resnet``).
Callers write a plain name, which is looked up in their own tenant's namespace first, or ``tenant/model``, which is exactly that one.
No plain name has a slash, so none is taken for another tenant's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from tether.domain.job import SHARED
from tether.domain.manifest import NAME_PATTERN, check_name
from tether.errors import BadName

DEFAULT_TENANT = "default"
"""The tenant of the first administrator's key. Its models are shared with every tenant unless it takes that back."""

LONGEST = 100
"""Characters of tenant, slash and model together: consumers of lanes are called by it, and a broker takes 255 characters."""

WRITTEN = r"^(?:[^/]{0,64}|[^/]{1,64}/[^/]{1,64})$"
"""What is no longer than a name that a caller may write, or empty."""

RESERVED = frozenset(
    {"aliases", "chunks", "config", "files", "generate", "generate_stream", "grants", "infer", "load", "logging"}
    | {"owner", "ready", "rekey", "rollback", "shadows", "stats", "trace", "unload", "versions"}
)
"""What may follow a model in a path of the HTTP interface. In a namespace of its own no model has such a name, so that
``/v2/models/acme/ready`` is read in one way, however a proxy writes the slash."""

Known = Callable[[str], bool]
"""Whether there is, or was, a model of a platform's name."""


def platform_name(tenant: str, model: str) -> str:
    """The platform's name of a model in a tenant's namespace."""
    return model if tenant == DEFAULT_TENANT else f"{tenant}/{model}"


def namespace(name: str) -> str:
    """The tenant whose namespace a platform's name is in; who owns the model may be another."""
    tenant, found, _ = name.partition("/")
    return tenant if found else DEFAULT_TENANT


def check_platform_name(name: str, *, field: str) -> str:
    """Return ``name`` when a model may be called so.

    Raises:
        BadName: with the rule that it breaks.
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
    """Prove that a model which is not there yet may get a platform's name.

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
    """The platform's name of the model that a caller of ``tenant`` means: of a plain name its tenant's own, if there is one, and
    otherwise the plain one.

    Raises:
        BadName: it has a slash and is not tenant/model. A plain name is not looked at.
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
    """The platform's name that a push makes a version of: of a plain name the tenant's own, unless there is a plain model
    that it may write to, and not one of its own.

    Raises:
        BadName: as :func:`resolved`.
    """
    name = resolved(written, tenant, known)
    if "/" in written or name != written or (known(name) and writable(name)):
        return name
    return platform_name(tenant, written)


def shown(name: str, tenant: str, known: Known) -> str:
    """How a caller of ``tenant`` writes a platform's name; :func:`resolved` gives the name back."""
    if tenant == DEFAULT_TENANT:
        return name
    space, found, model = name.partition("/")
    if found:
        return model if space == tenant else name
    return f"{DEFAULT_TENANT}/{name}" if known(f"{tenant}/{name}") else name


def shown_text(text: str, tenant: str) -> str:
    """A message of the platform with the models of a tenant's own namespace as the tenant writes them."""
    return text if tenant == DEFAULT_TENANT else text.replace(f"model '{tenant}/", "model '")


def spelled_out(patterns: Iterable[str], tenant: str) -> list[str]:
    """Patterns of models of a tenant's key, each with its namespace: one without means the tenant's own and the plain ones."""
    found: list[str] = []
    for pattern in patterns:
        if pattern == "*" or "/" in pattern:
            found.append(pattern)
        else:
            found += [f"{space}/{pattern}" for space in dict.fromkeys((DEFAULT_TENANT, tenant))]
    return found
