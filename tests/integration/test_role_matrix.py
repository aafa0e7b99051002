"""Every role tries every subject of every role on the server: it gets through exactly where the table says so."""

from __future__ import annotations

import pytest
import wildcards
from brokers import Broker, wait_until
from nats.aio.client import Client

from tether.bus.permissions import role_permissions
from tether.envelope import Role
from tether.home import read_secret
from tether.subjects import Names

TABLE = role_permissions(Names())
PUBLISH = sorted({wildcards.example(item) for row in TABLE.values() for item in (*row.publish, *row.publish_deny)})
SUBSCRIBE = sorted({wildcards.example(item) for row in TABLE.values() for item in row.subscribe})
FOREIGN = ["other.infer.0.a", "$SYS.REQ.ACCOUNT.PING", "_INBOX.x.y", "$KV.OTHER_models.x", "tether.unknown"]


async def refused(broker: Broker, role: Role) -> tuple[set[str], set[str]]:
    """Subjects that the server refused to a role: to publish on, and to subscribe to."""
    errors: list[str] = []

    async def collect(error: Exception) -> None:
        errors.append(str(error))

    client = Client()
    seed = read_secret(broker.home.nats_seed("worker-1" if role is Role.WORKER else role)).decode()
    await client.connect(broker.url, nkeys_seed_str=seed, error_cb=collect, allow_reconnect=False)
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
    return any(f'violation for {verb} to "{subject.lower()}"' in error.lower() for error in errors)


@pytest.mark.parametrize("role", Role)
async def test_a_role_gets_through_exactly_where_its_list_says(broker: Broker, role: Role) -> None:
    not_published, not_subscribed = await refused(broker, role)
    own = TABLE[role]
    assert not_published == {item for item in PUBLISH + FOREIGN if not wildcards.may_publish(own, item)}
    assert not_subscribed == {item for item in SUBSCRIBE + FOREIGN if not wildcards.may_subscribe(own, item)}
    assert set(FOREIGN) <= not_published & not_subscribed
