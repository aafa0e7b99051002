"""What gateways know of tenants."""

from __future__ import annotations

from support.brokers.brokers import wait_until
from support.platform.services import Services

from tether.domain.job import SHARED
from tether.domain.tenant import Tenant
from tether.gateway_http import gateway


async def test_a_tenants_record_reaches_every_gateway_and_leaves_them_when_it_is_deleted(one: Services) -> None:
    other = await one.stack.enter_async_context(gateway.running(one.settings, one.home))
    assert (other.tenants.pool("a.b"), other.tenants.get("a.b")) == (SHARED, Tenant("a.b"))
    record = Tenant("a.b", models=("x-*",), isolated=True, created_at=1.0)
    await one.gateway.tenants.store(record)
    assert one.gateway.tenants.pool("a.b") == "a.b"
    await wait_until(lambda: other.tenants.find("a.b") == record, "the other gateway has the record")
    assert other.tenants.known() == [record]
    await one.gateway.tenants.bucket.delete("a=b")
    await wait_until(lambda: other.tenants.find("a.b") is None, "it is gone there too")
    assert other.tenants.pool("a.b") == SHARED
