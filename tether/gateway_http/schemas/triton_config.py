"""Converts configurations to and from Triton's format: ``config`` of a model, and the parameter of a load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tether.domain.manifest import Batching, Manifest, TensorSpec
from tether.errors import InvalidRequest
from tether.gateway_http.schemas import triton
from tether.model.config import InstanceKind, ModelConfig, QueuePolicy, TimeoutAction, Warmup
from tether.wire import oip_json

_TYPES = {"BYTES": "TYPE_STRING"}
_KINDS = {InstanceKind.AUTO: "KIND_AUTO", InstanceKind.CPU: "KIND_CPU", InstanceKind.CUDA: "KIND_GPU"}


def triton_config(manifest: Manifest, config: ModelConfig, batching: Batching) -> triton.TritonConfig:
    """Return a version as Triton's ``ModelConfig``: Triton's datatypes, and dims without the batch axis if
    batched.

    ``max_batch_size`` is the rows of one run; a request may have more.
    """
    rows = batching.max_batch_size
    found = triton.TritonConfig(
        name=manifest.name,
        platform=manifest.platform,
        backend=manifest.platform.partition("_")[0],
        max_batch_size=rows,
        input=_tensors(manifest.inputs, batched=bool(rows)),
        output=_tensors(manifest.outputs, batched=bool(rows)),
        default_model_filename=manifest.files[0].path,
        version_policy=_versions(config),
        instance_group=[triton.InstanceGroup(f"{manifest.name}_0", config.instances, _KINDS[config.kind])],
        model_warmup=[_warmup(index, warmup, manifest, rows) for index, warmup in enumerate(config.warmup)],
    )
    if rows:
        delay_ms = batching.max_delay_ms if config.max_delay_ms is None else config.max_delay_ms
        found.dynamic_batching = triton.DynamicBatching(round(delay_ms * 1000), list(config.preferred_batch_sizes))
        if config.queue != QueuePolicy():
            found.dynamic_batching.default_queue_policy = _queue(config.queue)
    if config.cache_ttl_s:
        found.response_cache = triton.TritonCache(enable=True)
    return found


def _tensors(specs: tuple[TensorSpec, ...], *, batched: bool) -> list[triton.ConfigTensor]:
    return [
        triton.ConfigTensor(spec.name, _type(spec.datatype), list(spec.shape[1:] if batched else spec.shape))
        for spec in specs
    ]


def _type(datatype: str) -> str:
    return _TYPES.get(datatype, f"TYPE_{datatype}")


def _versions(config: ModelConfig) -> triton.TritonVersionPolicy:
    policy = config.versions
    if policy.specific:
        return triton.TritonVersionPolicy(specific=triton.SpecificVersions(list(policy.specific)))
    if policy.latest:
        return triton.TritonVersionPolicy(latest=triton.LatestVersions(policy.latest))
    return triton.TritonVersionPolicy(all=triton.AllVersions())


def _queue(queue: QueuePolicy) -> triton.TritonQueuePolicy:
    return triton.TritonQueuePolicy(
        timeout_action=queue.timeout_action.name,
        default_timeout_microseconds=round(queue.timeout_ms * 1000),
        allow_timeout_override=queue.allow_timeout_override,
        max_queue_size=queue.max_size,
    )


def _warmup(index: int, warmup: Warmup, manifest: Manifest, rows: int) -> triton.TritonWarmup:
    inputs = {}
    for spec in manifest.inputs:
        shape = list(spec.shape[1:] if rows else spec.shape)
        given = warmup.shapes.get(spec.name, tuple(1 if axis < 0 else axis for axis in shape))
        inputs[spec.name] = triton.WarmupInput(
            _type(spec.datatype), list(given), zero_data=not warmup.random, random_data=warmup.random
        )
    return triton.TritonWarmup(f"warmup {index + 1}", min(warmup.rows, rows), warmup.count, inputs)


# from Triton's format


class _Given(msgspec.Struct, forbid_unknown_fields=True):
    """Accepted fields of a load's configuration. Fields that describe the version are accepted and ignored."""

    name: str = ""
    platform: str = ""
    backend: str = ""
    input: list[Any] = []
    output: list[Any] = []
    default_model_filename: str = ""
    max_batch_size: int | None = None
    version_policy: triton.TritonVersionPolicy | None = None
    instance_group: list[triton.InstanceGroup] | None = None
    dynamic_batching: triton.DynamicBatching | None = None
    response_cache: triton.TritonCache | None = None
    model_warmup: list[triton.TritonWarmup] | None = None


