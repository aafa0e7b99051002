"""Sealed tenants on a real broker: what they send and get is nobody's to read between gateway and worker."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from support.brokers.brokers import Broker, wait_until
from support.brokers.taps import tapped
from support.models import models
from support.platform.services import Services, first, new_job, row, services

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.crypto.payload_encryption import new_data_key, seal_job
from tether.domain.job import AttemptNote, Failure, Job, JobId, JobState, Lane, Outcome, Priority, new_job_id
from tether.domain.tenant import Tenant
from tether.domain.tensor import from_numpy
from tether.errors import DeadlineExceeded, DecryptionFailed, IdempotencyConflict, InferenceFailed, NoDecryptionKey
from tether.gateway_http import gateway
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.identity import keyset_editor
from tether.identity.keys import RootKey
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.wire import codec
from tether.worker.jobs.payload_encryption import closed

SEALED, OPEN = "clinic", "acme"
IN, OUT = 1234.5, 1235.5
"""Numbers whose bytes are looked for; the models of :func:`support.models.models.add` add 1."""


def tensor(value: float) -> bytes:
    """How a row of ``value`` lies on a wire or a disk."""
    return struct.pack("<f", value) * 4


def result_trace(job: str) -> bytes:
    return b"tether.result." + job.encode()


async def seal_tenant(running: Services, name: str = SEALED, **what: Any) -> None:
    await running.gateway.tenants.store(Tenant(name, sealed=True, **what))
    ring = running.gateway.tenant_encryption.keyring
    await wait_until(lambda: ring.newest(name) is not None, "the tenant has a key")


async def infer(running: Services, tenant: str, served: ResolvedVersion, value: float = IN) -> float:
    inputs = (from_numpy(served.manifest.inputs[0].name, row(value)),)
    answer = await running.gateway.infer(served, tenant, inputs, (), request_id="r", timeout_s=20)
    return float(first(answer)[0][0])


async def run_job(
    running: Services, tenant: str, served: ResolvedVersion, value: float = IN, key: str = ""
) -> dict[str, Any]:
    (job,) = await running.gateway.jobs.submit(tenant, [new_job(served, row(value), key=key)])
    return await running.gateway.jobs.get(tenant, job["id"], 20)


def shown(job: dict[str, Any]) -> float:
    return float(job["result"]["outputs"][0]["data"][0])


class Thief:
    """Takes one bundle of a lane and keeps it."""

    def __init__(self, bus: Bus, lane: Lane) -> None:
        self.got: list[Delivery] = []
        self.pull = LaneConsumer(bus, lane, 1, self.got.append)


def on_disk(broker: Broker, pattern: bytes) -> bool:
    files = [path for path in broker.home.nats_store.rglob("*") if path.is_file()]
    assert files
    return any(pattern in path.read_bytes() for path in files)


@pytest.mark.parametrize(("tenant", "readable"), [(SEALED, False), (OPEN, True)])
async def test_only_a_sealed_tenants_payloads_are_unreadable_on_the_wire_and_on_disk(
    embedded_broker: Broker, tenant: str, readable: bool
) -> None:
    with tapped(embedded_broker) as (broker, tap):
        async with services(broker, workers=1) as running:
            served = await running.push("bump", models.add())
            await seal_tenant(running)
            assert await infer(running, tenant, served) == OUT
            done = await run_job(running, tenant, served, key="same")
            assert shown(done) == OUT
            assert (await run_job(running, tenant, served, key="same"))["id"] == done["id"]
            with pytest.raises(IdempotencyConflict):
                await run_job(running, tenant, served, IN + 1, key="same")
            await wait_until(lambda: on_disk(broker, result_trace(done["id"])), "its result is on disk")
            assert on_disk(broker, tensor(OUT)) == readable
            await running.workers[0].holder.stop(1)
            (queued,) = await running.gateway.jobs.submit(tenant, [new_job(served, row(IN))])
            await wait_until(lambda: on_disk(broker, queued["id"].encode()), "it is queued on disk")
            assert on_disk(broker, tensor(IN)) == readable
        assert (tap.heard(tensor(IN)), tap.heard(tensor(OUT))) == (readable, readable)
        assert tap.heard(done["id"].encode())
        assert tap.heard(tenant.encode())


async def test_jobs_of_sealed_and_open_tenants_share_a_bundle_and_get_their_own_answers(one: Services) -> None:
    served = await one.push("bump", models.add())
    await seal_tenant(one)
    await seal_tenant(one, "bank")

    tenants = [SEALED, OPEN, "bank"] * 20
    answers = await asyncio.gather(*[infer(one, tenant, served, number) for number, tenant in enumerate(tenants)])
    assert answers == [number + 1 for number in range(len(tenants))]


async def test_a_failure_says_its_reason_to_the_caller_alone(embedded_broker: Broker) -> None:
    with tapped(embedded_broker) as (broker, tap):
        async with services(broker, workers=1) as running:
            served = await running.push("lookup", models.gather())
            await seal_tenant(running)
            for tenant, index in ((SEALED, 86_753), (OPEN, 97_864)):
                request = msgspec.structs.replace(
                    new_job(served, row(1)), inputs=(from_numpy("x", np.array([[index]], np.int64)),)
                )
                (job,) = await running.gateway.jobs.submit(tenant, [request])
                failed = await running.gateway.jobs.get(tenant, job["id"], 20)
                assert (failed["state"], failed["error"]["code"]) == ("failed", InferenceFailed.code)
                message = failed["error"]["message"]
                assert str(index) in message
                assert tap.heard(message.encode()) == (tenant == OPEN)


async def test_what_a_worker_cannot_seal_leaves_without_a_models_words(one: Services) -> None:
    """Its box of the tenant's keys was withdrawn while the job ran."""
    ring = one.workers[0].keyring
    inputs = (from_numpy("x", row(1)),)
    job = seal_job(new_data_key(1), Job(new_job_id(), "stranger", inputs, 5.0))
    end = Outcome(JobId(job.id), JobState.FAILED, (), None, 1, "worker-1", 1.0, 2.0)
    for failure, words in (
        (Failure(InferenceFailed.code, "index 42 is out of bounds"), "no longer has a key to encrypt"),
        (Failure(NoDecryptionKey.code, "no key"), "no key"),
        (Failure(DeadlineExceeded.code, "too late"), "too late"),
    ):
        (left,) = closed(ring, [job], [msgspec.structs.replace(end, error=failure)])
        assert left.error is not None
        assert (left.state, left.error.code) == (JobState.FAILED, failure.code)
        assert words in left.error.message
        assert "42" not in left.error.message
    (without,) = closed(ring, [job], [msgspec.structs.replace(end, state=JobState.SUCCEEDED, outputs=inputs)])
    assert without.error is not None
    assert (without.state, without.outputs, without.error.code) == (JobState.FAILED, (), NoDecryptionKey.code)


