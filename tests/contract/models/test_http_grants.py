"""Models of several tenants over HTTP, in the SDK and on the command line: owned, shared, taken back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.http.served import Served, until
from support.http.tenant_http import INPUT, Tenant, pushed, tenants
from support.models import models
from support.platform.platforms import tether

from tether import AsyncClient, Client
from tether.errors import Forbidden, ModelNotFound

_numbers = itertools.count()


@pytest.fixture
def name() -> str:
    return f"owned-{next(_numbers)}"


@pytest.fixture
def tenant(served: Served) -> Iterator[Callable[[str], Tenant]]:
    with tenants(served) as made:
        yield made


@pytest.fixture
def mine(tenant: Callable[[str], Tenant]) -> Tenant:
    return tenant(f"mine-{next(_numbers)}")


@pytest.fixture
def other(tenant: Callable[[str], Tenant]) -> Tenant:
    return tenant(f"other-{next(_numbers)}")


def test_what_a_tenant_pushed_is_its_own(mine: Tenant, other: Tenant, name: str) -> None:
    pushed(mine, name)
    assert mine.listed()[name] == "own"
    assert name not in other.listed()
    assert other.infer(name) == 404
    job = other.http.post("/v1/jobs", json={"model": name, **INPUT})
    assert (job.status_code, job.json()["code"]) == (404, "model_not_found")
    pushed(other, name)
    assert other.listed()[name] == "own"
    assert list(mine.http.get(f"/v1/models/{name}").json()["aliases"].values()) == [1]


def test_a_model_that_is_used_by_others_keeps_its_weights_and_its_publisher_to_itself(
    mine: Tenant, other: Tenant, name: str
) -> None:
    pushed(mine, name)
    assert mine.grant(name, other.name, "use").status_code == 200
    theirs = mine.seen(name)
    assert other.infer(theirs) == 200
    assert other.listed()[f"{mine.name}/{name}"] == "use"
    (seen,) = other.http.get(f"/v1/models/{theirs}").json()["versions"]
    (known,) = mine.http.get(f"/v1/models/{name}").json()["versions"]
    assert (seen["publisher"], [file["digest"] for file in seen["files"]]) == ("", [""])
    assert known["publisher"].startswith("key:")
    digest = known["files"][0]["digest"]
    assert len(digest) == 64
    for path in ("files", f"chunks/{digest}"):
        answer = other.http.get(f"/v1/models/{theirs}/versions/1/{path}")
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    mine.http.patch(f"/v1/models/{name}/config", json={"instances": 1})
    assert other.http.get(f"/v1/models/{theirs}/config").json()["changed_by"] == ""


def test_what_was_granted_is_taken_back_at_once(mine: Tenant, other: Tenant, name: str) -> None:
    pushed(mine, name)
    assert mine.grant(name, other.name, "write").json()["grants"] == [{"tenant": other.name, "right": "write"}]
    theirs = mine.seen(name)
    assert other.push(theirs, 2.0).json()["version"] == 2
    assert other.grant(theirs, other.name, "write").status_code == 403
    assert other.http.get(f"/v1/models/{theirs}/grants").status_code == 403
    told = mine.http.delete(f"/v1/models/{name}/grants/{other.name}")
    assert (told.json()["grants"], told.json()["owner"], told.json()["revision"]) == ([], mine.name, 3)
    assert other.infer(theirs) == 404
    assert other.push(theirs, 3.0).status_code == 403


def test_a_model_is_shared_with_every_tenant(mine: Tenant, other: Tenant, name: str) -> None:
    pushed(mine, name)
    assert mine.grant(name, "*", "use").status_code == 200
    theirs = mine.seen(name)
    assert other.infer(theirs) == 200
    assert other.push(theirs, 2.0).status_code == 403
    assert mine.grant(name, "*", "write").status_code == 400
    assert mine.http.delete(f"/v1/models/{name}/grants/*").json()["grants"] == []
    assert other.infer(theirs) == 404


def test_models_of_the_default_tenant_are_shared_until_it_takes_that_back(
    tenant: Callable[[str], Tenant], other: Tenant, name: str
) -> None:
    default = tenant("default")
    pushed(default, name)
    assert other.infer(name) == 200
    assert other.listed()[name] == "use"
    assert other.push(f"default%2F{name}", 2.0).status_code == 403
    assert default.http.delete(f"/v1/models/{name}/grants/*").status_code == 200
    assert other.infer(name) == 404


def test_a_session_has_its_tenants_rights_and_never_an_administrators(served: Served, mine: Tenant, name: str) -> None:
    pushed(mine, name)
    for key, status in ((mine.key, 200), (served.key, 404)):
        made = httpx.post(f"{served.url}/v1/sessions", headers={"x-api-key": key}, trust_env=False).json()
        headers = {"x-api-key": made["token"]}
        shown = httpx.get(f"{served.url}/v1/models/{mine.seen(name)}", headers=headers, trust_env=False)
        assert shown.status_code == status, shown.text


def test_an_administrator_may_do_everything_and_hands_models_over(
    served: Served, mine: Tenant, other: Tenant, name: str
) -> None:
    pushed(mine, name)
    with served.client() as admin:
        theirs = mine.seen(name)
        assert admin.get(f"/v1/models/{theirs}").json()["right"] == "own"
        told = admin.put(f"/v1/models/{theirs}/owner", json={"tenant": other.name})
        assert (told.status_code, told.json()["owner"]) == (200, other.name), told.text
    assert (mine.infer(name), other.infer(theirs)) == (404, 200)
    taken = mine.push(name, 2.0)
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")
    assert other.name not in taken.text


def test_grants_and_refusals_are_in_the_audit_log(served: Served, mine: Tenant, other: Tenant, name: str) -> None:
    pushed(mine, name)
    mine.grant(name, other.name, "use")
    other.push(mine.seen(name), 2.0)

    def told(**wanted: str) -> list[dict[str, Any]]:
        with served.client() as http:
            found: list[dict[str, Any]] = http.get("/v1/audit", params={"limit": 1000, **wanted}).json()["entries"]
            return found

    def grants() -> list[dict[str, Any]]:
        return [row for row in told(kind="model", tenant=mine.name) if row["action"] == "grant"]

    until(lambda: grants() != [], "the grant is told of")
    (grant,) = grants()
    assert (grant["model"], grant["outcome"], other.name in grant["detail"]) == (f"{mine.name}/{name}", "ok", True)
    until(lambda: told(kind="access", tenant=other.name) != [], "the refusal is told of")
    assert {row["outcome"] for row in told(kind="access", tenant=other.name)} == {"forbidden"}


def test_the_sdk_grants_revokes_and_shows(
    served: Served, mine: Tenant, other: Tenant, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(models.add(3.0))
    pushed(mine, name)
    theirs = f"{mine.name}/{name}"
    with Client(served.url, mine.key) as client, Client(served.url, other.key) as stranger:
        with pytest.raises(ModelNotFound):
            stranger.model(theirs)
        assert client.grants.grant(name, other.name)["grants"] == [{"tenant": other.name, "right": "use"}]
        assert stranger.model(theirs)["right"] == "use"
        with pytest.raises(Forbidden):
            stranger.grants.show(theirs)
        with pytest.raises(Forbidden):
            client.grants.hand_over(name, other.name)
        assert client.grants.revoke(name, other.name) == client.grants.show(name)
        with pytest.raises(Forbidden):
            stranger.push(theirs, file)

    async def later() -> None:
        async with AsyncClient(served.url, mine.key) as client, AsyncClient(served.url, served.key) as admin:
            assert (await client.grants.grant(name, "*"))["grants"] == [{"tenant": "*", "right": "use"}]
            assert (await client.grants.revoke(name, "*"))["grants"] == []
            assert (await admin.grants.hand_over(theirs, other.name))["owner"] == other.name
            with pytest.raises(ModelNotFound):
                await client.grants.show(name)

    asyncio.run(later())


def test_the_command_line_grants_revokes_and_shows(served: Served, mine: Tenant, other: Tenant, name: str) -> None:
    pushed(mine, name)
    env = {"TETHER_URL": served.url, "TETHER_API_KEY": mine.key}

    def said(*words: str) -> str:
        done = tether(served.home, "model", *words, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [line.split() for line in said("grant", name, "--tenant", other.name, "--write").splitlines()[1:]] == [
        [mine.name, "own"],
        [other.name, "write"],
    ]
    assert other.push(mine.seen(name), 2.0).status_code == 201
    assert '"right": "use"' in said("grant", name, "--tenant", other.name, "--use", "--json")
    said("revoke", name, "--tenant", other.name)
    assert other.name not in said("grants", name)
    done = tether(served.home, "model", "hand-over", name, "--tenant", other.name, env=env)
    assert (done.returncode, "(forbidden)" in done.stderr) == (1, True)