_decoder = msgspec.json.Decoder(_Given)


def patch_of(text: str, names: Sequence[str], config: ModelConfig) -> dict[str, Any]:
    """Return the merge patch of ``config`` for a configuration in Triton's format.

    ``names`` are the names that the caller may use for its model.

    Raises:
        InvalidRequest, BadJson: naming the field that cannot be set.
    """
    given = oip_json.parse_body(_decoder, text.encode(), where="parameters.config")
    if given.name not in ("", *names):
        raise _unsupported("name", f"is '{given.name[:64]}', but the model is '{names[0]}'")
    patch: dict[str, Any] = {}
    if given.max_batch_size is not None:
        patch["max_batch_size"] = given.max_batch_size
    if given.version_policy is not None:
        patch["versions"] = _versions_of(given.version_policy)
    if given.instance_group:
        patch |= _instances_of(given.instance_group)
    if given.dynamic_batching is not None:
        patch |= _batching_of(given.dynamic_batching)
    if given.response_cache is not None:
        patch |= _cache_of(given.response_cache, config)
    if given.model_warmup is not None:
        patch["warmup"] = [_warmup_of(warmup) for warmup in given.model_warmup]
    return patch


def _versions_of(policy: triton.TritonVersionPolicy) -> dict[str, Any]:
    """Set both fields, since a merge patch keeps omitted ones."""
    found: dict[str, Any] = {"latest": 0, "specific": []}
    if isinstance(policy.latest, triton.LatestVersions):
        found["latest"] = policy.latest.num_versions
    if isinstance(policy.specific, triton.SpecificVersions):
        found["specific"] = policy.specific.versions
    return found


def _instances_of(groups: list[triton.InstanceGroup]) -> dict[str, Any]:
    if len(groups) > 1:
        raise _unsupported("instance_group", "has several groups; expected one")
    kinds = {name: kind.value for kind, name in _KINDS.items()}
    kind = kinds.get(groups[0].kind)
    if kind is None:
        raise _unsupported("instance_group", f"has an unknown kind; expected one of {', '.join(kinds)}")
    return {"instances": groups[0].count, "kind": kind}


def _batching_of(batching: triton.DynamicBatching) -> dict[str, Any]:
    patch: dict[str, Any] = {
        "max_delay_ms": batching.max_queue_delay_microseconds / 1000,
        "preferred_batch_sizes": batching.preferred_batch_size,
    }
    policy = batching.default_queue_policy
    if isinstance(policy, triton.TritonQueuePolicy):
        actions = {action.name: action.value for action in TimeoutAction}
        if policy.timeout_action not in actions:
            raise _unsupported("dynamic_batching.default_queue_policy.timeout_action", "must be REJECT or DELAY")
        patch["queue"] = {
            "max_size": policy.max_queue_size,
            "timeout_ms": policy.default_timeout_microseconds / 1000,
            "timeout_action": actions[policy.timeout_action],
            "allow_timeout_override": policy.allow_timeout_override,
        }
    return patch


def _cache_of(cache: triton.TritonCache, config: ModelConfig) -> dict[str, Any]:
    if cache.enable and not config.cache_ttl_s:
        raise _unsupported("response_cache", "has no lifetime; set cache_ttl_s with 'tether model config'")
    return {} if cache.enable else {"cache_ttl_s": None}


def _warmup_of(warmup: triton.TritonWarmup) -> dict[str, Any]:
    given = warmup.inputs
    return {
        "rows": max(1, warmup.batch_size),
        "count": max(1, warmup.count),
        "shapes": {name: one.dims for name, one in given.items()},
        "random": any(one.random_data for one in given.values()),
    }


def _unsupported(field: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"parameters.config: {field} {why}", field=f"parameters.config.{field}")
