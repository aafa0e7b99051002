"""nats-py's client without a bug that stops its reading, and with fewer copies of large messages."""

from __future__ import annotations

import asyncio
from typing import Any

import nats.aio.client
from nats.protocol import parser

LARGE = 64 << 10
"""Size in bytes from which a message is passed on with as few copies as possible."""

READ = 512 << 10
"""Maximum bytes per read; nats-py's 32 KiB need thirty reads for one chunk of a model."""


class Parser(parser.Parser):  # type: ignore[misc]
    """Collects the parts of a large message and joins them once; nats-py copies its buffer for each part."""

    def reset(self) -> None:
        super().reset()
        self._parts: list[bytes] = []
        self._gathered = 0

    async def parse(self, data: bytes = b"") -> None:
        """Parse the next bytes from the server."""
        if self.state == parser.AWAITING_MSG_PAYLOAD and self.needed >= LARGE:
            self._parts.append(data)
            self._gathered += len(data)
            if len(self.buf) + self._gathered < self.needed + parser.CRLF_SIZE:
                return
            data = b"".join(self._parts)
            self._parts, self._gathered = [], 0
        await super().parse(data)


class NatsClient(nats.aio.client.Client):  # type: ignore[misc]
    """Ignores pongs whose waiter timed out or was cancelled: they end nats-py's reading, because it sets a
    finished future.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ps = Parser(self)

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            self._pongs[0] = asyncio.get_running_loop().create_future()
        await super()._process_pong()

    async def _read_loop(self) -> None:
        transport = self._transport
        if isinstance(reader := getattr(transport, "_io_reader", None), asyncio.StreamReader):
            reader._limit = READ  # type: ignore[attr-defined]  # noqa: SLF001 - it is set too early to be asked for
            read = transport.read
            transport.read = lambda _: read(READ)
        await super()._read_loop()

    async def _send_publish(
        self, subject: str, reply: str, payload: bytes | memoryview, payload_size: int, headers: dict[str, Any] | None
    ) -> None:
        """Send a large message after its command line without copying; nats-py copies it twice to build one string."""
        if payload_size < LARGE:
            await super()._send_publish(subject, reply, payload, payload_size, headers)
            return
        block = b"".join(f"{name}: {value}\r\n".encode() for name, value in (headers or {}).items())
        if headers:
            block = b"NATS/1.0\r\n" + block + b"\r\n"
            line = f"HPUB {subject} {reply} {len(block)} {len(block) + payload_size}\r\n".encode() + block
        else:
            line = f"PUB {subject} {reply} {payload_size}\r\n".encode()
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += payload_size
        self._pending += (line, payload)
        self._pending_data_size += len(line) + payload_size
        await self._send_command(b"\r\n")
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()
