"""Attacks by an identity with a login, through what the broker or a service does on its behalf (S26).

Each is refused by the broker, or what it achieves is not believed by whoever receives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
from support.brokers.brokers import embedded, wait_until
from support.brokers.logins import OWN, TENANT, Logins, add_bound_worker, connected

from tether.broker.embedded_server import Binary
from tether.bus import rpc
from tether.bus.bus import Bus, Message
from tether.bus.errors import JetStreamError
from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.crypto import Envelope, MessageType
from tether.domain.manifest import Epoch
from tether.errors import PermissionDenied
from tether.process import metrics
from tether.process.data_dir import Home
from tether.streams.job_queue import BusQueue, BusResults
from tether.streams.lane_consumer import Delivery, LaneConsumer
from tether.wire import codec


@pytest.fixture
async def logins(home: Home, nats_binary: Binary) -> AsyncIterator[Logins]:
    add_bound_worker(home)
    async with embedded(home, nats_binary) as broker, connected(broker) as made:
        yield made


def rejected(reason: str) -> float:
    value: float = metrics.ENVELOPES_REJECTED.labels(reason)._value.get()
    return value


async def enqueue(logins: Logins, message_id: str, body: bytes = b"job") -> bytes:
    gateway = logins.gateway
    frame = gateway.signer.sign_envelope(MessageType.JOB, gateway.names.lane(logins.lane), body, message_id=message_id)
    await BusQueue(gateway).enqueue(logins.lane, frame, message_id=message_id, ttl_s=None)
    return frame


def pull_subject(logins: Logins) -> str:
    names = logins.worker.names
    return f"$JS.API.CONSUMER.MSG.NEXT.{names.lane_stream(logins.lane)}.{names.lane_consumer(logins.lane)}"


PULL = b'{"batch":1,"expires":2000000000,"group":"lane"}'


async def test_a_job_pulled_to_a_foreign_inbox_is_not_taken_for_what_is_awaited_there(logins: Logins) -> None:
    """The broker does deliver it there, under the lane's subject. Its signature is for a lane, as a job."""
    heard: list[Message] = []

    async def listen(message: Message) -> None:
        heard.append(message)

    reply = logins.gateway.names.reply("gateway-run")
    await logins.gateway.subscribe(reply, listen)
    await enqueue(logins, "1")
    await logins.worker.publish(pull_subject(logins), PULL, reply=reply)
    await wait_until(lambda: bool(heard), "the broker delivered the job to the gateway")
    assert heard[0].subject != reply
    before = rejected("subject_mismatch") + rejected("role_not_allowed")
    assert logins.gateway.verify_frame(heard[0].data, reply, MessageType.ANSWER) is None
    assert logins.gateway.verify_message(heard[0], MessageType.ANSWER) is None
    assert rejected("subject_mismatch") + rejected("role_not_allowed") == before + 2


async def test_a_job_pulled_to_a_service_is_not_a_request(logins: Logins) -> None:
    handled: list[Envelope] = []

    async def keep(envelope: Envelope) -> bytes:
        handled.append(envelope)
        return codec.encode(Epoch(1))

    service = logins.dispatcher.names.service("registerWorker")
    registered = MessageType.REGISTERED
    async with rpc.serve(
        logins.dispatcher, "registerWorker", accepts=MessageType.REGISTER, answers=registered, handler=keep
    ):
        await enqueue(logins, "1")
        before = rejected("role_not_allowed")
        await logins.worker.publish(pull_subject(logins), PULL, reply=service)
        await wait_until(lambda: rejected("role_not_allowed") > before, "the dispatcher refused it")
    assert handled == []


async def test_what_a_worker_makes_the_broker_write_into_a_bucket_is_not_believed(logins: Logins) -> None:
    """Its own note, read back with an answer address in the bucket: the broker stores it there, under the worker's
    signature for another subject. It is nobody's entry; see ADR 8 on what is lost by it."""
    names = logins.worker.names
    bucket = SignedBucket(logins.gateway, "tenants", MessageType.TENANT)
    await bucket.put("acme", b"the tenant")
    note = names.bucket_key("attempts", names.attempt_key("n"))
    frame = logins.worker.signer.sign_envelope(MessageType.TENANT, bucket.raw.subject("evil"), b"forged")
    await logins.worker.publish_acked(note, frame)
    read = f"$JS.API.DIRECT.GET.{names.bucket_stream('attempts')}.{note}"
    for key in ("acme", "evil"):
        await logins.worker.publish(read, b"", reply=bucket.raw.subject(key))

        async def arrived(key: str = key) -> bool:
            return await bucket.raw.get(key) == frame

        await wait_until(arrived, "the broker stored it on behalf of the worker")
    before = rejected("role_not_allowed")
    assert await bucket.entries() == {}
    assert rejected("role_not_allowed") == before + 2


