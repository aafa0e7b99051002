"""The broker's disk is full, and then it is not: a whole platform on a small file system."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.disks import fill, small_disk
from support.platform.platforms import Platform, platform

from tether.bus.session import connect
from tether.errors import BrokerUnavailable
from tether.process.os_process import send
from tether.settings import Settings

MB = 120
HEALED_S = 30
INPUTS = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


@dataclasses.dataclass
class Small:
    """A platform whose disk has ``MB`` megabytes, and a file that can take all of them."""

    platform: Platform
    http: httpx.Client
    ballast: Path

    def infer(self) -> int:
        return self.http.post("/v2/models/add/infer", json=INPUTS).status_code

    def submit(self) -> httpx.Response:
        return self.http.post("/v1/jobs", json={"model": "add", **INPUTS})

    def ready(self) -> bool:
        return self.http.get("/readyz").status_code == 200

    def accepts(self) -> bool:
        return self.ready() and self.submit().status_code == 202

    def state(self, job: str) -> str:
        return str(self.http.get(f"/v1/jobs/{job}", params={"wait": 10}).json()["state"])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    disk = tmp_path_factory.mktemp("disk")
    with (
        small_disk(disk, MB),
        platform(workers=1, folder=disk / "home") as started,
        httpx.Client(base_url=started.url, headers={"x-api-key": started.key}, timeout=60) as http,
    ):
        running = Small(started, http, disk / "ballast")
        assert http.post("/v1/models/add/versions", content=models.add()).status_code == 201
        yield running


@pytest.fixture(autouse=True)
async def has_room(small: Small) -> None:
    small.ballast.unlink(missing_ok=True)
    await wait_until(lambda: small.accepts() and small.infer() == 200, "it has room and works", HEALED_S)


def refused(answer: httpx.Response) -> str:
    """What a refusal says, which is the same for everything that would be stored."""
    told: dict[str, Any] = answer.json()
    assert (answer.status_code, told["code"]) == (503, "storage_full"), told
    assert int(answer.headers["retry-after"]) >= 1
    return str(told["error"])


async def test_new_work_is_refused_at_once_before_the_disk_is_full_and_taken_when_it_has_room(small: Small) -> None:
    job = small.submit().json()["id"]
    key = small.http.post("/v1/keys", json={"tenant": "default", "scopes": ["infer"]}).json()["id"]
    fill(small.ballast, leave_mb=8)
    words = refused(small.submit())
    assert "of 120 MB free" in words
    assert "reserve" in words
    assert str(small.platform.home.root) not in words
    refused(small.http.post("/v1/jobs:batch", json={"jobs": [{"model": "add", **INPUTS}]}))
    refused(small.http.post("/v1/models/other/versions", content=models.add(2.0)))
    refused(small.http.post("/v1/keys", json={"tenant": "default", "scopes": ["infer"]}))
    # what needs no room goes on, and so does what makes some
    assert small.infer() == 200
    assert small.http.delete(f"/v1/keys/{key}").status_code == 200
    assert small.state(job) == "succeeded"
    small.ballast.unlink()
    await wait_until(small.accepts, "jobs are taken again", HEALED_S)


async def test_everybody_who_is_asked_says_that_the_disk_is_full(small: Small) -> None:
    fill(small.ballast, leave_mb=8)
    await wait_until(lambda: not small.ready(), "the gateway is not ready")
    checks = small.http.get("/readyz").json()["checks"]
    assert checks["broker"] == checks["inference"] == "ok"
    assert "of 120 MB free" in checks["storage"]
    assert small.http.get("/v2/health/ready").status_code == 200
    assert 'tether_dependency_ready{dependency="storage"} 0.0' in small.http.get("/metrics").text

    def told() -> bool:
        return "nats: storage: the broker's disk has" in small.platform.run("status").stdout

    await wait_until(told, "tether status names it", 20)
    status = small.platform.run("status")
    assert status.returncode == 1
    assert "gateway: storage: the broker's disk has" in status.stdout
    assert "reserve" in small.platform.run("doctor").stdout


async def test_a_broker_that_stopped_storing_is_restarted_when_there_is_room(small: Small) -> None:
    jobs = [small.submit().json()["id"] for _ in range(5)]
    before = small.platform.endpoints["restarts"]
    fill(small.ballast)
    await stop_storing(small.platform)
    await wait_until(lambda: "not probed" in small.http.get("/readyz").json()["checks"]["jobs"], "it is known")
    refused(small.submit())
    assert small.infer() == 200
    assert small.platform.endpoints["restarts"] == before
    small.ballast.unlink()
    await wait_until(small.accepts, "jobs are taken again without anybody's help", HEALED_S)
    assert small.platform.endpoints["restarts"]["nats"] == before["nats"] + 1
    reason = small.platform.endpoints["reasons"]["nats"]
    assert "has stopped storing in" in reason
    assert "TETHER_JOBS_0" in reason
    assert [small.state(job) for job in jobs] == ["succeeded"] * 5


async def stop_storing(running: Platform) -> None:
    """Have the broker fail to write a job, as a client that nothing keeps from it would."""
    settings = Settings(home=str(running.home.root), nats_url=running.endpoints["nats"])
    async with connect(settings, running.home, "gateway") as bus:
        subject = bus.names.jobs_probe(0)
        with pytest.raises(BrokerUnavailable):
            await bus.publish_acked(subject, bytes(4 << 20), headers={"Nats-TTL": "1"}, timeout=2)


@pytest.mark.parametrize(("name", "leave_mb"), [("gateway", 0), ("dispatcher", 0), ("nats", 0), ("worker-1", 8)])
async def test_a_process_that_dies_while_the_disk_is_full_comes_back(small: Small, name: str, leave_mb: int) -> None:
    """A worker needs some of the reserve: the dispatcher stores its registration, and it puts model files together."""
    fill(small.ballast, leave_mb)
    pid = small.platform.pids[name]
    send(pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            return small.infer() == 200
        except httpx.TransportError:
            return False

    await wait_until(answers, f"inference goes on without room after {name} was killed", 40)
    small.ballast.unlink()
    await wait_until(lambda: small.platform.pids[name] != pid, f"{name} is told of again", 20)
