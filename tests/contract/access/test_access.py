"""Who may call what: every route of the table with every kind of key. A route that is not in :data:`ASKED` fails here."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from support.http.served import Served
from support.models import models

from tether.domain import api_key
from tether.gateway_http.access.authentication import ANY_SCOPE
from tether.gateway_http.api import route_table
from tether.gateway_http.api.route_spec import RouteSpec

OTHER = "rival"
HIDDEN = "walk-hidden"
ABSENT = "walk-absent"
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that only access can stand in the way of. ``names``: what it names, for which 404 is the refusal;
    ``{model}`` and ``{job}`` stand for names in ``body`` and ``query`` too. ``lists``: where models or jobs are listed."""

    names: str = ""
    body: Any = None
    query: str = ""
    lists: str = ""


MODEL = Asked("model")
NOTHING = Asked()
INFER = {"inputs": [TENSOR]}
JOB = {"model": "{model}", "inputs": [TENSOR]}
DIGEST = hashlib.sha256(b"").hexdigest()
FILE = {"path": "model.onnx", "size": 1, "digest": DIGEST, "chunks": [DIGEST], "sizes": [1]}
KEY = {"tenant": "walked", "scopes": ["infer"]}

ASKED: dict[tuple[str, str], Asked] = {
    **dict.fromkeys([("GET", path) for path in ("/v2", "/v2/health/live", "/v2/health/ready")], NOTHING),
    **dict.fromkeys(
        [
            ("GET", root + tail)
            for root in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
            for tail in ("", "/ready", "/config")
        ],
        MODEL,
    ),
    ("POST", "/v2/models/{model}/infer"): Asked("model", INFER),
    ("POST", "/v2/models/{model}/versions/{version}/infer"): Asked("model", INFER),
    ("POST", "/v2/repository/index"): Asked(lists="model"),
    ("POST", "/v2/repository/models/{model}/load"): MODEL,
    ("POST", "/v2/repository/models/{model}/unload"): MODEL,
    ("POST", "/v1/inference"): Asked("model", {"modelId": "{model}", "inputData": [[1, 2, 3, 4]]}),
    ("POST", "/v1/jobs"): Asked("model", JOB),
    ("POST", "/v1/jobs:batch"): Asked("model", {"jobs": [JOB]}),
    ("GET", "/v1/jobs"): Asked("job", query="?ids={job}", lists="job"),
    ("GET", "/v1/jobs/{id}"): Asked("job"),
    ("DELETE", "/v1/jobs/{id}"): Asked("job"),
    ("GET", "/v1/models"): Asked(lists="model"),
    ("GET", "/v1/models/{name}"): MODEL,
    ("POST", "/v1/models/{name}/versions"): MODEL,
    ("POST", "/v1/sessions"): NOTHING,
    ("GET", "/v1/models/{name}/aliases/{alias}"): MODEL,
    ("PUT", "/v1/models/{name}/aliases/{alias}"): Asked("model", {"version": 1}),
    ("DELETE", "/v1/models/{name}/aliases/{alias}"): MODEL,
    ("GET", "/v1/models/{name}/shadows"): MODEL,
    ("POST", "/v1/models/{name}/rollback"): Asked("model", {"alias": "walked"}),
    ("DELETE", "/v1/models/{name}/versions/{version}"): MODEL,
    ("GET", "/v1/models/{name}/versions/{version}/files"): MODEL,
    ("GET", "/v1/models/{name}/versions/{version}/rollout"): MODEL,
    ("GET", "/v1/models/{name}/versions/{version}/chunks/{digest}"): MODEL,
    ("POST", "/v1/models/{name}/chunks:missing"): Asked("model", {"chunks": []}),
    ("PUT", "/v1/models/{name}/chunks/{digest}"): MODEL,
    ("POST", "/v1/models/{name}/versions:register"): Asked("model", {"files": [FILE]}),
    ("PATCH", "/v1/models/{name}/versions/{version}"): Asked("model", {"note": "walked"}),
    ("GET", "/v1/models/{name}/config"): MODEL,
    ("POST", "/v1/models/{name}/rekey"): MODEL,
    ("PATCH", "/v1/models/{name}/config"): Asked("model", {"instances": 1}),
    ("DELETE", "/v1/models/{name}/config"): MODEL,
    ("GET", "/v1/models/{name}/grants"): MODEL,
    ("PUT", "/v1/models/{name}/grants/{tenant}"): Asked("model", {"right": "use"}),
    ("DELETE", "/v1/models/{name}/grants/{tenant}"): MODEL,
    ("PUT", "/v1/models/{name}/owner"): Asked("model", {"tenant": "default"}),
    ("GET", "/v1/store"): NOTHING,
    ("POST", "/v1/store:collect"): NOTHING,
    ("POST", "/v1/store:scrub"): NOTHING,
    ("POST", "/v1/tenants"): Asked(body={"name": "walked"}),
    ("GET", "/v1/tenants"): NOTHING,
    ("GET", "/v1/tenants/{tenant}"): NOTHING,
    ("PATCH", "/v1/tenants/{tenant}"): Asked(body={}),
    ("DELETE", "/v1/tenants/{tenant}"): NOTHING,
    ("POST", "/v1/keys"): Asked(body=KEY),
    ("GET", "/v1/keys"): NOTHING,
    ("DELETE", "/v1/keys/{id}"): NOTHING,
    ("POST", "/v1/keys/{id}/rotate"): NOTHING,
    ("GET", "/v1/workers"): NOTHING,
    ("GET", "/v1/audit"): NOTHING,
    **dict.fromkeys([("GET", path) for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs")], NOTHING),
}

ROWS = route_table.table()


def label(row: RouteSpec) -> str:
    return f"{row.method} {row.path}"


@dataclasses.dataclass
class Walk:
    """A client without a key, the model ``HIDDEN`` and a job of it that tenant default owns, which shares it with nobody."""

    http: httpx.Client
    served: Served
    job: str

    def ask(self, row: RouteSpec, key: str | None, *, model: str = HIDDEN, job: str = "") -> httpx.Response:
        asked = ASKED[row.method, row.path]
        names = {
            "model": model,
            "name": model,
            "version": "1",
            "tenant": "walked-off",
            "digest": DIGEST,
            "alias": "walked",
            "job": job or self.job,
        }
        names["id"] = names["job"] if row.path.startswith("/v1/jobs") else "aaaaaaaa"
        path = filled(row.path + asked.query, names)
        content = b"" if asked.body is None else filled(msgspec.json.encode(asked.body).decode(), names).encode()
        headers = {} if key is None else {"x-api-key": key}
        return self.http.request(row.method, path, content=content, headers=headers)


def filled(text: str, names: dict[str, str]) -> str:
    return re.sub(r"\{(model|name|version|tenant|digest|alias|job|id)\}", lambda found: names[found[1]], text)


@pytest.fixture(scope="module")
def walk(served: Served) -> Iterator[Walk]:
    served.push(HIDDEN, models.add())
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http:
        assert http.delete(f"/v1/models/{HIDDEN}/grants/*", headers=served.headers).status_code == 200
        body = {"model": HIDDEN, "inputs": [TENSOR]}
        made = http.post("/v1/jobs", json=body, headers=served.headers)
        assert made.status_code == 202
        yield Walk(http, served, made.json()["id"])


def narrow(walk: Walk, row: RouteSpec, **changes: Any) -> str:
    """A key that has the route's scope, and what ``changes`` say of it."""
    text = walk.served.new_key(*scopes_of(row))
    keys = walk.served.services.gateway.keys
    record = keys.find(api_key.key_id(text) or "")
    assert record is not None
    walk.served.run(keys.store(msgspec.structs.replace(record, **changes)))
    return text


def scopes_of(row: RouteSpec) -> tuple[str, ...]:
    return ("infer",) if row.scope == ANY_SCOPE else (str(row.scope),)


def test_every_route_is_walked_and_none_that_is_not_there() -> None:
    assert {(row.method, row.path) for row in ROWS} == set(ASKED)


def test_a_route_that_names_a_model_or_a_job_is_asked_for_one() -> None:
    for row in ROWS:
        if re.search(r"\{(model|name)\}", row.path):
            assert ASKED[row.method, row.path].names == "model", row.path
        if row.path.startswith("/v1/jobs/"):
            assert ASKED[row.method, row.path].names == "job", row.path


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_without_a_key_only_open_routes_answer(walk: Walk, row: RouteSpec) -> None:
    for key in (None, "", api_key.new_key_text()):
        answer = walk.ask(row, key)
        # metrics may be asked for with a key, and a wrong one is refused
        asks = row.scope is not None or (row.path == "/metrics" and bool(key))
        assert (answer.status_code == 401) is asks, answer.text


@pytest.mark.parametrize("row", [row for row in ROWS if row.scope not in (None, ANY_SCOPE)], ids=label)
def test_without_its_scope_a_key_is_refused_and_with_it_alone_it_is_not(walk: Walk, row: RouteSpec) -> None:
    lesser = [scope for scope in api_key.SCOPES if scope not in (row.scope, "admin")]
    for scopes in [*([scope] for scope in lesser), lesser]:
        answer = walk.ask(row, walk.served.new_key(*scopes))
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), scopes
    assert walk.ask(row, narrow(walk, row)).status_code not in (401, 403)


NAMING = [row for row in ROWS if ASKED.get((row.method, row.path), NOTHING).names]


@pytest.mark.parametrize("row", [row for row in NAMING if ASKED[row.method, row.path].names == "model"], ids=label)
def test_a_model_that_a_key_may_not_use_looks_like_one_that_is_not_there(walk: Walk, row: RouteSpec) -> None:
    key = narrow(walk, row, models=("other-*", ABSENT))
    hidden, absent = walk.ask(row, key), walk.ask(row, key, model=ABSENT)
    assert hidden.status_code == 404, hidden.text
    assert hidden.json()["code"] == "model_not_found"
    if row.scope != "models:write":
        assert seen(hidden, HIDDEN) == seen(absent, ABSENT)


def seen(answer: httpx.Response, name: str) -> tuple[Any, ...]:
    body = answer.json()
    body.pop("request_id")
    headers = sorted(name for name in answer.headers if name not in ("content-length", "connection"))
    return answer.status_code, {field: text.replace(name, "NAME") for field, text in body.items()}, headers


RIGHTS = ["stranger", "use", "write", "own"]
"""Tenants by what they may do with ``HIDDEN``; the last is the tenant that pushed it."""

OWNERS_ALONE = [row for row in ROWS if "/grants" in row.path]
OF_FILES = [
    row for row in ROWS if row.path.endswith(("/files", "/chunks/{digest}", "/shadows")) and row.method == "GET"
]
PUSHES = [
    row
    for row in ROWS
    if row.path.endswith(("/versions", ":missing", ":register")) or (row.method == "PUT" and "/chunks/" in row.path)
]


def needs(row: RouteSpec) -> str:
    if row in OWNERS_ALONE:
        return "own"
    return "write" if row.scope == "models:write" or row in OF_FILES else "use"


def grant(walk: Walk, tenant: str, right: str) -> None:
    path = f"/v1/models/{HIDDEN}/grants/{tenant}"
    answer = walk.http.put(path, json={"right": right}, headers=walk.served.headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "row",
    [row for row in NAMING if ASKED[row.method, row.path].names == "model" and row.scope != "admin"],
    ids=label,
)
def test_what_a_tenant_may_do_with_another_tenants_model_is_what_it_was_granted(walk: Walk, row: RouteSpec) -> None:
    for right in ("use", "write"):
        grant(walk, f"tenant-{right}", right)
    for right in RIGHTS:
        key = narrow(walk, row) if right == "own" else narrow(walk, row, tenant=f"tenant-{right}")
        # a push of the plain name by who may not write to the model is one into the tenant's own namespace
        foreign = row in PUSHES and right in ("stranger", "use")
        answer = walk.ask(row, key, model=f"default/{HIDDEN}" if foreign else HIDDEN)
        told = (answer.status_code, answer.json().get("code") if answer.status_code >= 400 else "")
        if RIGHTS.index(right) >= RIGHTS.index(needs(row)):
            assert told[0] != 403, (right, answer.text)
            assert f"there is no model '{HIDDEN}'" not in answer.text, right
            assert "is taken" not in answer.text, right
        elif right != "stranger" or foreign:
            assert told == (403, "forbidden"), (right, answer.text)
        else:
            assert told == (404, "model_not_found"), answer.text
            assert f"there is no model '{HIDDEN}'" in answer.text
        assert "tenant-" not in answer.text or row in OWNERS_ALONE, answer.text


def test_only_an_administrator_hands_a_model_over(walk: Walk) -> None:
    (row,) = (row for row in ROWS if row.path.endswith("/owner"))
    answer = walk.ask(row, walk.served.new_key("models:read", "models:write"))
    assert answer.status_code == 403
    assert walk.ask(row, narrow(walk, row, tenant=OTHER)).status_code == 200


@pytest.mark.parametrize("row", [row for row in NAMING if ASKED[row.method, row.path].names == "job"], ids=label)
def test_a_job_of_another_tenant_or_of_a_hidden_model_looks_like_one_that_is_not_there(
    walk: Walk, row: RouteSpec
) -> None:
    absent = "0" * 32
    for changes in ({"tenant": OTHER}, {"models": ("other-*",)}):
        key = narrow(walk, row, **changes)
        answer = walk.ask(row, key)
        assert answer.status_code == 404, answer.text
        assert answer.json()["code"] == "job_not_found"
        assert seen(answer, walk.job) == seen(walk.ask(row, key, job=absent), absent)


@pytest.mark.parametrize("row", [row for row in ROWS if ASKED.get((row.method, row.path), NOTHING).lists], ids=label)
def test_lists_leave_out_what_a_key_may_not_use(walk: Walk, row: RouteSpec) -> None:
    what = HIDDEN if ASKED[row.method, row.path].lists == "model" else walk.job

    def listed(key: str) -> str:
        return walk.http.request(row.method, row.path, headers={"x-api-key": key}).text

    assert what in listed(narrow(walk, row))
    assert what not in listed(narrow(walk, row, models=("other-*",)))
    if what == walk.job:
        assert what not in listed(narrow(walk, row, tenant=OTHER))


def test_the_tenants_patterns_bound_those_of_its_keys_at_once(walk: Walk) -> None:
    row = next(row for row in ROWS if row.path == "/v2/models/{model}/infer")
    key = narrow(walk, row, tenant="bounded")
    admin = {"headers": walk.served.headers}
    loaded = walk.http.post(f"/v2/repository/models/{HIDDEN}/load", **admin)  # type: ignore[arg-type]
    assert loaded.status_code == 200, "another test asked to unload it"
    grant(walk, "bounded", "use")
    assert walk.ask(row, key).status_code == 200
    walk.http.post("/v1/tenants", json={"name": "bounded", "models": ["other-*"]}, **admin)  # type: ignore[arg-type]
    assert walk.ask(row, key).status_code == 404
    walk.http.patch("/v1/tenants/bounded", json={"models": ["walk-*"]}, **admin)  # type: ignore[arg-type]
    assert walk.ask(row, key).status_code == 200


def test_what_a_caller_may_use_is_remembered_within_bounds(walk: Walk) -> None:
    key = walk.served.new_key("infer")
    caller = walk.served.services.gateway.keys.authenticate(key, "infer")
    assert all(caller.may_use_model(f"m{number}") for number in itertools.islice(itertools.count(), 10_000))
    assert len(caller._decisions) <= 4096
