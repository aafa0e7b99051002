"""Changes of a model's configuration: requests to the model store, and checks of patches. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, get_args, get_type_hints

import msgspec

from tether.domain.manifest import Alias, Manifest
from tether.errors import InvalidRequest
from tether.model.config import COMPILED, InstanceKind, LoadBalancing, Loading, ModelConfig, TimeoutAction, check_config

ENDPOINT = "configureModel"

ANY_REVISION = -1

STAMPS = ("model", "revision", "changed_at", "changed_by")
"""Fields that only the model store writes."""

KEPT = ("loaded",)
"""Fields that a reset keeps: they have their own commands."""


class ConfigAction(StrEnum):
    """Actions on a configuration."""

    SHOW = "show"
    CHANGE = "change"
    RESET = "reset"
    NOTE = "note"
    """Change the labels and note of one version."""


class ConfigRequest(msgspec.Struct, frozen=True):
    """Gateway to model store: show, patch (RFC 7396) or reset a configuration, or change labels and note of a
    ``version``.

    ``by`` is the requesting API key, ``tenant`` its tenant, ``admin`` whether it may change every tenant's
    models. Unless ``revision`` is ``ANY_REVISION``, only that revision is changed.
    """

    action: ConfigAction
    model: str
    patch: dict[str, Any] = {}
    revision: int = ANY_REVISION
    by: str = ""
    version: int = 0
    tenant: str = ""
    admin: bool = False


WORDS: Mapping[str, type[StrEnum]] = {
    "kind": InstanceKind,
    "load_balancing": LoadBalancing,
    "loading": Loading,
    "queue.timeout_action": TimeoutAction,
}
"""Fields with a closed set of values."""


def patched(config: ModelConfig, patch: Mapping[str, Any]) -> ModelConfig:
    """Apply a merge patch to ``config``: objects are merged, other values replaced, null resets to the
    default.

    Raises:
        InvalidRequest: naming a field that is unknown, read-only or invalid.
    """
    for name in STAMPS:
        if name in patch:
            raise InvalidRequest(f"{name} cannot be set: the model store writes it", field=name)
    _check_names(patch, ModelConfig, "")
    merged = _merged(msgspec.to_builtins(config), patch)
    try:
        return check_config(msgspec.convert(merged, ModelConfig))
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at ")
        field = path.strip("`").removeprefix("$.")[:64] or "config"
        known = f"; expected {' or '.join(WORDS[field])}" if field in WORDS else ""
        raise InvalidRequest(f"{field} is invalid: {reason[:300]}{known}", field=field) from error
    except (OverflowError, RecursionError) as error:
        raise InvalidRequest("a number of the configuration is too large", field="config") from error


def reset(config: ModelConfig) -> ModelConfig:
    """Return the default configuration, except for fields that have their own commands."""
    kept = {name: getattr(config, name) for name in KEPT}
    return ModelConfig(config.model, revision=config.revision, **kept)


def _merged(value: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(value)
    for name, new in patch.items():
        if new is None:
            found.pop(name, None)
        elif isinstance(new, Mapping):
            old = found.get(name)
            found[name] = _merged(old if isinstance(old, Mapping) else {}, new)
        else:
            found[name] = new
    return found


def _check_names(patch: Any, kind: type[msgspec.Struct], where: str) -> None:
    """Reject unknown fields, here and in nested structs; types are checked by the conversion."""
    if not isinstance(patch, Mapping):
        return
    hints = get_type_hints(kind)
    for name, value in patch.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, 1)
            known = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(hints)}"
            shown = f"{where}{str(name)[:64]}"
            raise InvalidRequest(f"unknown field {shown!r}; {known}", field=shown)
        inner = _struct_in(hints[name])
        for index, part in enumerate(value if isinstance(value, list | tuple) else [value]):
            if inner is not None:
                place = f"{where}{name}[{index}]." if isinstance(value, list | tuple) else f"{where}{name}."
                _check_names(part, inner, place)


def _struct_in(hint: Any) -> type[msgspec.Struct] | None:
    """Return the struct type of a field, or of the items of its list."""
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return kind
    return None


def check_against(
    config: ModelConfig, before: ModelConfig, manifests: Sequence[Manifest], aliases: Iterable[Alias]
) -> None:
    """Check new settings against the existing versions; settings from before are kept, even of deleted
    versions.

    Raises:
        InvalidRequest: naming the field, and the existing values.
    """
    numbers = [manifest.version for manifest in manifests]
    _check_known("versions.specific", set(config.versions.specific) - set(before.versions.specific), numbers, config)
    for index, shadow in enumerate(config.shadows):
        if shadow in before.shadows:
            continue
        _check_known(f"shadows[{index}].version", {shadow.version}, numbers, config)
        names = sorted(alias.name for alias in aliases)
        if shadow.alias and shadow.alias not in names:
            listed = ", ".join(f"'{name}'" for name in names)
            raise InvalidRequest(
                f"shadows[{index}].alias: model '{config.model}' has no alias '{shadow.alias[:64]}'; it has {listed}",
                field=f"shadows[{index}].alias",
            )
    most = max((manifest.batching.max_batch_size for manifest in manifests), default=0)
    if manifests and (config.max_batch_size, config.preferred_batch_sizes) != (
        before.max_batch_size,
        before.preferred_batch_sizes,
    ):
        _check_sizes(config, most)
    if config.warmup != before.warmup:
        _check_warmups(config, manifests)
    if config.compile and not before.compile:
        _check_compiled(config, manifests)


def _check_known(field: str, wanted: Iterable[int], numbers: Sequence[int], config: ModelConfig) -> None:
    for number in sorted(set(wanted) - set(numbers)):
        listed = ", ".join(str(known) for known in sorted(numbers)[-8:])
        raise InvalidRequest(f"{field}: model '{config.model}' has no version {number}; it has {listed}", field=field)


def _check_sizes(config: ModelConfig, most: int) -> None:
    sizes = {
        "max_batch_size": config.max_batch_size or 0,
        "preferred_batch_sizes": max(config.preferred_batch_sizes, default=0),
    }
    for field, size in sizes.items():
        if size > most:
            raise InvalidRequest(
                f"{field} is {size}, but no version of model '{config.model}' accepts more than {most} rows; "
                "a configuration may only lower that: push a version with --max-batch-size to declare more",
                field=field,
            )


def _check_compiled(config: ModelConfig, manifests: Sequence[Manifest]) -> None:
    there = {manifest.platform for manifest in manifests}
    if there and not there & set(COMPILED):
        raise InvalidRequest(
            f"compile supports {' and '.join(COMPILED)}, but model '{config.model}' has versions for "
            f"{', '.join(sorted(there))} only; push one made with torch.export",
            field="compile",
        )


def _check_warmups(config: ModelConfig, manifests: Sequence[Manifest]) -> None:
    for index, warmup in enumerate(config.warmup):
        for name, shape in warmup.shapes.items():
            field = f"warmup[{index}].shapes.{name[:64]}"
            ranks = [
                len(spec.shape) - (1 if manifest.batching.max_batch_size else 0)
                for manifest in manifests
                for spec in manifest.inputs
                if spec.name == name
            ]
            if not ranks:
                raise InvalidRequest(f"{field}: no version of model '{config.model}' has such an input", field=field)
            if len(shape) not in ranks:
                raise InvalidRequest(
                    f"{field} has {len(shape)} axes; the input has {max(ranks)} without the batch axis", field=field
                )
