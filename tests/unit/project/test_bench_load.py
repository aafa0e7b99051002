"""The load generator counts what a server answered, however the bytes arrive."""

from __future__ import annotations

import asyncio

import pytest

from bench.load import Report, content_length, drive, post

HEAD = b"HTTP/1.1 %s\r\nServer: x\r\ncontent-length: 5\r\n\r\nhello"


async def answering(chunks: list[bytes], *, seconds: float = 0.2) -> tuple[Report, str]:
    """Drive a server that answers every request with these chunks, one write each."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        target = post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x", b"{}", {})
        return await drive(target, connections=2, seconds=seconds, warm_up=0.05)


async def test_answers_are_counted_whole_or_torn() -> None:
    whole = HEAD % b"200 OK"
    for chunks in ([whole], [whole[:9], whole[9:30], whole[30:-2], whole[-2:]]):
        report, error = await answering(chunks)
        assert (report.errors, error) == (0, "")
        assert report.requests > 10
        assert 0 < report.p50_ms <= report.p99_ms <= report.max_ms


async def test_other_statuses_and_answers_without_a_length_are_errors() -> None:
    report, error = await answering([HEAD % b"503 No"])
    assert report.errors == report.requests > 0
    assert error.startswith("HTTP/1.1 503")
    report, error = await answering([b"HTTP/1.1 200 OK\r\n\r\n"])
    assert report.errors > 0
    assert error == "an answer without Content-Length"


def test_a_length_is_found_in_any_case_and_among_others() -> None:
    assert content_length(b"HTTP/1.1 200 OK\r\nContent-Type: a\r\nContent-Length: 42\r\nX: y") == 42
    assert content_length(b"HTTP/1.1 200 OK\r\ncontent-length:7") == 7
    assert content_length(b"HTTP/1.1 200 OK\r\nContent-Type: a") == -1


def test_only_plain_http_can_be_loaded() -> None:
    with pytest.raises(ValueError, match="http://"):
        post("https://example.invalid/", b"", {})