async def test_who_is_revoked_cannot_open_what_is_sealed_afterwards_and_its_jobs_end(one: Services) -> None:
    """As soon as the gateway has heard of it. The worker keeps pulling; what it is sent ends with a reason, once."""
    served = await one.push("bump", models.add())
    await seal_tenant(one)
    assert await infer(one, SEALED, served) == OUT
    seals, everyone = one.gateway.tenant_encryption, one.bus.verifier.keyset
    ring = seals.keyring
    before = ring.newest(SEALED)
    left = tuple(record for record in everyone.identities if record.name != "worker-1")
    without = msgspec.structs.replace(everyone, version=everyone.version + 1, identities=left)
    seals.keyset = lambda: without
    await wait_until(lambda: ring.newest(SEALED) is not before, "there is a new key")
    with pytest.raises(NoDecryptionKey):
        await infer(one, SEALED, served)
    failed = await run_job(one, SEALED, served)
    assert (failed["state"], failed["error"]["code"]) == ("failed", NoDecryptionKey.code)
    assert await infer(one, OPEN, served) == OUT
    worker = one.workers[0].keyring
    stored = ring.stored(SEALED)
    assert stored is not None
    assert [worker.opener.open(key) is None for key in stored.keys] == [True, True]
    assert [ring.opener.open(key) is None for key in stored.keys] == [False, False]
    again = msgspec.structs.replace(everyone, version=everyone.version + 2)
    seals.keyset = lambda: again
    await wait_until(lambda: ring.stored(SEALED) != stored, "it is entitled again")
    assert await infer(one, SEALED, served) == OUT


async def test_an_isolated_tenants_keys_are_not_for_shared_workers(one: Services) -> None:
    await seal_tenant(one, isolated=True)
    stored = one.gateway.tenant_encryption.keyring.stored(SEALED)
    assert stored is not None
    names = {record.kid: record.name for record in one.bus.verifier.keyset.identities}
    assert {names[kid] for kid in stored.keys[0].holders()} == {"gateway"}


async def test_a_second_gateway_opens_what_the_first_sealed_and_all_of_it_outlives_a_restart(
    embedded_broker: Broker,
) -> None:
    async with services(embedded_broker, workers=1) as running:
        served = await running.push("bump", models.add())
        await seal_tenant(running)
        done = await run_job(running, SEALED, served)
        other = await running.stack.enter_async_context(gateway.running(running.settings, running.home))
        assert await other.jobs.get(SEALED, done["id"]) == done
        await running.workers[0].holder.stop(1)
        (waiting,) = await other.jobs.submit(SEALED, [new_job(served, row(IN))])
    assert embedded_broker.server is not None
    await embedded_broker.server.kill()
    await embedded_broker.server.start()
    async with services(embedded_broker, workers=1) as running:
        assert await running.gateway.jobs.get(SEALED, done["id"]) == done
        assert shown(await running.gateway.jobs.get(SEALED, waiting["id"], 30)) == OUT


