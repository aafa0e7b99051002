"""One identity's use of the broker: JetStream requests and signed envelopes on a NATS connection."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import msgspec

from tether.bus.connection import NatsConnection, Subscription
from tether.bus.errors import ApiError, JetStreamError, PubAck, parse_ack, translate, undone
from tether.bus.pending_requests import Message, patiently, status_of
from tether.crypto import Envelope, MessageType
from tether.domain.job import SHARED
from tether.errors import BrokerUnavailable, EnvelopeError, TetherError
from tether.process import metrics
from tether.process.log_rate_limiter import LogRateLimiter

log = logging.getLogger(__name__)

_REFUSED = {"Nats-Expected-Last-Subject-Sequence": str(1 << 62)}
_LAST_SEQUENCE = re.compile(rb"wrong last sequence: (\d+)")

MULTI_LAST = 512
"""Subjects per batch request; the server refuses more than 1024."""


class StoredMessage(msgspec.Struct, frozen=True):
    """A message read back from a stream."""

    subject: str
    data: bytes
    sequence: int
    headers: Mapping[str, str]

    @property
    def stored_at(self) -> float:
        """Time at which the broker stored it, by its own clock; UTC seconds."""
        return datetime.fromisoformat(self.headers["Nats-Time-Stamp"]).timestamp()


class Bus(NatsConnection):
    """Made by :func:`tether.bus.session.connect`."""

    pool: str = SHARED
    """Of a worker: the pool whose lanes it serves, from its key's keyset entry at its start."""

    @cached_property
    def _told(self) -> LogRateLimiter:
        return LogRateLimiter(self.clock.monotonic)

    def bound_pool(self) -> str:
        """The pool to which the newest keyset binds this identity's key."""
        kid = self.signer.kid
        return next((record.tenant for record in self.verifier.keyset.identities if record.kid == kid), "") or SHARED

    # JetStream

    async def publish_acked(
        self,
        subject: str,
        payload: bytes | memoryview,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = 5.0,
    ) -> PubAck:
        """Publish into a stream and return once it is stored.

        Raises:
            BrokerUnavailable: not within ``timeout`` seconds; it may be stored all the same.
            QueueFull, ResultConflict, VersionConflict, PayloadTooLarge: the stream refused it.
            PermissionDenied: this identity may not publish there.
        """
        answer = await patiently(
            lambda left: self._ask(subject, payload, headers, left),
            timeout,
            undone=lambda answer: undone(answer.data, answer.headers),
        )
        return parse_ack(answer.data, answer.headers, subject)

    async def last_sequence(self, subject: str, *, timeout: float = 5.0) -> int:
        """Return the sequence of the last message of ``subject`` in its stream; 0 if there is none. It needs
        the right to write there and none to read: it sends a message with an impossible expected sequence,
        which the stream refuses.

        Raises:
            ResultConflict: there is one, in a stream that is full for this subject.
            VersionConflict: one is being stored just now.
            BrokerUnavailable, PermissionDenied, JetStreamError: unknown.
        """
        answer = await patiently(lambda left: self._ask(subject, b"", _REFUSED, left), timeout, undone=_not_said)
        said = _LAST_SEQUENCE.search(answer.data)
        if said is None:
            parse_ack(answer.data, answer.headers, subject)
            raise JetStreamError(f"the stream of '{subject}' accepted a message that it must refuse")
        return int(said[1])

    async def api(self, path: str, body: object | None = None, *, timeout: float = 5.0) -> dict[str, Any]:
        """Call ``$JS.API.<path>`` and return its JSON answer.

        Raises:
            JetStreamError or one of the classes of :func:`tether.bus.errors.translate`: the answer is an
        error.
        """
        payload = b"" if body is None else msgspec.json.encode(body)
        answer = await self.request(f"$JS.API.{path}", payload, timeout=timeout)
        try:
            content: dict[str, Any] = msgspec.json.decode(answer.data, type=dict[str, Any])
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise JetStreamError(f"'{path}' was not answered with JSON") from error
        if "error" in content:
            raise translate(msgspec.convert(content["error"], ApiError))
        return content

    async def direct_get(self, stream: str, subject: str, *, timeout: float = 5.0) -> StoredMessage | None:
        """Return the last message of ``subject`` in ``stream`` (NATS ADR-31), or None."""
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"", timeout=timeout)
        return _found(answer)

    async def direct_last(self, stream: str, subjects: str, *, timeout: float = 5.0) -> int:
        """Return the sequence of the last message of ``stream`` that matches ``subjects``; 0 if there is none."""
        body = msgspec.json.encode({"last_by_subj": subjects})
        found = _found(await self.request(f"$JS.API.DIRECT.GET.{stream}", body, timeout=timeout))
        return 0 if found is None else found.sequence

    async def direct_at(self, stream: str, sequence: int, *, timeout: float = 5.0) -> StoredMessage | None:
        """Return the message of ``stream`` with a sequence, or None."""
        body = msgspec.json.encode({"seq": sequence})
        return _stored(await self.request(f"$JS.API.DIRECT.GET.{stream}", body, timeout=timeout))

    async def direct_batch(
        self, stream: str, subjects: Sequence[str], *, timeout: float = 5.0
    ) -> dict[str, StoredMessage]:
        """Return the last message of each of ``subjects``, where there is one, in as few round trips as the
        server allows.
        """
        found: dict[str, StoredMessage] = {}
        for start in range(0, len(subjects), MULTI_LAST):
            wanted = list(subjects[start : start + MULTI_LAST])
            while wanted:
                got, complete = await self._batch(stream, {"multi_last": wanted}, timeout)
                found.update({item.subject: item for item in got})
                wanted = [] if complete or not got else [subject for subject in wanted if subject not in found]
        return found

    async def direct_scan(
        self,
        stream: str,
        subjects: str,
        *,
        start: int = 1,
        batch: int = 256,
        timeout: float = 5.0,
    ) -> AsyncIterator[StoredMessage]:
        """Return every message of ``stream`` that matches ``subjects``, by sequence from ``start``, without a
        consumer.
        """
        while True:
            request = {"batch": batch, "seq": start, "next_by_subj": subjects}
            got, complete = await self._batch(stream, request, timeout)
            for item in got:
                yield item
                start = item.sequence + 1
            if complete or not got:
                return

    async def direct_page(
        self, stream: str, subjects: str, *, start: int, batch: int, max_bytes: int, timeout: float = 5.0
    ) -> list[StoredMessage]:
        """Return the next messages of ``stream`` from sequence ``start``: at most ``batch``, and about
        ``max_bytes``.
        """
        request = {"batch": batch, "seq": start, "next_by_subj": subjects, "max_bytes": max_bytes}
        return (await self._batch(stream, request, timeout))[0]

    async def direct_since(self, stream: str, subjects: str, time: str, *, timeout: float = 5.0) -> int:
        """Return the sequence of the first message of ``stream`` that matches ``subjects`` and was stored at
        ``time`` (as in ``Nats-Time-Stamp``) or later; 0 if there is none.
        """
        request = {"batch": 1, "start_time": time, "next_by_subj": subjects}
        got, _ = await self._batch(stream, request, timeout)
        return got[0].sequence if got else 0

    async def _batch(self, stream: str, request: object, timeout: float) -> tuple[list[StoredMessage], bool]:
        subject, payload = f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(request)
        collected: list[Message] = []

        async def ask(left: float) -> Message:
            inbox = self.reply_inbox()
            with self._calling(inbox, subject, left) as call:
                call.collected = collected
                await self.publish(subject, payload, reply=inbox)
                return await call.future

        last = await patiently(ask, timeout)
        headers = last.headers or {}
        if status_of(last) == "503":
            raise BrokerUnavailable(f"stream '{stream}' is not available")
        if status_of(last) not in ("204", "404"):
            raise translate(ApiError(code=int(status_of(last) or 0), description=headers.get("Description", "")))
        stored = [item for item in map(_stored, collected) if item is not None]
        return stored, headers.get("Nats-Num-Pending", "0") == "0"

    # envelopes

    def verify_message(
        self, message: Message, *types: MessageType, once: bool = False, max_age_ms: int = 0
    ) -> Envelope | None:
        """Verify a received message; return None (logged and counted) if it is refused."""
        try:
            return self.verify_or_raise(
                message.data, message.subject, *types, once=once, max_age_ms=max_age_ms, stored=False
            )
        except EnvelopeError:
            return None

    def verify_frame(
        self, frame: bytes, subject: str, *types: MessageType, once: bool = False, max_age_ms: int = 0
    ) -> Envelope | None:
        """Verify a frame that belongs to ``subject``; return None (logged and counted) if it is refused."""
        try:
            return self.verify_or_raise(frame, subject, *types, once=once, max_age_ms=max_age_ms)
        except EnvelopeError:
            return None

    def verify_or_raise(
        self,
        frame: bytes,
        subject: str,
        *types: MessageType,
        once: bool = False,
        max_age_ms: int = 0,
        stored: bool = True,
        grace_ms: int = 0,
    ) -> Envelope:
        """Verify as :meth:`verify_frame`, but raise. Messages that must be young or unique are not ``stored``.

        Raises:
            EnvelopeError: logged and counted.
        """
        stored = stored and not (once or max_age_ms)
        try:
            return self.verifier.verify_envelope(
                frame,
                subject=subject,
                types=types,
                once=once,
                max_age_ms=max_age_ms,
                stored=stored,
                grace_ms=grace_ms,
            )
        except EnvelopeError as error:
            self.count_refused(error, subject)
            raise

    def count_refused(self, error: TetherError, subject: str) -> None:
        """Count and log a refused message."""
        metrics.ENVELOPES_REJECTED.labels(error.code).inc()
        if self.on_refused is not None:
            self.on_refused(error.code, subject)
        passed = self._told.passes(error.code)
        if passed is not None:
            more = f" ({passed} more like this were not logged)" if passed else ""
            extra = {"action": "envelope_refused", "code": error.code}
            log.warning("message refused: %s%s", error, more, extra=extra)


def _not_said(answer: Message) -> bool:
    """Return whether :meth:`Bus.last_sequence` may succeed later."""
    return _LAST_SEQUENCE.search(answer.data) is None and undone(answer.data, answer.headers)


def _stored(message: Message) -> StoredMessage | None:
    headers = message.headers or {}
    if "Nats-Sequence" not in headers:
        return None
    return StoredMessage(headers["Nats-Subject"], message.data, int(headers["Nats-Sequence"]), headers)


def _found(message: Message) -> StoredMessage | None:
    """Return the requested message, or None if there is none.

    Raises:
        BrokerUnavailable, JetStreamError: the broker did not answer the question.
    """
    status = status_of(message)
    if status not in ("", "404"):
        raise translate(ApiError(code=int(status), description=(message.headers or {}).get("Description", "")))
    return _stored(message)


__all__ = ["Bus", "Message", "PubAck", "StoredMessage", "Subscription"]
