"""What signing and verifying cost a gateway: its CPU time under load, and the part of it spent in envelopes.

A second gateway of the running platform, a process of its own, counts the CPU time of every ``Signer.sign_envelope`` and
``Verifier.verify_envelope``, less what the counting costs. The share is theirs in the CPU time of the whole process, the HTTP
server's threads included::

    python -m bench.signing --seconds 5 --connections 64
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import msgspec
import uvloop

from bench.load import Report, drive, post
from bench.servers import ROOT, Server, environment, request_body, tether_platform
from tether.crypto import Signer, Verifier
from tether.gateway_http import service
from tether.process import metrics
from tether.process.data_dir import Home
from tether.settings import Settings


@dataclasses.dataclass(frozen=True)
class Spent:
    """Since a gateway began: requests answered, CPU seconds of its process, and calls and CPU seconds of each kind."""

    requests: float
    cpu_s: float
    seals: int
    seal_s: float
    opens: int
    open_s: float

    def __sub__(self, before: Spent) -> Spent:
        now, then = dataclasses.astuple(self), dataclasses.astuple(before)
        return Spent(*[one - other for one, other in zip(now, then, strict=True)])

    @property
    def share(self) -> float:
        """Signing's and verifying's part of the CPU time; from 0 to 1."""
        return (self.seal_s + self.open_s) / self.cpu_s

    def table(self) -> str:
        """As Markdown."""
        rows = [
            ("CPU of the gateway a request", f"{self.cpu_s / self.requests * 1e6:.1f} µs"),
            ("requests a signature", f"{self.requests / self.seals:.1f}"),
            ("sign", f"{self.seal_s / self.seals * 1e6:.1f} µs a frame, {self.seal_s / self.requests * 1e6:.2f} µs a request"),
            ("verify", f"{self.open_s / self.opens * 1e6:.1f} µs a frame, {self.open_s / self.requests * 1e6:.2f} µs a request"),
            ("share of the gateway's CPU", f"{self.share:.1%}"),
        ]  # fmt: skip
        return "\n".join(["| measure | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


class Meter:
    """Counts calls of one function and their CPU time in this thread."""

    def __init__(self, owner: type, name: str) -> None:
        self.calls = 0
        self.spent_ns = 0
        setattr(owner, name, self._measured(getattr(owner, name)))

    def _measured(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def outer(*args: Any, **more: Any) -> Any:
            began = time.thread_time_ns()
            try:
                return inner(*args, **more)
            finally:
                self.spent_ns += time.thread_time_ns() - began
                self.calls += 1

        return outer

    def seconds(self) -> float:
        """Without what reading the clock adds to each call."""
        return max(0.0, self.spent_ns / 1e9 - self.calls * _clock_s())


@functools.cache
def _clock_s() -> float:
    """What two readings of the thread's clock, one after the other, are apart; the best of many."""
    pairs = [(time.thread_time_ns(), time.thread_time_ns()) for _ in range(10_000)]
    return min(after - before for before, after in pairs) / 1e9


def answered() -> float:
    """Requests that this process has answered."""
    return sum(
        sample.value
        for family in metrics.HTTP_REQUESTS.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    )


async def probe(home: str, nats: str) -> None:
    """Be a gateway: write its port, then a line with :class:`Spent` for each line that is read; end with the input."""
    sealing, opening = Meter(Signer, "seal"), Meter(Verifier, "open")
    settings = dataclasses.replace(Settings(), home=home, nats_url=nats, http_host="127.0.0.1", http_port=0)
    async with service.listening(settings, Home.at(home)) as (_, port):
        print(json.dumps(port), flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            spent = Spent(
                answered(), time.process_time(), sealing.calls, sealing.seconds(), opening.calls, opening.seconds()
            )
            print(json.dumps(dataclasses.astuple(spent)), flush=True)


class Probe:
    """A probed gateway as the measuring process sees it."""

    def __init__(self, to: IO[str], back: IO[str]) -> None:
        self._to = to
        self._back = back
        self.port = int(json.loads(back.readline()))

    def spent(self) -> Spent:
        self._to.write("\n")
        self._to.flush()
        return Spent(*json.loads(self._back.readline()))


@contextmanager
def probed(server: Server) -> Iterator[Probe]:
    """One more gateway of a platform, until the block ends.

    Raises:
        RuntimeError: the server is no platform of ours.
    """
    if server.home is None:
        raise RuntimeError("this server has no data directory to read keys from")
    nats = msgspec.json.decode(server.home.endpoints.read_bytes())["nats"]
    command = [sys.executable, "-m", "bench.signing", "--probe", str(server.home.root), nats]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the probe has no pipes")
        yield Probe(process.stdin, process.stdout)
        process.stdin.close()
        process.wait(30)


def measure(server: Server, body: bytes, *, connections: int, seconds: float) -> Spent:
    """Load a probed gateway of a platform; what the load cost it.

    Raises:
        RuntimeError: a request failed.
    """
    with probed(server) as gateway:
        headers = {"Content-Type": "application/json", **server.headers}
        target = post(f"http://127.0.0.1:{gateway.port}/v2/models/digits/infer", body, headers)

        def load(for_s: float) -> None:
            report: Report
            report, error = uvloop.run(drive(target, connections, for_s, 0.0))
            if error:
                raise RuntimeError(f"{report.errors} requests failed: {error}")

        load(1.0)
        before = gateway.spent()
        load(seconds)
        return gateway.spent() - before


def main() -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--probe", nargs=2, metavar=("HOME", "NATS"), help=argparse.SUPPRESS)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    if given.probe:
        uvloop.run(probe(*given.probe))
        return 0
    with tether_platform() as server:
        print(measure(server, request_body(), connections=given.connections, seconds=given.seconds).table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
