"""An isolated tenant has streams, lanes, results and workers of its own, and nobody else has any part in them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from support.brokers.brokers import wait_until
from support.brokers.stored import count
from support.models import models
from support.platform.services import Services, first, new_job, row
from support.platform.tenancy import Thief, bound_home, ended_by, has_lane, isolate, own_worker

from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.dispatcher import service as dispatcher_service
from tether.domain.job import SHARED, AttemptNote, Job, JobId, JobState, Lane, Outcome, Priority, new_job_id
from tether.domain.manifest import Assignment, Change, ChangeRequest, Heartbeat, ModelRef
from tether.domain.tenant import Tenant
from tether.domain.tensor import from_numpy
from tether.errors import IdempotencyConflict, JobNotFound, ModelNotReady, ResultConflict
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.process import metrics
from tether.process.data_dir import Home
from tether.streams.job_queue import BusResults
from tether.wire import codec
from tether.worker.models.run_limits import ActiveRun
from tether.worker.runs.job_runs import Runs
from tether.worker.scheduling.batching import Done, Run

ACME, OTHER = "acme", "other"
OWN, SPARE = "own", "spare"


@pytest.fixture
def home() -> Iterator[Home]:
    with bound_home(own=ACME, spare=ACME) as made:
        yield made


@pytest.fixture
async def bump(one: Services) -> ResolvedVersion:
    """A shared worker and a model; ``acme`` is isolated and has no worker yet."""
    served = await one.push("bump", models.add())
    await isolate(one, ACME, served)
    return served


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, frozenset[str]]]:
    """Every run of a model: on which worker, and for which tenants."""
    seen: list[tuple[str, frozenset[str]]] = []
    run = Runs.run

    async def noted(self: Runs, wanted: Run, going: ActiveRun, *, suspect: bool = False) -> tuple[Done, float, float]:
        seen.append((self._worker, frozenset(segment.source.job.tenant for segment in wanted.segments)))
        return await run(self, wanted, going, suspect=suspect)

    monkeypatch.setattr(Runs, "run", noted)
    return seen


async def infer(
    running: Services, tenant: str, served: ResolvedVersion, value: float, timeout_s: float = 20.0
) -> float:
    inputs = (from_numpy("x", row(value)),)
    answer = await running.gateway.infer(served, tenant, inputs, (), request_id="test", timeout_s=timeout_s)
    return float(first(answer)[0, 0])


async def submit(running: Services, tenant: str, *jobs: object) -> list[str]:
    shown = await running.gateway.jobs.submit(tenant, jobs)  # type: ignore[arg-type]
    return [job["id"] for job in shown]


def refused(code: str) -> float:
    return float(metrics.ENVELOPES_REJECTED.labels(code)._value.get())


async def messages(running: Services, stream: str) -> int:
    assert running.dispatcher is not None
    return await count(running.dispatcher._bus, stream)


async def test_two_tenants_share_no_stream_no_run_and_no_worker(
    one: Services, bump: ResolvedVersion, runs: list[tuple[str, frozenset[str]]]
) -> None:
    await own_worker(one, OWN, bump, ACME)
    calls = [infer(one, tenant, bump, number) for number in range(100) for tenant in (ACME, OTHER)]
    submits = [submit(one, tenant, *[new_job(bump, row(n)) for n in range(50)]) for tenant in (ACME, OTHER)]
    answers, (own, others) = await asyncio.gather(asyncio.gather(*calls), asyncio.gather(*submits))
    assert answers == [number + 1.0 for number in range(100) for _ in range(2)]
    for tenant, ids in ((ACME, own), (OTHER, others)):
        shown = await one.gateway.jobs.get_many(tenant, ids, 20)
        assert {job["state"] for job in shown} == {"succeeded"}
    assert {(worker, *tenants) for worker, tenants in runs} == {(OWN, ACME), ("worker-1", OTHER)}
    assert await ended_by(one, own, ACME) == {OWN}
    assert await ended_by(one, others, SHARED) == {"worker-1"}
    names = one.bus.names
    assert await messages(one, names.pool_results_stream(ACME)) == 50
    assert await messages(one, names.results_stream) == 50


async def test_without_its_worker_a_tenants_jobs_wait_and_go_nowhere_else(
    one: Services, bump: ResolvedVersion, runs: list[tuple[str, frozenset[str]]]
) -> None:
    with pytest.raises(ModelNotReady, match=r"none of its own workers has model 'bump' .* --tenant acme"):
        await infer(one, ACME, bump, 1)
    ids = await submit(one, ACME, *[new_job(bump, row(n)) for n in range(5)])
    assert await infer(one, OTHER, bump, 1) == 2.0
    (theirs,) = await submit(one, OTHER, new_job(bump, row(1)))
    await one.gateway.jobs.get(OTHER, theirs, 20)
    assert {job["state"] for job in await one.gateway.jobs.get_many(ACME, ids, 0)} == {"queued"}
    assert {worker for worker, _ in runs} == {"worker-1"}
    await own_worker(one, OWN, bump, ACME)
    assert {job["state"] for job in await one.gateway.jobs.get_many(ACME, ids, 20)} == {"succeeded"}
    assert await ended_by(one, ids, ACME) == {OWN}


@pytest.mark.parametrize("kind", ["infer", "job"])
async def test_what_its_dead_worker_held_is_run_by_another_of_its_own(
    one: Services, bump: ResolvedVersion, runs: list[tuple[str, frozenset[str]]], kind: str
) -> None:
    await own_worker(one, OWN, bump, ACME)
    dead = one.workers[-1]
    await dead.holder.stop(1)
    lane = bump.lane(ACME) if kind == "infer" else bump.job_lane(Priority.NORMAL, ACME)
    async with Thief(dead._bus, lane) as thief:
        asked = asyncio.create_task(infer(one, ACME, bump, 7) if kind == "infer" else wait(one, bump))
        await wait_until(lambda: len(thief.got) == 1, "the bundle is in a dead worker's hands")
    await thief.got[0].give_back()
    assert await infer(one, OTHER, bump, 1) == 2.0
    await one.start_worker(SPARE)
    assert await asked == 8.0
    assert [run for run in runs if ACME in run[1]] == [(SPARE, frozenset({ACME}))]


async def wait(running: Services, served: ResolvedVersion) -> float:
    (job,) = await submit(running, ACME, new_job(served, row(7)))
    shown = await running.gateway.jobs.get(ACME, job, 20)
    assert (shown["state"], shown["attempts"]) == ("succeeded", 2)
    return float(shown["result"]["outputs"][0]["data"][0])


async def test_a_job_that_keeps_killing_its_workers_is_buried_in_its_tenants_letters(
    one: Services, bump: ResolvedVersion
) -> None:
    await own_worker(one, OWN, bump, ACME)
    own = one.workers[-1]
    await own.holder.stop(1)
    lane = bump.job_lane(Priority.NORMAL, ACME)
    async with Thief(own._bus, lane) as thief:
        (job,) = await submit(one, ACME, new_job(bump, row(1)))
        await wait_until(lambda: len(thief.got) == 1, "the thief holds the bundle")
    note = codec.encode(AttemptNote(one.settings.max_attempts, OWN, own._bus.clock.utc()))
    key = own._bus.names.attempt_key(job, ACME)
    await SignedBucket(own._bus, "attempts", MessageType.ATTEMPT).put(key, note)
    await thief.got[0].give_back()
    await one.start_worker(SPARE)
    shown = await one.gateway.jobs.get(ACME, job, 20)
    assert (shown["state"], shown["error"]["code"]) == ("dead", "attempts_exhausted")
    bus, names = one.bus, one.bus.names
    letter = (await bus.direct_batch(names.dead_stream, [names.dead(lane)]))[names.dead(lane)]
    assert letter.subject == "tether.dead.acme.bump.1"
    assert await bus.direct_last(names.dead_stream, names.dead_subjects(SHARED)) == 0


async def test_cancel_expiry_and_idempotency_work_in_a_tenants_own_streams(
    one: Services, bump: ResolvedVersion
) -> None:
    jobs = one.gateway.jobs
    cancelled, late, keyed = await submit(
        one, ACME, new_job(bump, row(1)), new_job(bump, row(2), deadline_s=0.2), new_job(bump, row(3), key="k")
    )
    assert (await jobs.cancel(ACME, cancelled))["state"] == "cancelled"
    with pytest.raises(ResultConflict):
        await jobs.cancel(ACME, cancelled)
    assert (await jobs.get(ACME, late, 10))["state"] == "expired"
    assert await submit(one, ACME, new_job(bump, row(3), key="k")) == [keyed]
    with pytest.raises(IdempotencyConflict):
        await submit(one, ACME, new_job(bump, row(4), key="k"))
    await own_worker(one, OWN, bump, ACME)
    states = [job["state"] for job in await jobs.get_many(ACME, [cancelled, late, keyed], 20)]
    assert states == ["cancelled", "expired", "succeeded"]
    listed, _ = await jobs.list(ACME, state="", model="", limit=10, cursor="")
    assert [job["id"] for job in listed] == [keyed, late, cancelled]
    assert await one.gateway.jobs.room.open.count(ACME) == 0
    with pytest.raises(JobNotFound):
        await jobs.get(OTHER, keyed)
    assert await jobs.list(OTHER, state="", model="", limit=10, cursor="") == ([], None)


@pytest.mark.parametrize(("speaker", "tenant"), [(OWN, OTHER), ("worker-1", ACME)])
async def test_a_result_signed_by_a_worker_of_another_pool_is_refused(
    one: Services, bump: ResolvedVersion, speaker: str, tenant: str
) -> None:
    await one.start_worker(OWN)
    workers = {worker.name: worker for worker in one.workers}
    for worker in workers.values():
        await worker.holder.stop(1)
    (job,) = await submit(one, tenant, new_job(bump, row(1)))
    pool, before = one.gateway.tenants.pool(tenant), refused("result_conflict")
    forged = Outcome(JobId(job), JobState.SUCCEEDED, (from_numpy("y", row(9)),), None, 1, speaker, 1.0, 2.0)
    subject = one.bus.names.result(job, pool)
    frame = workers[speaker]._bus.signer.sign_envelope(
        MessageType.RESULT, subject, codec.encode_outcomes([forged]), jobs=(job,)
    )
    assert await BusResults(one.bus).commit(job, frame, pool=pool)
    assert (await one.gateway.jobs.get(tenant, job))["state"] == "queued"
    assert refused("result_conflict") > before


@pytest.mark.parametrize(("speaker", "tenant"), [(OWN, OTHER), ("worker-1", ACME)])
async def test_an_answer_signed_by_a_worker_of_another_pool_is_refused(
    one: Services, bump: ResolvedVersion, speaker: str, tenant: str
) -> None:
    await own_worker(one, OWN, bump, ACME)
    workers = {worker.name: worker for worker in one.workers}
    entitled = workers[OWN if tenant == ACME else "worker-1"]
    await entitled.holder.stop(1)
    async with Thief(entitled._bus, bump.lane(one.gateway.tenants.pool(tenant))) as thief:
        asked = asyncio.create_task(infer(one, tenant, bump, 7))
        await wait_until(lambda: len(thief.got) == 1, "a bundle is on its way")
        envelope = entitled._bus.verify_or_raise(thief.got[0].frame, thief.got[0].subject, MessageType.INFER)
        (job,) = envelope.header.jobs
        before = refused("result_conflict")
        for name, value in ((speaker, 99.0), (entitled.name, 8.0)):
            made = Outcome(JobId(job), JobState.SUCCEEDED, (from_numpy("y", row(value)),), None, 1, name, 1.0, 2.0)
            bus, reply = workers[name]._bus, envelope.header.reply
            frame = bus.signer.sign_envelope(MessageType.ANSWER, reply, codec.encode_outcomes([made]), jobs=(job,))
            await bus.publish(reply, frame)
            if name == speaker:
                await wait_until(lambda: refused("result_conflict") > before, "the forged answer was counted")
        assert await asked == 8.0


async def test_a_bundle_in_a_lane_of_another_pool_is_not_run(
    one: Services, bump: ResolvedVersion, runs: list[tuple[str, frozenset[str]]]
) -> None:
    """A gateway's signature alone opens no tenant's lane to another's jobs."""
    await own_worker(one, OWN, bump, ACME)
    wrong: list[tuple[Lane, str, str]] = [
        (bump.lane(ACME), ACME, OTHER),
        (bump.lane(ACME), "", ACME),
        (bump.lane(SHARED), ACME, ACME),
    ]
    for lane, header, tenant in wrong:
        before = refused("subject_mismatch")
        job = Job(new_job_id(), tenant, (from_numpy("x", row(1)),), one.bus.clock.utc() + 60)
        subject = one.bus.names.lane(lane)
        frame = one.bus.signer.sign_envelope(
            MessageType.INFER, subject, codec.encode_jobs([job]), jobs=(job.id,), tenant=header
        )
        await one.bus.publish_acked(subject, frame)
        await wait_until(lambda before=before: refused("subject_mismatch") > before, "it was counted")
    assert not runs
    assert await infer(one, ACME, bump, 1) == 2.0


