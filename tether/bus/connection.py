"""One identity's view of the broker: the link, and on it JetStream's answers and signed envelopes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from tether import metrics
from tether.bus.errors import ApiError, JetStreamError, PubAck, parse_ack, translate
from tether.bus.link import Link, Message, Subscription
from tether.clock import SystemClock
from tether.envelope import Envelope, MessageType, Signer, Verifier, open_keyset
from tether.errors import BrokerUnavailable, ConfigError, EnvelopeError
from tether.home import Home, load_identity, read_secret
from tether.settings import Settings
from tether.subjects import Names

log = logging.getLogger(__name__)

MULTI_LAST = 512
"""Subjects asked for in one batch; the server refuses more than 1024."""


class Stored(msgspec.Struct, frozen=True):
    """A message read back from a stream."""

    subject: str
    data: bytes
    sequence: int
    headers: Mapping[str, str]


class Bus(Link):
    """See :meth:`connect`."""

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings, home: Home, identity: str) -> AsyncIterator[Bus]:
        """Connect as ``identity``, whose key files are in ``home``; the connection reconnects for ever.

        Raises:
            ConfigError: key files missing or open to others, or the broker refuses this identity.
            BrokerUnavailable: no broker answers at ``settings.nats_url``.
        """
        bus = cls.prepare(settings, home, identity)
        await bus.open_connection(_nats_seed(home, identity))
        try:
            yield bus
        finally:
            await bus.close()

    @classmethod
    def prepare(cls, settings: Settings, home: Home, identity: str) -> Bus:
        """Read keys and keyset; no network."""
        clock = SystemClock()
        own = load_identity(home.identity(identity))
        try:
            keyset = open_keyset(home.keyset.read_bytes(), home.root_public.read_bytes(), now_ms=clock.utc_ms())
        except OSError as error:
            raise ConfigError(
                f"{home.keyset} or {home.root_public} cannot be read; make them with 'tether init'"
            ) from error
        names = Names(settings.prefix)
        return cls(settings, names, Signer(own, clock.utc_ms), Verifier(keyset, clock.utc_ms))

    # JetStream

    async def publish_acked(
        self,
        subject: str,
        payload: bytes,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = 5.0,
    ) -> PubAck:
        """Publish into a stream and return when it is stored.

        Raises:
            BrokerUnavailable: no answer within ``timeout`` seconds; it may be stored all the same.
            QueueFull, ResultConflict, VersionConflict, PayloadTooLarge: the stream refused it.
            PermissionDenied: this identity may not publish there.
        """
        answer = await self._ask(subject, payload, headers, timeout)
        return parse_ack(answer.data, answer.headers, subject)

    async def api(self, path: str, body: object | None = None, *, timeout: float = 5.0) -> dict[str, Any]:
        """Call ``$JS.API.<path>`` and return its JSON answer.

        Raises:
            JetStreamError or one of the classes of :func:`tether.bus.errors.translate`: it answered with an error.
        """
        payload = b"" if body is None else msgspec.json.encode(body)
        answer = await self.request(f"$JS.API.{path}", payload, timeout=timeout)
        try:
            content: dict[str, Any] = msgspec.json.decode(answer.data, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise JetStreamError(f"'{path}' was answered with something else than JSON") from error
        if "error" in content:
            raise translate(msgspec.convert(content["error"], ApiError))
        return content

    async def direct_get(self, stream: str, subject: str, *, timeout: float = 5.0) -> Stored | None:
        """The last message of ``subject`` in ``stream`` (NATS ADR-31), or None."""
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b"", timeout=timeout)
        return _stored(answer)

    async def direct_last(self, stream: str, subjects: str, *, timeout: float = 5.0) -> int:
        """The sequence of the last message of ``stream`` that matches ``subjects``; 0 when there is none."""
        body = msgspec.json.encode({"last_by_subj": subjects})
        found = _stored(await self.request(f"$JS.API.DIRECT.GET.{stream}", body, timeout=timeout))
        return 0 if found is None else found.sequence

    async def direct_batch(self, stream: str, subjects: Sequence[str], *, timeout: float = 5.0) -> dict[str, Stored]:
        """The last message of each of ``subjects`` that has one, in as few round trips as the server allows."""
        found: dict[str, Stored] = {}
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
    ) -> AsyncIterator[Stored]:
        """Every message of ``stream`` that matches ``subjects``, by sequence from ``start``, without a consumer."""
        while True:
            request = {"batch": batch, "seq": start, "next_by_subj": subjects}
            got, complete = await self._batch(stream, request, timeout)
            for item in got:
                yield item
                start = item.sequence + 1
            if complete or not got:
                return

    async def _batch(self, stream: str, request: object, timeout: float) -> tuple[list[Stored], bool]:
        inbox, subject = self.reply_inbox(), f"$JS.API.DIRECT.GET.{stream}"
        with self._calling(inbox, subject, timeout) as call:
            call.collected = []
            await self.publish(subject, msgspec.json.encode(request), reply=inbox)
            last = await call.future
        headers = last.headers or {}
        if headers.get("Status") == "503":
            raise BrokerUnavailable(f"stream '{stream}' is not available")
        if headers.get("Status") not in ("204", "404"):
            raise translate(ApiError(code=int(headers.get("Status", "0")), description=headers.get("Description", "")))
        stored = [item for item in map(_stored, call.collected or []) if item is not None]
        return stored, headers.get("Nats-Num-Pending", "0") == "0"

    # envelopes

    def open(self, message: Message, *types: MessageType, once: bool = False, max_age_ms: int = 0) -> Envelope | None:
        """Verify what arrived on a subscription; None (logged and counted) when it must not be acted on."""
        return self.open_frame(message.data, message.subject, *types, once=once, max_age_ms=max_age_ms)

    def open_frame(
        self, frame: bytes, subject: str, *types: MessageType, once: bool = False, max_age_ms: int = 0
    ) -> Envelope | None:
        """Verify a frame that belongs to ``subject``; None (logged and counted) when it must not be acted on."""
        try:
            return self.verified(frame, subject, *types, once=once, max_age_ms=max_age_ms)
        except EnvelopeError:
            return None

    def verified(
        self, frame: bytes, subject: str, *types: MessageType, once: bool = False, max_age_ms: int = 0
    ) -> Envelope:
        """:meth:`open_frame` for who acts on the reason.

        Raises:
            EnvelopeError: logged and counted.
        """
        try:
            return self.verifier.open(frame, subject=subject, types=types, once=once, max_age_ms=max_age_ms)
        except EnvelopeError as error:
            self.count_refused(error, subject)
            raise

    def count_refused(self, error: EnvelopeError, subject: str) -> None:
        """A message is not acted on: it is counted and logged."""
        metrics.ENVELOPES_REJECTED.labels(error.code).inc()
        if self.on_refused is not None:
            self.on_refused(error.code, subject)
        log.warning("refused a message: %s", error, extra={"action": "envelope_refused", "code": error.code})


def _stored(message: Message) -> Stored | None:
    headers = message.headers or {}
    if "Nats-Sequence" not in headers:
        return None
    return Stored(headers["Nats-Subject"], message.data, int(headers["Nats-Sequence"]), headers)


def _nats_seed(home: Home, name: str) -> str:
    return read_secret(home.nats_seed(name)).decode().strip()


__all__ = ["Bus", "Message", "PubAck", "Stored", "Subscription"]
