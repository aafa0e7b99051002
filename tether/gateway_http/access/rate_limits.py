"""Rate limits of API keys and tenants: requests per second, per minute and at the same time.

Checked right after authentication, before the body is read, so that a rejection is cheap. A limit holds for
all gateways together: see :mod:`tether.gateway_http.access.limit_meters`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from tether.bus.bus import Bus
from tether.domain.api_key import ApiKey
from tether.domain.tenant import Tenant
from tether.errors import RateLimited
from tether.gateway_http.access.limit_meters import DistributedSemaphore, DistributedTokenBucket, Meter
from tether.gateway_http.access.limit_sync import LimitSync
from tether.gateway_http.http.error_responses import limit_headers
from tether.process import metrics
from tether.process.lifecycle import Tasks

Header = tuple[str, str]

_RATE, _OPEN, _TENANT = "rate:", "open:", "tenant:"
"""Prefixes of limit names in messages between gateways."""

_refused_rate = metrics.LIMITED.labels("rate")
_refused_open = metrics.LIMITED.labels("concurrency")
_refused_tenant = metrics.LIMITED.labels("tenant")


class KeyLimits:
    """The limits of a key; ``free`` if there are none."""

    __slots__ = ("free", "key", "quota", "rate", "slots", "tenant")

    def __init__(
        self,
        key: ApiKey,
        tenant: Tenant | None,
        rate: DistributedTokenBucket | None,
        slots: DistributedSemaphore | None,
        quota: DistributedTokenBucket | None,
    ) -> None:
        self.key = key
        self.tenant = tenant
        self.rate = rate
        self.slots = slots
        self.quota = quota
        self.free = rate is None and slots is None and quota is None


class LimitPermit:
    """An admitted request; :meth:`leave` releases its slot."""

    __slots__ = ("_limited", "_now", "_open")

    def __init__(self, limited: KeyLimits, now: Callable[[], float]) -> None:
        self._limited = limited
        self._now = now
        self._open = True

    def count(self, more: int) -> None:
        """Charge ``more`` requests beyond the first. They are admitted and may leave a debt."""
        for meter in (self._limited.rate, self._limited.quota):
            if meter is not None and more:
                meter.charge(more, self._now())

    def leave(self) -> None:
        """Release the slot; idempotent."""
        if self._open:
            self._open = False
            if self._limited.slots is not None:
                self._limited.slots.give_back()

    def headers(self) -> list[Header]:
        """Return headers of the tightest limit: size, remainder, seconds until it is full again."""
        limited = self._limited
        rates = [meter for meter in (limited.rate, limited.quota) if meter is not None]
        if rates:
            tightest = min(rates, key=lambda meter: meter.remaining)
            return limit_headers(int(tightest.burst), tightest.remaining, tightest.full_in_s)
        slots = limited.slots
        return [] if slots is None else limit_headers(slots.limit, slots.remaining, 0.0)


class RateLimits:
    """The limits of all keys and tenants, as one gateway counts them."""

    def __init__(
        self,
        bus: Bus,
        tasks: Tasks,
        find_key: Callable[[str], ApiKey | None],
        find_tenant: Callable[[str], Tenant | None],
    ) -> None:
        settings = bus.settings
        self._default_rate = settings.default_key_rate
        self._default_slots = settings.default_key_concurrency
        self._find_key = find_key
        self._find_tenant = find_tenant
        self._now = bus.clock.monotonic
        self._known: dict[str, KeyLimits] = {}
        self._meters: dict[str, DistributedTokenBucket | DistributedSemaphore] = {}
        self.gossip = LimitSync(bus, tasks, self._by_name)

    def talking(self) -> AbstractAsyncContextManager[None]:
        """Synchronize the limits with the other gateways until the block ends."""
        return self.gossip.talking()

    def enter(self, key: ApiKey) -> LimitPermit | None:
        """Admit a request; return None if its key has no limits.

        Raises:
            RateLimited: too many requests per second, per minute or at the same time; nothing was taken.
        """
        limited = self._known.get(key.id)
        tenant = self._find_tenant(key.tenant)
        if limited is None or limited.key is not key or limited.tenant is not tenant:
            limited = self._known[key.id] = self._limits_of(key, tenant)
        if limited.free:
            return None
        now = self._now()
        self._take_slot(limited, now)
        try:
            self._take_tokens(limited, now)
        except RateLimited:
            if limited.slots is not None:
                limited.slots.give_back()
            raise
        return LimitPermit(limited, self._now)

    def _take_slot(self, limited: KeyLimits, now: float) -> None:
        slots = limited.slots
        if slots is None:
            return
        asleep = not slots.demand
        taken = slots.take(now)
        if asleep:
            self.gossip.woken(_OPEN + limited.key.id, slots)
        if not taken:
            _refused_open.inc()
            raise RateLimited(
                f"this API key has {slots.limit} open requests, the maximum; wait until one finishes",
                field="concurrency",
                limit=slots.limit,
                remaining=0,
            )

    def _take_tokens(self, limited: KeyLimits, now: float) -> None:
        rate, quota = limited.rate, limited.quota
        if rate is not None and not self._take(rate, _RATE + limited.key.id, now):
            _refused_rate.inc()
            raise _too_often(rate, f"this API key may send {rate.rate:g} requests a second", "rate")
        if quota is not None and not self._take(quota, _TENANT + limited.key.tenant, now):
            if rate is not None:
                rate.charge(-1, now)
            _refused_tenant.inc()
            per_minute = f"{quota.rate * 60:g} requests a minute"
            raise _too_often(quota, f"tenant '{limited.key.tenant}' may send {per_minute}", "requests_per_minute")

    def _take(self, meter: DistributedTokenBucket, name: str, now: float) -> bool:
        asleep = not meter.demand
        taken = meter.take(now)
        if asleep:
            self.gossip.woken(name, meter)
        return taken

    def open_requests(self, key_id: str) -> int:
        """Return the open requests at this gateway of a key that has a concurrency limit."""
        slots = self._meters.get(_OPEN + key_id)
        return slots.open if isinstance(slots, DistributedSemaphore) else 0

    # lookup of limits

    def _limits_of(self, key: ApiKey, tenant: Tenant | None) -> KeyLimits:
        return KeyLimits(key, tenant, self._rate(key), self._slots(key), self._quota(tenant))

    def _rate(self, key: ApiKey) -> DistributedTokenBucket | None:
        rate, burst = (key.rate, key.burst) if key.rate else (self._default_rate, 0)
        return self._bucket(_RATE + key.id, rate, burst) if rate else None

    def _quota(self, tenant: Tenant | None) -> DistributedTokenBucket | None:
        """Return the tenant's limit, with a burst of a tenth of a minute, so that no minute exceeds it by
        more."""
        per_minute = 0 if tenant is None else tenant.quotas.requests_per_minute
        if tenant is None or not per_minute:
            return None
        return self._bucket(_TENANT + tenant.name, per_minute / 60, max(1, per_minute // 10))

    def _bucket(self, name: str, rate: float, burst: int) -> DistributedTokenBucket:
        meter = self._meters.get(name)
        if isinstance(meter, DistributedTokenBucket):
            meter.configure(rate, burst, self._now())
            return meter
        meter = self._meters[name] = DistributedTokenBucket(
            rate, burst, self.gossip.own, self.gossip.members, self._now()
        )
        return meter

    def _slots(self, key: ApiKey) -> DistributedSemaphore | None:
        limit = key.concurrency or self._default_slots
        if not limit:
            return None
        name = _OPEN + key.id
        meter = self._meters.get(name)
        if isinstance(meter, DistributedSemaphore):
            meter.configure(limit)
            return meter
        made = self._meters[name] = DistributedSemaphore(limit, self.gossip.own, self.gossip.members, self._now())
        return made

    def _by_name(self, name: str) -> Meter | None:
        """Return the limit of a name in a peer's message; None if its key or tenant is unknown or unlimited."""
        found = self._meters.get(name)
        if found is not None:
            return found
        kind, _, owner = name.partition(":")
        if kind == "tenant":
            return self._quota(self._find_tenant(owner))
        key = self._find_key(owner)
        if key is None:
            return None
        return self._rate(key) if kind == "rate" else self._slots(key)


def _too_often(meter: DistributedTokenBucket, what: str, field: str) -> RateLimited:
    wait_s = meter.next_in_s
    return RateLimited(
        f"{what}; wait {wait_s:.1f} s",
        field=field,
        retry_after=wait_s,
        limit=int(meter.burst),
        remaining=meter.remaining,
        reset=meter.full_in_s,
    )
