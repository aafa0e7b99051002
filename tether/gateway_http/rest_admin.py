"""Keys and workers."""

from __future__ import annotations

from tether import apikey, codec
from tether.bus.kv import KvBucket
from tether.envelope import MessageType
from tether.errors import BadEncoding, Conflict, NotFound
from tether.gateway_http import bodies
from tether.gateway_http.core import Gateway
from tether.gateway_http.job_view import rfc3339
from tether.gateway_http.routing import Call, Reply, Row
from tether.model import Heartbeat, check_name

TAG = "Administration"


async def _create_key(call: Call) -> Reply:
    wanted: bodies.NewKey = call.body
    tenant = check_name(wanted.tenant, field="tenant")
    text = apikey.new_key_text()
    scopes = tuple(scope for scope in apikey.SCOPES if scope in wanted.scopes)
    now = call.gateway.bus.clock.utc()
    record = apikey.stored_key(text, tenant=tenant, scopes=scopes, name=wanted.name, created_at=now)
    await call.gateway.keys.store(record)
    return Reply(bodies.CreatedKey(record.id, text, tenant, list(scopes), record.name, rfc3339(now)), 201)


async def _list_keys(call: Call) -> Reply:
    return Reply(bodies.Keys([_key(record) for record in call.gateway.keys.known()]))


async def _revoke_key(call: Call) -> Reply:
    keys, key_id = call.gateway.keys, call.path("id")
    record = keys.find(key_id)
    if record is None:
        raise NotFound(f"there is no API key '{key_id[:64]}'", field="id")
    if call.key is not None and record.id == call.key.id:
        raise Conflict("a key cannot revoke itself; use another admin key", field="id")
    return Reply(_key(await keys.revoke(record)))


def _key(record: apikey.ApiKey) -> bodies.Key:
    return bodies.Key(
        id=record.id,
        tenant=record.tenant,
        scopes=list(record.scopes),
        name=record.name,
        created_at=rfc3339(record.created_at),
        revoked=record.revoked,
    )


async def _workers(call: Call) -> Reply:
    beats = await heartbeats(call.gateway)
    now = call.gateway.bus.clock.utc()
    return Reply(bodies.Workers([_worker(beat, now) for beat in sorted(beats, key=lambda beat: beat.worker)]))


async def heartbeats(gateway: Gateway) -> list[Heartbeat]:
    """The last heartbeat of every worker, each signed by the worker it is about; others are passed over.

    Raises:
        BrokerUnavailable: no answer.
    """
    bus, bucket = gateway.bus, KvBucket(gateway.bus, "liveness")
    found = []
    for name, frame in (await bucket.entries()).items():
        envelope = bus.open_frame(frame, bucket.subject(name), MessageType.HEARTBEAT)
        if envelope is None or envelope.sender != name:
            continue
        try:
            found.append(codec.decode(envelope.body, Heartbeat))
        except BadEncoding:
            continue
    return found


def _worker(beat: Heartbeat, now: float) -> bodies.Worker:
    return bodies.Worker(
        name=beat.worker,
        region=beat.region,
        ready=[bodies.HeldModel(ref.model, ref.version) for ref in beat.ready],
        failed=[_failed(label, reason) for label, reason in beat.failed],
        running=beat.running,
        slots=beat.slots,
        age_s=round(max(0.0, now - beat.sent_at), 3),
    )


def _failed(label: str, reason: str) -> bodies.FailedModel:
    model, _, version = label.rpartition(":")
    return bodies.FailedModel(model, int(version) if version.isdecimal() else 0, reason)


ROWS = [
    Row(
        "POST",
        "/v1/keys",
        "Make an API key",
        TAG,
        _create_key,
        {201: bodies.CreatedKey},
        "admin",
        body=bodies.NewKey,
        errors=(503,),
    ),
    Row("GET", "/v1/keys", "List API keys", TAG, _list_keys, {200: bodies.Keys}, "admin"),
    Row(
        "DELETE",
        "/v1/keys/{id}",
        "Revoke an API key",
        TAG,
        _revoke_key,
        {200: bodies.Key},
        "admin",
        errors=(404, 409, 503),
    ),
    Row("GET", "/v1/workers", "List workers", TAG, _workers, {200: bodies.Workers}, "admin", errors=(503,)),
]