async def test_what_a_worker_says_of_its_pool_entitles_it_to_nothing(one: Services, bump: ResolvedVersion) -> None:
    worker, names = one.workers[0], one.bus.names
    beat = Heartbeat("worker-1", worker._epoch, "local", (ModelRef("bump", 1),), (), 0, 1, 1.0, ACME)
    subject = names.bucket_key("liveness", "worker-1")
    frame = worker._bus.signer.sign_envelope(MessageType.HEARTBEAT, subject, codec.encode(beat))
    assert one.dispatcher is not None
    one.dispatcher.on_heartbeat("worker-1", frame)
    await one.dispatcher.reconcile()
    assert one.dispatcher._routed[ACME, ModelRef("bump", 1)].workers == ()
    assert one.dispatcher._assigned["worker-1"].pool == SHARED


async def test_an_isolated_tenants_workers_hold_only_what_it_may_use(one: Services) -> None:
    bump, gather = await one.push("bump", models.add()), await one.push("gather", models.gather())
    await isolate(one, ACME, bump, models=("b*",))
    await own_worker(one, OWN, bump, ACME)
    assert one.workers[-1].holder.ready() == (ModelRef("bump", 1),)
    assert not has_lane(one, gather, ACME)
    await isolate(one, ACME, gather, models=("*",))
    await wait_until(lambda: len(one.workers[-1].holder.ready()) == 2, "its worker holds the second model too")


