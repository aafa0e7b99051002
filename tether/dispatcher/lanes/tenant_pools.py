"""Tracks the pools of isolated tenants and creates their streams.

A tenant that is no longer isolated keeps its streams. While jobs are in them its workers serve its lanes; new
jobs go to the shared ones. No stream is removed here: its jobs were accepted.
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
    """Follows tenants' records and creates the streams of isolated ones."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._tenants: dict[str, Tenant] = {}
        self._leaving: set[str] = set()
        """Pools no longer isolated that still have jobs."""
        self._made: set[str] = set()
        self._refused: set[str] = set()
        """Pools whose streams the broker refused on the last try: no space, or no permission."""
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
                log.warning("rejected a tenant's record: %s", error, extra={"action": "entry_refused"})
                return
            if token(record.name) == key:
                self._tenants[name] = record
        self._leaving |= before - self._isolated()

    def _isolated(self) -> set[str]:
        return {name for name, tenant in self._tenants.items() if tenant.isolated}

    def isolated(self, pool: str) -> bool:
        """Return True if the pool belongs to a tenant that is isolated now."""
        return pool in self._tenants and self._tenants[pool].isolated

    def served(self) -> set[str]:
        """Return the served pools except the shared one: their streams exist, and a worker is bound to them."""
        return (self._isolated() | self._leaving) & self._made & self._bound()

    def _bound(self) -> set[str]:
        """Return tenants with workers in the keyset; the broker permits streams only for these."""
        return {record.tenant for record in self._bus.verifier.keyset.identities}

    def models(self, refs: Iterable[ModelRef], owners: OwnerBook) -> Mapping[str, tuple[ModelRef, ...]]:
        """Return the versions that each served pool may use, the shared one included."""
        every = tuple(sorted(refs, key=lambda ref: (ref.model, ref.version)))
        found = {SHARED: every}
        for pool in self.served():
            tenant = self._tenants.get(pool) or Tenant(pool)
            allowed = {ref.model for ref in every if allows_model(tenant.models, ref.model, pool)}
            allowed = {model for model in allowed if owners.right(model, pool) > Right.NONE}
            found[pool] = tuple(ref for ref in every if ref.model in allowed)
        return found

    async def ensure(self) -> None:
        """Create missing streams of pools. A tenant whose streams do not fit delays no other one.

        Raises:
            BrokerUnavailable: the broker did not answer.
        """
        await self._make_each(sorted((self._isolated() | self._leaving) - self._made - self._refused))

    async def update(self) -> None:
        """Update every pool's streams, and find formerly isolated tenants whose lanes still have jobs.

        Raises:
            JetStreamError, BrokerUnavailable: a stream could not be read or updated.
        """
        left = await pools_with_streams(self._bus) - self._isolated()
        holding = {pool for pool in left if not await self._is_empty(pool)}
        self._leaving = holding - self._isolated()
        self._refused.clear()
        await self._make_each(sorted(self._isolated() | self._leaving))

    async def _is_empty(self, pool: str) -> bool:
        """Return True if no job is left; a stream that does not answer may have jobs."""
        try:
            return await is_empty(self._bus, pool)
        except BrokerUnavailable:
            return False

    async def _make_each(self, pools: Sequence[str]) -> None:
        """Create the streams of all pools, also after one that failed.

        Raises:
            BrokerUnavailable: of the first that failed.
        """
        failed = [error for pool in pools if (error := await self._make(pool)) is not None]
        for error in failed:
            raise error

    async def _make(self, pool: str) -> BrokerUnavailable | None:
        if pool not in self._bound():
            self._refuse(
                pool, f"no worker is bound to it: run 'tether identity add NAME --role worker --tenant {pool}'"
            )
            return None
        try:
            await ensure_pool(self._bus, pool, self._bus.settings, self._as_they_are)
        except PermissionDenied as error:
            self._refuse(pool, f"{error}; reload the broker with its new configuration")
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
            log.warning("could not create streams for isolated tenant '%s': %s", pool, reason, extra=extra)
