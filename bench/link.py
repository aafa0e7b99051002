"""A link of a known width between a worker and its broker, in a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

_PART = 1 << 18


@contextmanager
def link(url: str, mb_s: float) -> Iterator[str]:
    """Another address of the broker at ``url``, which lets ``mb_s`` MB a second through on the way from it."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_run, args=(url, mb_s * (1 << 20), theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(20):
            raise RuntimeError("the link did not start in 20 s")
        yield f"nats://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def _run(url: str, rate: float, told: Connection) -> None:
    with suppress(KeyboardInterrupt):
        asyncio.run(_serve(url, rate, told))


async def _serve(url: str, rate: float, told: Connection) -> None:
    parsed = urlsplit(url)

    async def dial(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(parsed.hostname, parsed.port, limit=4 * _PART)
        await asyncio.gather(_carry(reader, back, 0.0), _carry(there, writer, rate), return_exceptions=True)

    server = await asyncio.start_server(dial, "127.0.0.1", 0)
    told.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, rate: float) -> None:
    """Until the source ends; ``rate`` in bytes a second, 0: as fast as it comes."""
    loop = asyncio.get_running_loop()
    free_at = loop.time()
    try:
        while part := await source.read(_PART):
            target.write(part)
            await target.drain()
            if rate:
                free_at = max(free_at, loop.time() - 0.05) + len(part) / rate
                await asyncio.sleep(free_at - loop.time())
    finally:
        target.close()
