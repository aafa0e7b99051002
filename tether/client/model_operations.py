"""Model operations as flows: promote, roll back, delete, configure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from tether.client.operations import Json, model_path, post, put
from tether.client.protocol import Flow, Request, RetryPolicy, exchange_json
from tether.errors import Conflict, InvalidRequest, ModelNotFound

PRODUCTION = "production"
LATEST = "latest"
"""The alias of the newest pushed version."""


def alias_path(name: str, alias: str) -> str:
    return f"{model_path(name)}/aliases/{quote(alias, safe='')}"


def promote(
    policy: RetryPolicy, name: str, version: int, alias: str, canary: float | None, *, sticky: bool, force: bool
) -> Flow[Json]:
    """Point ``alias`` at ``version``, or give it ``canary`` percent of the alias's requests.

    Raises:
        InvalidRequest: ``canary`` is not a percentage, or no other version can take the remaining
            requests.
    """
    body: Json = {"version": version}
    if canary is not None:
        body = {"split": (yield from _split(policy, name, version, alias, canary)), "sticky": sticky}
    ask = put(alias_path(name, alias), {**body, "force": force})
    return (yield from exchange_json(policy, ask, dict[str, Any]))


def _split(policy: RetryPolicy, name: str, version: int, alias: str, canary: float) -> Flow[list[Json]]:
    if not 0 < canary < 100:
        raise InvalidRequest(f"canary must be more than 0 and less than 100 percent, got {canary:g}", field="canary")
    try:
        now = yield from exchange_json(policy, Request("GET", alias_path(name, alias)), dict[str, Any])
    except ModelNotFound as error:
        raise InvalidRequest(f"{error.message}: promote a version to it before a canary", field="alias") from error
    stable = now["version"]
    others = [share["version"] for share in now["split"] if share["version"] != version]
    stable = others[0] if stable == version and others else stable
    if stable == version:
        raise InvalidRequest(f"alias '{alias}' points at version {version} already", field="version")
    return [{"version": stable, "weight": 100 - canary}, {"version": version, "weight": canary}]


def rollback(policy: RetryPolicy, name: str, alias: str) -> Flow[Json]:
    """Point ``alias`` at its previous version or split."""
    ask = post(f"{model_path(name)}/rollback", {"alias": alias}, repeatable=False)
    return (yield from exchange_json(policy, ask, dict[str, Any]))


def rekey(policy: RetryPolicy, name: str) -> Flow[Json]:
    """Rotate the key of an encrypted model."""
    return (yield from exchange_json(policy, post(f"{model_path(name)}/rekey", {}, repeatable=False), dict[str, Any]))


def delete(policy: RetryPolicy, name: str, version: int) -> Flow[Json]:
    """Delete a version that no alias points at."""
    ask = Request("DELETE", f"{model_path(name)}/versions/{version}")
    return (yield from exchange_json(policy, ask, dict[str, Any]))


def delete_model(policy: RetryPolicy, name: str, version: int | None, *, force: bool) -> Flow[list[int]]:
    """Delete a version, or all of a model's; return their numbers.

    The alias ``latest`` then moves to the newest remaining version, or is deleted. Other aliases need
    ``force``.

    Raises:
        Conflict: another alias points at one of them.
        ModelNotFound: there is no such model or version.
    """
    told = yield from exchange_json(policy, Request("GET", model_path(name)), dict[str, Any])
    there = [entry["version"] for entry in told["versions"]]
    gone = there if version is None else [version]
    left = [number for number in there if number not in gone]
    for alias, target in told["aliases"].items():
        found = yield from exchange_json(policy, Request("GET", alias_path(name, alias)), dict[str, Any])
        if not {target, *(share["version"] for share in found["split"])} & set(gone):
            continue
        if alias == LATEST and left:
            yield from exchange_json(
                policy, put(alias_path(name, alias), {"version": max(left), "force": True}), dict[str, Any]
            )
        elif alias == LATEST or force:
            yield from delete_alias(policy, name, alias)
        else:
            raise Conflict(
                f"alias '{alias}' points at version {target} of model '{name}'; --force deletes it too",
                field="version",
            )
    for number in gone:
        yield from delete(policy, name, number)
    return gone


def delete_alias(policy: RetryPolicy, name: str, alias: str) -> Flow[Json]:
    return (yield from exchange_json(policy, Request("DELETE", alias_path(name, alias)), dict[str, Any]))


STORE = "/v1/store"


def work_on_store(policy: RetryPolicy, work: str) -> Flow[Json]:
    """Request maintenance ``work`` of the chunk store. Idempotent."""
    return (yield from exchange_json(policy, post(f"{STORE}:{work}", {}, repeatable=True), dict[str, Any]))


def shadows(policy: RetryPolicy, name: str) -> Flow[list[Json]]:
    told = yield from exchange_json(policy, Request("GET", f"{model_path(name)}/shadows"), dict[str, Any])
    return list(told["shadows"])


# model configuration


def config_path(name: str) -> str:
    return f"{model_path(name)}/config"


def change_config(policy: RetryPolicy, name: str, method: str, patch: Json | None, revision: int | None) -> Flow[Json]:
    """PATCH or DELETE a configuration. Idempotent, unless it requires a revision."""
    body = b"" if patch is None else msgspec.json.encode(patch)
    headers = {} if patch is None else {"content-type": "application/json"}
    params = {} if revision is None else {"revision": str(revision)}
    ask = Request(method, config_path(name), body, params=params, headers=headers, repeatable=revision is None)
    return (yield from exchange_json(policy, ask, dict[str, Any]))


def load(policy: RetryPolicy, name: str, what: str) -> Flow[Json]:
    """Load or unload a model; ``what`` is "load" or "unload"."""
    path = f"/v2/repository/models/{quote(name, safe='')}/{what}"
    ask = Request("POST", path, b"{}", headers={"content-type": "application/json"}, timeout=policy.timeout)
    return (yield from exchange_json(policy, ask, dict[str, Any]))


def annotate(
    policy: RetryPolicy, name: str, version: int, labels: Mapping[str, str | None], note: str | None
) -> Flow[Json]:
    """Change labels and note of a version. Idempotent."""
    body = {"labels": dict(labels)} | ({} if note is None else {"note": note})
    headers = {"content-type": "application/json"}
    ask = Request("PATCH", f"{model_path(name)}/versions/{version}", msgspec.json.encode(body), headers=headers)
    return (yield from exchange_json(policy, ask, dict[str, Any]))
