"""One identity's connection to the broker: publish, acknowledged publish, request, direct get.

Every answer comes back on one wildcard inbox below the identity's own prefix; a token in its subject says which
call it belongs to. Every call has a deadline of its own, because nats-py's reconnect buffering has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import msgspec
import nats
import nats.aio.client
import nats.errors

from tether import metrics
from tether.bus.errors import ApiError, PubAck, parse_ack, permission_denied, translate, translated
from tether.clock import SystemClock
from tether.envelope import Envelope, MessageType, Signer, Verifier, open_keyset
from tether.errors import BrokerUnavailable, ConfigError, EnvelopeError, PermissionDenied
from tether.home import Home, load_identity, read_secret
from tether.settings import Settings
from tether.subjects import Names

log = logging.getLogger(__name__)

MULTI_LAST = 512
"""Subjects asked for in one batch; the server refuses more than 1024."""


class Message(Protocol):
    """What arrives on a subscription."""

    subject: str
    data: bytes
    reply: str
    headers: dict[str, str] | None


Handler = Callable[[Message], Awaitable[None]]


class Subscription(Protocol):
    async def unsubscribe(self) -> None: ...

    async def drain(self) -> None:
        """:meth:`unsubscribe` once everything that was already on its way has been handled."""


class Stored(msgspec.Struct, frozen=True):
    """A message read back from a stream."""

    subject: str
    data: bytes
    sequence: int
    headers: Mapping[str, str]


class _Call:
    """One outstanding request: a future for a single answer, or a list for a batch."""

    __slots__ = ("collected", "future", "subject")

    def __init__(self, future: asyncio.Future[Message], subject: str) -> None:
        self.future = future
        self.subject = subject
        self.collected: list[Message] | None = None


class Bus:
    """See :meth:`connect`. Not thread-safe: it belongs to the event loop it was made on."""

    def __init__(self, settings: Settings, names: Names, signer: Signer, verifier: Verifier) -> None:
        self.settings = settings
        self.names = names
        self.signer = signer
        self.verifier = verifier
        self.clock = SystemClock()
        self.closed = asyncio.Event()
        self.losses = 0
        """Times the connection was lost: an answer expected from before one will not come."""
        self._client = nats.aio.client.Client()
        self._calls: dict[str, _Call] = {}
        self._numbers = itertools.count()
        self._reconnected: list[Callable[[], None]] = []
        self._watchdog: asyncio.Task[None] | None = None
        self._closing = False
        self.inbox = f"{names.inbox(signer.role.value)}.{signer.name}.{os.urandom(6).hex()}"
        self._answers = f"{self.inbox}.r."

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: Settings, home: Home, identity: str) -> AsyncIterator[Bus]:
        """Connect as ``identity``, whose key files are in ``home``; the connection reconnects for ever.

        Raises:
            ConfigError: key files missing or open to others, or the broker refuses this identity.
            BrokerUnavailable: no broker answers at ``settings.nats_url``.
        """
        bus = cls.prepare(settings, home, identity)
        await bus.open_connection(_nats_seed(home, bus.signer.role.value))
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

    async def open_connection(self, seed: str) -> None:
        options = self._options(seed)
        probe = nats.aio.client.Client()
        with translated(f"connecting to {self.settings.nats_url}"):
            try:
                await probe.connect(**{**options, "allow_reconnect": False, "error_cb": _ignore})
            except nats.errors.Error as error:
                if "authorization" in str(error).lower():
                    raise nats.errors.AuthorizationError from error
                raise
            finally:
                # after a failed TLS handshake nats-py waits here for ever
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await probe.close()
            await self._client.connect(
                **options,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.1,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnect,
                reconnected_cb=self._on_reconnect,
                closed_cb=self._on_closed,
            )
            await self._client.subscribe(self._answers + "*", cb=self._on_answer)
        metrics.BROKER_CONNECTED.set(1)
        self._watchdog = asyncio.create_task(self._watch(), name="bus-watchdog")

    def _options(self, seed: str) -> dict[str, Any]:
        return {
            "servers": self.settings.nats_url.split(","),
            "nkeys_seed_str": seed,
            "inbox_prefix": self.inbox,
            "name": f"tether {self.signer.name}",
            "connect_timeout": 2,
            "ping_interval": 10,
            "max_outstanding_pings": 2,
            "flush_timeout": 5,
            "pending_size": 8 * 1024 * 1024,
            "skip_subject_validation": True,
        }

    async def close(self) -> None:
        self._closing = True
        if self._watchdog is not None:
            self._watchdog.cancel()
            await asyncio.gather(self._watchdog, return_exceptions=True)
        for call in self._calls.values():
            if not call.future.done():
                call.future.cancel()
        with contextlib.suppress(nats.errors.Error, TimeoutError, asyncio.TimeoutError, OSError):
            async with asyncio.timeout(3):
                if self._client.is_connected:
                    await self._client.flush(timeout=2)
                await self._client.close()

    # connection state

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after every reconnect; it must not block. Returns what ends that."""
        self._reconnected.append(callback)
        return lambda: self._reconnected.remove(callback)

    async def wait_connected(self, timeout: float) -> bool:
        """True as soon as the broker is there, False after ``timeout`` seconds without it."""
        end = self.clock.monotonic() + timeout
        while not self.connected and self.clock.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.connected

    async def _on_error(self, error: Exception) -> None:
        denied = permission_denied(str(error))
        if denied is None:
            log.debug("broker connection: %s", error, extra={"action": "broker_error"})
            return
        metrics.PERMISSION_DENIED.inc()
        log.error("%s", denied, extra={"action": "permission_denied"})
        for call in list(self._calls.values()):
            # nats-py hands the server's message on in lower case
            if call.subject.lower() == str(denied.field).lower() and not call.future.done():
                call.future.set_exception(denied)

    async def _on_disconnect(self) -> None:
        self.losses += 1
        metrics.BROKER_CONNECTED.set(0)
        if self._closing:
            return
        log.warning("lost the broker", extra={"action": "broker_lost"})

    async def _on_reconnect(self) -> None:
        metrics.BROKER_CONNECTED.set(1)
        metrics.BROKER_RECONNECTS.inc()
        log.info("the broker is back", extra={"action": "broker_back"})
        for callback in list(self._reconnected):
            callback()

    async def _on_closed(self) -> None:
        self.closed.set()

    async def _watch(self) -> None:
        """nats-py can be connected and deaf; a round trip every five seconds notices."""
        while True:
            await asyncio.sleep(5)
            if not self.connected:
                continue
            try:
                await self._client.flush(timeout=4)
            except (nats.errors.Error, TimeoutError, OSError):
                log.warning("the broker does not answer; reconnecting", extra={"action": "broker_deaf"})
                await self._client.force_reconnect()

    # publish and subscribe

    async def flush(self) -> None:
        """Return when the broker has seen everything sent so far, subscriptions too."""
        with translated("waiting for the broker"):
            await self._client.flush(timeout=5)

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Hand every message on ``subject`` to ``handler``, one at a time; its errors are logged, never lost."""

        async def guarded(message: Message) -> None:
            try:
                await handler(message)
            except Exception:
                log.exception("a handler failed", extra={"action": "handler_failed"})

        with translated(f"subscribing to {subject}"):
            subscription: Subscription = await self._client.subscribe(subject, cb=guarded)
        return subscription

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Send without asking whether anyone took it.

        Raises:
            BrokerUnavailable: not connected just now; nothing was sent.
        """
        if not self._client.is_connected:
            raise BrokerUnavailable("the broker is not connected")
        with translated(f"publishing on {subject}"):
            await self._client.publish(subject, payload, reply, headers)

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

    async def request(self, subject: str, payload: bytes, *, timeout: float) -> Message:
        """Publish and return the one answer.

        Raises:
            BrokerUnavailable: nobody serves ``subject``, or no answer within ``timeout`` seconds.
        """
        answer = await self._ask(subject, payload, None, timeout)
        if (answer.headers or {}).get("Status") == "503":
            raise BrokerUnavailable(f"nobody answers on '{subject}' at the moment")
        return answer

    def reply_inbox(self) -> str:
        """A fresh inbox subject for one answer."""
        return self._answers + format(next(self._numbers), "x")

    async def _ask(
        self,
        subject: str,
        payload: bytes,
        headers: dict[str, str] | None,
        timeout: float,
        *,
        reply: str = "",
    ) -> Message:
        inbox = reply or self.reply_inbox()
        with self._calling(inbox, subject, timeout) as call:
            await self.publish(subject, payload, reply=inbox, headers=headers)
            return await call.future

    @contextlib.contextmanager
    def _calling(self, inbox: str, subject: str, timeout: float) -> Iterator[_Call]:
        """Expect an answer on ``inbox`` for at most ``timeout`` seconds."""
        token = inbox[len(self._answers) :]
        loop = asyncio.get_running_loop()
        call = self._calls[token] = _Call(loop.create_future(), subject)
        timer = loop.call_later(timeout, _expire, call.future, subject)
        try:
            yield call
        finally:
            timer.cancel()
            self._calls.pop(token, None)

    async def ask_signed(self, subject: str, frame: bytes, reply: str, *, timeout: float) -> Message:
        """:meth:`request` with an inbox from :meth:`reply_inbox`, which the frame's signature covers."""
        answer = await self._ask(subject, frame, None, timeout, reply=reply)
        if (answer.headers or {}).get("Status") == "503":
            raise BrokerUnavailable(f"nobody answers on '{subject}' at the moment")
        return answer

    async def _on_answer(self, message: Message) -> None:
        call = self._calls.get(message.subject[len(self._answers) :])
        if call is None or call.future.done():
            return
        if call.collected is None or (message.headers or {}).get("Status"):
            call.future.set_result(message)
            return
        call.collected.append(message)

    # JetStream

    async def api(self, path: str, body: object | None = None, *, timeout: float = 5.0) -> dict[str, Any]:
        """Call ``$JS.API.<path>`` and return its JSON answer.

        Raises:
            JetStreamError or one of the classes of :func:`tether.bus.errors.translate`: it answered with an error.
        """
        payload = b"" if body is None else msgspec.json.encode(body)
        answer = await self.request(f"$JS.API.{path}", payload, timeout=timeout)
        content: dict[str, Any] = msgspec.json.decode(answer.data)
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
        inbox = self.reply_inbox()
        with self._calling(inbox, stream, timeout) as call:
            call.collected = []
            await self.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(request), reply=inbox)
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
            return self.verifier.open(frame, subject=subject, types=types, once=once, max_age_ms=max_age_ms)
        except EnvelopeError as error:
            metrics.ENVELOPES_REJECTED.labels(error.code).inc()
            log.warning("refused a message: %s", error, extra={"action": "envelope_refused", "code": error.code})
            return None


def _expire(future: asyncio.Future[Message], subject: str) -> None:
    if not future.done():
        future.set_exception(BrokerUnavailable(f"no answer on '{subject}' in time"))


def _stored(message: Message) -> Stored | None:
    headers = message.headers or {}
    if "Nats-Sequence" not in headers:
        return None
    return Stored(headers["Nats-Subject"], message.data, int(headers["Nats-Sequence"]), headers)


def _nats_seed(home: Home, role: str) -> str:
    return read_secret(home.nats_seed(role)).decode().strip()


async def _ignore(_: Exception) -> None:
    """The preflight connection's errors are raised, not reported twice."""


__all__ = ["Bus", "Message", "PermissionDenied", "PubAck", "Stored", "Subscription"]
