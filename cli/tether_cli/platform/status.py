"""Collects the state of one home's platform from its processes and the broker, for ``tether status``."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx

from tether.broker.embedded_server import check_server
from tether.bus.bus import Bus
from tether.bus.session import connect
from tether.client.asynchronous import AsyncClient
from tether.errors import TetherError
from tether.process.data_dir import Home, read_secret
from tether.process.os_process import alive
from tether.settings import Settings
from tether.streams.broker_storage import frozen_streams
from tether_cli.platform.supervisor import unready
from tether_cli.platform.up import is_locked, read_endpoints


async def collect(settings: Settings, home: Home) -> dict[str, Any]:
    """Return everything ``tether status --json`` prints. ``running`` is false if no supervisor has locked the home."""
    found = read_endpoints(home)
    if found is None or not is_locked(home):
        return {"running": False, "home": str(home.root), "processes": [], "broker": None}
    broker = await _broker(settings, home, found)
    return {
        "running": True,
        "ready": found["ready"],
        "home": str(home.root),
        "http": found["http"],
        "supervisor": found["supervisor"],
        "processes": await _processes(found),
        "broker": broker,
        "queues": _queues(settings.prefix, broker.get("streams", [])),
        **await _served(home, found["http"]),
    }


QUEUES = {"jobs": "_JOBS_", "requests": "_INFER_", "results": "_RESULTS", "dead_letters": "_DEAD"}
"""Names of the queue streams after the platform's prefix."""


def _queues(prefix: str, streams: list[dict[str, Any]]) -> dict[str, int]:
    """Count queued messages, each with many jobs or requests, and stored results and dead letters."""
    named = {kind: f"{prefix.upper()}{part}" for kind, part in QUEUES.items()}
    return {
        kind: sum(row["messages"] for row in streams if row["name"].startswith(name)) for kind, name in named.items()
    }


async def _served(home: Home, url: str) -> dict[str, Any]:
    """Return models and workers as the gateway reports them; a failure is in ``error``."""
    try:
        key = read_secret(home.admin_key).decode().strip()
        async with AsyncClient(url, key, timeout=3, tries=1) as client:
            return {"models": await client.models(), "workers": await client.workers()}
    except (TetherError, ValueError) as error:
        return {"models": [], "workers": [], "error": str(error)}


async def _processes(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
        for name, pid in found["pids"].items():
            port = found["ports"].get(name, 0)
            missing = await _missing(http, found, name)
            rows.append(
                {
                    "name": name,
                    "pid": pid,
                    "alive": alive(pid),
                    "ready": not missing,
                    "missing": missing,
                    "port": port or None,
                    "restarts": found["restarts"].get(name, 0),
                    "restarted_because": found.get("reasons", {}).get(name, ""),
                }
            )
    return rows


async def _missing(http: httpx.AsyncClient, found: dict[str, Any], name: str) -> dict[str, str]:
    """Return why a process is not ready, by dependency; empty if it is ready."""
    if name in found["ports"]:
        return await unready(http, found["hosts"][name], found["ports"][name])
    try:
        problems = (await check_server(found["monitor"])).problems
    except TetherError as error:
        return {"process": error.message}
    told = {"settings": "; ".join(problems)} if problems else {}
    storage = found.get("storage") or await frozen_streams(http, found["monitor"])
    return told | ({"storage": storage} if storage else {})


async def _broker(settings: Settings, home: Home, found: dict[str, Any]) -> dict[str, Any]:
    report: dict[str, Any] = {"url": found["nats"], "version": found["version"], "durability": found["durability"]}
    try:
        async with connect(dataclasses.replace(settings, nats_url=found["nats"]), home, "admin") as bus:
            report["streams"] = await streams(bus)
            for row in report["streams"]:
                row["messages"] -= await _probes(bus, row["name"])
    except TetherError as error:
        report["error"] = error.message
    return report


async def _probes(bus: Bus, stream: str) -> int:
    """Count the readiness probes in a queue: empty messages with a lifetime of one second."""
    names, shard = bus.names, stream.rpartition("_")[2]
    kinds = {names.infer_stream(shard): names.infer_probe(shard), names.jobs_stream(shard): names.jobs_probe(shard)}
    if stream not in kinds:
        return 0
    found = await bus.api(f"STREAM.INFO.{stream}", {"subjects_filter": kinds[stream]})
    return sum((found["state"].get("subjects") or {}).values())


async def streams(bus: Bus) -> list[dict[str, Any]]:
    """Return every stream of the platform with its messages, bytes and consumers."""
    rows: list[dict[str, Any]] = []
    while True:
        page = await bus.api("STREAM.LIST", {"offset": len(rows)})
        rows += [
            {
                "name": stream["config"]["name"],
                "messages": stream["state"]["messages"],
                "bytes": stream["state"]["bytes"],
                "consumers": stream["state"]["consumer_count"],
            }
            for stream in page.get("streams") or []
        ]
        if not page.get("streams") or len(rows) >= page["total"]:
            return sorted(rows, key=lambda row: str(row["name"]))
