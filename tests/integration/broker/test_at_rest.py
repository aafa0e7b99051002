"""What the broker writes to disk: readable under the development file, and not under the production files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.brokers.brokers import wait_until
from support.brokers.shipped import JETSTREAM_KEY, nodes, running

from tether.broker.embedded_server import Binary
from tether.bus.session import connect
from tether.identity.certificates import make_certificates
from tether.process.data_dir import Home
from tether.settings import Settings
from tether.streams.layout import ensure_platform

PLAIN = b"a sentence that nobody but its owner should read"


def on_disk(folder: Path) -> bool:
    """Whether the sentence stands in any file below a folder."""
    return any(PLAIN in path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("name", "readable"), [("dev", True), ("single", False)])
async def test_stored_messages_are_encrypted_in_production(
    home: Home, nats_binary: Binary, tmp_path: Path, name: str, readable: bool
) -> None:
    make_certificates(home, [])
    (node,) = nodes(tmp_path, home, [name])
    settings = Settings(nats_url=node.url, home=str(home.root))
    stored = node.config.parent / "data"
    async with running([node], nats_binary):
        async with connect(settings, home, "dispatcher") as bus:
            await ensure_platform(bus, settings)
            await bus.publish_acked(bus.names.bucket_key("routes", "m.1"), PLAIN)
        node.kill()
        assert list(stored.rglob("*.blk")), "nothing was stored at all"
        assert on_disk(stored) == readable
        node.start(nats_binary)
        await wait_until(node.healthy, "the server is back on its files", 30)
        async with connect(settings, home, "dispatcher") as bus:
            found = await bus.direct_get(bus.names.bucket_stream("routes"), bus.names.bucket_key("routes", "m.1"))
    assert found is not None
    assert found.data == PLAIN


async def test_without_the_key_a_production_server_does_not_start(
    home: Home, nats_binary: Binary, tmp_path: Path
) -> None:
    make_certificates(home, [])
    (node,) = nodes(tmp_path, home, ["single"])
    without = dataclasses.replace(node, environment={})
    without.start(nats_binary)
    assert without.process is not None
    await wait_until(lambda: without.process is not None and without.process.poll() is not None, "it ended")
    assert without.process.returncode != 0
    assert JETSTREAM_KEY not in node.config.read_text()
