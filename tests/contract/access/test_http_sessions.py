"""Session tokens over HTTP: what they may do, and when they end."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pytest
from support.brokers.brokers import wait_until
from support.http.documented import Document, assert_error
from support.http.served import Served, until
from support.models import models

from tether.crypto import Identity, Role, Session, Signer, issue_session, new_identity
from tether.domain import api_key
from tether.domain.api_key import ApiKey
from tether.errors import RateLimited, Unauthenticated
from tether.gateway_http import gateway as core
from tether.gateway_http.access.sessions import FORGERIES
from tether.gateway_http.jobs.view import rfc3339
from tether.process.data_dir import load_identity

INPUT = {"modelId": "plus", "inputData": [[1, 2, 3, 4]]}


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    served.push("plus", models.add())
    served.share("plus")
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


def session(http: httpx.Client, key: str, **wanted: Any) -> dict[str, Any]:
    answer = http.post("/v1/sessions", json=wanted, headers={"x-api-key": key})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def status(http: httpx.Client, token: str, path: str = "/v1/models") -> int:
    return http.get(path, headers={"x-api-key": token}).status_code


def stored(served: Served, text: str) -> ApiKey:
    record = served.services.gateway.keys.find(api_key.key_id(text) or "")
    assert record is not None
    return record


def change(served: Served, text: str, **changes: Any) -> None:
    served.run(served.services.gateway.keys.store(msgspec.structs.replace(stored(served, text), **changes)))


def test_a_session_has_the_rights_of_its_key_in_either_header(http: httpx.Client, served: Served) -> None:
    key = served.new_key("infer", "models:read")
    made = session(http, key)
    assert (made["scopes"], made["models"], made["key"]) == (["infer", "models:read"], ["*"], api_key.key_id(key))
    for headers in ({"x-api-key": made["token"]}, {"x-api-key": "", "authorization": f"Bearer {made['token']}"}):
        assert http.post("/v1/inference", json=INPUT, headers=headers).status_code == 200
        assert http.get("/v1/models", headers=headers).status_code == 200
        assert http.get("/v1/jobs", headers=headers).status_code == 403


def test_a_session_may_have_less_and_never_more(http: httpx.Client, served: Served) -> None:
    key = served.new_key("infer", "models:read")
    change(served, key, models=("plus", "pl-*"))
    made = session(http, key, scopes=["models:read"], models=["p*", "other"])
    token = made["token"]
    assert [entry["name"] for entry in http.get("/v1/models", headers={"x-api-key": token}).json()["models"]] == [
        "plus"
    ]
    assert http.post("/v1/inference", json=INPUT, headers={"x-api-key": token}).status_code == 403
    narrowed = session(http, key, models=["other"])["token"]
    assert_error(http.post("/v1/inference", json=INPUT, headers={"x-api-key": narrowed}), 404, "model_not_found")
    wider = http.post("/v1/sessions", json={"scopes": ["jobs"]}, headers={"x-api-key": key})
    assert_error(wider, 403, "forbidden", "jobs")


def test_a_session_of_an_admin_key_administers_nothing(http: httpx.Client, served: Served) -> None:
    made = session(http, served.key)
    assert made["scopes"] == ["infer", "jobs", "models:read", "models:write"]
    asked = session(http, served.key, scopes=["models:code"])
    assert asked["scopes"] == ["models:code"], "which an admin key may give, when it is asked for"
    also = session(http, served.new_key("admin"))
    assert also["scopes"] == made["scopes"]
    named = session(http, served.new_key("models:write", "models:code"))
    assert named["scopes"] == ["models:write", "models:code"]
    assert (status(http, made["token"]), status(http, made["token"], "/v1/keys")) == (200, 403)
    assert_error(http.post("/v1/sessions", json={"scopes": ["admin"]}), 400, "bad_json", "admin")


def test_a_session_makes_neither_sessions_nor_keys(http: httpx.Client, served: Served) -> None:
    headers = {"x-api-key": session(http, served.key)["token"]}
    assert_error(http.post("/v1/sessions", headers=headers), 403, "forbidden", "API key")
    assert_error(http.post("/v1/keys", json={"tenant": "t", "scopes": ["infer"]}, headers=headers), 403, "forbidden")


@pytest.mark.parametrize("wanted", [{"ttl_s": 0}, {"ttl_s": 3601}, {"models": []}, {"scopes": []}, {"for": 5}])
def test_a_session_that_cannot_be_is_refused(http: httpx.Client, wanted: dict[str, Any]) -> None:
    assert_error(http.post("/v1/sessions", json=wanted), 400, "bad_json", *wanted)


def test_a_session_ends_by_itself(http: httpx.Client, served: Served) -> None:
    token = session(http, served.new_key("models:read"), ttl_s=1)["token"]
    assert status(http, token) == 200
    until(lambda: status(http, token) == 401, "the session is over")


@pytest.mark.parametrize("end", [{"revoked": True}, {"expires_at": 1.0}, {"tenant": "another"}])
def test_a_session_ends_with_its_key(http: httpx.Client, served: Served, end: dict[str, Any]) -> None:
    key = served.new_key("models:read")
    token = session(http, key)["token"]
    assert status(http, token) == 200
    change(served, key, **end)
    assert status(http, token) == 401


def test_a_session_loses_what_its_key_or_tenant_loses(http: httpx.Client, served: Served) -> None:
    key = served.new_key("infer", "models:read", tenant="losing")
    token = session(http, key)["token"]
    headers = {"x-api-key": token}
    assert http.post("/v1/inference", json=INPUT, headers=headers).status_code == 200
    assert http.post("/v1/tenants", json={"name": "losing", "models": ["none"]}).status_code == 201
    assert http.post("/v1/inference", json=INPUT, headers=headers).status_code == 404
    change(served, key, scopes=("models:read",))
    assert http.post("/v1/inference", json=INPUT, headers=headers).status_code == 403


def test_a_session_never_outlives_its_key(http: httpx.Client, served: Served) -> None:
    key = served.new_key("models:read")
    change(served, key, expires_at=time.time() + 30)
    made = session(http, key, ttl_s=3600)
    assert made["expires_at"] == rfc3339(stored(served, key).expires_at)


def forged(identity: Identity, key: str, tenant: str) -> str:
    now = time.time()
    signer = Signer(identity, lambda: int(now * 1000))
    return issue_session(signer, Session("0" * 16, key, tenant, ("models:read",), ("*",), now, now + 60))


def test_a_token_that_no_gateway_signed_is_refused_as_any_other_key(http: httpx.Client, served: Served) -> None:
    key = stored(served, served.new_key("models:read"))
    genuine = load_identity(served.home.identity("gateway"))
    assert status(http, forged(genuine, key.id, key.tenant)) == 200
    assert status(http, forged(genuine, key.id, "another")) == 401
    assert status(http, forged(genuine, "aaaaaaaa", key.tenant)) == 401
    for identity in (load_identity(served.home.identity("worker-1")), new_identity("gateway", Role.GATEWAY)):
        answer = http.get("/v1/models", headers={"x-api-key": forged(identity, key.id, key.tenant)})
        assert_error(answer, 401, "unauthenticated")
        assert answer.json()["error"] == "Invalid API key"


def test_forged_tokens_cost_no_more_than_so_many_signature_checks(http: httpx.Client, served: Served) -> None:
    """Whoever floods is told to wait; keys and sessions in use go on."""
    key = served.new_key("models:read")
    token = session(http, key)["token"]
    assert status(http, token) == 200
    keys, record = served.services.gateway.keys, stored(served, key)
    impostor = new_identity("gateway", Role.GATEWAY)
    own = load_identity(served.home.identity("gateway"))

    async def flood() -> list[type[Exception]]:
        checked: list[type[Exception]] = []
        for number in range(4 * FORGERIES):
            text = with_kid(forged(impostor, record.id, f"t{number}"), own.kid)
            try:
                keys.authenticate(text, "models:read")
            except (Unauthenticated, RateLimited) as error:
                checked.append(type(error))
        assert keys.authenticate(key, "models:read").id == record.id
        assert keys.authenticate(token, "models:read").id == record.id
        return checked

    began = time.monotonic()
    told = served.run(flood())
    assert RateLimited in told
    assert told.count(Unauthenticated) <= FORGERIES * (2 + int(time.monotonic() - began))
    fresh = session(http, key)["token"]
    until(lambda: status(http, fresh) == 200, "a session that was not seen before counts again")


def with_kid(token: str, kid: bytes) -> str:
    """The token, with the name of another key in it."""
    head, _, tail = token.removeprefix("ts_").partition(".")
    payload = kid + base64.urlsafe_b64decode(head + "=" * (-len(head) % 4))[16:]
    return f"ts_{base64.urlsafe_b64encode(payload).rstrip(b'=').decode()}.{tail}"


def test_every_gateway_accepts_the_session_of_one_without_asking(http: httpx.Client, served: Served) -> None:
    key = served.new_key("models:read")
    token = session(http, key)["token"]

    async def elsewhere() -> None:
        async with core.running(served.services.settings, served.home) as other:
            assert other.keys.authenticate(token, "models:read").id == api_key.key_id(key)
            record = other.keys.find(api_key.key_id(key) or "")
            assert record is not None
            await served.services.gateway.keys.revoke(record)
            await wait_until(lambda: refused(other, token), "the other gateway refuses the session")

    served.run(elsewhere())


def refused(gateway: core.Gateway, token: str) -> bool:
    try:
        gateway.keys.authenticate(token, "models:read")
    except Unauthenticated:
        return True
    return False


def test_no_more_tokens_are_remembered_than_there_is_room_for(served: Served) -> None:
    keys = served.services.gateway.keys
    record = stored(served, served.new_key("infer"))
    ends = time.time() + 60
    texts = [
        keys.sessions.issue(record.id, record.tenant, scopes=("infer",), models=("*",), ends=lambda _now: ends)[0]
        for _ in range(4200)
    ]

    async def all_of_them() -> None:
        for text in texts:
            assert keys.authenticate(text, "infer").id == record.id

    served.run(all_of_them())
    assert len(keys.sessions._known) <= 4096
    assert len(keys._in_session) <= 4096
