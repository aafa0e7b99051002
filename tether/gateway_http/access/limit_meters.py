"""One limit as one of several gateways counts it. Pure: time is passed in, what other gateways told is handed in.

A limit belongs to all gateways together. Each takes a share of it in proportion to how much was asked of it, so that
the shares add up to the whole. How full a gateway's part is travels with its demand: who takes over a part of the limit
takes it over as full or as empty as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import msgspec

TICK_S = 0.2
"""Time between two reports of a gateway whose keys are asked."""

SILENT_S = 1.5
"""A gateway that is expected to report and has not for this long is gone: others take its share over."""

IDLE_S = 1.0
"""A gateway that nobody asked for this long gives its share back."""

_MEMORY_S = 0.3
"""Time in which an old demand is forgotten by two thirds; half of it when nothing at all is asked any more."""

_EPSILON = 1e-9


class LimitReport(msgspec.Struct, frozen=True):
    """What a gateway tells of one limit."""

    name: str
    demand: float
    """Requests a second that were asked of it, or for slots how many it could have used; 0: none now."""
    fill: float = 1.0
    """How full its part of the bucket is: 1 full, 0 empty, below 0 in debt."""
    open: int = 0
    """Slots that are taken there."""


class Peer:
    """Another gateway's last report."""

    __slots__ = ("at", "demand", "fill", "open", "weight")

    def __init__(self, report: LimitReport, now: float, weight: float) -> None:
        self.demand = report.demand
        self.fill = report.fill
        self.open = report.open
        self.at = now
        self.weight = weight


class Meter(Protocol):
    """What :class:`DistributedTokenBucket` and :class:`DistributedSemaphore` have in common."""

    demand: float
    peers: dict[str, Peer]

    def tick(self, now: float) -> None: ...

    def heard(self, gateway: str, report: LimitReport, now: float) -> None: ...

    def report(self, name: str, now: float) -> LimitReport: ...

    def refresh(self, now: float) -> None: ...

    def unknown(self) -> bool: ...

    def at_rest(self, now: float) -> bool: ...


class _SharedLimit:
    """Own demand, that of others, and who has not said anything yet. ``members`` are the other live gateways."""

    def __init__(self, own: str, members: Mapping[str, float], now: float) -> None:
        self._own = own
        self._members = members
        self.demand = 0.0
        self.peers: dict[str, Peer] = {}
        self._ticked_at = now
        self._asked_at = now
        self._fresh = False

    def unknown(self) -> bool:
        """Whether a live gateway has not told its demand."""
        return any(member not in self.peers for member in self._members)

    def _strangers(self) -> int:
        """Those gateways are taken to want as much as this one."""
        if not self._members:
            return 0
        return sum(member not in self.peers for member in self._members)

    def _first_demand(self) -> float:
        """What to assume of a demand that begins: as much as others have; else one request."""
        active = [peer.demand for peer in self.peers.values() if peer.demand]
        return sum(active) / len(active) if active else self._one()

    def _one(self) -> float:
        return 1.0

    def _wake(self, now: float) -> None:
        self._silence(now)
        self.demand = self._first_demand()
        self._ticked_at = now
        self._fresh = True

    def _learn(self, asked: float, now: float) -> None:
        """Follow what was asked for since the last tick."""
        if self._fresh:
            self.demand, self._fresh = asked, False
            return
        weight = 1 - math.exp(-(now - self._ticked_at) / (_MEMORY_S if asked else _MEMORY_S / 2))
        self.demand += weight * (asked - self.demand)

    def _silence(self, now: float) -> None:
        """Peers that should have reported and did not want nothing from now on."""
        for name, peer in self.peers.items():
            if peer.demand and (name not in self._members or now - peer.at > SILENT_S):
                peer.demand, peer.open = 0.0, 0

    def _settle(self) -> None:
        """What the silent had was handed on; those who are gone are forgotten."""
        for peer in self.peers.values():
            peer.weight = peer.demand
        for name in [name for name in self.peers if name not in self._members]:
            del self.peers[name]

    def refresh(self, now: float) -> None:
        """The broker was away: nobody could report."""
        for peer in self.peers.values():
            peer.at = now


