"""Updates the broker's streams to the settings when ``tether up`` starts."""

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
    """Update streams before services start, which may not change them. ``plan`` has the broker and the bucket count;
    all else comes from the dispatcher's settings.
    """
    settings = dataclasses.replace(load(DISPATCHER), home=plan.home, nats_url=nats_url, partitions=plan.partitions)
    try:
        async with connect(settings, Home.at(plan.home), "admin") as bus:
            for stream, fields in (await update_streams(bus, settings)).items():
                log.info(
                    "stream %s: brought %s up to date", stream, ", ".join(fields), extra={"action": "stream_updated"}
                )
    except TetherError as error:
        extra = {"action": "streams_not_updated", "code": error.code}
        log.warning("streams not updated: %s", error, extra=extra)
