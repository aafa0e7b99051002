"""Every identity tries every subject of every identity on a server under the files that are shipped in ops/nats.

What is allowed is read from the text of the shipped file, so a change of the table that nobody put there fails here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from nats.aio.client import Client
from support.brokers import verbs, wildcards
from support.brokers.brokers import wait_until
from support.brokers.shipped import SHIPPED, nodes, running

from tether.broker.embedded_server import Binary
from tether.broker.permissions import Permissions, streams_made
from tether.bus.errors import denied_subject
from tether.process.data_dir import Home, read_secret
from tether.wire.subjects import Names

FOREIGN = ["other.infer.0.a", "$SYS.REQ.ACCOUNT.PING", "_INBOX.x.y", "$KV.OTHER_models.x", "tether.unknown"]


def shipped_lists() -> dict[str, Permissions]:
    """The allow lists of each user that the shipped file names."""
    parts = re.split(r"\{ # (\S+)\n", (SHIPPED / "permissions.conf").read_text())[1:]
    found = {}
    for name, block in zip(parts[::2], parts[1::2], strict=True):
        publish, subscribe = block.split("subscribe:")
        assert "deny" not in block, "an allow list needs no exceptions"
        found[name] = Permissions(listed(publish, "allow"), listed(subscribe, "allow"))
    return found


def listed(text: str, kind: str) -> tuple[str, ...]:
    block = re.search(rf"{kind}: \[(.*?)\]", text, re.DOTALL)
    return () if block is None else tuple(re.findall(r'"(.+?)"', block[1]))


TABLE = shipped_lists()
STREAMS = [*streams_made(Names()), "TETHER_JOBS_=acme", "TETHER_RESULTS_=acme", "COPY"]
PUBLISH = sorted(
    {wildcards.example(item) for row in TABLE.values() for item in row.publish} | set(verbs.subjects(STREAMS))
)
SUBSCRIBE = sorted({wildcards.example(item) for row in TABLE.values() for item in row.subscribe})


async def refused(home: Home, url: str, name: str) -> tuple[set[str], set[str]]:
    """Subjects that the server refused to an identity: to publish on, and to subscribe to."""
    errors: set[tuple[str, str]] = set()

    async def collect(error: Exception) -> None:
        found = denied_subject(str(error))
        assert found is not None, error
        errors.add(found)

    client = Client()
    seed = read_secret(home.nats_seed(name)).decode()
    await client.connect(url, nkeys_seed_str=seed, error_cb=collect, allow_reconnect=False)
    try:
        for subject in PUBLISH + FOREIGN:
            await client.publish(subject, b"")
        for subject in SUBSCRIBE + FOREIGN:
            await client.subscribe(subject)
        # the server answers in order, and the last of both is refused to everyone
        await wait_until(lambda: ("subscription", FOREIGN[-1].lower()) in errors, "the last refusal", 30)
    finally:
        await client.close()
    published = {subject for subject in PUBLISH + FOREIGN if ("publish", subject.lower()) in errors}
    return published, {subject for subject in SUBSCRIBE + FOREIGN if ("subscription", subject.lower()) in errors}


def test_the_shipped_file_names_the_identities_of_a_new_home() -> None:
    assert list(TABLE) == ["admin", "dispatcher", "gateway", "modelstore", "worker-1", "worker-2"]
    assert all(row.publish and row.subscribe for row in TABLE.values())
    assert len(PUBLISH) > 800
    assert len(SUBSCRIBE) > 20


@pytest.mark.parametrize("name", TABLE)
async def test_an_identity_gets_through_exactly_where_the_shipped_list_says(
    home: Home, nats_binary: Binary, tmp_path: Path, name: str
) -> None:
    (node,) = nodes(tmp_path, home, ["dev"])
    shutil.copy(SHIPPED / "permissions.conf", node.config.parent)
    async with running([node], nats_binary):
        not_published, not_subscribed = await refused(home, f"nats://127.0.0.1:{node.client}", name)
    own = TABLE[name]
    assert not_published == {item for item in PUBLISH + FOREIGN if not wildcards.may_publish(own, item)}
    assert not_subscribed == {item for item in SUBSCRIBE + FOREIGN if not wildcards.may_subscribe(own, item)}
    assert set(FOREIGN) <= not_published & not_subscribed
