"""Runs a service as a process: logs, signals, operations port, and its endpoint file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from tether.process import lifecycle, logs, operations_server
from tether.process.data_dir import Home
from tether.process.os_process import keep_memory_private, limit_malloc_arenas
from tether.settings import Settings


class Daemon(lifecycle.Service, Protocol):
    """A running service with health checks."""

    def checks(self) -> dict[str, str]: ...


D = TypeVar("D", bound=Daemon)


async def run(
    settings: Settings,
    name: str,
    usual_port: int,
    running: Callable[[Settings, Home], AbstractAsyncContextManager[D]],
    *,
    keep_mb: int = 0,
) -> None:
    """Run a service until SIGTERM or SIGINT, or until its connection is closed permanently.

    ``keep_mb``: see :func:`tether.process.os_process.limit_malloc_arenas`. Health is served from the start,
    also while the service waits for a broker.

    Raises:
        ConfigError, BrokerUnavailable: the service could not start or go on.
    """
    limit_malloc_arenas(keep_mb)
    keep_memory_private()
    logs.setup(settings, name)
    stop = lifecycle.stop_on_signals()
    home = Home.at(settings.home)
    current: list[D] = []
    app = operations_server.operations(lambda: current[0].checks() if current else lifecycle.waits())
    port = usual_port if settings.ops_port < 0 else settings.ops_port
    async with operations_server.listening(app, settings.ops_host, port) as bound:
        lifecycle.write_endpoint(home, name, bound)
        await lifecycle.serve(stop, running(settings, home), current.append)
