"""A model's configuration takes effect in workers that hold it, and no request fails by it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from support.brokers.brokers import wait_until
from support.models import bundles, models
from support.platform.services import TENANT, Services, new_job, row

from tether.domain.manifest import ModelRef
from tether.errors import InferenceFailed
from tether.gateway_http.jobs.submission import NewJob
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model.config import Warmup
from tether.wire.subjects import token
from tether.worker.runtimes.process_runtime import ProcessRuntime
from tether.worker.version_manager import HostedVersion

ROWS = """
import numpy as np


class Model:
    def predict(self, inputs):
        return {"y": np.full_like(inputs["x"], len(inputs["x"]))}
"""
"""Answers with the rows of its run."""

SIDE_BY_SIDE = """
import os, time
from pathlib import Path
import numpy as np


class Model:
    def predict(self, inputs):
        if inputs["x"].min() >= 1:
            (Path(FOLDER) / str(os.getpid())).touch()
            while len(os.listdir(FOLDER)) < 2:
                time.sleep(0.01)
        return {"y": np.full_like(inputs["x"], os.getpid() % 65536)}
"""
"""Ends no run (but on zeros) before two of its processes have begun one."""


def held(running: Services, name: str, version: int = 1) -> HostedVersion:
    return running.workers[0].holder._held[ModelRef(name, version)]


async def run_jobs(running: Services, jobs: list[NewJob]) -> list[float]:
    """The first number of each job's answer."""
    shown = await running.gateway.jobs.submit(TENANT, jobs)
    ended = await running.gateway.jobs.get_many(TENANT, [job["id"] for job in shown], 40)
    assert {job["state"] for job in ended} == {"succeeded"}, ended
    return [float(job["result"]["outputs"][0]["data"][0]) for job in ended]


async def answers(running: Services, served: ResolvedVersion, count: int) -> set[float]:
    return set(await run_jobs(running, [new_job(served, row(number)) for number in range(1, count + 1)]))


async def test_the_largest_batch_changes_from_one_run_to_the_next_and_cannot_be_raised(
    one: Services, tmp_path: Path
) -> None:
    served = await one.push_bundle("rows", bundles.write(tmp_path / "rows", code=ROWS))
    assert await answers(one, served, 8) == {8}
    loaded = held(one, "rows").instance.instances.runtimes
    for wanted, found in ((2, 2), (100, 8), (0, 1), (None, 8)):
        config = await one.decide("rows", max_batch_size=wanted)
        await wait_until(lambda: held(one, "rows").loader.config == config, "it is heard")  # noqa: B023
        assert await answers(one, served, 8) == {found}
    assert held(one, "rows").instance.instances.runtimes == loaded


async def test_a_worker_waits_for_company_as_long_as_it_is_told_and_no_longer_than_the_preferred_size(
    one: Services, tmp_path: Path
) -> None:
    served = await one.push_bundle("rows", bundles.write(tmp_path / "rows", code=ROWS))
    config = await one.decide("rows", max_delay_ms=10_000, preferred_batch_sizes=(3,))
    await wait_until(lambda: held(one, "rows").loader.config == config, "it is heard")
    found = await asyncio.gather(*[one.infer(served, row(number), timeout_s=9) for number in range(3)])
    assert [answer[0, 0] for answer in found] == [3, 3, 3]
    config = await one.decide("rows", max_delay_ms=50)
    await wait_until(lambda: held(one, "rows").loader.config == config, "it is heard")
    assert (await one.infer(served, row(1)))[0, 0] == 1


async def test_a_worker_that_waits_for_company_and_is_stopped_answers_what_it_has(
    one: Services, tmp_path: Path
) -> None:
    served = await one.push_bundle("rows", bundles.write(tmp_path / "rows", code=ROWS))
    config = await one.decide("rows", max_delay_ms=10_000)
    await wait_until(lambda: held(one, "rows").loader.config == config, "it is heard")
    instance = held(one, "rows").instance
    (shown,) = await one.gateway.jobs.submit(TENANT, [new_job(served, row(1))])
    await wait_until(lambda: len(instance._lane_pulls.filling_batch) == 1, "it waits for more")
    await one.workers[0].holder.stop(20)
    (ended,) = await one.gateway.jobs.get_many(TENANT, [shown["id"]], 0)
    assert (ended["state"], ended["attempts"]) == ("succeeded", 1)


