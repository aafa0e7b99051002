"""A revoked key is refused by a second gateway within two seconds, while the requests of other keys go on as before."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import Services

from bench.load import HEAD_END, content_length
from tether.domain import api_key
from tether.gateway_http import gateway, service

RATE = 500
CALLERS = 10
LIMIT_S = 2.0
Note = Callable[[str, object], None]

BODY = b'{"modelId": "flow", "inputData": [[1, 2, 3, 4]]}'


class Connection:
    """One connection to a gateway, with one key."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self._reader, self.writer = reader, writer
        head = f"POST /v1/inference HTTP/1.1\r\nhost: t\r\nx-api-key: {key}\r\ncontent-length: {len(BODY)}\r\n\r\n"
        self._request = head.encode() + BODY

    @classmethod
    async def to(cls, port: int, key: str) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port), key)

    async def status(self) -> str:
        self.writer.write(self._request)
        head = await self._reader.readuntil(HEAD_END)
        await self._reader.readexactly(content_length(head))
        return head[9:12].decode()


async def flow(port: int, key: str, number: int, stop: asyncio.Event, statuses: list[str]) -> None:
    """This caller's part of RATE requests a second."""
    loop, connection = asyncio.get_running_loop(), await Connection.to(port, key)
    turn = loop.time() + number / RATE
    while not stop.is_set():
        await asyncio.sleep(max(0.0, turn - loop.time()))
        turn += CALLERS / RATE
        statuses.append(await connection.status())
    connection.writer.close()


async def new_key(running: Services, name: str) -> str:
    text = api_key.new_key_text()
    record = api_key.stored_key(text, tenant="acme", scopes=("infer",), name=name, created_at=time.time())
    await running.gateway.keys.store(record)
    return text


async def test_a_revoked_key_ends_at_a_second_gateway_while_others_flow(one: Services, record_property: Note) -> None:
    await one.push("flow", models.add())
    keys = [await new_key(one, f"flow-{number}") for number in range(CALLERS)]
    stolen = await new_key(one, "stolen")
    other = await one.stack.enter_async_context(gateway.running(one.settings, one.home))
    port = await one.stack.enter_async_context(service.listen(other, "127.0.0.1", 0))
    statuses: list[str] = []
    stop, began = asyncio.Event(), time.monotonic()
    flowing = [asyncio.create_task(flow(port, key, number, stop, statuses)) for number, key in enumerate(keys)]
    thief = await Connection.to(port, stolen)
    try:
        await wait_until(lambda: len(statuses) > RATE, "requests flow")
        assert await thief.status() == "200"
        record = one.gateway.keys.find(api_key.key_id(stolen) or "")
        assert record is not None
        at = time.monotonic()
        await one.gateway.keys.revoke(record)

        async def refused() -> bool:
            return await thief.status() == "401"

        await wait_until(refused, "the second gateway refuses the key", LIMIT_S)
        took, seen = time.monotonic() - at, len(statuses)
        await wait_until(lambda: len(statuses) > seen + RATE, "requests still flow")
    finally:
        stop.set()
        await asyncio.gather(*flowing)
        thief.writer.close()
    record_property("refused_after_ms", round(1000 * took))
    record_property("requests_per_second", round(len(statuses) / (time.monotonic() - began)))
    assert took < LIMIT_S
    assert set(statuses) == {"200"}, "another key was refused"