class DistributedTokenBucket(_SharedLimit):
    """A token bucket: ``rate`` a second, at most ``burst`` at once."""

    def __init__(self, rate: float, burst: float, own: str, members: Mapping[str, float], now: float) -> None:
        super().__init__(own, members, now)
        self.share = 0.0
        self._fill = 1.0
        self._at = now
        self._asked = 0
        self.configure(rate, burst, now)

    def configure(self, rate: float, burst: float, now: float) -> None:
        """Set the limit, new or changed; a burst of 0 is what the rate allows in a second."""
        self.rate = rate
        self.burst = max(1.0, float(burst or math.ceil(rate)))
        self._at = max(self._at, now)
        self._scale()

    def _scale(self) -> None:
        """A part is never smaller than one request, or nothing would ever fit it."""
        share = self.share or 1.0
        self._room = max(1.0, share * self.burst)
        self._per_s = share * self.rate
        self._speed = self._per_s / self._room

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._fill = min(1.0, self._fill + (now - self._at) * self._speed)
            self._at = now

    def take(self, now: float) -> bool:
        """Take one token; False when this gateway's part has none."""
        self._asked += 1
        self._asked_at = now
        if not self.demand:
            self._wake(now)
            self._reshare(now)
        self._refill(now)
        if self._fill * self._room < 1.0 - _EPSILON:
            return False
        self._fill -= 1.0 / self._room
        return True

    def charge(self, count: int, now: float) -> None:
        """Count what was not known when the token was taken; it may leave a debt. Below 0 it gives back."""
        self._refill(now)
        self._asked += max(0, count)
        self._fill = min(1.0, self._fill - count / self._room)

    def _one(self) -> float:
        return 1.0 / TICK_S

    # others

    def tick(self, now: float) -> None:
        """Work out demand and share anew; call it every ``TICK_S`` while there is a demand."""
        elapsed = now - self._ticked_at
        if not self._fresh or elapsed > TICK_S / 2:
            if self.demand:
                self._learn(self._asked / max(elapsed, 1e-3), now)
            self._asked = 0
            self._ticked_at = now
        if now - self._asked_at > IDLE_S:
            self.demand = 0.0
        self._silence(now)
        self._reshare(now)
        self._settle()

    def heard(self, gateway: str, report: LimitReport, now: float) -> None:
        old = self.peers.get(gateway)
        weight = report.demand or (self.demand if old is None else old.weight)
        peer = self.peers[gateway] = Peer(report, now, weight)
        self._reshare(now)
        peer.weight = peer.demand

    def _reshare(self, now: float) -> None:
        """Take the share that belongs to the demands; what comes from others comes as full as it was there."""
        self._refill(now)
        share = 0.0
        if self.demand:
            others = sum(peer.demand for peer in self.peers.values()) + self.demand * self._strangers()
            share = self.demand / (self.demand + others)
        if share > self.share:
            self._fill = (self.share * self._fill + (share - self.share) * self._fill_elsewhere()) / share
        elif not share:
            self._fill = self._fill_elsewhere()
        self.share = share
        self._scale()

    def _fill_elsewhere(self) -> float:
        whole = sum(peer.weight for peer in self.peers.values())
        if not whole:
            return self._fill
        return sum(peer.weight * peer.fill for peer in self.peers.values()) / whole

    def report(self, name: str, now: float) -> LimitReport:
        self._refill(now)
        return LimitReport(name, self.demand, self._fill)

    def at_rest(self, now: float) -> bool:
        """Whether nothing would be lost by forgetting it."""
        self._refill(now)
        return not self.demand and self._fill >= 1.0 and not any(peer.demand for peer in self.peers.values())

    # telling

    @property
    def remaining(self) -> int:
        """Requests that are left over all gateways, as far as this one knows; 0 when it has none to give."""
        if self._fill * self._room < 1.0 - _EPSILON:
            return 0
        return max(1, int(self._fill * self.burst + _EPSILON))

    @property
    def full_in_s(self) -> float:
        """Seconds until all of ``burst`` is there again."""
        return (1.0 - self._fill) / self._speed

    @property
    def next_in_s(self) -> float:
        """Seconds until one request is let in."""
        return max(0.0, (1.0 - self._fill * self._room) / self._per_s)


class DistributedSemaphore(_SharedLimit):
    """At most ``limit`` requests open at the same time."""

    def __init__(self, limit: int, own: str, members: Mapping[str, float], now: float) -> None:
        super().__init__(own, members, now)
        self.limit = limit
        self.open = 0
        self._peak = 0
        self._refused = 0
        self.allotted = limit
        self._elsewhere = 0

    def configure(self, limit: int) -> None:
        self.limit = limit
        self._allot()

    def take(self, now: float) -> bool:
        """Take a slot; False when this gateway's part, or the whole, is taken. Every slot taken is to be given back."""
        self._asked_at = now
        if not self.demand:
            self._wake(now)
            self._allot()
        if self.open >= self.allotted or self.open + self._elsewhere >= self.limit:
            self._refused += 1
            return False
        self.open += 1
        self._peak = max(self._peak, self.open)
        return True

    def give_back(self) -> None:
        self.open -= 1

    @property
    def remaining(self) -> int:
        return max(0, min(self.allotted - self.open, self.limit - self.open - self._elsewhere))

    # others

    def tick(self, now: float) -> None:
        if self.demand:
            self._learn(float(self._peak + self._refused), now)
            if not self.open and now - self._asked_at > IDLE_S:
                self.demand = 0.0
        self._peak, self._refused = self.open, 0
        self._ticked_at = now
        self._silence(now)
        self._settle()
        self._allot()

    def heard(self, gateway: str, report: LimitReport, now: float) -> None:
        self.peers[gateway] = Peer(report, now, report.demand)
        self._allot()

    def _allot(self) -> None:
        """Whole slots in proportion to demand. Who sees the same demands comes to the same parts."""
        self._elsewhere = sum(peer.open for peer in self.peers.values())
        wanted = {name: peer.demand for name, peer in self.peers.items() if peer.demand}
        wanted |= {name: self.demand for name in self._members if name not in self.peers}
        wanted[self._own] = max(self.demand, _EPSILON)
        if len(wanted) == 1:
            self.allotted = self.limit
            return
        self.allotted = allotment(self.limit, wanted)[self._own]

    def report(self, name: str, now: float) -> LimitReport:
        del now
        return LimitReport(name, self.demand, 1.0, self.open)

    def at_rest(self, now: float) -> bool:
        del now
        return not self.demand and not self.open and not any(peer.demand for peer in self.peers.values())


def allotment(limit: int, wanted: Mapping[str, float]) -> dict[str, int]:
    """``limit`` whole slots in proportion to what each wants, the largest remainders rounded up; they add up to it."""
    whole = sum(wanted.values())
    exact = {name: limit * demand / whole for name, demand in wanted.items()}
    parts = {name: int(value) for name, value in exact.items()}
    left = limit - sum(parts.values())
    for name in sorted(exact, key=lambda name: (parts[name] - exact[name], name))[:left]:
        parts[name] += 1
    return parts