async def test_a_large_payload_is_sealed_too(one: Services) -> None:
    served = await one.push("wide", models.add(width=1 << 16))
    await seal_tenant(one)
    rows = np.arange(1 << 20, dtype=np.float32).reshape(-1, 1 << 16)
    answer = await one.gateway.infer(served, SEALED, (from_numpy("x", rows),), (), request_id="r", timeout_s=30)
    assert np.array_equal(first(answer), rows + 1)


async def test_a_job_that_comes_again_and_one_that_is_buried_stay_sealed(one: Services) -> None:
    served = await one.push("bump", models.add())
    await seal_tenant(one)
    bus, lane = one.workers[0]._bus, served.job_lane(Priority.NORMAL)
    await one.workers[0].holder.stop(1)
    thief = Thief(bus, lane)
    await thief.pull.start()
    requests = [new_job(served, row(IN)) for _ in range(2)]
    ids = [job["id"] for job in await one.gateway.jobs.submit(SEALED, requests)]
    await wait_until(lambda: bool(thief.got), "the thief holds the bundle")
    await thief.pull.stop()
    note = AttemptNote(one.settings.max_attempts, "worker-1", bus.clock.utc())
    attempts = SignedBucket(bus, "attempts", MessageType.ATTEMPT)
    await attempts.put(bus.names.attempt_key(ids[1]), codec.encode(note))
    await thief.got[0].give_back()
    await one.start_worker("worker-2")
    again, dead = await one.gateway.jobs.get_many(SEALED, ids, 30)
    assert (shown(again), again["attempts"]) == (OUT, 2)
    assert (dead["state"], dead["error"]["code"]) == ("dead", "attempts_exhausted")
    letters = await one.bus.direct_batch(bus.names.dead_stream, [bus.names.dead(lane)])
    (letter,) = letters.values()
    assert ids[1].encode() in letter.data
    assert tensor(IN) not in letter.data


async def test_a_payload_that_was_moved_to_another_job_does_not_open(one: Services) -> None:
    """A gateway's bundle in which one job has another's ciphertext, or says that it is another tenant's."""
    served = await one.push("bump", models.add())
    await seal_tenant(one)
    await seal_tenant(one, "bank")
    key = one.gateway.tenant_encryption.keyring.newest(SEALED)
    assert key is not None
    deadline = one.bus.clock.utc() + 30
    good = seal_job(key, Job(new_job_id(), SEALED, (from_numpy("x", row(IN)),), deadline))
    moved = msgspec.structs.replace(good, id=new_job_id())
    lent = msgspec.structs.replace(good, id=good.id, tenant="bank")
    answers: dict[str, Outcome] = {}
    reply = one.bus.names.reply(new_job_id())

    async def answered(message: Any) -> None:
        envelope = one.bus.verify_message(message, MessageType.ANSWER)
        assert envelope is not None
        answers.update({outcome.job: outcome for outcome in codec.decode_outcomes(envelope.body)})

    await one.bus.subscribe(reply, answered)
    for jobs, ends in (((good, moved), ("succeeded", "failed")), ((lent,), ("failed",))):
        answers.clear()
        subject = one.bus.names.lane(served.infer_lane)
        ids = tuple(job.id for job in jobs)
        frame = one.bus.signer.sign_envelope(MessageType.INFER, subject, codec.encode_jobs(jobs), reply=reply, jobs=ids)
        await one.bus.publish_acked(subject, frame)
        await wait_until(lambda ids=ids: set(answers) == set(ids), "every job has an answer")
        assert [answers[job].state.value for job in ids] == list(ends)
    (refused,) = answers.values()
    opened = await one.gateway.tenant_encryption.keyring.open_outcome("bank", refused)
    assert opened.error is not None
    assert opened.error.code in (DecryptionFailed.code, NoDecryptionKey.code)


async def test_identities_that_rotate_keep_opening_what_was_and_what_will_be_sealed(one: Services) -> None:
    served = await one.push("bump", models.add())
    await seal_tenant(one)
    done = await run_job(one, SEALED, served)
    for name in ("worker-1", "gateway"):
        before = one.gateway.tenant_encryption.keyring.stored(SEALED)
        keyset_editor.rotate(one.home, RootKey(one.home.root_key), name, grace_s=0)
        await wait_until(
            lambda before=before: one.gateway.tenant_encryption.keyring.stored(SEALED) != before, "keys were passed on"
        )
        assert await infer(one, SEALED, served) == OUT
    assert await one.gateway.jobs.get(SEALED, done["id"]) == done
    assert shown(await run_job(one, SEALED, served)) == OUT
