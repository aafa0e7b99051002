"""Jobs that may have ended a worker run in a process of their own, and what ends that is remembered of its version."""

from __future__ import annotations

import numpy as np
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import TENANT, Services

from tether.domain.job import Job, new_job_id
from tether.domain.tensor import from_numpy, to_numpy
from tether.errors import InferenceFailed
from tether.worker.models.run_limits import ActiveRun
from tether.worker.runs.isolated_instance import SEATS
from tether.worker.runtimes.process_runtime import ProcessRuntime
from tether.worker.scheduling.batching import Result, Run, Segment, Source
from tether.worker.version_manager import HostedVersion


def held(running: Services) -> HostedVersion:
    (found,) = running.workers[0].holder._held.values()
    return found


async def run(running: Services, number: int) -> Result:
    """As a job of a suspect bundle."""
    deadline = running.bus.clock.utc() + 60
    job = Job(new_job_id(), TENANT, (from_numpy("x", np.array([number], np.int32)),), deadline)
    instance = held(running).instance
    wanted = Run((Segment(Source(job), 0, 1),), batched=False)
    async with instance.instances.pinned():
        (result,) = (await instance.runs.run(wanted, ActiveRun(), suspect=True))[0].results
    assert result is not None
    return result


async def test_it_is_the_process_that_ends_and_its_version_has_one_from_then_on(one: Services) -> None:
    served = await one.push("dividing", models.dividing())
    instance, seats = held(one).instance, one.workers[0].holder._seats
    good = await run(one, 7)
    assert isinstance(good, tuple)
    assert to_numpy(good[0]).tolist() == [-7]
    assert instance._isolated._isolated_set is not None
    assert isinstance(instance._isolated._isolated_set.runtimes[0], ProcessRuntime)
    assert not isinstance(instance.instances.runtimes[0], ProcessRuntime)
    assert seats.left == SEATS - 1
    assert not one.gateway.catalog.finding(served).crashed

    failed = await run(one, models.FATAL)
    assert isinstance(failed, InferenceFailed)
    assert "SIGFPE" in failed.message
    assert seats.left == SEATS
    await wait_until(lambda: "SIGFPE" in one.gateway.catalog.finding(served).crashed, "everybody knows")
    await wait_until(
        lambda: isinstance(instance.instances.runtimes[0], ProcessRuntime), "it is loaded anew in a process"
    )
    again = await run(one, 9)
    assert isinstance(again, tuple)
    assert instance._isolated._isolated_set is None, "what runs in a process needs no other"


async def test_without_a_seat_it_runs_with_the_others(one: Services) -> None:
    await one.push("dividing", models.dividing())
    one.workers[0].holder._seats.left = 0
    assert isinstance(await run(one, 7), tuple)
    assert held(one).instance._isolated._isolated_set is None
    one.workers[0].holder._seats.left = SEATS
    assert isinstance(await run(one, 8), tuple)
    assert held(one).instance._isolated._isolated_set is not None


async def test_a_version_that_is_let_go_takes_its_process_along(one: Services) -> None:
    await one.push("dividing", models.dividing())
    instance = held(one).instance
    await run(one, 7)
    assert instance._isolated._isolated_set is not None
    (process,) = instance._isolated._isolated_set.runtimes
    assert isinstance(process, ProcessRuntime)
    assert process.pid
    await one.decide("dividing", loaded=False)
    await wait_until(lambda: not process.pid, "its process has ended")
    assert one.workers[0].holder._seats.left == SEATS
