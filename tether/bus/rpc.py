"""Signed requests to service endpoints (nats.micro, so that ``nats micro ls`` lists them).

The request's signature covers the inbox for its answer, the answer's signature covers that inbox, so an
answer can neither be redirected nor taken from another request. A request with a foreign inbox gets no
answer: we may answer on any subject, and would store the answer there on behalf of a caller who may not.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import nats.micro
import nats.micro.service
from nats.micro.request import Request

from tether.bus.bus import Bus
from tether.bus.errors import translated
from tether.crypto import MAX_DELAY_MS, MAX_SKEW_MS, Envelope, MessageType
from tether.domain.job import Failure
from tether.errors import (
    BadEncoding,
    BrokerUnavailable,
    ClockSkew,
    EnvelopeError,
    KeyExpired,
    SubjectMismatch,
    TetherError,
    Unavailable,
    by_code,
)
from tether.process import lifecycle, metrics
from tether.wire import codec

log = logging.getLogger(__name__)

MAX_AGE_MS = MAX_SKEW_MS + MAX_DELAY_MS
"""Older requests are refused; younger ones are refused if they arrive twice."""

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
    grace_ms: int = 0,
) -> AsyncIterator[None]:
    """Answer requests on ``endpoint`` (or on ``subject``) until the block ends, then finish pending ones for
    ``shutdown_timeout_s`` at most.

    A :class:`TetherError` of ``handler`` reaches the caller as the same class; a request that is not signed
    by a key that may send ``accepts`` is counted and gets no answer. A request too old or from the future
    gets an error, because its sender's clock may be wrong; ``grace_ms``: how much longer than its sender
    waits a request is valid.
    ``side_by_side`` above 1 handles that many requests concurrently, and refuses further ones with a
    retryable error; otherwise they are handled one after another.
    """

    async def answer(request: Request) -> None:
        message = request._msg  # noqa: SLF001 - the reply subject is part of what the signature covers
        try:
            envelope = bus.verify_or_raise(
                request.data, request.subject, accepts, once=True, max_age_ms=MAX_AGE_MS, grace_ms=grace_ms
            )
        except EnvelopeError as error:
            if error.reply and _is_own_inbox(bus, error.role, error.sender, error.reply, message.reply):
                await _send(bus, answers, error.reply, _failed(_untimely(error)))
            return
        if not _is_own_inbox(bus, envelope.header.role, envelope.sender, envelope.header.reply, message.reply):
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
            await running.finish(bus.settings.shutdown_timeout_s)


def _is_own_inbox(bus: Bus, role: str, sender: str, signed: str, reply: str) -> bool:
    """Return whether the answer goes to the inbox that the sender signed, below its own prefix."""
    own = bus.names.inbox(role, sender) + "."
    if signed == reply and reply.startswith(own):
        return True
    metrics.ENVELOPES_REJECTED.labels(SubjectMismatch.code).inc()
    log.warning("request refused: its answer is not for its sender", extra={"action": "envelope_refused"})
    return False


def _untimely(error: EnvelopeError) -> ClockSkew:
    """Return the error for the sender of a request that is too old, or from the future."""
    where = f"{-error.age_s:.0f} s ahead of" if error.age_s < 0 else f"{error.age_s:.0f} s behind"
    return ClockSkew(
        f"your clock is {where} that of this service, unless the request was delayed in transit; "
        f"at most {MAX_SKEW_MS // 1000} s are allowed: set the clocks"
    )


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
    await _send(bus, kind, header.reply, await _handled(handler, envelope), header.message_id)


async def _send(bus: Bus, kind: MessageType, reply: str, body: bytes, message_id: str = "") -> None:
    frame = bus.signer.sign_envelope(kind, reply, body, message_id=message_id)
    try:
        await bus.publish(reply, frame)
    except BrokerUnavailable:
        log.warning("broker lost before the answer", extra={"action": "rpc_unanswered"})


def _failed(error: TetherError) -> bytes:
    return _FAILED + codec.encode(Failure(error.code, error.message))


async def _busy(_: Envelope) -> bytes:
    raise Unavailable("the service has too many pending requests; try again", retry_after=2)


async def _handled(handler: RpcHandler, envelope: Envelope) -> bytes:
    try:
        return _OK + await handler(envelope)
    except TetherError as error:
        return _failed(error)
    except Exception:
        log.exception("request failed", extra={"action": "rpc_failed", "sender": envelope.sender})
        return _FAILED + codec.encode(Failure("internal", "the service failed; its log has the reason"))


class Answer(NamedTuple):
    """The body of a verified answer, and its signing time in UTC seconds on the signer's clock."""

    body: bytes
    issued_at: float


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
    """Return the body of :func:`ask`."""
    return (await ask(bus, endpoint, kind, body, answers=answers, timeout=timeout, subject=subject)).body


async def ask(
    bus: Bus,
    endpoint: str,
    kind: MessageType,
    body: bytes,
    *,
    answers: MessageType,
    timeout: float = 5.0,
    subject: str = "",
) -> Answer:
    """Send a signed request to ``endpoint`` (or to ``subject``) and return the verified answer.

    Raises:
        BrokerUnavailable: nobody serves the endpoint, or no answer within ``timeout`` seconds.
        ClockSkew, KeyExpired: the clocks here and there are too far apart, or a key is out of force.
        TetherError: what the handler raised.
    """
    subject, reply = subject or bus.names.service(endpoint), bus.reply_inbox()
    frame = bus.signer.sign_envelope(
        kind, subject, body, reply=reply, expires_at=bus.clock.utc_ms() + int(timeout * 1000)
    )
    message = await bus.ask_signed(subject, frame, reply, timeout=timeout)
    try:
        envelope = bus.verifier.verify_envelope(message.data, subject=reply, types=(answers,))
    except ClockSkew as error:
        raise ClockSkew(
            f"this machine's clock is {-error.age_s:.0f} s behind that of '{error.sender}', who answered '{endpoint}'; "
            f"at most {MAX_SKEW_MS // 1000} s are allowed: set the clocks"
        ) from error
    except KeyExpired:
        raise
    except EnvelopeError as error:
        raise BrokerUnavailable(f"the answer of '{endpoint}' could not be verified: {error}") from error
    if envelope.body[:1] == _OK:
        return Answer(envelope.body[1:], envelope.header.issued_at / 1000)
    failure = codec.decode(envelope.body[1:], Failure)
    if failure.code == BadEncoding.code:
        raise BadEncoding(failure.message)
    raise by_code(failure.code, failure.message)