@pytest.mark.parametrize("value", ["all", "sub"])
async def test_a_roll_up_wipes_no_bucket(logins: Logins, value: str) -> None:
    names = logins.worker.names
    await logins.other.publish_acked(names.bucket_key("liveness", "worker-2"), b"beat")
    note = names.attempt_key("1")
    writers = {
        "liveness": (logins.worker, "worker-1"),
        "attempts": (logins.worker, note),
        "models": (logins.modelstore, "m.1"),
        "routes": (logins.dispatcher, "m.1"),
        "jobs": (logins.gateway, "job"),
        "apikeys": (logins.gateway, "key"),
    }
    for bucket, (bus, key) in writers.items():
        with pytest.raises(JetStreamError, match="rollup not permitted"):
            await bus.publish_acked(names.bucket_key(bucket, key), b"", headers={"Nats-Rollup": value})
    beat = await logins.gateway.direct_get(names.bucket_stream("liveness"), names.bucket_key("liveness", "worker-2"))
    assert beat is not None


async def test_nobody_can_schedule_a_message_for_a_subject_it_may_not_publish_on(logins: Logins) -> None:
    """No stream of ours takes schedules, batches or counters; with the header a message is refused."""
    names = logins.worker.names
    target = {"Nats-Schedule": "@at 2020-01-01T00:00:00Z", "Nats-Schedule-Target": names.bucket_key("models", "m.1")}
    tries = [
        (logins.worker, names.result("job")),
        (logins.worker, names.bucket_key("liveness", "worker-1")),
        (logins.worker, f"{names.dead_subjects('shared')[:-1]}m.1"),
        (logins.gateway, names.lane(logins.lane)),
        (logins.gateway, names.bucket_key("jobs", "job")),
        (logins.gateway, names.audit("acme", "infer")),
        (logins.modelstore, names.bucket_key("models", "m.1")),
    ]
    for bus, subject in tries:
        with pytest.raises(JetStreamError, match="schedules is disabled"):
            await bus.publish_acked(subject, b"x", headers=target)
    assert await logins.gateway.direct_get(names.bucket_stream("models"), names.bucket_key("models", "m.1")) is None


async def test_no_worker_can_take_the_place_of_a_job_by_guessing_its_message_id(logins: Logins) -> None:
    lane = logins.worker.names.lane(logins.lane)
    with pytest.raises(PermissionDenied):
        await logins.worker.publish_acked(lane, b"decoy", headers={"Nats-Msg-Id": "guessed"})
    frame = await enqueue(logins, "guessed")
    got = await take(logins.worker, logins)
    assert got.frame == frame


async def take(bus: Bus, logins: Logins) -> Delivery:
    """The next message of the lane."""
    taken: list[Delivery] = []
    pull = LaneConsumer(bus, logins.lane, 1, taken.append)
    await pull.start()
    try:
        await wait_until(lambda: bool(taken), "a message was delivered")
    finally:
        await pull.stop()
    return taken[0]


async def test_no_worker_settles_what_another_pool_holds(logins: Logins) -> None:
    await enqueue(logins, "1")
    held = await take(logins.worker, logins)
    stream = logins.own.names.lane_stream(logins.lane)
    flushed = await denials(logins.own, held.ack_subject)
    assert flushed == 1
    info = await logins.dispatcher.api(f"CONSUMER.INFO.{stream}.{logins.own.names.lane_consumer(logins.lane)}")
    assert info["num_ack_pending"] == 1
    for call in (f"CONSUMER.MSG.NEXT.{stream}.{logins.own.names.lane_consumer(logins.lane)}", f"STREAM.INFO.{stream}"):
        with pytest.raises(PermissionDenied):
            await logins.own.api(call)


async def denials(bus: Bus, subject: str) -> float:
    """How many messages on ``subject`` the broker refused of one."""
    before: float = metrics.PERMISSION_DENIED._value.get()
    await bus.publish(subject, b"+ACK")
    await bus.flush()
    after: float = metrics.PERMISSION_DENIED._value.get()
    return after - before


async def test_nobody_listens_in_on_anothers_answers(logins: Logins) -> None:
    spies = (logins.worker, logins.own, logins.gateway, logins.modelstore, logins.dispatcher)
    patterns = [
        f"{logins.other.inbox}.>", "_INBOX.tether.worker.worker-2.>", "_INBOX.tether.worker.>", "_INBOX.>", "_INBOX.*.>",
        "_INBOX.tether.*.*.*.r.*", ">", "*.tether.>",
    ]  # fmt: skip
    for spy in spies:
        for pattern in patterns:
            with pytest.raises(PermissionDenied):
                await spy.subscribe(pattern, _nothing)


async def _nothing(_: Message) -> None:
    raise AssertionError("a message was overheard")


async def test_only_the_dispatcher_makes_consumers(logins: Logins) -> None:
    config = {"ack_policy": "none", "deliver_subject": "_INBOX.tether.worker.worker-1.x"}
    for bus in (logins.worker, logins.own, logins.gateway, logins.modelstore):
        for stream in ("TETHER_JOBS_0", "TETHER_RESULTS", "KV_TETHER_apikeys", "OBJ_TETHER_CHUNKS_0"):
            for call in (
                f"CONSUMER.CREATE.{stream}",
                f"CONSUMER.CREATE.{stream}.spy",
                f"CONSUMER.DURABLE.CREATE.{stream}.spy",
            ):
                with pytest.raises(PermissionDenied):
                    await bus.api(call, {"stream_name": stream, "config": config})


