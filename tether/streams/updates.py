"""Finds and updates existing streams that differ from the settings.

A service's login may not change streams: that right would allow it to empty a stream or have it copied. So
the administrator's login does it, in ``tether up`` before services start, and in ``tether streams --apply``
elsewhere.
"""

from __future__ import annotations

from typing import Any

from tether.bus.bus import Bus
from tether.settings import Settings
from tether.streams.layout import compared_stream, ensure_streams, pool_streams, pools_with_streams, streams


async def differing_streams(bus: Bus, settings: Settings) -> dict[str, list[str]]:
    """Return existing streams that differ from ``settings``, isolated tenants' too, with the fields.

    Raises:
        JetStreamError, BrokerUnavailable: the broker could not be asked.
    """
    return {config["name"]: fields for config, fields in await _differing(bus, settings)}


async def update_streams(bus: Bus, settings: Settings) -> dict[str, list[str]]:
    """Update existing streams; return those that differed, as :func:`differing_streams` does.

    Raises:
        PermissionDenied: this identity may not; the administrator's may.
        QueueFull, StorageFull, JetStreamError, BrokerUnavailable: a stream was not updated.
    """
    found = await _differing(bus, settings)
    for error in (await ensure_streams(bus, [config for config, _ in found])).values():
        raise error
    return {config["name"]: fields for config, fields in found}


async def _differing(bus: Bus, settings: Settings) -> list[tuple[dict[str, Any], list[str]]]:
    wanted = streams(bus.names, settings)
    for pool in sorted(await pools_with_streams(bus)):
        wanted += pool_streams(bus.names, pool, settings)
    found = [(config, *await compared_stream(bus, config)) for config in wanted]
    return [(config, fields) for config, current, fields in found if current and fields]
