"""Keys and workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.http.documented import Document, assert_error
from support.http.served import Served, until
from support.models import models


@pytest.fixture(scope="module")
def document(served: Served) -> Document:
    served.push("plus", models.add())
    served.share("plus")
    return Document.of(served)


@pytest.fixture
def http(served: Served, document: Document) -> Iterator[httpx.Client]:
    with document.client(served) as client:
        yield client


# keys


def test_a_key_is_shown_once_works_at_once_and_not_after_it_was_revoked(http: httpx.Client, served: Served) -> None:
    wanted = {"tenant": "new-tenant", "scopes": ["jobs", "infer", "jobs"], "name": "the new one"}
    answer = http.post("/v1/keys", json=wanted)
    assert answer.status_code == 201
    made = answer.json()
    assert (made["tenant"], made["scopes"], made["name"]) == ("new-tenant", ["infer", "jobs"], "the new one")
    own = {"x-api-key": made["key"]}
    body = {"modelId": "plus", "inputData": [[1, 2, 3, 4]]}
    assert http.post("/v1/inference", json=body, headers=own).status_code == 200
    assert_error(http.get("/v1/models", headers=own), 403, "forbidden")
    listed = http.get("/v1/keys")
    assert made["key"] not in listed.text
    assert made["key"].split("_", 2)[2] not in listed.text  # the secret: it may hold underscores itself
    (entry,) = [key for key in listed.json()["keys"] if key["id"] == made["id"]]
    assert (entry["tenant"], entry["revoked"]) == ("new-tenant", False)
    revoked = http.delete(f"/v1/keys/{made['id']}")
    assert (revoked.status_code, revoked.json()["revoked"]) == (200, True)
    assert_error(http.post("/v1/inference", json=body, headers=own), 401, "unauthenticated")
    stored = served.run(served.services.gateway.keys.bucket.get(made["id"]))
    assert stored is not None
    assert made["key"].encode() not in stored


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({}, "bad_json", ["tenant"]),
        ({"tenant": "a"}, "bad_json", ["scopes"]),
        ({"tenant": "a", "scopes": []}, "bad_json", ["scopes"]),
        ({"tenant": "a", "scopes": ["everything"]}, "bad_json", ["everything"]),
        ({"tenant": "A B", "scopes": ["infer"]}, "bad_name", ["tenant"]),
        ({"tenant": "a.*.>", "scopes": ["infer"]}, "bad_name", ["tenant"]),
        ({"tenant": "a", "scopes": ["infer"], "name": "x" * 201}, "bad_json", ["name"]),
        ({"tenant": "a", "scopes": ["infer"], "expires": 5}, "bad_json", ["expires"]),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_field(
    http: httpx.Client, body: dict[str, Any], code: str, words: list[str]
) -> None:
    assert_error(http.post("/v1/keys", json=body), 400, code, *words)


def test_a_key_cannot_revoke_itself_and_an_unknown_one_is_not_there(http: httpx.Client, served: Served) -> None:
    assert_error(http.delete(f"/v1/keys/{served.key.split('_')[1]}"), 409, "conflict", "itself")
    assert_error(http.delete("/v1/keys/aaaaaaaa"), 404, "not_found", "aaaaaaaa")


# workers


def test_workers_tell_what_they_hold(http: httpx.Client) -> None:
    until(lambda: {"model": "plus", "version": 1} in http.get("/v1/workers").json()["workers"][0]["ready"], "a beat")
    (worker,) = http.get("/v1/workers").json()["workers"]
    assert (worker["name"], worker["region"], worker["slots"]) == ("worker-1", "local", 2)
    assert worker["age_s"] < 5
    assert (worker["labels"], worker["memory_bytes"]) == ({}, 0)
