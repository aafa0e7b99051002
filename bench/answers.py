"""What the response cache costs and saves: ``python -m bench.answers``, in interleaved rounds, medians as a table.

One model under three names: without a cache, with one that has the answer, and with one that keeps answers for a
microsecond, so that every request is digested, looked for in vain, and its answer put away. The last is asked on one
connection only, since requests that are the same at the same time are one run.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import threading
import time
from collections import defaultdict

import httpx
import msgspec
import uvloop

from bench.load import drive, post
from bench.run import say
from bench.servers import READY_S, ROOT, Server, push, request_body, tether_platform
from tether.bus.key_value.bucket import SignedBucket
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.model.config import ModelConfig
from tether.settings import Settings
from tether.wire import codec
from tether.wire.subjects import token

KEPT, MISSED, PLAIN = "digits-kept", "digits-missed", "digits"


async def configure(server: Server, *configs: ModelConfig) -> None:
    """Store configurations as the platform's model store would.

    Raises:
        RuntimeError: the server is no platform of ours.
    """
    if server.home is None:
        raise RuntimeError("this server has no data directory to read keys from")
    nats = msgspec.json.decode(server.home.endpoints.read_bytes())["nats"]
    async with connect(Settings(home=str(server.home.root), nats_url=nats), server.home, "modelstore") as bus:
        bucket = SignedBucket(bus, "configs", MessageType.CONFIG)
        for config in configs:
            await bucket.put(token(config.model), codec.encode(config))


def wait_followed(server: Server, name: str, says: str) -> None:
    """Ask until the cache says ``says``: the gateway has heard of the configuration.

    Raises:
        TimeoutError: it has not.
    """
    end, pause = time.monotonic() + READY_S, threading.Event()
    headers = {"Content-Type": "application/json", **server.headers}
    with httpx.Client(trust_env=False, headers=headers, timeout=10) as http:
        while time.monotonic() < end:
            answer = http.post(f"{server.url}/v2/models/{name}/infer", content=request_body())
            if answer.headers.get("x-tether-cache") == says:
                return
            pause.wait(0.05)
    raise TimeoutError(f"{name} had no '{says}' in {READY_S:g} s")


def measure(server: Server, *, rounds: int, seconds: float) -> str:
    """Interleaved rounds; the table.

    Raises:
        RuntimeError: a request failed.
    """
    headers = {"Content-Type": "application/json", **server.headers}
    body = request_body()
    cases = [(1, PLAIN), (1, MISSED), (1, KEPT), (64, PLAIN), (64, KEPT)]
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    p50s: dict[tuple[int, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for connections, name in cases:
            target = post(f"{server.url}/v2/models/{name}/infer", body, headers)
            report, error = uvloop.run(drive(target, connections, seconds, 0.5))
            if error:
                raise RuntimeError(f"{name}: {report.errors} requests failed: {error}")
            rates[connections, name].append(report.per_s)
            p50s[connections, name].append(report.p50_ms)
            say(f"{name}, {connections} connections: {report.per_s:,.0f}/s, p50 {report.p50_ms:.2f} ms")
    what = {PLAIN: "no cache", MISSED: "every request a miss", KEPT: "every request a hit"}
    rows = [
        f"| {case[0]} | {what[case[1]]} | {statistics.median(rates[case]):,.0f} | {statistics.median(p50s[case]):.2f} |"
        for case in cases
    ]
    return "\n".join(["| connections | | requests/s | p50 ms |", "|---:|---|---:|---:|", *rows])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    given = parser.parse_args()
    with tether_platform() as server:
        for name in (KEPT, MISSED):
            push(server, name, ROOT / "examples" / "digits" / "digits.onnx")
        configs = [ModelConfig(KEPT, revision=1, cache_ttl_s=600.0), ModelConfig(MISSED, revision=1, cache_ttl_s=1e-6)]
        asyncio.run(configure(server, *configs))
        for name, says in ((KEPT, "hit"), (MISSED, "miss")):
            wait_followed(server, name, says)
        print(measure(server, rounds=given.rounds, seconds=given.seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
