"""Isolated tenants: which pools there are beside the shared one, and their streams.

A tenant that ceases to be isolated keeps its streams. While jobs are in them its own workers go on serving its lanes;
new jobs go to the shared ones. No stream is ever removed here: what is in one was accepted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from tether.bus.bus import Bus
from tether.bus.errors import JetStreamError
from tether.bus.key_value.model_owners import OwnerBook
from tether.domain.job import SHARED
from tether.domain.manifest import ModelRef
from tether.domain.tenant import Tenant, allows_model
from tether.errors import BadEncoding, BrokerUnavailable, PermissionDenied, QueueFull, StorageFull
from tether.model.ownership import Right
from tether.process.log_rate_limiter import LogRateLimiter
from tether.streams.layout import ensure_pool, is_empty, pools_with_streams
from tether.wire import codec
from tether.wire.subjects import name_of, token

log = logging.getLogger(__name__)

_TOLD_S = 60.0


class Pools:
    """Follows the tenants' records and keeps the streams of the isolated ones as they must be."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._tenants: dict[str, Tenant] = {}
        self._leaving: set[str] = set()
        """Not isolated any more, and not yet empty."""
        self._made: set[str] = set()
        self._refused: set[str] = set()
        """The broker had no room for their streams, when it was last asked, or did not let this dispatcher make them."""
        self._as_they_are: set[str] = set()
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=_TOLD_S)

    def tenant_changed(self, key: str, body: bytes | None) -> None:
        name = name_of(key)
        before = self._isolated()
        if body is None:
            self._tenants.pop(name, None)
        else:
            try:
                record = codec.decode(body, Tenant)
            except BadEncoding as error:
                log.warning("unreadable tenant: %s", error, extra={"action": "entry_refused"})
                return
            if token(record.name) == key:
                self._tenants[name] = record
        self._leaving |= before - self._isolated()

    def _isolated(self) -> set[str]:
        return {name for name, tenant in self._tenants.items() if tenant.isolated}

    def isolated(self, pool: str) -> bool:
        """Whether a pool is that of a tenant which is isolated now."""
        return pool in self._tenants and self._tenants[pool].isolated

    def served(self) -> set[str]:
        """Every pool whose lanes are served, without the shared one: its streams are there, and a worker is bound to it."""
        return (self._isolated() | self._leaving) & self._made & self._bound()

    def _bound(self) -> set[str]:
        """Tenants with workers of their own, by the keyset: the broker lets nobody make streams of others."""
        return {record.tenant for record in self._bus.verifier.keyset.identities}

    def models(self, refs: Iterable[ModelRef], owners: OwnerBook) -> Mapping[str, tuple[ModelRef, ...]]:
        """For the shared and every served pool the versions that it may use."""
        every = tuple(sorted(refs, key=lambda ref: (ref.model, ref.version)))
        found = {SHARED: every}
        for pool in self.served():
            tenant = self._tenants.get(pool) or Tenant(pool)
            allowed = {ref.model for ref in every if allows_model(tenant.models, ref.model, pool)}
            allowed = {model for model in allowed if owners.right(model, pool) > Right.NONE}
            found[pool] = tuple(ref for ref in every if ref.model in allowed)
        return found

    async def ensure(self) -> None:
        """Make the streams of pools that have none yet. A tenant for whom there is no room keeps nobody else waiting.

        Raises:
            BrokerUnavailable
        """
        await self._make_each(sorted((self._isolated() | self._leaving) - self._made - self._refused))

    async def look_again(self) -> None:
        """Bring every pool's streams in line, and find formerly isolated tenants whose lanes still hold jobs.

        Raises:
            JetStreamError, BrokerUnavailable
        """
        left = await pools_with_streams(self._bus) - self._isolated()
        holding = {pool for pool in left if not await self._is_empty(pool)}
        self._leaving = holding - self._isolated()
        self._refused.clear()
        await self._make_each(sorted(self._isolated() | self._leaving))

    async def _is_empty(self, pool: str) -> bool:
        """A stream that does not answer may hold jobs."""
        try:
            return await is_empty(self._bus, pool)
        except BrokerUnavailable:
            return False

    async def _make_each(self, pools: Sequence[str]) -> None:
        """All of them, also after one that failed.

        Raises:
            BrokerUnavailable: of the first that failed.
        """
        failed = [error for pool in pools if (error := await self._make(pool)) is not None]
        for error in failed:
            raise error

    async def _make(self, pool: str) -> BrokerUnavailable | None:
        if pool not in self._bound():
            self._refuse(pool, f"no worker is bound to it: 'tether identity add NAME --role worker --tenant {pool}'")
            return None
        try:
            await ensure_pool(self._bus, pool, self._bus.settings, self._as_they_are)
        except PermissionDenied as error:
            self._refuse(pool, f"{error}; let the broker read its new configuration")
        except (QueueFull, StorageFull, JetStreamError) as error:
            self._refuse(pool, f"{error}; raise max_memory_mb, max_file_mb or max_isolated_tenants")
        except BrokerUnavailable as error:
            return error
        else:
            self._made.add(pool)
        return None

    def _refuse(self, pool: str, reason: str) -> None:
        self._made.discard(pool)
        self._refused.add(pool)
        if self._told.passes(pool) is not None:
            extra = {"action": "pool_refused", "tenant": pool}
            log.warning("tenant '%s' is isolated and gets no streams: %s", pool, reason, extra=extra)
