"""Decides which events get their own entry, so that no tenant can fill the audit log: others are counted by
tenant and key.

Two bounds. Actions that a tenant may repeat at will have a number of entries per ten minutes. Inference and
jobs may fill a part of the stream and of the entries in memory; the rest is for all other entries.
"""

from __future__ import annotations

import asyncio

from tether.audit.entries import Kind
from tether.bus.bus import Bus
from tether.crypto import Role
from tether.errors import TetherError
from tether.process.log_rate_limiter import LogRateLimiter

BULK = frozenset({Kind.INFERENCE, Kind.JOB})

ACTS_OF_TENANTS = frozenset({Kind.MODEL, Kind.AUTH})

ACTS, WITHIN_S = 1200, 600.0
"""Maximum own entries for one tenant's actions within that time."""

BULK_SHARE = 7 / 8
"""Part of the stream, and of the entries in memory, that inference and jobs may fill."""

LOOK_S = 5.0


class Budget:
    """The budget of one writer."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._acts = LogRateLimiter(bus.clock.monotonic, lines=ACTS, within_s=WITHIN_S)
        self.bulk_full = False
        """Inference and jobs have filled their part of the stream."""

    def allows(self, kind: Kind, tenant: str, in_memory: float) -> bool:
        """Return whether an event gets its own entry. ``in_memory``: fill level of the memory for entries, 0 to 1."""
        if kind in BULK:
            return not self.bulk_full and in_memory < BULK_SHARE
        return kind not in ACTS_OF_TENANTS or self._acts.passes(tenant) is not None

    async def keep(self) -> None:
        """Read without end how full the stream is. Gateways alone write inference and jobs, and may ask for it."""
        while self._bus.signer.role is Role.GATEWAY:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        try:
            info = await self._bus.api(f"STREAM.INFO.{self._bus.names.audit_stream}")
        except TetherError:
            return
        most = info["config"]["max_bytes"]
        self.bulk_full = most > 0 and info["state"]["bytes"] >= BULK_SHARE * most
