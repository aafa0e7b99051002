"""One limit over three gateways on a real broker, in real time; the figures are printed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest
from support.brokers.brokers import Broker, wait_until
from support.platform.services import services

from tether.crypto import MessageType
from tether.domain import api_key
from tether.domain.api_key import ApiKey
from tether.domain.job import new_job_id
from tether.domain.tenant import Quotas, Tenant
from tether.errors import RateLimited
from tether.gateway_http import gateway as core
from tether.gateway_http.access.limit_meters import SILENT_S, LimitReport
from tether.gateway_http.access.limit_sync import LimitMessage
from tether.gateway_http.access.rate_limits import LimitPermit
from tether.gateway_http.gateway import Gateway
from tether.wire import codec


@pytest.fixture
async def three(broker: Broker) -> AsyncIterator[list[Gateway]]:
    async with (
        services(broker, workers=1) as one,
        core.running(broker.settings, broker.home) as second,
        core.running(broker.settings, broker.home) as third,
    ):
        found = [one.gateway, second, third]
        await wait_until(lambda: all(len(_members(gateway)) == 2 for gateway in found), "gateways know each other")
        yield found


def _members(gateway: Gateway) -> dict[str, float]:
    return gateway.limits.gossip.members


async def _key(gateways: list[Gateway], *, tenant: str = "acme", **limits: float) -> ApiKey:
    record = api_key.stored_key(
        api_key.new_key_text(), tenant=tenant, scopes=("infer",), name="test", created_at=time.time()
    )
    record = msgspec.structs.replace(record, **limits)
    await gateways[0].keys.store(record)
    await wait_until(lambda: all(gateway.keys.find(record.id) for gateway in gateways), "every gateway has the key")
    return record


def _say(figures: str) -> None:
    print(f"\n{figures}")  # noqa: T201 - the figures are what the test is for


class Load:
    """Requests at random moments on the event loop's clock, for so many seconds."""

    def __init__(self, gateways: list[Gateway], key: ApiKey, seconds: float) -> None:
        self._gateways = gateways
        self._keys = [gateway.keys.find(key.id) or key for gateway in gateways]
        self._loop = asyncio.get_running_loop()
        self.began = self._loop.time()
        self._end = self.began + seconds
        self._random = random.Random(7)
        self.admitted: list[tuple[float, int]] = []
        self.refused = 0

    async def run(self, *per_s: float, take: Callable[[int], None] | None = None) -> float:
        """Seconds that it took; ``per_s`` are the demands of the gateways."""
        ended = self._loop.create_future()
        self._loop.call_at(self._end, ended.set_result, None)
        for index, rate in enumerate(per_s):
            if rate:
                self._later(self.began, index, rate, take or self._take)
        await ended
        return self._loop.time() - self.began

    def _later(self, last: float, index: int, rate: float, take: Callable[[int], None]) -> None:
        when = last + self._random.expovariate(rate)
        if when < self._end:
            self._loop.call_at(when, self._ask, when, index, rate, take)

    def _ask(self, when: float, index: int, rate: float, take: Callable[[int], None]) -> None:
        take(index)
        self._later(when, index, rate, take)

    def _take(self, index: int) -> None:
        ticket = self.enter(index)
        if ticket is not None:
            ticket.leave()

    def enter(self, index: int) -> LimitPermit | None:
        try:
            ticket = self._gateways[index].limits.enter(self._keys[index])
        except RateLimited:
            self.refused += 1
            return None
        assert ticket is not None
        self.admitted.append((self._loop.time(), index))
        return ticket


@pytest.mark.parametrize("demand", [(900.0, 0.0, 0.0), (300.0, 300.0, 300.0), (800.0, 80.0, 20.0)])
async def test_three_gateways_hold_one_rate(three: list[Gateway], demand: tuple[float, ...]) -> None:
    key = await _key(three, rate=200.0, burst=100)
    load = Load(three, key, 4.0)
    elapsed = await load.run(*demand)
    allowed = 100 + 200 * elapsed
    _say(f"demand {demand}: {len(load.admitted)} of {allowed:.0f} allowed in {elapsed:.2f} s, {load.refused} refused")
    assert len(load.admitted) == pytest.approx(allowed, rel=0.1)


async def test_a_demand_that_moves_finds_the_same_limit(three: list[Gateway]) -> None:
    key = await _key(three, rate=200.0, burst=50)
    parts = []
    for demand in ((600.0, 0.0, 0.0), (0.0, 600.0, 0.0), (0.0, 0.0, 600.0)):
        load = Load(three, key, 1.5)
        await load.run(*demand)
        parts.append(len(load.admitted))
    _say(f"admitted in turns of 1.5 s: {parts}; allowed {50 + 3 * 300}")
    assert sum(parts) == pytest.approx(50 + 900, rel=0.1)


