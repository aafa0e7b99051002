"""Durable jobs that were once lost, ended twice, or answered with another request's outputs."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.crypto import MessageType
from tether.domain.job import Priority, new_job_id
from tether.domain.tensor import to_numpy
from tether.errors import BadTensor, IdempotencyConflict, QueueFull, TetherError
from tether.gateway_http import gateway as core
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.wire import codec, oip


async def bump(running: Services) -> ResolvedVersion:
    return await running.push("bump", models.add())


async def ended(running: Services, job: str) -> dict[str, Any]:
    return await running.gateway.jobs.get(TENANT, job, 15.0)


def output(job: dict[str, Any]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    (tensor,) = oip.tensors_from_json(job["result"]["outputs"])
    return to_numpy(tensor)


async def test_a_job_whose_lane_was_full_is_queued_when_its_key_comes_again(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await bump(one)
    queue = one.gateway.jobs._submitter._bundler._queue

    async def full(*_: object, **__: object) -> None:
        raise QueueFull("full")

    for key in ("again", ""):
        with monkeypatch.context() as patch:
            patch.setattr(queue, "enqueue", full)
            with pytest.raises(QueueFull):
                await one.gateway.jobs.submit(TENANT, [new_job(served, row(1), key=key)])
        assert await one.gateway.jobs.list(TENANT, state="", model="", limit=10, cursor="") == ([], None)
    (job,) = await one.gateway.jobs.submit(TENANT, [new_job(served, row(1), key="again")])
    assert (await ended(one, job["id"]))["state"] == "succeeded"


async def test_of_two_requests_with_one_key_on_two_gateways_one_is_refused(one: Services) -> None:
    served = await bump(one)
    other = await one.stack.enter_async_context(core.running(one.settings, one.home))
    for number in range(5):
        asked = [
            gateway.jobs.submit(TENANT, [new_job(served, row(value), key=f"key-{number}")])
            for gateway, value in ((one.gateway, 1.0), (other, 5.0))
        ]
        first, second = await asyncio.gather(*asked, return_exceptions=True)
        refused = first if isinstance(first, BaseException) else second
        assert isinstance(refused, IdempotencyConflict)
        accepted, value = (second, 5.0) if refused is first else (first, 1.0)
        assert isinstance(accepted, list)
        assert np.array_equal(output(await ended(one, accepted[0]["id"])), row(value + 1))


async def test_a_job_that_cannot_be_stored_for_a_reason_of_ours_is_refused_at_once(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await bump(one)

    def broken(_: object) -> bytes:
        raise RuntimeError("broken")

    monkeypatch.setattr("tether.wire.codec.encode_jobs", broken)
    async with asyncio.timeout(5):
        with pytest.raises(TetherError):
            await one.gateway.jobs.submit(TENANT, [new_job(served, row(1))])


async def test_an_output_cannot_be_asked_for_so_often_that_the_bundle_is_unreadable(one: Services) -> None:
    served = await bump(one)
    name = served.manifest.outputs[0].name
    with pytest.raises(BadTensor):
        await one.gateway.infer(
            served, TENANT, new_job(served, row(1)).inputs, (name, name), request_id="t", timeout_s=5
        )


async def test_jobs_of_a_signed_bundle_that_no_worker_can_read_end_as_failed(one: Services) -> None:
    served = await bump(one)
    lane = served.job_lane(Priority.NORMAL)
    subject, job = one.bus.names.lane(lane), new_job_id()
    frame = one.bus.signer.sign_envelope(MessageType.JOB, subject, codec.pack([1, 2, 3]), jobs=(job,))
    await one.bus.publish_acked(subject, frame)

    async def result() -> bool:
        return bool(await one.gateway.jobs._results.find([job]))

    await wait_until(result, "the job ended")
    assert np.array_equal(await one.infer(served, row(1)), row(2))


async def test_a_worker_whose_clock_is_late_leaves_jobs_to_others(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = await bump(one)
    late = one.workers[0]._bus
    now_ms = late.clock.utc_ms
    monkeypatch.setattr(late.verifier, "_now_ms", lambda: now_ms() - 60_000)
    waiting = asyncio.create_task(one.infer(served, row(1)))
    await asyncio.sleep(0.5)
    await one.start_worker("worker-2")
    assert np.array_equal(await waiting, row(2))
