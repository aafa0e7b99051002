"""The bucket ``leases``: which model store owns which partition; and requests to the current owner.

The key of a lease is ``partition.<number>``, of a heartbeat ``store.<instance>``. A lease changes owner by a
conditional write. Its epoch is the time in milliseconds, or the replaced sequence plus one if that is more:
sequences
restart after
a power cut, and an owner whose epoch was lost must not share it with the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NamedTuple

from tether.bus import rpc
from tether.bus.bus import Bus, StoredMessage
from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.domain.partition import Lease, StoreHeartbeat
from tether.errors import BadEncoding, BrokerUnavailable, Unavailable, VersionConflict
from tether.wire import codec

FORGOTTEN_S = 60
"""Seconds after which the broker deletes a heartbeat."""

PATIENCE_S = 20.0
"""Seconds that a request waits for a partition to be taken over."""

_LOOK_S = 1.0
_AGAIN_S = 0.25
_LEASE = "partition."
_LIFE = "store."


class LeaseState(NamedTuple):
    """The bucket's state: sequence and lease of each partition (None: unreadable), sequence of each heartbeat."""

    leases: dict[int, tuple[int, Lease | None]]
    signs: dict[str, int]


class LeaseBucket:
    """For model stores, which write it, and gateways, which read single leases."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._raw = KvBucket(bus, "leases")

    async def read_all(self) -> LeaseState:
        """Read all leases and heartbeats.

        Raises:
            BrokerUnavailable: no answer.
        """
        seen, start = LeaseState({}, {}), len(self._raw.subject(""))
        async for item in self._bus.direct_scan(self._raw.stream, self._raw.subject(">")):
            key = item.subject[start:]
            if item.headers.get("KV-Operation"):
                continue
            if key.startswith(_LEASE) and key[len(_LEASE) :].isdecimal():
                seen.leases[int(key[len(_LEASE) :])] = (item.sequence, self._lease(item))
            elif (
                key.startswith(_LIFE) and self._bus.verify_frame(item.data, item.subject, MessageType.LEASE) is not None
            ):
                seen.signs[key[len(_LIFE) :]] = item.sequence
        return seen

    async def get(self, partition: int) -> Lease | None:
        """Return the lease of one partition; None if there is no valid one.

        Raises:
            BrokerUnavailable: no answer.
        """
        item = await self._bus.direct_get(self._raw.stream, self._raw.subject(f"{_LEASE}{partition}"))
        return None if item is None else self._lease(item)

    def _lease(self, item: StoredMessage) -> Lease | None:
        envelope = self._bus.verify_frame(item.data, item.subject, MessageType.LEASE)
        if envelope is None:
            return None
        with suppress(BadEncoding):
            return codec.decode(envelope.body, Lease)
        return None

    async def sign(self, sign: StoreHeartbeat) -> None:
        """Send a heartbeat.

        Raises:
            BrokerUnavailable: it may not be stored.
        """
        key = f"{_LIFE}{sign.instance}"
        frame = self._bus.signer.sign_envelope(MessageType.LEASE, self._raw.subject(key), codec.encode(sign))
        await self._raw.put(key, frame, ttl_s=FORGOTTEN_S)

    async def forget(self, instance: str) -> None:
        """Delete the last heartbeat of an instance that stops.

        Raises:
            BrokerUnavailable: no answer.
        """
        await self._raw.delete(f"{_LIFE}{instance}")

    async def transfer(self, partition: int, owner: str, sequence: int) -> Lease | None:
        """Give ``owner`` (empty: no owner) a partition whose lease has ``sequence``; return None if another
        writer was first.

        Raises:
            BrokerUnavailable: it may be stored all the same.
        """
        lease = Lease(partition, max(sequence + 1, self._bus.clock.utc_ms()), owner)
        subject = self._raw.subject(f"{_LEASE}{partition}")
        frame = self._bus.signer.sign_envelope(MessageType.LEASE, subject, codec.encode(lease))
        headers = {"Nats-Expected-Last-Subject-Sequence": str(sequence)}
        try:
            await self._bus.publish_acked(subject, frame, headers=headers)
        except VersionConflict:
            return None
        return lease


async def ask_owner(
    bus: Bus,
    endpoint: str,
    partition: int,
    kind: MessageType,
    body: bytes,
    *,
    answers: MessageType,
    timeout: float = 5.0,
    again: bool = True,
) -> bytes:
    """Call the current owner of a partition with :func:`tether.bus.rpc.call`.

    Waits for a partition without an owner. If the owner changes during the request, the next owner is called,
    unless ``again`` is off: for requests that must not run twice.

    Raises:
        Unavailable: the partition has no owner, or its owner changed during the request.
        BrokerUnavailable: the owner gave no answer within ``timeout`` seconds.
        TetherError: the error that the owner raised.
    """
    leases, now = LeaseBucket(bus), bus.clock.monotonic
    until = now() + PATIENCE_S
    while True:
        lease = await leases.get(partition)
        if lease is not None and lease.owner:
            subject = bus.names.store_service(endpoint, partition, lease.epoch)
            call = rpc.call(bus, endpoint, kind, body, answers=answers, timeout=timeout, subject=subject)
            try:
                answer = await _while_owned(leases, lease, call)
            except BrokerUnavailable as error:
                if error.field != subject:
                    raise
            else:
                if answer is not None:
                    return answer
                if not again:
                    raise Unavailable(
                        "the model store changed while handling the request; check whether it was applied, then retry",
                        retry_after=2,
                    )
                until = now() + PATIENCE_S
        if now() > until:
            raise Unavailable(f"no model store owns partition {partition} at the moment", retry_after=2)
        await asyncio.sleep(_AGAIN_S)


async def _while_owned(leases: LeaseBucket, lease: Lease, call: Coroutine[Any, Any, bytes]) -> bytes | None:
    """Return the answer; None once another store has the lease and no answer has arrived."""
    asking = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({asking}, timeout=_LOOK_S))[0]:
            with suppress(BrokerUnavailable):
                if await leases.get(lease.partition) != lease and not asking.done():
                    return None
        return asking.result()
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