async def test_a_worker_in_other_lanes_than_its_own_lets_them_go_and_takes_up_its_own(
    one: Services, bump: ResolvedVersion
) -> None:
    await own_worker(one, OWN, bump, ACME)
    own = one.workers[-1]
    own._bus.pool = SHARED
    await wait_until(lambda: own.holder.ready() == (), "it let the model go")
    await wait_until(lambda: own.holder.ready() == (ModelRef("bump", 1),), "it took it up again")
    assert own._bus.pool == ACME
    await wait_until(lambda: one.gateway.catalog.workers(bump, ACME) == (OWN,), "requests are routed to it")
    assert await infer(one, ACME, bump, 1) == 2.0


async def test_a_worker_of_a_tenant_that_is_not_isolated_holds_nothing(one: Services) -> None:
    bump = await one.push("bump", models.add())
    await one.start_worker(OWN)
    await wait_until(lambda: one.workers[-1].holder.has_orders, "it was told what to hold")
    assert one.workers[-1].holder.ready() == ()
    assert one.gateway.catalog.workers(bump) == ("worker-1",)
    assert await infer(one, ACME, bump, 1) == 2.0


async def test_no_accepted_job_is_lost_while_a_tenant_is_isolated_and_joined_again(
    one: Services, runs: list[tuple[str, frozenset[str]]]
) -> None:
    bump = await one.push("bump", models.add())
    await one.start_worker(OWN)
    stop, accepted, answered, early = asyncio.Event(), list[str](), list[float](), 0

    async def ask() -> None:
        nonlocal early
        while not stop.is_set():
            try:
                answered.append(await infer(one, ACME, bump, 1))
                accepted.extend(await submit(one, ACME, *[new_job(bump, row(1)) for _ in range(3)]))
            except ModelNotReady:
                early += 1
                await asyncio.sleep(0.01)

    asking = [asyncio.create_task(ask()) for _ in range(4)]
    await wait_until(lambda: len(answered) > 20, "requests flow")
    await isolate(one, ACME)
    await wait_until(lambda: (OWN, frozenset({ACME})) in runs, "its own worker runs its jobs")
    count = len(runs)
    await wait_until(lambda: len(runs) > count + 20, "requests flow")
    await one.gateway.tenants.store(Tenant(ACME))
    count = len(answered)
    await wait_until(lambda: len(answered) > count + 20, "requests flow")
    stop.set()
    await asyncio.gather(*asking)
    assert set(answered) == {2.0}
    for start in range(0, len(accepted), 200):
        shown = await one.gateway.jobs.get_many(ACME, accepted[start : start + 200], 20)
        assert {job["state"] for job in shown} == {"succeeded"}
    assert {len(tenants) for _, tenants in runs} == {1}