@pytest.mark.usefixtures("unconfined")
async def test_several_copies_run_side_by_side_and_no_more_than_the_worker_allows(
    one: Services, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    await one.decide("pairs", instances=64)
    code = SIDE_BY_SIDE.replace("FOLDER", repr(str(begun)))
    served = await one.push_bundle("pairs", bundles.write(tmp_path / "pairs", code=code, maxBatchSize=0))
    copies = held(one, "pairs").instance.instances
    assert len(copies.runtimes) == one.settings.max_instances == 8
    await one.decide("pairs", instances=2)
    await wait_until(lambda: len(copies.runtimes) == 2, "two are left", 60)
    assert len(await answers(one, served, 6)) == 2


async def test_what_needs_a_new_load_changes_under_load_and_no_request_fails(one: Services) -> None:
    served = await one.push("bump", models.add(1.0))
    stop, done = asyncio.Event(), 0

    async def ask(number: int) -> None:
        nonlocal done
        while not stop.is_set():
            assert (await one.infer(served, row(number)))[0, 0] == number + 1
            done += 1

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(ask(number))
        for change, apart, count in (
            ({"isolation": "process", "instances": 2}, True, 2),
            ({"threads": 2, "warmup": (Warmup(rows=4, count=2, random=True),)}, False, 1),
            ({"instances": 3}, False, 3),
        ):
            config = await one.decide("bump", **change)
            here = held(one, "bump")
            await wait_until(
                lambda: here.loader.config == config and not here.outdated,  # noqa: B023
                "it is as decided",
                60,
            )
            runtimes = here.instance.instances.runtimes
            assert [isinstance(runtime, ProcessRuntime) for runtime in runtimes] == [apart] * count
            before = done
            await wait_until(lambda: done > before + 20, "it answers", 60)  # noqa: B023
        stop.set()


async def test_a_version_whose_warm_up_fails_is_not_ready_and_says_why_until_it_is_another_one(
    one: Services, tmp_path: Path
) -> None:
    code = bundles.CODE.replace("        first =", "        assert len(x) != 3, 'three'\n        first =", 1)
    await one.decide("moody", warmup=(Warmup(), Warmup(rows=3)))
    served = await one.push_bundle("moody", bundles.write(tmp_path / "moody", code=code), workers=0)
    holder = one.workers[0].holder
    await wait_until(lambda: bool(holder.failed()), "it fails", 60)
    reason = "model_rejected: warmup[1] failed: the model failed: AssertionError: three"
    assert holder.failed() == (("moody:1", reason),)
    assert holder.ready() == ()
    await one.decide("moody", warmup=(Warmup(rows=2),))
    await wait_until(lambda: holder.ready() == (ModelRef("moody", 1),), "it is ready", 60)
    assert holder.failed() == ()
    await one.decide("moody", warmup=(Warmup(rows=3),))
    await wait_until(lambda: bool(holder.failed()), "the new load fails", 60)
    assert (await one.infer(served, row(1.0)))[0, 0] == 1.5
    await one.decide("moody")
    await wait_until(lambda: not held(one, "moody").outdated and not holder.failed(), "all is well", 60)


async def test_how_long_a_run_may_take_changes_without_a_new_load(one: Services, tmp_path: Path) -> None:
    served = await one.push_bundle("slow", bundles.write(tmp_path / "slow"))
    (before,) = held(one, "slow").instance.instances.runtimes
    config = await one.decide("slow", run_timeout_s=0.5)
    await wait_until(lambda: held(one, "slow").loader.config == config, "it is heard")
    assert held(one, "slow").instance.instances.runtimes == [before]
    with pytest.raises(InferenceFailed, match=r"took longer than 0\.5 s"):
        await one.infer(served, row(-3.0))
    np.testing.assert_array_equal(await one.infer(served, row(1.0)), row(1.5))


async def test_an_entry_that_is_gone_means_the_defaults(one: Services) -> None:
    await one.push("bump", models.add(1.0))
    config = await one.decide("bump", instances=2, max_batch_size=4)
    here = held(one, "bump")
    await wait_until(lambda: here.loader.config == config and not here.outdated, "it is as decided", 60)
    await (await one.configs()).delete(token("bump"))
    await wait_until(lambda: here.loader.config.revision == 0 and not here.outdated, "it is as by default", 60)
    assert len(here.instance.instances.runtimes) == 1
