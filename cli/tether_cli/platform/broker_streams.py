"""What ``tether up`` does with streams of the broker that are not as the settings want them."""

from __future__ import annotations

import dataclasses
import logging

from tether.bus.session import connect
from tether.errors import TetherError
from tether.process.data_dir import Home
from tether.settings import Settings, load
from tether.streams.updates import update_streams
from tether_cli.platform.supervisor import DISPATCHER

log = logging.getLogger(__name__)


async def bring_up_to_date(plan: Settings, nats_url: str) -> None:
    """Change them before services start, which may not. ``plan``: where and for how many buckets; the rest is what the dispatcher
    goes by."""
    settings = dataclasses.replace(load(DISPATCHER), home=plan.home, nats_url=nats_url, partitions=plan.partitions)
    try:
        async with connect(settings, Home.at(plan.home), "admin") as bus:
            for stream, fields in (await update_streams(bus, settings)).items():
                log.info(
                    "stream %s: brought %s up to date", stream, ", ".join(fields), extra={"action": "stream_updated"}
                )
    except TetherError as error:
        extra = {"action": "streams_not_updated", "code": error.code}
        log.warning("streams stay as they are: %s", error, extra=extra)
