"""Three nats-servers with the configuration that ``tether init --nats-config`` writes, each killed in turn under load.

In what is written only addresses, ports and folders are changed. Callers are answered again within ``back_s`` of a kill, also
when the server held a stream that has one copy; no job is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from chaos.history import History, loaded
from chaos.platform import Platform
from chaos.report import arguments, check, counted, finish, listed, say
from chaos.workload import square
from support.platform.platforms import command, environment

from tether.broker.embedded_server import find_server
from tether.process.data_dir import Home
from tether.settings import Settings

SERVERS = (1, 2, 3)


class Cluster:
    """The servers, by number."""

    def __init__(self, home: Path, port: int, *, tls: bool) -> None:
        self.home = home
        self.tls = tls
        self._first = port
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def client(self, number: int) -> int:
        return self._first + number

    def _route(self, number: int) -> int:
        return self._first + 3 + number

    def _monitor(self, number: int) -> int:
        return self._first + 6 + number

    @property
    def urls(self) -> str:
        scheme = "tls" if self.tls else "nats"
        return ",".join(f"{scheme}://127.0.0.1:{self.client(number)}" for number in SERVERS)

    def write(self) -> None:
        """Have ``tether init`` write keys and configuration, and put them on this machine."""
        hosts = ["127.0.0.1", "localhost", *(f"nats-{number}" for number in SERVERS)]
        words = ["init", "--data-dir", str(self.home), "--nats-config", str(self.home / "ops")]
        words += ["--tls", *(word for host in hosts for word in ("--host", host))] if self.tls else []
        env = environment(Home.at(str(self.home)))
        subprocess.run(command(*words), env=env, check=True, capture_output=True, timeout=60)
        for number in SERVERS:
            path = self.home / f"ops/cluster-{number}.conf"
            text = path.read_text()
            for before, after in (
                ("0.0.0.0:4222", f"127.0.0.1:{self.client(number)}"),
                ("127.0.0.1:8222", f"127.0.0.1:{self._monitor(number)}"),
                ("0.0.0.0:6222", f"127.0.0.1:{self._route(number)}"),
                ('"/data"', f'"{self.home}/data-{number}"'),
                ("/etc/nats/tls", str(self.home / "tls")),
                *(
                    (f"nats-route://nats-{other}:6222", f"nats-route://localhost:{self._route(other)}")
                    for other in SERVERS
                ),
            ):
                text = text.replace(before, after)
            path.write_text(text)

    def start(self, number: int) -> None:
        words = [str(find_server(Settings()).path), "-c", str(self.home / f"ops/cluster-{number}.conf")]
        env = {**os.environ, "NATS_JETSTREAM_KEY": "key-0123456789abcdef0123456789abcdef"}
        with (self.home / f"nats-{number}.log").open("a") as log:
            self._running[number] = subprocess.Popen(
                words, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=self.home / "ops"
            )

    def kill(self, number: int) -> None:
        self._running[number].kill()
        self._running[number].wait()

    def stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()

    def told(self, number: int, query: str = "") -> dict[str, Any]:
        try:
            found: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self._monitor(number)}/jsz?{query}", timeout=3).json()
        except (httpx.HTTPError, ValueError):
            return {}
        return found

    def has_leader(self) -> bool:
        return any((self.told(number).get("meta_cluster") or {}).get("leader") for number in SERVERS)

    def alone(self) -> dict[str, str]:
        """The streams that have one copy, and the server that holds each."""
        found = {}
        for number in SERVERS:
            for account in self.told(number, "streams=1&config=1&accounts=1").get("account_details", []):
                for stream in account.get("stream_detail", []):
                    if stream["config"]["num_replicas"] == 1:
                        found[stream["name"]] = (stream.get("cluster") or {}).get("leader", "")
        return found


@contextmanager
def started(cluster: Cluster) -> Iterator[Cluster]:
    cluster.write()
    try:
        for number in SERVERS:
            cluster.start(number)
        end = time.monotonic() + 30
        while not cluster.has_leader():
            if time.monotonic() > end:
                raise RuntimeError("the servers found no leader within 30 s")
            time.sleep(0.2)
        yield cluster
    finally:
        cluster.stop()


async def one_kill(platform: Platform, cluster: Cluster, number: int, given: Namespace) -> tuple[float, float]:
    """Kill a server for a while; when, and when it was started again."""
    held = [name for name, leader in cluster.alone().items() if leader == f"nats-{number}"]
    killed = time.time()
    cluster.kill(number)
    await asyncio.sleep(given.down_s / 2)
    if given.only:
        platform.kill("worker-1")
    await asyncio.sleep(given.down_s / 2)
    paths = ("/readyz", "/v2/health/ready", "/v2/models/sq/ready")
    say(
        f"server {number} is down; it held alone {held};", {path: platform.http.get(path).status_code for path in paths}
    )
    back = time.time()
    cluster.start(number)
    await asyncio.sleep(20)
    return killed, back


def tell(history: History, number: int, killed: float, back: float, given: Namespace) -> None:
    calls = [call for call in history.calls if call.ended > killed and call.began < back + 20]
    bad = [call.ended for call in calls if call.what != "ok" or call.ended - call.began > 1]
    answered_s = max(bad, default=killed) - killed
    slowest = max(
        (job.acknowledged - job.sent for job in history.jobs.values() if killed < job.acknowledged < back + 20),
        default=0,
    )
    errors = counted(call.what for call in calls if call.what != "ok")
    say(
        f"server {number}: {len(calls)} calls, errors {errors}, as before after {answered_s:.1f} s; slowest submission {slowest:.1f} s"
    )
    check(
        answered_s <= given.back_s, f"server {number} killed: callers were answered as before after {answered_s:.1f} s"
    )
    check(slowest <= 10, f"server {number} killed: a submission took {slowest:.1f} s")


async def attacked(platform: Platform, cluster: Cluster, given: Namespace) -> None:
    history = History(platform, turns=2000)
    times: list[tuple[int, float, float]] = []

    async def attack() -> None:
        await asyncio.sleep(6)
        for _ in range(given.rounds):
            for number in SERVERS:
                held = [name.lower() for name, leader in cluster.alone().items() if leader == f"nats-{number}"]
                if not given.only or any(part in name for part in listed(given.only) for name in held):
                    times.append((number, *await one_kill(platform, cluster, number, given)))

    await loaded([history], attack, callers=4, submit_pause_s=0.1, seed=given.seed)
    for number, killed, back in times:
        tell(history, number, killed, back, given)
    await history.check("cluster")
    history.check_answers("cluster")
    say(history.summary())
    refused = counted(why for _, why in history.refused)
    check(not refused, f"submissions were refused while leaders changed: {refused}")
    say("audit:", platform.audit())


def main() -> None:
    given = arguments(__doc__, down_s=15.0, rounds=1, tls=1, only="", back_s=10.0)
    home = Path(given.folder) / "cluster"
    platform = Platform(home, given.port, replicas=3)
    cluster = Cluster(home, given.port + 1, tls=bool(given.tls))
    with started(cluster):
        platform.env["TETHER_NATS_URL"] = cluster.urls
        with platform:
            platform.push("sq", square())
            say("streams with one copy:", cluster.alone())
            asyncio.run(attacked(platform, cluster, given))
    finish()


if __name__ == "__main__":
    main()
