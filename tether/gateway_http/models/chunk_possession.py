"""Tracks which chunks a tenant possesses: knowing a digest gives no right to the chunk.

A tenant may use chunks in a version if it sent them recently, to any gateway, or if it may read them in one
of the model's versions. All other chunks are reported as missing, so the tenant sends them, and they are
stored again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import msgspec

from tether.bus.bus import Bus
from tether.bus.key_value.bucket import SignedBucket
from tether.crypto import MessageType
from tether.errors import CorruptChunk, ModelNotFound, PermissionDenied
from tether.gateway_http.access.authentication import Caller
from tether.gateway_http.models.catalog import Catalog
from tether.gateway_http.models.encrypted_models import EncryptedModels
from tether.model.ownership import Right
from tether.wire import codec
from tether.wire.subjects import token

log = logging.getLogger(__name__)

_OWN = 65_536
"""Chunks that this gateway remembers without asking the broker; the oldest are evicted."""
_SETS = 64
_TOGETHER = 1024
"""Digests looked up before other requests get a turn."""
_VERIFIED = 64
"""Signatures verified before other requests get a turn."""

Named = Callable[[str], str]
"""Returns the stored name of a chunk by its digest."""


class Put(msgspec.Struct, frozen=True):
    """An entry of the bucket ``puts``: the tenant sent the chunk at ``put_at`` (UTC seconds)."""

    tenant: str
    put_at: float


class ChunkPossession:
    """The bucket ``puts`` and the catalog's versions, as one gateway sees them."""

    def __init__(self, bus: Bus, catalog: Catalog, seals: EncryptedModels) -> None:
        self._bus = bus
        self._catalog = catalog
        self._seals = seals
        self._bucket = SignedBucket(bus, "puts", MessageType.RECORD)
        self._own: OrderedDict[str, float] = OrderedDict()
        """When each entry expires, in monotonic seconds."""
        self._sets: OrderedDict[tuple[object, ...], frozenset[str]] = OrderedDict()

    def readable(self, caller: Caller, model: str) -> frozenset[str]:
        """Return the plain digests of chunks in a model's versions that a caller may read."""
        try:
            versions = self._catalog.versions(model) if caller.right(model) >= Right.WRITE else {}
        except ModelNotFound:
            return frozenset()
        every = "models:read" in caller.scopes
        manifests = [one.manifest for one in versions.values() if every or one.manifest.tenant == caller.tenant]
        known = (model, *[(one.version, one.created_at) for one in manifests])
        if known not in self._sets:
            files = [file for one in manifests for file in self._seals.shown(one).files]
            self._sets[known] = frozenset([digest for file in files for digest in file.chunks])
            while len(self._sets) > _SETS:
                self._sets.popitem(last=False)
        return self._sets[known]

    async def shown(self, caller: Caller, model: str, digests: Iterable[str], named: Named) -> set[str]:
        """Return the subset of ``digests`` that the caller's tenant sent or may read.

        Raises:
            BrokerUnavailable: no answer.
        """
        readable, asked, found = self.readable(caller, model), list(set(digests)), set[str]()
        for start in range(0, len(asked), _TOGETHER):
            found |= await self._shown(caller, readable, asked[start : start + _TOGETHER], named)
            await asyncio.sleep(0)
        return found

    async def _shown(self, caller: Caller, readable: frozenset[str], asked: Sequence[str], named: Named) -> set[str]:
        found = readable.intersection(asked)
        now = self._bus.clock.monotonic()
        keys = {_key(caller.tenant, named(digest)): digest for digest in asked if digest not in found}
        own = [key for key in keys if self._own.get(key, 0.0) > now]
        found |= {keys.pop(key) for key in own}
        return set(found) | await self._stored(keys)

    async def require(self, caller: Caller, model: str, digests: Sequence[str], named: Named) -> None:
        """Reject a version of chunks that the tenant does not possess, as if they were missing.

        Raises:
            CorruptChunk: naming the first of them.
            BrokerUnavailable: no answer.
        """
        shown = await self.shown(caller, model, digests, named)
        for digest in digests:
            if digest not in shown:
                raise CorruptChunk(f"chunk {digest} is not in the store; push the model again", field=digest)

    async def note(self, tenant: str, name: str) -> None:
        """Record that a tenant sent a chunk, after it was stored.

        Raises:
            BrokerUnavailable: other gateways may not see it.
        """
        key, settings = _key(tenant, name), self._bus.settings
        self._own[key] = self._bus.clock.monotonic() + settings.unreferenced_ttl_s / 2
        self._own.move_to_end(key)
        while len(self._own) > _OWN:
            self._own.popitem(last=False)
        try:
            await self._bucket.put(key, codec.encode(Put(tenant, self._bus.clock.utc())))
        except PermissionDenied as error:
            log.warning(
                "sender of a chunk not recorded for other gateways: %s", error, extra={"action": "put_not_noted"}
            )

    async def _stored(self, keys: dict[str, str]) -> set[str]:
        """Return the digests that any gateway has recorded."""
        raw, found = self._bucket.raw, set()
        subjects = {raw.subject(key): digest for key, digest in keys.items()}
        items = await self._bus.direct_batch(raw.stream, list(subjects)) if subjects else {}
        for number, (subject, item) in enumerate(items.items()):
            if not number % _VERIFIED:
                await asyncio.sleep(0)
            if item.data and self._bus.verify_frame(item.data, subject, MessageType.RECORD) is not None:
                found.add(subjects[subject])
        return found


def _key(tenant: str, name: str) -> str:
    return f"{token(tenant)}.{name}"
