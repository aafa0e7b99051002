"""Signed requests to service endpoints (nats.micro, so that ``nats micro ls`` sees them).

The request's signature covers the inbox its answer goes to, the answer's signature covers that inbox, so an answer
can neither be redirected nor taken from another request. A caller whose inbox is not its own gets none: we have the
right to answer wherever a request points to, and would store it there on behalf of who has not.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import nats.micro
import nats.micro.service
from nats.micro.request import Request

from tether import codec, lifecycle, metrics
from tether.bus.connection import Bus
from tether.bus.errors import translated
from tether.envelope import Envelope, MessageType
from tether.errors import (
    BadEncoding,
    BrokerUnavailable,
    EnvelopeError,
    SubjectMismatch,
    TetherError,
    Unavailable,
    by_code,
)
from tether.job import Failure

log = logging.getLogger(__name__)

MAX_AGE_MS = 30_000
"""A request older than this is refused; younger ones are refused when they come twice."""

_OK = b"\x01"
_FAILED = b"\x00"

RpcHandler = Callable[[Envelope], Awaitable[bytes]]


@asynccontextmanager
async def serve(
    bus: Bus,
    endpoint: str,
    *,
    accepts: MessageType,
    answers: MessageType,
    handler: RpcHandler,
    side_by_side: int = 1,
    subject: str = "",
) -> AsyncIterator[None]:
    """Answer requests on ``endpoint`` (or on ``subject``) until the block ends; those in hand may then end, for ``drain_s`` at most.

    A :class:`TetherError` that ``handler`` raises reaches the caller as the same class; what is not signed by a key
    that may send ``accepts`` is counted and gets no answer. With ``side_by_side`` above 1 that many requests are
    handled at a time, and one too many is told to come again; otherwise they are handled one after another.
    """

    async def answer(request: Request) -> None:
        message = request._msg  # noqa: SLF001 - the reply subject is part of what the signature covers
        envelope = bus.open_frame(request.data, request.subject, accepts, once=True, max_age_ms=MAX_AGE_MS)
        if envelope is None or not _is_own_inbox(bus, envelope, message.reply):
            return
        if side_by_side == 1:
            await _respond(bus, answers, handler, envelope)
            return
        work = _busy if len(running) >= side_by_side else handler
        running.spawn(_respond(bus, answers, work, envelope), f"rpc-{endpoint}")

    async with lifecycle.tasks() as running:
        try:
            async with _endpoint(bus, endpoint, subject or bus.names.service(endpoint), answer):
                yield
        finally:
            await running.finish(bus.settings.drain_s)


def _is_own_inbox(bus: Bus, envelope: Envelope, reply: str) -> bool:
    """Whether the answer goes where the request's sender signed that it hears answers, and may hear them."""
    own = bus.names.inbox(envelope.header.role.value, envelope.sender) + "."
    if envelope.header.reply == reply and reply.startswith(own):
        return True
    metrics.ENVELOPES_REJECTED.labels(SubjectMismatch.code).inc()
    log.warning("refused a request: its answer is not for its sender", extra={"action": "envelope_refused"})
    return False


@asynccontextmanager
async def _endpoint(
    bus: Bus, endpoint: str, subject: str, answer: Callable[[Request], Awaitable[None]]
) -> AsyncIterator[None]:
    with translated(f"serving {endpoint}"):
        service = await nats.micro.add_service(
            bus._client,  # noqa: SLF001 - the micro framework needs the client itself
            name=f"{bus.names.prefix}-{bus.signer.role.value}-{endpoint}",
            version="1.0.0",
            description=f"Tether {endpoint}",
        )
        await service.add_endpoint(name=endpoint, subject=subject, handler=answer)
        await bus.flush()
    try:
        yield
    finally:
        if bus.connected:
            with translated(f"ending {endpoint}"):
                await service.stop()


async def _respond(bus: Bus, kind: MessageType, handler: RpcHandler, envelope: Envelope) -> None:
    header = envelope.header
    body = await _handled(handler, envelope)
    frame = bus.signer.seal(kind, header.reply, body, message_id=header.message_id)
    try:
        await bus.publish(header.reply, frame)
    except BrokerUnavailable:
        log.warning("the broker went away before an answer", extra={"action": "rpc_unanswered"})


async def _busy(_: Envelope) -> bytes:
    raise Unavailable("the service has too many requests in hand; try again", retry_after=2)


async def _handled(handler: RpcHandler, envelope: Envelope) -> bytes:
    try:
        return _OK + await handler(envelope)
    except TetherError as error:
        return _FAILED + codec.encode(Failure(error.code, error.message))
    except Exception:
        log.exception("a request failed", extra={"action": "rpc_failed", "sender": envelope.sender})
        return _FAILED + codec.encode(Failure("internal", "the service failed; its log has the reason"))


async def call(
    bus: Bus,
    endpoint: str,
    kind: MessageType,
    body: bytes,
    *,
    answers: MessageType,
    timeout: float = 5.0,
    subject: str = "",
) -> bytes:
    """Send a signed request to ``endpoint`` (or to ``subject``) and return the body of the verified answer.

    Raises:
        BrokerUnavailable: nobody serves the endpoint, or no answer within ``timeout`` seconds.
        TetherError: what the handler raised.
    """
    subject, reply = subject or bus.names.service(endpoint), bus.reply_inbox()
    frame = bus.signer.seal(kind, subject, body, reply=reply, expires_at=bus.clock.utc_ms() + int(timeout * 1000))
    message = await bus.ask_signed(subject, frame, reply, timeout=timeout)
    try:
        envelope = bus.verifier.open(message.data, subject=reply, types=(answers,))
    except EnvelopeError as error:
        raise BrokerUnavailable(f"the answer of '{endpoint}' could not be verified: {error}") from error
    if envelope.body[:1] == _OK:
        return envelope.body[1:]
    failure = codec.decode(envelope.body[1:], Failure)
    if failure.code == BadEncoding.code:
        raise BadEncoding(failure.message)
    raise by_code(failure.code, failure.message)
