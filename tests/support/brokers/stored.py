"""What lies in the broker's streams, for tests that count it."""

from __future__ import annotations

from tether.bus.bus import Bus
from tether.streams.lane_admin import stream_state


async def stored(bus: Bus, stream: str) -> dict[str, int]:
    """The number of messages on each subject of a stream that a dispatcher may ask about, without those with which gateways
    try it (:mod:`tether.gateway_http.readiness`): these come every few seconds and stay for one."""
    found = await stream_state(bus, stream)
    assert found is not None, f"there is no stream '{stream}'"
    result_probe = bus.names.result_probe("")
    return {
        subject: count
        for subject, count in found.waiting.items()
        if not subject.startswith(result_probe) and not subject.endswith(".probe")
    }


async def count(bus: Bus, stream: str) -> int:
    """The number of messages in a stream, without probes."""
    return sum((await stored(bus, stream)).values())
