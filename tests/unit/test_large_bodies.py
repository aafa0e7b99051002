"""A large body is packed and unpacked beside the event loop, which goes on with everybody else's requests."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any

import pytest

from tether.gateway_http.request import Heading, read_body, replied

MB = 1 << 20
BODY = b"0123456789abcdef" * (8 * MB // 16)


class Whole:
    """A body that is there already."""

    peer = ""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.headers: Iterable[tuple[str, str]] = ()

    async def read(self, limit: int, announced: int) -> bytes:  # noqa: ARG002 - it is there already
        return self._body


class Patient:
    async def read(self, body: Awaitable[bytes]) -> bytes:
        return await body


async def turns(work: Coroutine[Any, Any, Any]) -> tuple[Any, int]:
    """What comes of it, and how often others had their turn meanwhile."""
    task, count = asyncio.create_task(work), 0
    while not task.done():
        await asyncio.sleep(0)
        count += 1
    return task.result(), count


async def test_others_have_their_turn_while_an_answer_is_packed() -> None:
    heading = Heading([("accept-encoding", "gzip")])
    made, count = await turns(replied(200, BODY, heading, content_type="text/plain"))
    assert gzip.decompress(made.body) == BODY
    assert count > 10


async def test_others_have_their_turn_while_a_body_is_unpacked() -> None:
    heading = Heading([("content-encoding", "gzip")])
    found, count = await turns(read_body(heading, Whole(gzip.compress(BODY)), len(BODY), Patient()))
    assert found == BODY
    assert count > 10


@pytest.mark.parametrize("accept", ["gzip", "deflate", "gzip, deflate, br, zstd"])
async def test_what_does_not_get_smaller_is_not_packed(accept: str) -> None:
    heading = Heading([("accept-encoding", accept)])
    made = await replied(200, BODY, heading, content_type="application/octet-stream", pack=False)
    assert made.body is BODY
    assert "content-encoding" not in dict(made.headers)
