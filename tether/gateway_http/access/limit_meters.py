"""One gateway's part of a limit that several gateways share. Pure: time and the peers' reports are passed in.

Gateways divide a limit in proportion to their demand, so that the shares add up to the whole. A report
carries the demand and the fill level of a gateway's part; a gateway that takes over a part of the limit also
takes over its fill level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import msgspec

TICK_S = 0.2
"""Time between two reports of a gateway with demand, in seconds."""

SILENT_S = 1.5
"""An expected gateway that has not reported for this many seconds is gone; others take over its share."""

IDLE_S = 1.0
"""A gateway without requests for this many seconds gives its share back."""

_MEMORY_S = 0.3
"""Time constant of the demand average, in seconds; halved when there are no requests at all."""

_EPSILON = 1e-9


class LimitReport(msgspec.Struct, frozen=True):
    """A gateway's report of one limit."""

    name: str
    demand: float
    """Requests per second that it received; of a semaphore, the slots it could have used. 0: none now."""
    fill: float = 1.0
    """Fill level of its part of the bucket: 1 full, 0 empty, below 0 in debt."""
    open: int = 0
    """Slots in use there."""


class Peer:
    """The last report of another gateway."""

    __slots__ = ("at", "demand", "fill", "open", "weight")

    def __init__(self, report: LimitReport, now: float, weight: float) -> None:
        self.demand = report.demand
        self.fill = report.fill
        self.open = report.open
        self.at = now
        self.weight = weight


class Meter(Protocol):
    """The common interface of :class:`DistributedTokenBucket` and :class:`DistributedSemaphore`."""

    demand: float
    peers: dict[str, Peer]

    def tick(self, now: float) -> None: ...

    def heard(self, gateway: str, report: LimitReport, now: float) -> None: ...

    def report(self, name: str, now: float) -> LimitReport: ...

    def refresh(self, now: float) -> None: ...

    def unknown(self) -> bool: ...

    def at_rest(self, now: float) -> bool: ...


class _SharedLimit:
    """Own demand, the peers' demand, and peers that have not reported. ``members`` are the other live
    gateways."""

    def __init__(self, own: str, members: Mapping[str, float], now: float) -> None:
        self._own = own
        self._members = members
        self.demand = 0.0
        self.peers: dict[str, Peer] = {}
        self._ticked_at = now
        self._asked_at = now
        self._fresh = False

    def unknown(self) -> bool:
        """Return True if a live gateway has not reported its demand."""
        return any(member not in self.peers for member in self._members)

    def _strangers(self) -> int:
        """Count the live gateways without a report; they are assumed to have this gateway's demand."""
        if not self._members:
            return 0
        return sum(member not in self.peers for member in self._members)

    def _first_demand(self) -> float:
        """Return the initial estimate of a new demand: the average of the peers', else one request."""
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
        """Update the demand average with the requests since the last tick."""
        if self._fresh:
            self.demand, self._fresh = asked, False
            return
        weight = 1 - math.exp(-(now - self._ticked_at) / (_MEMORY_S if asked else _MEMORY_S / 2))
        self.demand += weight * (asked - self.demand)

    def _silence(self, now: float) -> None:
        """Set the demand of peers with an overdue report to zero."""
        for name, peer in self.peers.items():
            if peer.demand and (name not in self._members or now - peer.at > SILENT_S):
                peer.demand, peer.open = 0.0, 0

    def _settle(self) -> None:
        """Forget the weights of silent peers, whose share was taken over, and peers that are gone."""
        for peer in self.peers.values():
            peer.weight = peer.demand
        for name in [name for name in self.peers if name not in self._members]:
            del self.peers[name]

    def refresh(self, now: float) -> None:
        """Restart the silence timeout of all peers: they could not report while the broker was away."""
        for peer in self.peers.values():
            peer.at = now


class DistributedTokenBucket(_SharedLimit):
    """A token bucket of ``rate`` tokens per second, at most ``burst`` at once."""

    def __init__(self, rate: float, burst: float, own: str, members: Mapping[str, float], now: float) -> None:
        super().__init__(own, members, now)
        self.share = 0.0
        self._fill = 1.0
        self._at = now
        self._asked = 0
        self.configure(rate, burst, now)

    def configure(self, rate: float, burst: float, now: float) -> None:
        """Set or change the limit; a burst of 0 means one second's worth of ``rate``."""
        self.rate = rate
        self.burst = max(1.0, float(burst or math.ceil(rate)))
        self._at = max(self._at, now)
        self._scale()

    def _scale(self) -> None:
        """Scale this gateway's part to its share, but to at least one request, or nothing would ever fit."""
        share = self.share or 1.0
        self._room = max(1.0, share * self.burst)
        self._per_s = share * self.rate
        self._speed = self._per_s / self._room

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._fill = min(1.0, self._fill + (now - self._at) * self._speed)
            self._at = now

    def take(self, now: float) -> bool:
        """Take one token; return False if this gateway's part has none."""
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
        """Take ``count`` more tokens, even into debt; give them back if negative."""
        self._refill(now)
        self._asked += max(0, count)
        self._fill = min(1.0, self._fill - count / self._room)

    def _one(self) -> float:
        return 1.0 / TICK_S

    # peers

    def tick(self, now: float) -> None:
        """Recompute demand and share; call it every ``TICK_S`` while there is a demand."""
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
        """Set the share in proportion to demand; a part taken over from peers keeps the fill level it had
        there."""
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
        """Return True if it can be forgotten without loss of state."""
        self._refill(now)
        return not self.demand and self._fill >= 1.0 and not any(peer.demand for peer in self.peers.values())

    # reporting

    @property
    def remaining(self) -> int:
        """Requests left over all gateways, as far as this one knows; 0 if its own part is empty."""
        if self._fill * self._room < 1.0 - _EPSILON:
            return 0
        return max(1, int(self._fill * self.burst + _EPSILON))

    @property
    def full_in_s(self) -> float:
        """Seconds until all of ``burst`` is available again."""
        return (1.0 - self._fill) / self._speed

    @property
    def next_in_s(self) -> float:
        """Seconds until the next request is admitted."""
        return max(0.0, (1.0 - self._fill * self._room) / self._per_s)


class DistributedSemaphore(_SharedLimit):
    """At most ``limit`` requests at the same time."""

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
        """Take a slot, which the caller must give back; return False if this part or the whole limit is used
        up."""
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

    # peers

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
        """Divide whole slots in proportion to demand; gateways with the same reports compute the same parts."""
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
    """Divide ``limit`` whole slots in proportion to demand, by largest remainder; the parts add up to
    ``limit``."""
    whole = sum(wanted.values())
    exact = {name: limit * demand / whole for name, demand in wanted.items()}
    parts = {name: int(value) for name, value in exact.items()}
    left = limit - sum(parts.values())
    for name in sorted(exact, key=lambda name: (parts[name] - exact[name], name))[:left]:
        parts[name] += 1
    return parts
