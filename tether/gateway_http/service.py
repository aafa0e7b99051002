"""The gateway process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from granian.constants import Interfaces

from tether.gateway_http import gateway as core
from tether.gateway_http.api import app
from tether.gateway_http.gateway import Gateway
from tether.process import lifecycle, logs, operations_server
from tether.process.data_dir import Home
from tether.process.os_process import KEEP_MB, keep_memory_private, limit_malloc_arenas
from tether.settings import Settings

log = logging.getLogger(__name__)


def listen(gateway: Gateway, host: str, port: int) -> AbstractAsyncContextManager[int]:
    """Listen on a port (0: a free one) until the block ends; the value is the port."""
    limits = operations_server.HttpLimits(gateway.settings.max_connections, gateway.settings.header_timeout_s)
    return operations_server.listening(app.build(gateway), host, port, interface=Interfaces.RSGI, limits=limits)


@asynccontextmanager
async def listening(settings: Settings, home: Home) -> AsyncIterator[tuple[Gateway, int]]:
    """Run a gateway that listens until the block ends; pending requests are answered before it stops."""
    async with (
        core.running(settings, home) as gateway,
        listen(gateway, settings.http_host, settings.http_port) as port,
    ):
        yield gateway, port
        await _drain(gateway, settings.shutdown_timeout_s)


async def _drain(gateway: Gateway, within_s: float) -> None:
    end = gateway.bus.clock.monotonic() + within_s
    while gateway.inflight and gateway.bus.clock.monotonic() < end:
        await asyncio.sleep(0.02)


async def main(settings: Settings) -> None:
    """Run the gateway until SIGTERM or SIGINT."""
    limit_malloc_arenas(KEEP_MB)
    keep_memory_private()
    logs.setup(settings, "gateway")
    home = Home.at(settings.home)
    stop = lifecycle.stop_on_signals()
    await lifecycle.serve(stop, _serving(settings, home), _started)


@asynccontextmanager
async def _serving(settings: Settings, home: Home) -> AsyncIterator[Gateway]:
    async with listening(settings, home) as (gateway, port):
        lifecycle.write_endpoint(home, "gateway", port)
        yield gateway


def _started(gateway: Gateway) -> None:
    log.info("listening on %s", gateway.settings.http_host, extra={"action": "gateway_started"})
