"""Streams that are there and not as the settings want them: what differs, and how it is mended.

A service's login changes no stream: a right to do so is one to empty it, or to have what is in it copied. So that is done with
the administrator's login, by ``tether up`` before it starts services and by ``tether streams --apply`` elsewhere.
"""

from __future__ import annotations

from typing import Any

from tether.bus.bus import Bus
from tether.settings import Settings
from tether.streams.layout import compared_stream, ensure_streams, pool_streams, pools_with_streams, streams


async def differing_streams(bus: Bus, settings: Settings) -> dict[str, list[str]]:
    """The streams that are there and are not as ``settings`` want them, those of isolated tenants too, each with the fields
    that differ.

    Raises:
        JetStreamError, BrokerUnavailable
    """
    return {config["name"]: fields for config, fields in await _differing(bus, settings)}


async def update_streams(bus: Bus, settings: Settings) -> dict[str, list[str]]:
    """Bring the streams that are there up to date; returns those that were not, as :func:`differing_streams`.

    Raises:
        PermissionDenied: this identity may not; that of the administrator may.
        QueueFull, StorageFull, JetStreamError, BrokerUnavailable
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