async def test_the_share_of_a_gateway_that_vanished_flows_back(three: list[Gateway]) -> None:
    """It says nothing any more, as one does that was killed; the two others are the whole within two seconds."""
    key = await _key(three, rate=200.0, burst=20)
    before = Load(three, key, 1.0)
    await before.run(300.0, 300.0, 300.0)
    await three[2].bus.close()
    load = Load(three, key, 4.0)
    await load.run(300.0, 300.0, 0.0)
    late = [at for at, _ in load.admitted if at > load.began + SILENT_S + 0.5]
    allowed = 200 * (4.0 - SILENT_S - 0.5)
    _say(f"after one of three died: {len(late)} of {allowed:.0f} allowed")
    assert len(late) == pytest.approx(allowed, rel=0.1)


async def test_a_gateway_that_has_left_sends_no_report_that_makes_it_count_again(
    three: list[Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report may be due when a gateway stops; an ended one kept a share of every limit."""
    stays, leaves, _ = three
    own = leaves.limits.gossip.own
    await leaves.limits.gossip._send(gone=True)
    await wait_until(lambda: own not in _members(stays), "it is known to have left")
    sent: list[str] = []

    async def noted(subject: str, *_: object, **__: object) -> None:
        sent.append(subject)

    monkeypatch.setattr(leaves.bus, "publish", noted)
    await leaves.limits.gossip._send_reports()
    assert not sent


async def test_three_gateways_hold_one_concurrency(three: list[Gateway]) -> None:
    """Each request stays for 50 ms; offered are 60 at a time, 20 may be open."""
    key = await _key(three, concurrency=20)
    loop = asyncio.get_running_loop()
    load = Load(three, key, 4.0)
    open_now, most, area, since = 0, 0, 0.0, load.began + 1.0

    def change(step: int) -> None:
        nonlocal open_now, most, area, since
        now = loop.time()
        if now > since:
            area += open_now * (now - since)
            since = now
            most = max(most, open_now)
        open_now += step

    def take(index: int) -> None:
        ticket = load.enter(index)
        if ticket is not None:
            change(1)
            loop.call_later(0.05, leave, ticket)

    def leave(ticket: LimitPermit) -> None:
        ticket.leave()
        change(-1)

    elapsed = await load.run(800.0, 300.0, 100.0, take=take)
    change(0)
    mean = area / (elapsed - 1.0)
    _say(f"open over three gateways: {mean:.1f} on average, {most} at most, of 20 allowed")
    assert mean == pytest.approx(20, rel=0.1)
    assert most <= 22
    await wait_until(lambda: open_now == 0, "all have left")


async def test_a_tenants_requests_a_minute_hold_for_all_of_its_keys(three: list[Gateway]) -> None:
    await three[0].tenants.store(Tenant("metered", quotas=Quotas(requests_per_minute=6000)))
    await wait_until(lambda: all(gateway.tenants.find("metered") for gateway in three), "every gateway knows it")
    keys = [await _key(three, tenant="metered") for _ in range(2)]
    loads = [Load(three, key, 3.0) for key in keys]
    elapsed, _ = await asyncio.gather(loads[0].run(300.0, 0.0, 50.0), loads[1].run(0.0, 300.0, 0.0))
    admitted = sum(len(load.admitted) for load in loads)
    _say(f"two keys of one tenant: {admitted} of {600 + 100 * elapsed:.0f} allowed")
    assert admitted == pytest.approx(600 + 100 * elapsed, rel=0.1)


async def test_at_rest_nothing_is_told_and_forged_or_repeated_reports_are_not_heard(three: list[Gateway]) -> None:
    key = await _key(three, rate=100.0, burst=10)
    heard: list[bytes] = []

    async def note(message: object) -> None:
        heard.append(getattr(message, "data"))  # noqa: B009 - a subscription's message

    bus, gossip = three[0].bus, three[0].limits.gossip
    subscription = await bus.subscribe(bus.names.demand(), note)
    await Load(three, key, 0.5).run(200.0, 200.0, 0.0)
    assert heard
    name = f"rate:{key.id}"
    await wait_until(lambda: all(gateway.limits.gossip.resting for gateway in three), "all came to rest")
    repeated = heard[-1]
    mine = LimitMessage("someone", 1, [LimitReport(name, 1e6)])
    old = bus.signer.sign_envelope(
        MessageType.DEMAND, bus.names.demand(), codec.encode(mine), expires_at=1, message_id=new_job_id()
    )
    for frame in (repeated, old, repeated[:-1], b"TTHR"):
        await bus.publish(bus.names.demand(), frame)
    await wait_until(lambda: b"TTHR" in heard, "they were delivered, among what was still on its way")
    await bus.flush()
    told = len(heard)
    assert "someone" not in gossip.members
    assert await _silent_for(0.6, lambda: len(heard) == told)
    await subscription.unsubscribe()


async def _silent_for(seconds: float, still: Callable[[], bool]) -> bool:
    end = asyncio.get_running_loop().time() + seconds
    await wait_until(lambda: asyncio.get_running_loop().time() > end or not still(), "time has passed")
    return still()
