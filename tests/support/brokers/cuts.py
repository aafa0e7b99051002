"""What a power cut soon after a start leaves at the broker, made without one: a stream's messages as they were some time before,
empty descriptions of the stream and its consumers, and what the consumers had delivered. The broker is stopped meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.brokers.brokers import Broker

from tether.broker.embedded_server import EmbeddedServer


def server_of(broker: Broker) -> EmbeddedServer:
    assert broker.server is not None
    return broker.server


def messages_folder(broker: Broker, stream: str) -> Path:
    """Where the broker keeps a stream's messages; what its consumers know lies beside it."""
    (found,) = broker.home.nats_store.glob(f"jetstream/*/streams/{stream}/msgs")
    return found


class Earlier:
    """The messages of streams as they were when this was made."""

    def __init__(self, broker: Broker, *streams: str) -> None:
        self._broker = broker
        self._streams = streams
        for stream in streams:
            folder = messages_folder(broker, stream)
            shutil.copytree(folder, folder.with_name("earlier"))

    def put_back(self) -> None:
        for stream in self._streams:
            folder = messages_folder(self._broker, stream)
            shutil.rmtree(folder)
            folder.with_name("earlier").rename(folder)
            for description in folder.parent.rglob("meta.*"):
                description.write_bytes(b"")


async def keep(broker: Broker, *streams: str) -> Earlier:
    """Restart the broker and remember what its streams have now."""
    server = server_of(broker)
    await server.stop()
    earlier = Earlier(broker, *streams)
    await server.start()
    return earlier


async def cut(broker: Broker, earlier: Earlier) -> None:
    """Restart the broker with the messages that its streams had before."""
    server = server_of(broker)
    await server.stop()
    earlier.put_back()
    await server.start()