@pytest.mark.parametrize("wildcard", ["*", ">", "*.>", "=acme=eu", "*.*"])
async def test_a_wildcard_in_a_read_gives_nothing_of_another_pool(logins: Logins, wildcard: str) -> None:
    """A ``*`` in a right admits the literal ``*`` and ``>``, so what follows it must be the pool."""
    names = logins.worker.names
    await logins.own.publish_acked(names.result("secret", TENANT), b"secret")
    await logins.own.publish_acked(names.bucket_key("attempts", names.attempt_key("secret", TENANT)), b"secret")
    found: list[bytes] = []
    for stream, subject in (
        (names.results_stream, names.result(wildcard)),
        (names.bucket_stream("attempts"), names.bucket_key("attempts", names.attempt_key(wildcard))),
        (names.bucket_stream("attempts"), names.bucket_key("attempts", wildcard)),
        (names.pool_results_stream(TENANT), names.result(wildcard, TENANT)),
        (names.pool_results_stream(TENANT), wildcard),
    ):
        with contextlib.suppress(PermissionDenied):
            stored = await logins.worker.direct_get(stream, subject)
            found += [] if stored is None else [stored.data]
    assert found == []
    notes, own = names.bucket_stream("attempts"), names.bucket_key("attempts", names.attempt_key("secret", TENANT))
    assert await logins.own.direct_get(notes, own) is not None


async def test_the_subject_form_of_a_read_takes_no_other_wish_in_its_body(logins: Logins) -> None:
    names = logins.worker.names
    await logins.own.publish_acked(names.bucket_key("attempts", names.attempt_key("secret", TENANT)), b"secret")
    await logins.worker.publish_acked(names.bucket_key("attempts", names.attempt_key("mine")), b"mine")
    own = f"$JS.API.DIRECT.GET.{names.bucket_stream('attempts')}.{names.bucket_key('attempts', names.attempt_key('mine'))}"
    for body in (b'{"seq":1}', b'{"multi_last":["$KV.TETHER_attempts.>"]}', b'{"batch":9,"seq":1,"next_by_subj":">"}'):
        answer = await logins.worker.request(own, body, timeout=5)
        assert (answer.headers or {})["Status"] == "408"
        assert answer.data == b""


async def test_an_isolated_worker_reads_and_writes_in_its_own_pool_alone(logins: Logins) -> None:
    names, own = logins.own.names, logins.own
    assert await BusResults(logins.worker).commit("shared-job", b"shared")
    for subject in (
        names.result("shared-job"),
        names.result("job", "another"),
        names.bucket_key("attempts", names.attempt_key("job")),
        names.bucket_key("attempts", names.attempt_key("job", "another")),
        names.bucket_key("liveness", "worker-1"),
        f"{names.dead_subjects('shared')[:-1]}m.1",
        f"{names.dead_subjects('another')[:-1]}m.1",
    ):
        with pytest.raises(PermissionDenied):
            await own.publish_acked(subject, b"x")
    with pytest.raises(PermissionDenied):
        await BusResults(own).find(["shared-job"])
    with pytest.raises(PermissionDenied):
        await BusResults(own).find(["shared-job", "other"])
    with pytest.raises(PermissionDenied):
        await KvBucket(own, "assign").get("worker-1")
    assert await KvBucket(own, "assign").get(OWN) is None
    await own.publish_acked(names.bucket_key("liveness", OWN), b"beat")
    await own.publish_acked(names.result("job", TENANT), b"result")


async def test_an_answer_goes_to_the_inbox_of_who_asked_and_nowhere_else(logins: Logins) -> None:
    """The dispatcher may answer wherever a request points: a worker must not make it write what it may not."""
    worker, names = logins.worker, logins.worker.names
    subject, models = names.service("registerWorker"), names.bucket_key("models", "m.1")

    async def epoch(_: Envelope) -> bytes:
        return codec.encode(Epoch(5))

    serving = rpc.serve(
        logins.dispatcher,
        "registerWorker",
        accepts=MessageType.REGISTER,
        answers=MessageType.REGISTERED,
        handler=epoch,
    )
    async with serving:
        for reply in (names.inbox("worker", "worker-2") + ".r.1", logins.gateway.reply_inbox(), models):
            before = rejected("subject_mismatch")
            frame = worker.signer.sign_envelope(MessageType.REGISTER, subject, b"x", reply=reply)
            await worker.publish(subject, frame, reply=reply)
            await wait_until(lambda before=before: rejected("subject_mismatch") > before, f"no answer to {reply}")
        kinds = {"kind": MessageType.REGISTER, "answers": MessageType.REGISTERED}
        answer = await rpc.call(worker, "registerWorker", kinds["kind"], b"", answers=kinds["answers"])
    assert codec.decode(answer, Epoch).epoch == 5
    assert await logins.gateway.direct_get(names.bucket_stream("models"), models) is None
