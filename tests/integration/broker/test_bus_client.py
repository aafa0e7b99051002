"""Large messages through our form of nats-py's client: the same bytes, however they are torn on the way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest
from nats.protocol.parser import Parser as Original
from support.brokers.brokers import Broker, wait_until

from tether.bus.bus import Message
from tether.bus.nats_client import LARGE, Parser
from tether.bus.session import connect

SIZES = (0, 1, LARGE - 1, LARGE, LARGE + 1, 300_000, 3_000_001)


class Told:
    """What a parser said to its client."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    async def _process_msg(self, *message: Any) -> None:
        self.heard.append(message)

    async def _process_pong(self) -> None:
        self.heard.append(("pong",))


def stream() -> bytes:
    """What a server sends: messages of every size with and without headers, and pongs between them."""
    parts = []
    for number, size in enumerate(SIZES):
        data = random.Random(number).randbytes(size)
        head = b"NATS/1.0\r\nNats-Sequence: 7\r\n\r\n"
        parts.append(b"MSG a.%d %d %d\r\n%b\r\n" % (number, number, size, data))
        parts.append(b"PONG\r\n")
        parts.append(
            b"HMSG a.%d %d r.%d %d %d\r\n%b%b\r\n" % (number, number, number, len(head), len(head) + size, head, data)
        )
    return b"".join(parts)


def torn(content: bytes, most: int, seed: int) -> Iterator[bytes]:
    position, sizes = 0, random.Random(seed)
    while position < len(content):
        step = sizes.randint(1, most)
        yield content[position : position + step]
        position += step


@pytest.mark.parametrize("most", [700, 9_000, 70_000, 600_000, 1 << 30])
async def test_our_parser_hears_what_nats_pys_own_hears(most: int) -> None:
    content, told = stream(), []
    for kind in (Original, Parser):
        client = Told()
        parser = kind(client)
        for part in torn(content, most, seed=most):
            await parser.parse(part)
        told.append(client.heard)
    assert told[0] == told[1]
    assert len(told[0]) == 3 * len(SIZES)


async def test_a_parser_that_was_reset_in_the_middle_of_a_message_begins_anew() -> None:
    client = Told()
    parser = Parser(client)
    await parser.parse(b"MSG a 1 100000\r\n" + bytes(70_000))
    await parser.parse(bytes(10))
    parser.reset()
    await parser.parse(b"MSG b 2 2\r\nok\r\n")
    assert [message[1] for message in client.heard] == [b"b"]


async def test_large_messages_arrive_as_they_were_sent(broker: Broker) -> None:
    """With and without headers, several at a time, between small ones; also after the connection was made anew."""
    async with connect(broker.settings, broker.home, "gateway") as bus:
        heard: asyncio.Queue[Message] = asyncio.Queue()
        await bus.subscribe(bus.names.demand(), heard.put)
        for _ in range(2):
            await bus._client.force_reconnect()
            await wait_until(lambda: bus.connected, "it is connected again")
            for headers in (None, {"Nats-Rollup": "sub", "Other": "of ours"}):
                sent = [random.Random(number).randbytes(size) for number, size in enumerate(SIZES)]
                await asyncio.gather(*(bus.publish(bus.names.demand(), data, headers=headers) for data in sent))
                async with asyncio.timeout(30):
                    arrived = [await heard.get() for _ in sent]
                assert sorted(message.data for message in arrived) == sorted(sent)
                assert all((message.headers or None) == headers for message in arrived)
