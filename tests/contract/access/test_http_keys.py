"""API keys: their rights, their end, and what a refusal tells."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from support.http.documented import Document, assert_error
from support.http.served import TENANT, Served, until
from support.models import models

from tether import Client
from tether.domain import api_key
from tether.errors import Unauthenticated
from tether.gateway_http import gateway


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    served.push("plus", models.add())
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


def made(http: httpx.Client, **wanted: Any) -> dict[str, Any]:
    answer = http.post("/v1/keys", json={"tenant": TENANT, "scopes": ["models:read"], **wanted})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def listed(http: httpx.Client, key: dict[str, Any]) -> dict[str, Any]:
    (entry,) = [entry for entry in http.get("/v1/keys").json()["keys"] if entry["id"] == key["id"]]
    found: dict[str, Any] = entry
    return found


def status(http: httpx.Client, key: dict[str, Any]) -> int:
    return http.get("/v1/models", headers={"x-api-key": key["key"]}).status_code


def change(served: Served, key: dict[str, Any], **changes: Any) -> None:
    keys = served.services.gateway.keys
    record = keys.find(key["id"])
    assert record is not None
    served.run(keys.store(msgspec.structs.replace(record, **changes)))


def test_a_key_keeps_and_tells_its_limits(http: httpx.Client) -> None:
    limits = {"models": ["plus", "a-*"], "rate": 100.0, "burst": 200, "concurrency": 50}
    key = made(http, **limits, expires_s=3600, name="limited")
    for shown in (key, listed(http, key)):
        assert {name: shown[name] for name in limits} == limits
        assert shown["expires_at"] > shown["created_at"]
    assert "key" not in listed(http, key)


@pytest.mark.parametrize(
    ("wanted", "code", "word"),
    [
        ({"models": ["not a name"]}, "invalid_request", "models"),
        ({"models": []}, "bad_json", "models"),
        ({"rate": -1}, "bad_json", "rate"),
        ({"burst": 1.5}, "bad_json", "burst"),
        ({"concurrency": -1}, "bad_json", "concurrency"),
        ({"expires_s": -1}, "bad_json", "expires_s"),
        ({"tenant": "shared"}, "bad_name", "reserved"),
    ],
)
def test_limits_that_cannot_be_are_refused_by_field(
    http: httpx.Client, wanted: dict[str, Any], code: str, word: str
) -> None:
    answer = http.post("/v1/keys", json={"tenant": "t", "scopes": ["infer"], **wanted})
    assert_error(answer, 400, code, word)


def test_a_key_counts_until_it_expires(http: httpx.Client) -> None:
    key = made(http, expires_s=0.5)
    assert status(http, key) == 200
    until(lambda: status(http, key) == 401, "the key is expired")


def test_the_last_use_of_a_key_is_told_by_every_gateway(http: httpx.Client, served: Served) -> None:
    key = made(http)
    assert "last_used_at" not in listed(http, key)
    before = time.time()
    assert status(http, key) == 200
    assert listed(http, key)["last_used_at"] is not None
    uses = served.services.gateway.keys.uses
    assert served.run(uses.write()) >= 1
    assert status(http, key) == 200
    assert served.run(uses.write()) == 0, "a key is written about once a minute"
    assert served.run(uses.write(every_s=0.0)) >= 1

    async def elsewhere() -> float:
        async with gateway.running(served.services.settings, served.home) as other:
            return (await other.keys.uses.last())[key["id"]]

    assert before <= served.run(elsewhere()) <= time.time()


# rotation


def test_a_rotated_key_has_the_same_rights_and_the_old_one_ends_after_the_grace(http: httpx.Client) -> None:
    old = made(http, models=["plus"], rate=7.0, burst=9, concurrency=3, expires_s=1000, name="r")
    answer = http.post(f"/v1/keys/{old['id']}/rotate", json={"grace_s": 1.0})
    assert answer.status_code == 201
    new = answer.json()
    same = ("tenant", "scopes", "name", "models", "rate", "burst", "concurrency")
    assert [new[name] for name in same] == [old[name] for name in same]
    assert (new["replaces"], new["id"] != old["id"]) == (old["id"], True)
    assert new["expires_at"] > old["expires_at"]
    assert (status(http, old), status(http, new)) == (200, 200)
    until(lambda: status(http, old) == 401, "the old key is over")
    assert status(http, new) == 200
    assert_error(http.post(f"/v1/keys/{old['id']}/rotate"), 409, "conflict", old["id"])


def test_without_a_grace_the_old_key_ends_at_once(http: httpx.Client) -> None:
    old = made(http)
    new = http.post(f"/v1/keys/{old['id']}/rotate").json()
    assert (status(http, old), status(http, new)) == (401, 200)
    assert_error(http.post("/v1/keys/aaaaaaaa/rotate"), 404, "not_found", "aaaaaaaa")


def test_a_grace_does_not_make_a_key_live_longer(http: httpx.Client) -> None:
    old = made(http, expires_s=1.0)
    http.post(f"/v1/keys/{old['id']}/rotate", json={"grace_s": 3600})
    until(lambda: status(http, old) == 401, "the old key is over when it always was")


# refusals


@dataclasses.dataclass
class Refusal:
    """One way not to have a key that counts."""

    name: str
    headers: dict[str, str]


@pytest.fixture
def refusals(http: httpx.Client, served: Served) -> list[Refusal]:
    revoked, expired, wrong = made(http), made(http), made(http)
    change(served, revoked, revoked=True)
    change(served, expired, expires_at=time.time() - 5)
    cut = wrong["key"][:-1] + ("A" if wrong["key"][-1] != "A" else "B")
    texts = {
        "unknown": api_key.new_key_text(),
        "wrong": cut,
        "revoked": revoked["key"],
        "expired": expired["key"],
        "malformed": "x" * 55,
        "a session that nobody signed": "ts_" + "A" * 52,
    }
    return [Refusal("missing", {}), *[Refusal(name, {"x-api-key": text}) for name, text in texts.items()]]


def told(answer: httpx.Response) -> tuple[Any, ...]:
    body = answer.json()
    assert body.pop("request_id") == answer.headers["x-request-id"]
    headers = {name: value for name, value in answer.headers.items() if name not in ("date", "x-request-id")}
    return answer.status_code, body, headers


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/models"), ("POST", "/v2/models/plus/infer"), ("POST", "/v1/jobs")]
)
def test_no_key_and_every_key_that_does_not_count_get_the_same_answer(
    served: Served, refusals: list[Refusal], method: str, path: str
) -> None:
    with httpx.Client(base_url=served.url, trust_env=False) as plain:
        answers = [told(plain.request(method, path, headers=refusal.headers)) for refusal in refusals]
    assert answers[0][:2] == (401, {"error": "Invalid API key", "code": "unauthenticated"})
    assert all(answer == answers[0] for answer in answers)


def test_a_refusal_takes_the_same_time_whatever_is_wrong_with_the_key(served: Served, refusals: list[Refusal]) -> None:
    """Interleaved, so that whatever else the machine does meets all of them; medians, so that a pause does not count."""
    authenticate = served.services.gateway.keys.authenticate
    spent: dict[str, list[float]] = {refusal.name: [] for refusal in refusals if "session" not in refusal.name}
    texts = {refusal.name: refusal.headers.get("x-api-key", "") for refusal in refusals}
    for _ in range(3000):
        for name, times in spent.items():
            times.append(refused_after(authenticate, texts[name]))
    medians = {name: statistics.median(times) for name, times in spent.items()}
    assert max(medians.values()) - min(medians.values()) < 3e-6, medians


def refused_after(authenticate: Callable[[str, str], object], text: str) -> float:
    """Seconds until a key was refused."""
    began = time.perf_counter()
    try:
        authenticate(text, "infer")
    except Unauthenticated:
        return time.perf_counter() - began
    raise AssertionError("it was not refused")


def test_an_admin_key_that_is_bounded_gives_no_more_than_it_has(http: httpx.Client, served: Served) -> None:
    """Neither to a key that it makes, nor by rotating one, nor to a tenant."""
    wide = made(http)
    bounded = made(http, scopes=["admin"], models=["own-*", "*-shared"])
    headers = {"x-api-key": bounded["key"]}
    first = http.post("/v1/keys", json={"tenant": TENANT, "scopes": ["infer"]}, headers=headers)
    assert (first.status_code, first.json()["models"]) == (201, ["own-*", "*-shared"]), "as wide as it may be"
    for patterns in (["own-*"], ["own-a*"], ["a*-shared", "own-x"]):
        less = http.post("/v1/keys", json={"tenant": TENANT, "scopes": ["admin"], "models": patterns}, headers=headers)
        assert less.status_code == 201, patterns
    for patterns in (["*"], ["own*"], ["own-*", "a"], ["*own-*"]):
        body = {"tenant": "elsewhere", "scopes": ["infer"], "models": patterns}
        assert_error(
            http.post("/v1/keys", json=body, headers=headers), 403, "forbidden", "may use, and grant, only models"
        )
        change = {"name": "bounded-tenant", "models": patterns}
        assert_error(
            http.post("/v1/tenants", json=change, headers=headers), 403, "forbidden", "may use, and grant, only models"
        )
    rotated = http.post(f"/v1/keys/{wide['id']}/rotate", headers=headers)
    assert_error(rotated, 403, "forbidden", "may use, and grant, only models")
    tenant = http.post("/v1/tenants", json={"name": "bounded-tenant"}, headers=headers)
    assert (tenant.status_code, tenant.json()["models"]) == (201, ["default/own-*", "default/*-shared"])
    wider = http.patch("/v1/tenants/bounded-tenant", json={"models": ["*"]}, headers=headers)
    assert_error(wider, 403, "forbidden", "may use, and grant, only models")
    assert http.patch("/v1/tenants/bounded-tenant", json={"models": ["*"]}).status_code == 200


def test_a_client_without_a_key_is_told_where_one_was_looked_for(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TETHER_API_KEY", raising=False)
    monkeypatch.setenv("TETHER_HOME", str(tmp_path))
    with Client(served.url) as client, pytest.raises(Unauthenticated) as caught:
        client.models()
    assert caught.value.message == (
        f"no API key found (searched the argument api_key, TETHER_API_KEY and {tmp_path / 'admin.key'}); "
        "run it in the folder of 'tether up', or set TETHER_API_KEY"
    )
    with Client(served.url, "tk_wrong\n") as client, pytest.raises(Unauthenticated, match="Invalid API key"):
        client.models()
