"""Answers that are kept: for whom, how long, how many; and what becomes of requests that wait for another's answer."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from tether.domain.job import Job, JobId
from tether.domain.tensor import Tensor
from tether.errors import DeadlineExceeded, InferenceFailed, QueueFull
from tether.gateway_http.inference.request_coalescer import RequestCoalescer
from tether.gateway_http.inference.response_cache import Answer, CacheLookup, ResponseCache, digest_of


def answer(size: int = 16, name: str = "y") -> Answer:
    return (Tensor(name, "UINT8", (size,), bytes(size)),)


def job(data: bytes = b"\1\2\3\4", *, shape: tuple[int, ...] = (4,), name: str = "x", **rest: object) -> Job:
    fields = {"tenant": "acme", "datatype": "UINT8", "outputs": (), **rest}
    tensor = Tensor(name, str(fields.pop("datatype")), shape, data)
    return Job(JobId("0" * 32), inputs=(tensor,), deadline=0.0, **fields)  # type: ignore[arg-type]


def digest(made: Job, pool: str = "shared", model: str = "m", version: int = 1, generation: int = 1) -> bytes:
    return digest_of(made, pool, model, version, generation)


def question(
    key: bytes, tenant: str = "acme", *, model: str = "m", timeout_s: float = 10.0, ttl_s: float = 60.0
) -> CacheLookup:
    return CacheLookup(tenant, model, key, timeout_s, ttl_s)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def cache(limit: int = 1 << 20) -> tuple[ResponseCache, Clock]:
    clock = Clock()
    return ResponseCache(limit, clock), clock


def test_a_request_is_the_same_when_everything_its_answer_depends_on_is() -> None:
    same = digest(job())
    assert digest(job(request_id="another")) == same
    different = [
        digest(job(), pool="acme"),
        digest(job(), model="n"),
        digest(job(), version=2),
        digest(job(), generation=2),
        digest(job(tenant="other")),
        digest(job(outputs=("y",))),
        digest(job(b"\1\2\3\5")),
        digest(job(shape=(2, 2))),
        digest(job(datatype="INT8")),
        digest(job(name="z")),
    ]
    assert len({same, *different}) == 1 + len(different)


def test_bytes_of_one_input_are_not_taken_for_those_of_the_next() -> None:
    def two(first: bytes, second: bytes) -> bytes:
        tensors = (Tensor("a", "BYTES", (1,), first), Tensor("b", "BYTES", (1,), second))
        return digest(Job(JobId("0" * 32), "acme", tensors, 0.0))

    assert two(b"ab", b"c") != two(b"a", b"bc")


def test_an_answer_is_kept_for_its_time_and_for_its_tenant() -> None:
    kept, clock = cache()
    kept.put(question(b"k", ttl_s=5.0), answer())
    assert kept.get("acme", b"k") == answer()
    assert kept.get("other", b"k") is None
    clock.now += 4.9
    assert kept.get("acme", b"k") == answer()
    clock.now += 0.2
    assert kept.get("acme", b"k") is None
    assert (len(kept), kept.size) == (0, 0)


def test_what_is_used_least_lately_makes_room() -> None:
    kept, _ = cache(limit=100_000)
    for number in range(9):
        kept.put(question(bytes([number])), answer(10_000))
    assert kept.get("acme", bytes([0])) is not None
    kept.put(question(b"new"), answer(10_000))
    assert kept.get("acme", bytes([0])) is not None
    assert kept.get("acme", bytes([1])) is None
    assert 0 < kept.size <= kept.limit


def test_a_tenant_that_floods_the_cache_pushes_out_its_own_answers() -> None:
    kept, _ = cache(limit=100_000)
    for number in range(3):
        kept.put(question(bytes([number]), "calm"), answer(10_000))
    for number in range(500):
        kept.put(question(number.to_bytes(2), "flood"), answer(10_000))
        assert kept.size <= kept.limit
    assert all(kept.get("calm", bytes([number])) is not None for number in range(3))
    for number in range(2):
        kept.put(question(bytes([number]), "late"), answer(10_000))
    assert all(kept.get("late", bytes([number])) is not None for number in range(2))


def test_an_answer_that_would_take_much_of_the_room_is_not_kept() -> None:
    kept, _ = cache(limit=100_000)
    kept.put(question(b"k"), answer(12_400))
    assert kept.get("acme", b"k") is None
    kept.put(question(b"k"), answer(10_000))
    kept.put(question(b"k"), answer(20))
    assert len(kept) == 1
    assert kept.size < 2000


def test_answers_of_a_model_or_a_tenant_are_forgotten_together() -> None:
    kept, _ = cache()
    for tenant in ("acme", "other"):
        for model in ("m", "n"):
            kept.put(question(model.encode(), tenant, model=model), answer())
    kept.drop_model("m")
    assert [kept.get(tenant, b"m") for tenant in ("acme", "other")] == [None, None]
    assert kept.get("acme", b"n") is not None
    kept.drop_tenant("acme")
    assert kept.get("acme", b"n") is None
    assert kept.get("other", b"n") is not None
    kept.drop_tenant("other")
    assert (len(kept), kept.size) == (0, 0)


def test_what_is_counted_is_at_least_what_is_used() -> None:
    """Of many small answers, which take more for themselves than for their bytes."""
    kept, _ = cache(limit=64 << 20)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(2000):
            outputs = tuple(
                Tensor(f"output {name} {number}", "FP32", (number, 2), bytes(8 + number % 3)) for name in range(3)
            )
            kept.put(question(number.to_bytes(32)), outputs)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept) == 2000
    assert after - before <= kept.size


class Sends:
    """What :class:`RequestCoalescer` puts on its way; the test decides how each ends."""

    def __init__(self) -> None:
        self.sent: list[asyncio.Future[Answer]] = []
        self.seconds: list[float] = []

    def __call__(self, timeout_s: float) -> asyncio.Future[Answer]:
        self.seconds.append(timeout_s)
        self.sent.append(asyncio.get_running_loop().create_future())
        return self.sent[-1]

    def withdraw(self) -> None:
        self.sent[-1].cancel()


class Desk:
    """Several callers with the same request."""

    def __init__(self, most_following: int = 100) -> None:
        made, self.clock = cache()
        self.kept = RequestCoalescer(made, self.clock, most_following)
        self.sends = Sends()
        self.may_keep = True

    def ask(self, *, timeout_s: float = 10.0) -> asyncio.Task[tuple[Answer, bool]]:
        asked = question(b"k", timeout_s=timeout_s)
        return asyncio.ensure_future(self.kept.answer(asked, self.sends, self.sends.withdraw, lambda: self.may_keep))


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_of_the_same_requests_one_is_run_and_all_are_answered() -> None:
    desk = Desk()
    callers = [desk.ask() for _ in range(10)]
    await turns()
    assert (len(desk.sends.sent), desk.kept.following) == (1, 9)
    desk.sends.sent[0].set_result(answer())
    assert [await caller for caller in callers] == [(answer(), False)] + 9 * [(answer(), True)]
    assert await desk.ask() == (answer(), True)
    assert (len(desk.sends.sent), desk.kept.following) == (1, 0)


async def test_who_leaves_takes_the_answer_from_nobody() -> None:
    desk = Desk()
    first, second, third = desk.ask(), desk.ask(), desk.ask()
    await turns()
    first.cancel()
    third.cancel()
    await turns()
    assert not desk.sends.sent[0].cancelled()
    desk.sends.sent[0].set_result(answer())
    assert await second == (answer(), True)
    left = await asyncio.gather(first, third, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in left)
    assert await desk.ask() == (answer(), True)


async def test_a_run_that_the_last_of_its_callers_has_left_is_withdrawn() -> None:
    desk = Desk()
    callers = [desk.ask(), desk.ask(), desk.ask(timeout_s=0.01)]
    await turns()
    with pytest.raises(DeadlineExceeded):
        await callers[2]
    callers[0].cancel()
    await turns()
    assert not desk.sends.sent[0].cancelled()
    callers[1].cancel()
    await turns()
    assert desk.sends.sent[0].cancelled()
    again = desk.ask()
    await turns()
    assert len(desk.sends.sent) == 2
    desk.sends.sent[1].set_result(answer())
    assert await again == (answer(), False)


async def test_an_error_is_nobody_elses_and_never_kept() -> None:
    desk = Desk()
    first, second = desk.ask(), desk.ask()
    await turns()
    desk.clock.now += 4.0
    desk.sends.sent[0].set_exception(QueueFull("no room"))
    with pytest.raises(QueueFull):
        await first
    await turns()
    assert len(desk.sends.sent) == 2
    assert desk.sends.seconds == [10.0, 6.0]
    desk.sends.sent[1].set_result(answer())
    assert await second == (answer(), False)
    assert await desk.ask() == (answer(), True)


async def test_a_failed_run_is_not_kept() -> None:
    desk = Desk()
    first = desk.ask()
    await turns()
    desk.sends.sent[0].set_exception(InferenceFailed("no"))
    with pytest.raises(InferenceFailed):
        await first
    second = desk.ask()
    await turns()
    assert len(desk.sends.sent) == 2
    desk.sends.sent[1].set_result(answer())
    assert await second == (answer(), False)


async def test_who_follows_waits_no_longer_than_it_said() -> None:
    desk = Desk()
    first = desk.ask()
    await turns()
    with pytest.raises(DeadlineExceeded):
        await desk.ask(timeout_s=0.01)
    desk.sends.sent[0].set_result(answer())
    assert await first == (answer(), False)


async def test_only_so_many_wait_for_another_ones_answer() -> None:
    desk = Desk(most_following=2)
    callers = [desk.ask() for _ in range(5)]
    await turns()
    assert len(desk.sends.sent) == 3
    for sent in desk.sends.sent:
        sent.set_result(answer())
    assert [hit for _, hit in await asyncio.gather(*callers)] == [False, True, True, False, False]


async def test_what_may_not_be_kept_any_more_when_it_comes_is_not() -> None:
    desk = Desk()
    first = desk.ask()
    await turns()
    desk.may_keep = False
    desk.sends.sent[0].set_result(answer())
    assert await first == (answer(), False)
    assert len(desk.kept.cache) == 0