async def test_a_tenant_that_is_no_longer_isolated_keeps_its_streams_until_they_are_empty(
    one: Services, bump: ResolvedVersion
) -> None:
    queued = await submit(one, ACME, *[new_job(bump, row(n)) for n in range(5)])
    await one.gateway.tenants.store(Tenant(ACME))
    (shared,) = await submit(one, ACME, new_job(bump, row(1)))
    assert (await one.gateway.jobs.get(ACME, shared, 20))["state"] == "succeeded"
    assert one.dispatcher is not None
    await one.dispatcher._pools.update()
    assert {job["state"] for job in await one.gateway.jobs.get_many(ACME, queued, 0)} == {"queued"}
    await one.start_worker(OWN)
    own = one.workers[-1]
    shown = await one.gateway.jobs.get_many(ACME, [*queued, shared], 20)
    assert {job["state"] for job in shown} == {"succeeded"}
    assert await ended_by(one, queued, ACME) == {OWN}
    await wait_until(lambda: pool_is_empty(one), "its lanes are empty")
    await one.dispatcher._pools.update()
    await wait_until(lambda: own.holder.ready() == (), "its worker has nothing left to hold")
    assert {job["state"] for job in await one.gateway.jobs.get_many(ACME, queued, 0)} == {"succeeded"}


