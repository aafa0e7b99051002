"""Every identity tries every subject of every identity on a server under the files that are shipped in ops/nats.

What is allowed is read from the text of the shipped file, so a change of the table that nobody put there fails here.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import wildcards
from brokers import wait_until
from nats.aio.client import Client
from shipped import SHIPPED, nodes, running

from tether.bus.permissions import Permissions
from tether.bus.server import Binary
from tether.home import Home, read_secret

FOREIGN = ["other.infer.0.a", "$SYS.REQ.ACCOUNT.PING", "_INBOX.x.y", "$KV.OTHER_models.x", "tether.unknown"]


def shipped_lists() -> dict[str, Permissions]:
    """The allow lists of each user that the shipped file names."""
    parts = re.split(r"\{ # (\S+)\n", (SHIPPED / "permissions.conf").read_text())[1:]
    found = {}
    for name, block in zip(parts[::2], parts[1::2], strict=True):
        publish, subscribe = block.split("subscribe:")
        found[name] = Permissions(listed(publish, "allow"), listed(subscribe, "allow"), listed(publish, "deny"))
    return found


def listed(text: str, kind: str) -> tuple[str, ...]:
    block = re.search(rf"{kind}: \[(.*?)\]", text, re.DOTALL)
    return () if block is None else tuple(re.findall(r'"(.+?)"', block[1]))


TABLE = shipped_lists()
_CALLS = ("CREATE", "UPDATE", "DELETE", "PURGE", "INFO", "MSG.GET", "MSG.DELETE", "SNAPSHOT", "RESTORE")
_STREAMS = (
    "TETHER_INFER_0",
    "TETHER_JOBS_=acme",
    "TETHER_RESULTS",
    "TETHER_AUDIT",
    "KV_TETHER_models",
    "KV_TETHER_keyset",
)
_CONSUMER_CALLS = ("CREATE.{}", "CREATE.{}.c.s", "DURABLE.CREATE.{}.c", "DELETE.{}.c", "MSG.NEXT.{}.c", "PAUSE.{}.c")
PUBLISH = sorted(
    {wildcards.example(item) for row in TABLE.values() for item in (*row.publish, *row.publish_deny)}
    | {f"$JS.API.STREAM.{call}.{stream}" for call in _CALLS for stream in _STREAMS}
    | {f"$JS.API.CONSUMER.{call.format(stream)}" for call in _CONSUMER_CALLS for stream in _STREAMS}
    | {f"$JS.API.DIRECT.GET.{stream}" for stream in (*_STREAMS, "KV_TETHER_apikeys", "KV_TETHER_jobs", "TETHER_DEAD")}
    | {f"$JS.ACK.{stream}.c.1.2.3.4.5" for stream in _STREAMS}
)
SUBSCRIBE = sorted({wildcards.example(item) for row in TABLE.values() for item in row.subscribe})


async def refused(home: Home, url: str, name: str) -> tuple[set[str], set[str]]:
    """Subjects that the server refused to an identity: to publish on, and to subscribe to."""
    errors: list[str] = []

    async def collect(error: Exception) -> None:
        errors.append(str(error).lower())

    client = Client()
    seed = read_secret(home.nats_seed(name)).decode()
    await client.connect(url, nkeys_seed_str=seed, error_cb=collect, allow_reconnect=False)
    try:
        for subject in PUBLISH + FOREIGN:
            await client.publish(subject, b"")
        for subject in SUBSCRIBE + FOREIGN:
            await client.subscribe(subject)
        # the server answers in order, and the last of both is refused to everyone
        await wait_until(lambda: denied(errors, "subscription", FOREIGN[-1]), "the last refusal")
    finally:
        await client.close()
    published = {subject for subject in PUBLISH + FOREIGN if denied(errors, "publish", subject)}
    return published, {subject for subject in SUBSCRIBE + FOREIGN if denied(errors, "subscription", subject)}


def denied(errors: list[str], verb: str, subject: str) -> bool:
    return any(f'violation for {verb} to "{subject.lower()}"' in error for error in errors)


def test_the_shipped_file_names_the_identities_of_a_new_home() -> None:
    assert list(TABLE) == ["admin", "dispatcher", "gateway", "modelstore", "worker-1", "worker-2"]
    assert all(row.publish and row.subscribe for row in TABLE.values())
    assert len(PUBLISH) > 150
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
