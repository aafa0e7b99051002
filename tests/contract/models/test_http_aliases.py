"""Aliases and versions over HTTP: promote, split, roll back, delete."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest
from support.http.served import Served, until
from support.models import models

from tether import Client
from tether.errors import Conflict, InvalidRequest, ModelNotFound, ModelNotReady

X = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [0, 0, 0, 0]}


def pushed(served: Served, name: str, count: int) -> None:
    """Versions 1 to ``count``; each adds its number."""
    for number in range(1, count + 1):
        assert served.push(name, models.add(float(number))) == number


def asked(http: httpx.Client, name: str, version: str, **headers: str) -> tuple[int, float]:
    """The version that answered and what it answered."""
    answer = http.post(f"/v2/models/{name}/versions/{version}/infer", json={"inputs": [X]}, headers=headers)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return int(told["model_version"]), told["outputs"][0]["data"][0]


def follows(http: httpx.Client, name: str, alias: str, version: int) -> None:
    until(lambda: asked(http, name, alias)[0] == version, f"{alias} stands for {version}")


def test_an_alias_is_promoted_and_rolled_back(served: Served, http: httpx.Client, sdk: Client) -> None:
    name = "aliased"
    pushed(served, name, 3)
    for version in (1, 2, 3):
        assert sdk.promote(name, version)["version"] == version
    follows(http, name, "production", 3)
    assert asked(http, name, "production") == (3, 3.0)
    assert sdk.rollback(name)["version"] == 2
    told = sdk.rollback(name)
    assert (told["version"], told["previous"], [move["version"] for move in told["undone"]]) == (1, [], [2, 3])
    follows(http, name, "production", 1)
    with pytest.raises(Conflict, match="no previous target"):
        sdk.rollback(name)
    again = sdk.promote(name, 3)
    assert (again["revision"], [move["version"] for move in again["previous"]], again["undone"]) == (6, [1], [])
    assert sdk.promote(name, 3) == again
    assert sdk.alias(name, "latest")["version"] == 3


def test_a_version_that_an_alias_stands_for_is_not_deleted(served: Served, http: httpx.Client, sdk: Client) -> None:
    name = "deleted"
    pushed(served, name, 3)
    sdk.promote(name, 1)
    with pytest.raises(Conflict, match="production"):
        sdk.delete_model(name, 1)
    answer = http.delete(f"/v1/models/{name}/versions/3")
    assert (answer.status_code, "latest" in answer.json()["error"]) == (409, True)
    sdk.delete_model(name, 2)
    until(lambda: http.get(f"/v2/models/{name}/versions/2").status_code == 404, "the version is gone")
    with pytest.raises(ModelNotFound):
        sdk.delete_model(name, 2)
    with pytest.raises(ModelNotFound):
        sdk.promote(name, 2)
    sdk.delete_alias(name, "production")
    until(lambda: "production" not in sdk.model(name)["aliases"], "the alias is gone")
    sdk.delete_model(name, 1)
    assert served.push(name, models.add(4.0)) == 4
    held = served.services.workers[0].holder
    until(lambda: {ref.version for ref in held.ready() if ref.model == name} == {3, 4}, "the worker let go of them")


def test_latest_goes_back_when_the_newest_version_is_deleted(served: Served, http: httpx.Client, sdk: Client) -> None:
    pushed(served, "one-back", 2)
    assert sdk.delete_model("one-back", 2) == [2]
    follows(http, "one-back", "latest", 1)
    assert asked(http, "one-back", "latest") == (1, 1.0)


def test_a_model_is_deleted_whole_and_its_other_aliases_only_with_force(
    served: Served, http: httpx.Client, sdk: Client
) -> None:
    pushed(served, "mistake", 2)
    sdk.promote("mistake", 2, alias="stable")
    sdk.promote("mistake", 1, alias="canaries", canary=None)
    sdk.promote("mistake", 2, alias="canaries", canary=10)
    until(lambda: set(sdk.model("mistake")["aliases"]) == {"latest", "stable", "canaries"}, "the gateway knows them")
    with pytest.raises(Conflict, match="--force deletes it too"):
        sdk.delete_model("mistake")
    assert len(sdk.model("mistake")["versions"]) == 2
    assert sdk.delete_model("mistake", force=True) == [1, 2]
    until(lambda: http.get("/v1/models/mistake").status_code == 404, "it is gone")
    with pytest.raises(ModelNotFound):
        sdk.delete_model("mistake")


def test_the_command_line_shows_and_deletes_aliases_and_models(served: Served, sdk: Client, tmp_path: Path) -> None:
    pushed(served, "cleaned", 2)
    sdk.promote("cleaned", 1, alias="old")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "TETHER_URL": served.url, "TETHER_API_KEY": served.key, "TETHER_HOME": str(tmp_path)}
        line = [sys.executable, "-m", "tether_cli", "model", *words]
        return subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=False)

    until(lambda: "old" in sdk.model("cleaned")["aliases"], "the gateway knows it")
    assert sorted(run("alias", "cleaned").stdout.split("\n")) == ["", "cleaned latest = 2", "cleaned old = 1"]
    assert run("alias", "cleaned", "old").stdout == "cleaned old = 1\n"
    assert "no alias" in run("alias", "cleaned", "none").stderr
    assert "points at version 1" in run("delete", "cleaned", "1").stderr
    assert run("alias", "cleaned", "old", "--delete").returncode == 0
    until(lambda: "old" not in sdk.model("cleaned")["aliases"], "the alias is gone")
    assert "model cleaned is deleted: 2 versions" in run("delete", "cleaned").stderr
    assert run("delete", "cleaned").returncode == 1


def test_a_split_shares_requests_by_weight(served: Served, http: httpx.Client, sdk: Client) -> None:
    name = "canaried"
    pushed(served, name, 2)
    with pytest.raises(InvalidRequest, match="promote a version to it before"):
        sdk.promote(name, 2, canary=30)
    sdk.promote(name, 1)
    told = sdk.promote(name, 2, canary=30)
    assert told["split"] == [{"version": 1, "weight": 70}, {"version": 2, "weight": 30}]
    until(lambda: {asked(http, name, "production")[0] for _ in range(20)} == {1, 2}, "both versions answer")
    seen = Counter(asked(http, name, "production")[0] for _ in range(300))
    assert 45 <= seen[2] <= 140  # five standard deviations around 90
    for one in ("alice", "bob", "carol"):
        assert len({asked(http, name, "production", **{"x-tether-sticky": one}) for _ in range(5)}) == 1
    by_text = {asked(http, name, "production", **{"x-tether-sticky": str(n)})[0] for n in range(40)}
    assert by_text == {1, 2}
    assert sdk.promote(name, 2, canary=30, sticky=True)["sticky"]
    until(lambda: len({asked(http, name, "production")[0] for _ in range(20)}) == 1, "the key sticks")
    assert sdk.promote(name, 2)["split"] == []
    assert sdk.rollback(name)["sticky"] is True


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("aliases/production", {}, 400, "either"),
        ("aliases/production", {"version": 1, "split": [{"version": 1, "weight": 1}]}, 400, "either"),
        ("aliases/production", {"version": 99}, 404, "99"),
        ("aliases/production", {"version": 99, "force": True}, 404, "99"),
        ("aliases/7", {"version": 1}, 400, "number"),
        ("aliases/Bad", {"version": 1}, 400, "alias"),
        ("aliases/a", {"split": [{"version": 1, "weight": 1}, {"version": 1, "weight": 2}]}, 400, "twice"),
        ("aliases/a", {"split": [{"version": 1, "weight": 0}]}, 400, "weight"),
    ],
)
def test_what_no_alias_can_stand_for_is_refused(
    served: Served, http: httpx.Client, *, path: str, body: dict[str, object], status: int, word: str
) -> None:
    if http.get("/v1/models/refusing").status_code == 404:
        pushed(served, "refusing", 1)
    answer = http.put(f"/v1/models/refusing/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert word in answer.json()["error"]


def test_what_no_worker_holds_is_not_promoted(served: Served, http: httpx.Client, sdk: Client) -> None:
    name = "unheld"
    pushed(served, name, 1)
    worker = served.services.workers[0]
    hidden = threading.Event()

    async def hide() -> None:
        catalog = served.services.gateway.catalog
        route = catalog._routes.pop((name, 1, "shared"), None)
        hidden.set()
        assert route is not None

    served.run(hide())
    assert hidden.is_set()
    with Client(served.url, served.key, timeout=0.5) as impatient, pytest.raises(ModelNotReady, match="no worker"):
        impatient.promote(name, 1)
    assert sdk.promote(name, 1, force=True)["version"] == 1
    assert worker.holder.ready()


def test_who_moved_an_alias_is_answered_by_what_it_stands_for_now(served: Served, http: httpx.Client) -> None:
    """At the gateway that was asked, from the next request on."""
    name = "followed"
    pushed(served, name, 2)
    for number in range(10):
        alias = f"{name}-{number}"
        for version in (1, 2):
            moved = http.put(f"/v1/models/{name}/aliases/{alias}", json={"version": version})
            assert moved.status_code == 200, moved.text
            assert asked(http, name, alias) == (version, float(version))
        assert http.post(f"/v1/models/{name}/rollback", json={"alias": alias}).status_code == 200
        assert asked(http, name, alias) == (1, 1.0)


def test_promotes_and_rollbacks_under_load_fail_no_request(served: Served, sdk: Client) -> None:
    """And each answer is that of exactly the version that it names."""
    name = "moved"
    pushed(served, name, 2)
    sdk.promote(name, 1)
    stop = threading.Event()
    seen: list[tuple[int, float]] = []
    failures: list[BaseException] = []

    def load() -> None:
        with served.client() as http:
            try:
                while not stop.is_set():
                    seen.append(asked(http, name, "production"))
            except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        with served.client() as http:
            for _ in range(5):
                sdk.promote(name, 2)
                follows(http, name, "production", 2)
                sdk.rollback(name)
                follows(http, name, "production", 1)
            served.push(name, models.add(3.0))
            served.push(name, models.add(4.0))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert {version for version, _ in seen} == {1, 2}
    assert all(answer == float(version) for version, answer in seen)


def test_latest_stays_what_it_was_until_a_worker_holds_the_new_version(served: Served, sdk: Client) -> None:
    name = "seamless"
    pushed(served, name, 1)
    stop = threading.Event()
    seen: list[int] = []
    failures: list[BaseException] = []

    def load() -> None:
        with served.client() as http:
            try:
                while not stop.is_set():
                    seen.append(asked(http, name, "latest")[0])
            except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for number in range(2, 6):
            served.push(name, models.add(float(number)))
        until(lambda: bool(seen) and seen[-1] == 5, "the newest version answers")
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[0]
    assert seen == sorted(seen)
