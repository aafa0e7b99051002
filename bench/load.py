"""A closed-loop HTTP/1.1 load generator: N connections, each with one request in flight, for S seconds.

It works on raw protocols and fixed request bytes, so that on a small machine it takes little from the server that it
measures. Answers must carry Content-Length. As a program it prints one JSON object::

    python -m bench.load http://127.0.0.1:8000/v2/models/digits/infer --body request.json --connections 16 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import uvloop

HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """Where to send which bytes."""

    host: str
    port: int
    request: bytes


@dataclass(frozen=True)
class Report:
    """What one run measured; ``cpu`` is the share of one core that the generator itself took."""

    connections: int
    seconds: float
    requests: int
    errors: int
    per_s: float
    p50_ms: float
    p99_ms: float
    max_ms: float
    cpu: float


class Meter:
    """Latencies in seconds and errors, counted only while ``open``."""

    def __init__(self) -> None:
        self.latencies = array("d")
        self.errors = 0
        self.first_error = ""
        self.open = False

    def failed(self, why: str) -> None:
        self.errors += 1
        self.first_error = self.first_error or why

    def answered(self, sent: float, answer: bytes) -> None:
        """Count an answer, head and body, to a request that was sent at ``sent`` (:func:`time.perf_counter`)."""
        if self.open:
            self.latencies.append(time.perf_counter() - sent)
            if answer[9:12] != b"200":
                self.failed(answer[:300].decode("latin-1"))


def content_length(head: bytes) -> int:
    """The body length that a response head announces; -1 when it announces none."""
    start = head.find(b"ontent-")
    while start != -1:
        if head[start + 7 : start + 14].lower() == b"length:":
            end = head.find(b"\r\n", start)
            return int(head[start + 14 : end if end != -1 else len(head)])
        start = head.find(b"ontent-", start + 7)
    return -1


class Connection(asyncio.Protocol):
    """Sends the request, waits for the whole answer, sends it again, ``interval_s`` after it sent the last one or later."""

    def __init__(self, request: bytes, meter: Meter, stopping: asyncio.Event, interval_s: float = 0.0) -> None:
        self._request = request
        self._interval_s = interval_s
        self._meter = meter
        self._stopping = stopping
        self._buffer = b""
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def _send(self) -> None:
        if self._stopping.is_set():
            self.close()
        elif self._transport is not None:
            self._sent = time.perf_counter()
            self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        head_end = self._buffer.find(HEAD_END)
        if head_end == -1:
            return
        length = content_length(self._buffer[:head_end])
        if length == -1:
            self._meter.failed("an answer without Content-Length")
            self.close()
        elif len(self._buffer) >= head_end + 4 + length:
            self._answered()

    def _answered(self) -> None:
        answer, self._buffer = self._buffer, b""
        self._meter.answered(self._sent, answer)
        wait = self._sent + self._interval_s - time.perf_counter() if self._interval_s else 0.0
        if self._stopping.is_set():
            self.close()
        elif wait > 0:
            asyncio.get_running_loop().call_later(wait, self._send)
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._stopping.is_set():
            self._meter.failed(f"connection lost: {exc}")
        self._transport = None
        self.lost.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def keep_connected(target: Target, meter: Meter, stopping: asyncio.Event, interval_s: float = 0.0) -> None:
    """One connection, made anew when it is lost, until ``stopping`` is set and its last request is answered."""
    loop = asyncio.get_running_loop()
    while not stopping.is_set():
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(target.request, meter, stopping, interval_s), target.host, target.port
            )
        except OSError as error:
            meter.failed(f"cannot connect: {error}")
            await asyncio.sleep(0.05)
            continue
        await connection.lost.wait()


async def drive(
    target: Target, connections: int, seconds: float, warm_up: float = 1.0, meter: Meter | None = None
) -> tuple[Report, str]:
    """Load the target; the report and the first error in words ('' when there was none)."""
    meter, stopping = meter or Meter(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(keep_connected(target, meter, stopping))
        await asyncio.sleep(warm_up)
        meter.open = True
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(seconds)
        meter.open = False
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
        stopping.set()
    return _report(meter, connections, elapsed, cpu), meter.first_error


def _report(meter: Meter, connections: int, elapsed: float, cpu: float) -> Report:
    ordered = sorted(meter.latencies) or [float("nan")]

    def quantile(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e3, 3)

    return Report(
        connections=connections,
        seconds=round(elapsed, 3),
        requests=len(meter.latencies),
        errors=meter.errors,
        per_s=round(len(meter.latencies) / elapsed, 1),
        p50_ms=quantile(0.5),
        p99_ms=quantile(0.99),
        max_ms=quantile(1.0),
        cpu=round(cpu / elapsed, 2),
    )


def post(url: str, body: bytes, headers: dict[str, str]) -> Target:
    """The target of a POST with keep-alive.

    Raises:
        ValueError: the URL is not plain http.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise ValueError(f"{url} is not an http:// URL")
    port = parts.port or 80
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": f"{parts.hostname}:{port}", **headers, "Content-Length": str(len(body))}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return Target(parts.hostname, port, head.encode("latin-1") + b"\r\n" + body)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--body", type=Path, help="file with the request body; default: standard input")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm-up", type=float, default=1.0, metavar="SECONDS")
    return parser.parse_args()


def main() -> int:
    """Load one URL; 1 when any answer was not 200."""
    given = _arguments()
    headers = {"Content-Type": "application/json"}
    headers.update((name.strip(), value.strip()) for name, _, value in (text.partition(":") for text in given.header))
    body = given.body.read_bytes() if given.body else sys.stdin.buffer.read()
    target = post(given.url, body, headers)
    report, error = uvloop.run(drive(target, given.connections, given.seconds, given.warm_up))
    print(json.dumps(asdict(report)))
    if error:
        print(f"first error: {error}", file=sys.stderr)
    return 1 if report.errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
