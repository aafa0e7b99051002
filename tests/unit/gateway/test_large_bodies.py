"""A large body is packed and unpacked beside the event loop, which goes on with everybody else's requests."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import os
import zlib
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any

import pytest

from tether.errors import InvalidRequest, PayloadTooLarge
from tether.gateway_http.http.request import RequestHeaders, build_reply_async, read_body

MB = 1 << 20
ONE = gzip.compress(b"x", mtime=0)
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
    heading = RequestHeaders([("accept-encoding", "gzip")])
    made, count = await turns(build_reply_async(200, BODY, heading, content_type="text/plain"))
    assert gzip.decompress(made.body) == BODY
    assert count > 10


async def test_others_have_their_turn_while_a_body_is_unpacked() -> None:
    heading = RequestHeaders([("content-encoding", "gzip")])
    found, count = await turns(read_body(heading, Whole(gzip.compress(BODY)), len(BODY), Patient()))
    assert found == BODY
    assert count > 10


@pytest.mark.parametrize("accept", ["gzip", "deflate", "gzip, deflate, br, zstd"])
async def test_what_does_not_get_smaller_is_not_packed(accept: str) -> None:
    heading = RequestHeaders([("accept-encoding", accept)])
    made = await build_reply_async(200, BODY, heading, content_type="application/octet-stream", pack=False)
    assert made.body is BODY
    assert "content-encoding" not in dict(made.headers)


async def unpacked(packed: bytes, encoding: str = "gzip", limit: int = MB) -> bytes:
    found = await read_body(RequestHeaders([("content-encoding", encoding)]), Whole(packed), limit, Patient())
    assert isinstance(found, bytes)
    return found


@pytest.mark.parametrize("cut", [[0], [1], [5, 5], [20_000], [3, 10_000, 60_000]])
async def test_every_member_of_a_gzip_body_counts(cut: list[int]) -> None:
    body = os.urandom(70_000)
    ends = [0, *cut, len(body)]
    members = b"".join(gzip.compress(body[begin:end]) for begin, end in itertools.pairwise(ends))
    assert await unpacked(members) == body


async def test_very_many_members_cost_little() -> None:
    assert await unpacked(gzip.compress(b"") * 100_000 + gzip.compress(b"x")) == b"x"


@pytest.mark.parametrize("after", [b"more", b"\0", b"\x1f", ONE[:-1], ONE + b"\x1f\x8b"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_what_follows_the_last_member_is_refused(after: bytes, encoding: str) -> None:
    packed = gzip.compress(BODY[: MB // 2]) if encoding == "gzip" else zlib.compress(BODY[: MB // 2])
    with pytest.raises(InvalidRequest) as caught:
        await unpacked(packed + after, encoding)
    assert caught.value.field == "content-encoding"


async def test_members_together_may_be_no_larger_than_one() -> None:
    half = gzip.compress(bytes(MB // 2))
    assert len(await unpacked(half + half)) == MB
    with pytest.raises(PayloadTooLarge):
        await unpacked(half + half + gzip.compress(b"x"))
