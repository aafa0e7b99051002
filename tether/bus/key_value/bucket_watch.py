"""Follows a bucket: its entries, their changes, and changes missed while the broker was away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from tether.errors import BrokerUnavailable, PermissionDenied, TetherError
from tether.process import lifecycle
from tether.process.log_rate_limiter import LogRateLimiter

if TYPE_CHECKING:
    from tether.bus.bus import Bus, Message

log = logging.getLogger(__name__)

OnChange = Callable[[str, bytes | None], None]
"""Called with a key and its new value; None if it was deleted."""

OnDeleted = Callable[[str, bytes], None]
"""Called with a deleted key and its ``last`` value; without it once that is gone too."""

_RESYNC_S = 20.0
_QUIET_S = 5.0
_SETTLE_S = (0.0, 0.01, 0.05, 0.25)


class Watched(Protocol):
    """The parts of a bucket that a watcher reads."""

    name: str

    def subject(self, key: str) -> str: ...

    async def get(self, key: str) -> bytes | None: ...

    async def entries_and_deleted(self) -> tuple[dict[str, bytes], dict[str, bytes]]: ...


class Watcher:
    """Calls ``on_change`` as :meth:`tether.bus.key_value.bucket.KvBucket.watch` says."""

    def __init__(
        self,
        bus: Bus,
        bucket: Watched,
        on_change: OnChange,
        *,
        key: str,
        refetch: bool,
        on_deleted: OnDeleted | None = None,
    ) -> None:
        self._bus = bus
        self._key = key
        self._bucket = bucket
        self._on_change = on_change
        self._on_deleted = on_deleted
        self._deleted: dict[str, bytes] = {}
        self._refetch = refetch
        self._known: dict[str, bytes] = {}
        self._first = asyncio.Event()
        self._began = bus.clock.monotonic()
        self._told = LogRateLimiter(bus.clock.monotonic, lines=1, within_s=60.0)
        self._root = len(bucket.subject(""))
        self.resync = asyncio.Event()

    async def wait_first(self, task: asyncio.Task[None]) -> None:
        """Wait for the first snapshot.

        Raises:
            PermissionDenied: this identity may not read the bucket.
        """
        first = asyncio.ensure_future(self._first.wait())
        try:
            await asyncio.wait({first, task}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
        finally:
            first.cancel()

    async def received(self, message: Message) -> None:
        key = message.subject[self._root :]
        gone = bool((message.headers or {}).get("KV-Operation"))
        value = None if gone else message.data
        if self._refetch:
            try:
                value = await self._read_until_consistent(key, value)
            except BrokerUnavailable:
                self.resync.set()
                return
        self._apply(key, value)
        if value is None and gone:
            self._left(key, message.data)

    async def _read_until_consistent(self, key: str, received: bytes | None) -> bytes | None:
        """Read the stream; retry for a moment while it lags behind the received message."""
        current: bytes | None = None
        for pause in _SETTLE_S:
            await asyncio.sleep(pause)
            current = await self._bucket.get(key)
            if current == received:
                break
        return current

    def _apply(self, key: str, value: bytes | None) -> None:
        if self._known.get(key) == value:
            return
        if value is None:
            del self._known[key]
        else:
            self._known[key] = value
        self._act(lambda: self._on_change(key, value))

    def _left(self, key: str, data: bytes) -> None:
        """Report the ``last`` value of a deleted key, or nothing."""
        if self._on_deleted is None or self._deleted.get(key, b"") == data:
            return
        if data:
            self._deleted[key] = data
        else:
            del self._deleted[key]
        on_deleted = self._on_deleted
        self._act(lambda: on_deleted(key, data))

    def _act(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:
            log.exception("bucket %s: entry refused", self._bucket.name, extra={"action": "watch_failed"})

    async def run(self) -> None:
        while True:
            self.resync.clear()
            try:
                await self._snapshot()
                self._first.set()
                self._waits("")
                pause = _RESYNC_S
            except BrokerUnavailable as error:
                self._waits(error.message)
                pause = 0.25
            except TetherError as error:
                if isinstance(error, PermissionDenied) and not self._first.is_set():
                    raise  # else the task that waits for the first snapshot would wait forever
                log.warning("bucket %s: %s", self._bucket.name, error, extra={"action": "watch_failed"})
                pause = 1.0
            try:
                async with asyncio.timeout(pause):
                    await self.resync.wait()
            except TimeoutError:
                continue

    def _waits(self, why: str) -> None:
        """Report in health, and after a moment in the log, that the service waits for this bucket to start."""
        if why and self._first.is_set():
            return
        lifecycle.wait_for(f"bucket {self._bucket.name}", why)
        if (
            why
            and self._bus.clock.monotonic() - self._began > _QUIET_S
            and self._told.passes(self._bucket.name) is not None
        ):
            fields = {"action": "watch_waits", "bucket": self._bucket.name}
            log.warning("waiting for bucket %s, which the dispatcher makes: %s", self._bucket.name, why, extra=fields)

    async def _entries(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        if not self._key:
            return await self._bucket.entries_and_deleted()
        value = await self._bucket.get(self._key)
        return ({} if value is None else {self._key: value}), {}

    async def _snapshot(self) -> None:
        entries, deleted = await self._entries()
        if self._refetch:
            for key in [key for key in self._known if key not in entries]:
                self._apply(key, await self._bucket.get(key))
        for key, value in entries.items():
            if key not in self._known:
                self._apply(key, value)
            elif self._refetch and self._known[key] != value:
                self._apply(key, await self._bucket.get(key))
        for key in self._deleted.keys() - deleted.keys():
            self._left(key, b"")
        for key, data in deleted.items():
            self._left(key, data)