async def pool_is_empty(running: Services) -> bool:
    names = running.bus.names
    return await messages(running, names.pool_jobs_stream(ACME)) == 0


async def test_a_second_dispatcher_knows_whose_worker_it_is(one: Services, bump: ResolvedVersion) -> None:
    await own_worker(one, OWN, bump, ACME)
    fresh = await one.stack.enter_async_context(dispatcher_service.running(one.settings, one.home))
    assert fresh._bound[OWN] == ACME
    held = Assignment(OWN, one.workers[-1]._epoch, (ModelRef("bump", 1),), ACME)
    await fresh.reconcile()
    assert fresh._assigned[OWN] == held
    assert one.workers[-1].holder.ready() == (ModelRef("bump", 1),)


async def test_a_deleted_versions_jobs_in_a_tenants_lane_are_ended_by_its_own_worker_and_no_other(
    one: Services, bump: ResolvedVersion
) -> None:
    second = await one.push("bump", models.add(2.0))
    ids = await submit(one, ACME, *[new_job(bump, row(n)) for n in range(20)])
    request = ChangeRequest(Change.DELETE_VERSION, "bump", version=1, by="test")
    await one.change(request)
    others = await submit(one, OTHER, *[new_job(second, row(n)) for n in range(5)])
    assert {job["state"] for job in await one.gateway.jobs.get_many(OTHER, others, 40)} == {"succeeded"}
    assert {job["state"] for job in await one.gateway.jobs.get_many(ACME, ids, 0)} == {"queued"}
    await own_worker(one, OWN, second, ACME)
    shown = await one.gateway.jobs.get_many(ACME, ids, 40)
    assert {(job["state"], job["error"]["code"]) for job in shown} == {("failed", "model_not_found")}
    assert await ended_by(one, ids, ACME) == {OWN}
