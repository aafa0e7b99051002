"""What keeps a tenant out of another's namespace: spellings of names, patterns of keys, names of tenants that were removed."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support.http.served import Served
from support.http.tenant_http import INPUT, Tenant, pushed
from support.models import models
from support.platform.platforms import tether

SPELLINGS = [
    "{tenant}/{model}", "{tenant}%2F{model}", "{tenant}%2f{model}", "{tenant}%252F{model}", "{tenant}%252f{model}",
    "{tenant}%25252F{model}", "{tenant}//{model}", "{tenant}/./{model}", "./{tenant}/{model}", "x/../{tenant}/{model}",
    "{tenant}/x/../{model}", "..%2F{tenant}%2F{model}", "default%2F{tenant}%2F{model}", "default/{tenant}/{model}",
    "default/../{tenant}/{model}", "{tenant}%5C{model}", "{tenant}~{model}", "{tenant}={model}", "{tenant}.{model}",
    "{tenant}+{model}", "{tenant}:{model}", "%2F{tenant}%2F{model}", "{tenant}%2F%2F{model}", "{tenant}%2F{model}%2F",
    "{tenant}%2F{model}%00", "%00{tenant}%2F{model}", "{tenant}%00%2F{model}", "{tenant}%2F{model}%0a", "{tenant}%20%2F{model}",
    "{upper}%2F{model}", "{tenant}%2F{model_upper}", "{tenant}%EF%BC%8F{model}", "{tenant}%E2%88%95{model}",
    "{tenant}%c0%af{model}", "{tenant}%2F{model}" + "x" * 200, "x" * 200 + "%2F{tenant}%2F{model}", "*%2F{model}", "{tenant}%2F*",
    "shared%2F{model}", "{model}", "default%2F{model}", "%7Btenant%7D%2F{model}",
]  # fmt: skip

ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/v2/models/{}", None),
    ("GET", "/v2/models/{}/ready", None),
    ("GET", "/v2/models/{}/config", None),
    ("GET", "/v2/models/{}/versions/1", None),
    ("POST", "/v2/models/{}/infer", INPUT),
    ("POST", "/v2/models/{}/versions/1/infer", INPUT),
    ("POST", "/v2/repository/models/{}/load", None),
    ("POST", "/v2/repository/models/{}/unload", None),
    ("GET", "/v1/models/{}", None),
    ("GET", "/v1/models/{}/config", None),
    ("PATCH", "/v1/models/{}/config", {"instances": 2}),
    ("DELETE", "/v1/models/{}/config", None),
    ("GET", "/v1/models/{}/shadows", None),
    ("GET", "/v1/models/{}/grants", None),
    ("PUT", "/v1/models/{}/grants/thief", {"right": "write"}),
    ("PUT", "/v1/models/{}/aliases/taken", {"version": 1}),
    ("GET", "/v1/models/{}/aliases/latest", None),
    ("DELETE", "/v1/models/{}/aliases/latest", None),
    ("POST", "/v1/models/{}/rollback", {"alias": "latest"}),
    ("DELETE", "/v1/models/{}/versions/1", None),
    ("PATCH", "/v1/models/{}/versions/1", {"note": "x"}),
    ("GET", "/v1/models/{}/versions/1/files", None),
    ("POST", "/v1/models/{}/rekey", None),
    ("POST", "/v1/models/{}/chunks:missing", {"chunks": []}),
]


def raw(served: Served, key: str, method: str, path: str, body: Any) -> tuple[int, str]:
    """A request whose path goes out as it is written."""
    url = urlsplit(served.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
    try:
        content = b"" if body is None else json.dumps(body).encode()
        connection.request(method, path, body=content, headers={"x-api-key": key, "content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def everything(owner: Tenant, model: str) -> dict[str, Any]:
    """All that is decided about a model."""
    paths = ("", "/config", "/grants", "/aliases/latest", "/versions/1/files", "/shadows")
    found: dict[str, Any] = {path: owner.http.get(f"/v1/models/{model}{path}").json() for path in paths}
    for version in found[""]["versions"]:
        for passing in ("ready", "workers", "reason"):
            version.pop(passing)
    return found


def test_no_spelling_reaches_another_tenants_model(served: Served, one: Tenant, two: Tenant, name: str) -> None:
    pushed(one, name)
    before = everything(one, name)
    words = {"tenant": one.name, "model": name, "upper": one.name.upper(), "model_upper": name.upper()}
    told: set[int] = set()
    for spelling in SPELLINGS:
        written = spelling.format(**words)
        for method, path, body in ROUTES:
            status, text = raw(served, two.key, method, path.format(written), body)
            pushes = path.endswith(":missing") and status in (200, 403)
            assert pushes or status in (400, 404, 405, 414, 431), (method, path, written, text)
            assert '"versions"' not in text, (written, text)
            told.add(status)
    assert {400, 403, 404} <= told
    for spelling in SPELLINGS:
        written = (
            httpx.URL(f"http://x/{spelling.format(**words)}").path[1:] if "%" in spelling else spelling.format(**words)
        )
        for route, asked in (
            ("/v1/inference", {"modelId": written, "inputData": [[1.0] * 4]}),
            ("/v1/jobs", {"model": written, **INPUT}),
        ):
            answer = two.http.post(route, json=asked)
            assert answer.status_code in (400, 404), (route, written, answer.text)
    assert everything(one, name) == before
    assert two.listed().keys().isdisjoint({name, f"{one.name}/{name}"})


def test_a_hidden_model_of_another_namespace_looks_like_one_that_is_not_there(
    served: Served, one: Tenant, two: Tenant, name: str
) -> None:
    pushed(one, name)
    for method, path, body in [*ROUTES, ("POST", "/v1/models/{}/versions", None)]:
        hidden, absent = (
            raw(served, two.key, method, path.format(f"{one.name}%2F{model}"), body) for model in (name, "absent")
        )
        said = [
            text.replace(name, "M").replace("absent", "M").partition('"request_id"')[0] for _, text in (hidden, absent)
        ]
        assert (hidden[0], said[0]) == (absent[0], said[1]), path


def test_no_pattern_of_a_key_gains_anything(
    served: Served, default: Tenant, one: Tenant, two: Tenant, name: str
) -> None:
    pushed(one, name)
    pushed(two, name)

    def statuses(*patterns: str) -> list[int]:
        with served.client() as admin:
            asked = {"tenant": two.name, "scopes": ["infer"], "models": list(patterns)}
            made = admin.post("/v1/keys", json=asked)
            assert made.status_code == 201, made.text
        headers = {"x-api-key": made.json()["key"]}
        return [
            two.http.post(f"/v2/models/{written}/infer", json=INPUT, headers=headers).status_code
            for written in (name, two.seen(name), one.seen(name), f"default%2F{name}")
        ]

    every = (
        "*",
        f"{one.name}/*",
        f"*/{name}",
        f"{one.name}/{name}",
        "*/*",
        name,
        "same-*",
        f"{two.name}/*",
        "default/*",
    )
    for pattern in every:
        assert statuses(pattern)[2:] == [404, 404], pattern
    own = [200, 200, 404, 404]
    for pattern in ("*", f"*/{name}", "*/*", name, "same-*", f"{two.name}/*", f"{two.name}/{name}"):
        assert statuses(pattern) == own, pattern
    for pattern in (f"{one.name}/*", "default/*", f"{two.name}*", f"{two.name}-*/*", "x*"):
        assert statuses(pattern) == [404] * 4, pattern
    one.grant(name, two.name, "use")
    pushed(default, name)
    for pattern, wanted in (
        ("*", [200, 200, 200, 200]),
        (name, [200, 200, 404, 200]),
        (f"{one.name}/*", [404, 404, 200, 404]),
        (f"{two.name}/*", [200, 200, 404, 404]),
        ("default/*", [404, 404, 404, 200]),
    ):
        assert statuses(pattern) == wanted, pattern


def test_an_administrator_bounded_by_patterns_gives_no_more_than_it_has(served: Served) -> None:
    with served.client() as admin:
        asked = {"tenant": "default", "scopes": ["admin"], "models": ["fraud-*"]}
        key = admin.post("/v1/keys", json=asked).json()["key"]
        for models, status in ((["fraud-a"], 403), (["default/fraud-a"], 201), (["acme/fraud-a"], 403), (["*"], 403)):
            made = admin.post(
                "/v1/keys", json={"tenant": "acme", "scopes": ["infer"], "models": models}, headers={"x-api-key": key}
            )
            assert made.status_code == status, (models, made.text)
        made = admin.post("/v1/keys", json={"tenant": "acme", "scopes": ["infer"]}, headers={"x-api-key": key})
        assert made.json()["models"] == ["default/fraud-*"]


@pytest.mark.parametrize("word", ["ready", "config", "versions", "infer"])
def test_a_word_of_a_path_is_no_tenants_model(one: Tenant, default: Tenant, word: str) -> None:
    for path in (word, f"{one.name}%2F{word}"):
        answer = one.push(path)
        assert answer.status_code in (400, 404, 405), answer.text
    answer = one.http.post("/v1/models/" + word + "/versions", content=models.add())
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_name")
    assert "a word of the HTTP interface" in answer.json()["error"]


def test_nobody_gets_the_name_of_a_tenant_that_was_removed(served: Served, two: Tenant, name: str) -> None:
    gone = f"gone-{name}"
    with served.client() as admin:
        assert admin.post("/v1/tenants", json={"name": gone}).status_code == 201
        made = admin.post("/v1/keys", json={"tenant": gone, "scopes": ["infer", "models:read", "models:write"]}).json()
        headers = {"x-api-key": made["key"]}
        assert admin.post(f"/v1/models/{name}/versions", content=models.add(), headers=headers).status_code == 201
        assert admin.delete(f"/v1/keys/{made['id']}").status_code == 200
        assert admin.delete(f"/v1/tenants/{gone}").status_code == 200
        refused = [
            admin.post("/v1/tenants", json={"name": gone}),
            admin.post("/v1/keys", json={"tenant": gone, "scopes": ["infer"]}),
        ]
        for answer in refused:
            assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
            assert "was removed" in answer.json()["error"]
        assert admin.get(f"/v1/tenants/{gone}").status_code == 404
        assert gone not in [entry["name"] for entry in admin.get("/v1/tenants").json()["tenants"]]
        assert admin.get(f"/v1/models/{gone}%2F{name}").json()["name"] == f"{gone}/{name}"
        done = tether(
            served.home,
            "tenant",
            "create",
            gone,
            "--restore",
            env={"TETHER_URL": served.url, "TETHER_API_KEY": served.key},
        )
        assert done.returncode == 0, done.stderr
        again = admin.post("/v1/keys", json={"tenant": gone, "scopes": ["models:read"]}).json()
        listed = admin.get("/v1/models", headers={"x-api-key": again["key"]}).json()["models"]
        assert (name, "own") in [(entry["name"], entry["right"]) for entry in listed]
        assert admin.post("/v1/tenants", json={"name": gone, "restore": True}).status_code == 409
