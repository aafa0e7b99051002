"""A request that ends the process of ONNX Runtime: it costs one worker one restart, and from then on only itself."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.platforms import Platform, platform

from tether.process.os_process import alive


def ask(running: Platform, model: str, number: int) -> httpx.Response:
    tensor = {"name": "x", "datatype": "INT32", "shape": [1], "data": [number]}
    url = f"{running.url}/v2/models/{model}/infer"
    return httpx.post(url, json={"inputs": [tensor]}, headers={"x-api-key": running.key}, timeout=60)


def pids(running: Platform) -> dict[str, int]:
    return {name: pid for name, pid in running.pids.items() if name.startswith("worker")}


def isolation(running: Platform, model: str) -> tuple[str, str]:
    answer = httpx.get(f"{running.url}/v1/models/{model}", headers={"x-api-key": running.key}).json()
    version = answer["versions"][0]
    return version["isolation"], version["isolation_reason"]


@pytest.mark.alone
@pytest.mark.parametrize("workers", [1, 2])
async def test_a_request_that_crashes_onnx_runtime_ends_a_worker_once_and_then_only_its_own_process(
    tmp_path: Path, workers: int
) -> None:
    (tmp_path / "dividing.onnx").write_bytes(models.dividing())
    (tmp_path / "beside.onnx").write_bytes(models.identity("INT32", ("n",)))
    with platform(workers=workers) as running:
        for name in ("dividing", "beside"):
            pushed = running.run("model", "push", name, str(tmp_path / f"{name}.onnx"))
            assert pushed.returncode == 0, pushed.stderr
        assert ask(running, "dividing", 7).json()["outputs"][0]["data"] == [-7]
        assert isolation(running, "dividing") == ("thread", "")
        before = pids(running)
        refused = ask(running, "dividing", models.FATAL)
        assert refused.status_code == 422, refused.text
        assert "SIGFPE" in refused.json()["error"], refused.text
        (dead,) = [name for name, pid in before.items() if not alive(pid)]
        await wait_until(lambda: pids(running)[dead] != before[dead], "the worker is back")
        after = pids(running)

        await wait_until(lambda: isolation(running, "dividing")[0] == "process", "the gateway heard of it", 30)
        assert isolation(running, "dividing")[1]
        assert isolation(running, "beside") == ("thread", "")
        await wait_until(running.ready, "every process is ready", 30)
        for _ in range(3 * workers):
            assert ask(running, "dividing", models.FATAL).status_code == 422
            assert ask(running, "dividing", 9).json()["outputs"][0]["data"] == [-9]
            assert ask(running, "beside", 5).json()["outputs"][0]["data"] == [5]
        assert pids(running) == after
        assert all(map(alive, after.values()))
        log = (running.home.logs / f"{dead}.log").read_text()
        assert f"ended worker '{dead}': Floating point exception" in log
