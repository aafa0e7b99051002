"""One identity's connection to the broker: publish, subscribe, request.

Every answer arrives on one wildcard inbox below the identity's own prefix; a token in its subject identifies
the call.
Every call has its own deadline, because nats-py's reconnect buffering has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import nats
import nats.aio.client
import nats.aio.subscription
import nats.errors

from tether.bus.errors import denied_subject, permission_denied, translated
from tether.bus.pending_requests import Message, PendingReply, patiently, status_of
from tether.bus.tls import ClientTls, TlsNatsClient
from tether.crypto import Signer, Verifier
from tether.errors import BrokerUnavailable
from tether.process import metrics
from tether.process.clock import SystemClock
from tether.process.lifecycle import Termination
from tether.settings import Settings
from tether.wire.subjects import Names

log = logging.getLogger(__name__)


_FRAME_ROOM = 64 * 1024
_REFUSALS = 3
"""Consecutive refused logins per server before an established connection is given up."""


Handler = Callable[[Message], Awaitable[None]]


class Subscription:
    """A subscription to a subject; ending it is always safe, also while the broker is away."""

    def __init__(
        self,
        client: nats.aio.client.Client,
        inner: nats.aio.subscription.Subscription,
        round_trip: Callable[[float], Awaitable[None]],
    ) -> None:
        self._client = client
        self._inner = inner
        self._round_trip = round_trip

    async def unsubscribe(self) -> None:
        """End it immediately; a reconnect does not restore it."""
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._inner.unsubscribe()

    async def drain(self, within_s: float) -> None:
        """Unsubscribe after all messages in flight have been handled.

        Raises:
            BrokerUnavailable: not within ``within_s``; ended all the same.
        """
        if not self._client.is_connected:
            await self.unsubscribe()
            return
        try:
            with translated(f"draining {self._inner.subject}"):
                async with asyncio.timeout(within_s):
                    # nats-py's own drain lets its ping overtake the end of the subscription, and then drops
                    # later messages
                    await self._client._send_unsubscribe(self._inner._id)  # noqa: SLF001
                    await self._round_trip(within_s)
                    await self._inner._pending_queue.join()  # noqa: SLF001
        finally:
            # else the next reconnect would restore it
            self._inner._closed = True  # noqa: SLF001
            self._inner._stop_processing()  # noqa: SLF001 - nats-py has no public way
            self._client._remove_sub(self._inner._id)  # noqa: SLF001


class NatsConnection:
    """Publishes, subscribes and sends requests. Not thread-safe: it belongs to the event loop that created it."""

    def __init__(self, settings: Settings, names: Names, signer: Signer, verifier: Verifier) -> None:
        self.settings = settings
        self.names = names
        self.signer = signer
        self.verifier = verifier
        self.clock = SystemClock()
        self.closed = Termination()
        self.losses = 0
        """Number of lost connections."""
        self.on_refused: Callable[[str, str], None] | None = None
        """Called with error code and subject of every refused message."""
        self.on_keyset: Callable[[int, str], None] | None = None
        """Called with the version of a newly trusted keyset, and its changes."""
        self._client = TlsNatsClient()
        self._calls: dict[str, PendingReply] = {}
        self._unheard: set[str] = set()
        """Subjects, in lower case, whose last subscription the broker refused."""
        self._refusals = 0
        self._numbers = itertools.count()
        self._reconnected: list[Callable[[], None]] = []
        self._watchdog: asyncio.Task[None] | None = None
        self._giving_up: asyncio.Task[None] | None = None
        self._closing = False
        self.inbox = f"{names.inbox(signer.role.value, signer.name)}.{os.urandom(6).hex()}"
        self._answers = f"{self.inbox}.r."

    async def open_connection(self, seed: str, tls: ClientTls | None = None) -> None:
        options = self._options(seed)
        probe = TlsNatsClient()
        if tls is not None:
            options["tls"] = tls.context
            probe.certificate = self._client.certificate = tls.certificate
        with translated(f"connecting to {self.settings.nats_url}"):
            try:
                await probe.connect(**{**options, "allow_reconnect": False, "error_cb": _ignore})
            except nats.errors.Error as error:
                if "authorization" in str(error).lower():
                    raise nats.errors.AuthorizationError from error
                raise
            finally:
                # after a failed TLS handshake nats-py waits here forever
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
                    await self._round_trip(2)
                await self._client.close()

    # connection state

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def room(self) -> int:
        """Bytes of tensors that fit into one message: the broker's limit, less envelope and fields."""
        largest: int = min(self.settings.max_payload_bytes, self._client.max_payload)
        return largest - min(_FRAME_ROOM, largest // 4)

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` after every reconnect; it must not block. Return a function that stops that."""
        self._reconnected.append(callback)
        return lambda: self._reconnected.remove(callback)

    def begin_again(self) -> None:
        """Act as after a reconnect: a server of the cluster has lost the state of this connection's pulls."""
        for callback in list(self._reconnected):
            callback()

    async def wait_connected(self, timeout: float) -> bool:
        """Return True once the broker is connected, False after ``timeout`` seconds without it."""
        end = self.clock.monotonic() + timeout
        while not self.connected and self.clock.monotonic() < end:
            await asyncio.sleep(0.05)
        return self.connected

    async def _on_error(self, error: Exception) -> None:
        denied = denied_subject(str(error))
        if denied is None:
            self._note_refusal(error)
            log.debug("broker connection: %s", error, extra={"action": "broker_error"})
            return
        verb, subject = denied
        metrics.PERMISSION_DENIED.inc()
        log.error("%s", permission_denied(verb, subject), extra={"action": "permission_denied"})
        if verb != "publish":
            self._unheard.add(subject)
            return
        for call in list(self._calls.values()):
            if call.subject.lower() == subject and not call.future.done():
                call.future.set_exception(permission_denied(verb, call.subject))

    def _note_refusal(self, error: Exception) -> None:
        """Give up on a login that every server refuses repeatedly: it was revoked, and waiting does not help."""
        if "authorization violation" not in str(error).lower():
            return
        self._refusals += 1
        if self._refusals == _REFUSALS * (self.settings.nats_url.count(",") + 1) and not self._closing:
            log.error(
                "the broker refuses '%s': its login was revoked or replaced",
                self.signer.name,
                extra={"action": "login_refused"},
            )
            self._giving_up = asyncio.create_task(self._client.close(), name="give-up")

    async def _on_disconnect(self) -> None:
        self.losses += 1
        for call in self._calls.values():
            call.lose()
        metrics.BROKER_CONNECTED.set(0)
        if self._closing:
            return
        log.warning("broker connection lost", extra={"action": "broker_lost"})

    async def _on_reconnect(self) -> None:
        self._refusals = 0
        metrics.BROKER_CONNECTED.set(1)
        metrics.BROKER_RECONNECTS.inc()
        log.info("broker connection restored", extra={"action": "broker_back"})
        self.begin_again()

    async def _on_closed(self) -> None:
        self.closed.set()

    async def _watch(self) -> None:
        """Check with a round trip every five seconds: nats-py can be connected and receive nothing."""
        while True:
            await asyncio.sleep(5)
            if not self.connected:
                continue
            try:
                await self._round_trip(4)
            except (BrokerUnavailable, nats.errors.Error, TimeoutError, OSError):
                log.warning("broker did not answer; reconnecting", extra={"action": "broker_deaf"})
                await self._client.force_reconnect()

    # publish and subscribe

    async def flush(self) -> None:
        """Return once the broker has processed everything sent so far, including subscriptions."""
        with translated("waiting for the broker"):
            await self._round_trip(5)

    async def _round_trip(self, timeout: float) -> None:
        """Send a ping and wait for its pong; nats-py's flush alone lets its ping overtake unsent data.

        Both nats-py and asyncio.wait_for of Python 3.11 would swallow a cancellation of this task, so we wait
        ourselves.
        """
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        answered: asyncio.Future[None] = loop.create_future()
        if not self._client.is_connected:
            raise BrokerUnavailable("the broker is not connected")
        async with asyncio.timeout(timeout):
            await self._client._flush_queue.put(written)  # noqa: SLF001
            await written
            await self._client._send_ping(answered)  # noqa: SLF001
            await answered

    async def subscribe(self, subject: str, handler: Handler, *, confirmed: bool = True) -> Subscription:
        """Pass every message on ``subject`` to ``handler``, one at a time; its errors are logged.

        Returns once the broker has confirmed it; with ``confirmed=False`` at once, and a refusal is only
        logged.

        Raises:
            PermissionDenied: this identity may not subscribe there.
        """

        async def guarded(message: Message) -> None:
            try:
                await handler(message)
            except Exception:
                log.exception("a handler failed", extra={"action": "handler_failed"})

        with translated(f"subscribing to {subject}"):
            inner = await self._client.subscribe(subject, cb=guarded)
        subscription = Subscription(self._client, inner, self._round_trip)
        if confirmed and self.connected:
            await self._confirm(subject, subscription)
        return subscription

    async def _confirm(self, subject: str, subscription: Subscription) -> None:
        """Wait for a ping sent after the subscription: a refusal arrives before its answer."""
        self._unheard.discard(subject.lower())
        with contextlib.suppress(
            BrokerUnavailable, nats.errors.Error, TimeoutError, OSError
        ):  # a reconnect subscribes again
            await self._round_trip(5)
        if subject.lower() in self._unheard:
            await subscription.unsubscribe()
            raise permission_denied("subscription", subject)

    async def publish(
        self, subject: str, payload: bytes | memoryview, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Send without waiting for a confirmation.

        Raises:
            BrokerUnavailable: not connected; nothing was sent.
        """
        if not self._client.is_connected:
            raise BrokerUnavailable("the broker is not connected")
        with translated(f"publishing on {subject}"):
            await self._client.publish(subject, payload, reply, headers)

    async def request(self, subject: str, payload: bytes, *, timeout: float) -> Message:
        """Publish and return the one answer.

        Raises:
            BrokerUnavailable: no service on ``subject``, or no answer, within ``timeout`` seconds.
        """
        answer = await patiently(lambda left: self._ask(subject, payload, None, left), timeout)
        if status_of(answer) == "503":
            raise BrokerUnavailable(f"no service answers on '{subject}' at the moment")
        return answer

    def reply_inbox(self) -> str:
        """Return a new inbox subject for one answer."""
        return self._answers + format(next(self._numbers), "x")

    async def _ask(
        self,
        subject: str,
        payload: bytes | memoryview,
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
    def _calling(self, inbox: str, subject: str, timeout: float) -> Iterator[PendingReply]:
        """Expect an answer on ``inbox`` for at most ``timeout`` seconds."""
        token = inbox[len(self._answers) :]
        loop = asyncio.get_running_loop()
        call = self._calls[token] = PendingReply(loop.create_future(), subject)
        timer = loop.call_later(timeout, call.expire)
        try:
            yield call
        finally:
            timer.cancel()
            self._calls.pop(token, None)

    async def ask_signed(self, subject: str, frame: bytes, reply: str, *, timeout: float) -> Message:
        """Send a request with an inbox from :meth:`reply_inbox`, which the frame's signature covers. The
        ``field`` of a ``BrokerUnavailable`` is ``subject`` if no service listens there.
        """
        answer = await self._ask(subject, frame, None, timeout, reply=reply)
        if status_of(answer) == "503":
            raise BrokerUnavailable(f"no service answers on '{subject}' at the moment", field=subject)
        return answer

    async def _on_answer(self, message: Message) -> None:
        call = self._calls.get(message.subject[len(self._answers) :])
        if call is None or call.future.done():
            return
        if call.collected is None or (message.headers or {}).get("Status"):
            call.future.set_result(message)
            return
        call.collected.append(message)


async def _ignore(_: Exception) -> None:
    """Ignore errors of the preflight connection: they are raised, so need no second report."""
