"""The list of workers, and their heartbeats."""

from __future__ import annotations

from tether.bus.key_value.bucket import KvBucket
from tether.crypto import MessageType
from tether.domain.manifest import Heartbeat
from tether.errors import BadEncoding
from tether.gateway_http.api.route_spec import RequestContext, RouteReply, RouteSpec
from tether.gateway_http.gateway import Gateway
from tether.gateway_http.schemas import common
from tether.wire import codec

TAG = "Administration"


async def _workers(call: RequestContext) -> RouteReply:
    beats = await heartbeats(call.gateway)
    now = call.gateway.bus.clock.utc()
    return RouteReply(common.Workers([_worker(beat, now) for beat in sorted(beats, key=lambda beat: beat.worker)]))


async def heartbeats(gateway: Gateway) -> list[Heartbeat]:
    """Return the last heartbeat of every worker; skip those not signed by the worker itself.

    Raises:
        BrokerUnavailable: no answer.
    """
    bus, bucket = gateway.bus, KvBucket(gateway.bus, "liveness")
    found = []
    for name, frame in (await bucket.entries()).items():
        envelope = bus.verify_frame(frame, bucket.subject(name), MessageType.HEARTBEAT)
        if envelope is None or envelope.sender != name:
            continue
        try:
            found.append(codec.decode(envelope.body, Heartbeat))
        except BadEncoding:
            continue
    return found


def _worker(beat: Heartbeat, now: float) -> common.Worker:
    return common.Worker(
        name=beat.worker,
        region=beat.region,
        ready=[common.HeldModel(ref.model, ref.version) for ref in beat.ready],
        failed=[_failed(label, reason) for label, reason in beat.failed],
        running=beat.running,
        slots=beat.slots,
        age_s=round(max(0.0, now - beat.sent_at), 3),
        labels=dict(beat.labels),
        memory_bytes=beat.memory,
    )


def _failed(label: str, reason: str) -> common.FailedModel:
    model, _, version = label.rpartition(":")
    return common.FailedModel(model, int(version) if version.isdecimal() else 0, reason)


ROWS = [
    RouteSpec("GET", "/v1/workers", "List workers", TAG, _workers, {200: common.Workers}, "admin", errors=(503,)),
]
