"""What HTTP requests leave in the audit log, and the log over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.http.served import Served, until
from support.models import models

Rows = list[dict[str, Any]]


def rows(served: Served, **wanted: str) -> Rows:
    with served.client() as http:
        answer = http.get("/v1/audit", params={"limit": 1000, **wanted})
        assert answer.status_code == 200, answer.text
        found: Rows = answer.json()["entries"]
        return found


def one(served: Served, what: str, **wanted: str) -> dict[str, Any]:
    """The one entry that fits, once it is there."""
    found: Rows = []

    def arrived() -> bool:
        found[:] = rows(served, **wanted)
        return len(found) > 0

    until(arrived, what)
    assert len(found) == 1, found
    return found[0]


def key_id(text: str) -> str:
    return text.split("_")[1]


def tensor() -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def test_refused_keys_leave_their_address_and_never_their_secret(served: Served) -> None:
    wrong = "tk_zzzzzzzz_" + "S3cr3t-0" * 5 + "abc"
    with served.client() as http:
        for _ in range(20):
            assert http.post("/v2/models/nothing/infer", headers={"x-api-key": wrong}).status_code == 401
            assert http.get("/v1/keys", headers={"x-api-key": wrong}).status_code == 401
    until(
        lambda: sum(row.get("count", 1) for row in rows(served, kind="auth", key="zzzzzzzz")) == 40, "all are counted"
    )
    found = rows(served, kind="auth", key="zzzzzzzz")
    assert {row["action"] for row in found} == {"infer", "GET /v1/keys"}
    assert {(row["address"], row["outcome"]) for row in found} == {("127.0.0.1", "unauthenticated")}
    assert "S3cr3t" not in json.dumps(rows(served))


def test_refused_access_names_key_tenant_and_what_was_lacking(served: Served) -> None:
    key = served.new_key("models:read", tenant="watcher")
    with served.client() as http:
        assert http.post("/v2/models/any/infer", headers={"x-api-key": key}).status_code == 403
        assert http.get("/v1/keys", headers={"x-api-key": key}).status_code == 403
    until(lambda: len(rows(served, kind="access", tenant="watcher")) == 2, "both are there")
    found = rows(served, kind="access", tenant="watcher")
    assert {row["actor"] for row in found} == {f"key:{key_id(key)}"}
    assert {row["detail"] for row in found} == {
        "this API key lacks the scope 'infer'",
        "this API key lacks the scope 'admin'",
    }


def test_a_model_and_a_job_that_are_not_the_callers_are_refusals(served: Served) -> None:
    version = served.push("audited", models.add())
    with served.client() as http:
        body = {"tenant": "narrow", "scopes": ["infer", "jobs"], "models": ["other-*"]}
        narrow = http.post("/v1/keys", json=body).json()["key"]
        assert http.post("/v2/models/audited/infer", json=tensor(), headers={"x-api-key": narrow}).status_code == 404
        job = http.post("/v1/jobs", json={"model": "audited", **tensor()}).json()["id"]
        assert http.get(f"/v1/jobs/{job}", headers={"x-api-key": narrow}).status_code == 404
    until(lambda: len(rows(served, kind="access", tenant="narrow")) == 2, "both are there")
    assert {row["outcome"] for row in rows(served, kind="access", tenant="narrow")} == {"forbidden"}
    submitted = one(served, "the job", kind="job", job=job)
    assert (submitted["action"], submitted["model"], submitted["version"]) == ("submit", "audited", version)
    assert submitted["bytes_in"] == 16


def test_inference_says_who_what_and_how_it_went(served: Served) -> None:
    version = served.push("measured", models.add())
    served.share("measured")
    key = served.new_key("infer", tenant="asker")
    with served.client() as http:
        headers = {"x-api-key": key, "x-request-id": "tell-me"}
        assert http.post("/v2/models/measured/infer", json=tensor(), headers=headers).status_code == 200
    found = one(served, "the entry", kind="inference", tenant="asker")
    assert found["job"]
    assert 0 < found["seconds"] < 30
    wanted = {"actor": f"key:{key_id(key)}", "model": "measured", "version": version, "request_id": "tell-me"}
    assert wanted.items() <= found.items()
    assert (found["outcome"], found["bytes_in"], found["bytes_out"]) == ("ok", 16, 16)


def test_administration_is_there_when_it_is_answered_and_says_what_was_made(served: Served) -> None:
    with served.client() as http:
        made = http.post("/v1/keys", json={"tenant": "made", "scopes": ["infer"]}).json()
        http.delete(f"/v1/keys/{made['id']}")
        assert http.delete(f"/v1/keys/{made['key']}").status_code == 404
        http.post("/v1/tenants", json={"name": "audited-tenant", "models": ["a-*"]})
        http.delete("/v1/tenants/audited-tenant")
    until(
        lambda: len([row for row in rows(served, kind="tenant") if "audited-tenant" in row.get("detail", "")]) == 2,
        "tenants",
    )
    found = [row for row in rows(served, kind="key") if made["id"] in row.get("detail", "")]
    assert [(row["action"], row["outcome"]) for row in reversed(found)] == [
        ("POST /v1/keys", "ok"),
        ("DELETE /v1/keys/{id}", "ok"),
        ("DELETE /v1/keys/{id}", "not_found"),
    ]
    assert "tenant=made" in found[-1]["detail"]
    assert made["key"] not in json.dumps(rows(served))
    assert {row["actor"] for row in found} == {f"key:{key_id(served.key)}"}


def test_sessions_are_told_of_and_their_tokens_are_not(served: Served) -> None:
    key = served.new_key("infer", tenant="sitting")
    with served.client() as http:
        made = http.post("/v1/sessions", headers={"x-api-key": key}).json()
        assert http.get("/v1/keys", headers={"x-api-key": made["token"]}).status_code == 403
    session = one(served, "the session", kind="auth", tenant="sitting")
    assert f"id={made['id']}" in session["detail"]
    refused = one(served, "the refusal", kind="access", tenant="sitting")
    assert refused["actor"] == f"key:{key_id(key)}"
    assert made["token"][:40] not in json.dumps(rows(served))


def test_the_log_comes_in_pages_and_only_to_administrators(served: Served) -> None:
    with served.client() as http:
        for number in range(7):
            http.post("/v1/tenants", json={"name": f"paged-{number}"})
        until(
            lambda: sum("paged-" in row.get("detail", "") for row in rows(served, kind="tenant")) == 7, "seven entries"
        )
        seen: list[str] = []
        cursor = ""
        while True:
            page = http.get("/v1/audit", params={"kind": "tenant", "limit": 2, "cursor": cursor}).json()
            seen += [row.get("detail", "") for row in page["entries"]]
            cursor = page.get("next_cursor", "")
            if not cursor:
                break
        assert [text.split()[0] for text in seen if "paged-" in text] == [f"name=paged-{n}" for n in range(6, -1, -1)]
        assert http.get("/v1/audit", params={"since": "2999-01-01T00:00:00Z"}).json()["entries"] == []
        lesser = {"x-api-key": served.new_key("infer", "jobs", "models:read", "models:write")}
        assert http.get("/v1/audit", headers=lesser).status_code == 403


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("since", "yesterday"),
        ("until", "2026-01-01T00:00:00"),
        ("cursor", "x"),
        ("kind", "checkpoint2"),
        ("limit", "0"),
    ],
)
def test_what_is_no_filter_is_refused_by_name(served: Served, name: str, value: str) -> None:
    with served.client() as http:
        answer = http.get("/v1/audit", params={name: value})
    assert answer.status_code == 400
    assert name in answer.json()["error"]
