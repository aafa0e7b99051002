"""Chunks that no version names count against the quota and the tenant's share, each once, for a day."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tether.domain.tenant import Quotas, Tenant
from tether.errors import QuotaExceeded
from tether.gateway_http.models import unreferenced_chunks
from tether.gateway_http.models.unreferenced_chunks import KEPT_S, UnreferencedChunks
from tether.storage.stored_bytes import CHUNK_OVERHEAD

ACME = Tenant("acme", quotas=Quotas(stored_bytes=100))
ROOM = 50_000
"""A tenant's share, in these tests."""


async def share(tenant: Tenant, bucket: str, loose: int, more: int) -> None:
    if loose + more > ROOM:
        raise QuotaExceeded(f"no room for {tenant.name} in {bucket}")


def chunks(now: Callable[[], float] = lambda: 0.0, stored: int = 0) -> UnreferencedChunks:
    return UnreferencedChunks(now, lambda _: stored, share)


async def test_a_chunk_counts_once_until_a_version_names_it_or_a_day_is_over() -> None:
    now = [0.0]
    loose = chunks(lambda: now[0], 40)
    assert await loose.take(ACME, "b", "1", 30)
    assert not await loose.take(ACME, "b", "1", 30)
    now[0] = 10.0
    assert await loose.take(ACME, "b", "2", 30)
    with pytest.raises(QuotaExceeded, match="stored_bytes is 100"):
        await loose.take(ACME, "c", "1", 1)
    loose.drop("acme", "c", ["1"])
    loose.drop("acme", "b", ["2", "3"])
    assert loose.bytes_of("acme") == 30
    now[0] = KEPT_S
    assert await loose.take(ACME, "b", "4", 60)


async def test_so_many_are_counted_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a quota the oldest are forgotten."""
    monkeypatch.setattr(unreferenced_chunks, "MOST", 2)
    for tenant in (ACME, Tenant("free")):
        loose = chunks()
        assert await loose.take(tenant, "b", "1", 0)
        assert await loose.take(tenant, "b", "2", 0)
        if tenant is ACME:
            with pytest.raises(QuotaExceeded, match="2 unreferenced chunks"):
                await loose.take(tenant, "b", "3", 0)
        else:
            assert await loose.take(tenant, "b", "3", 0)
            assert await loose.take(tenant, "b", "1", 0), "the oldest"


async def test_chunks_count_by_their_number_too() -> None:
    loose, free = chunks(), Tenant("free")
    most = ROOM // (CHUNK_OVERHEAD + 1)
    for number in range(most):
        assert await loose.take(free, "b", str(number), 1)
    with pytest.raises(QuotaExceeded, match="no room for free in b"):
        await loose.take(free, "b", "more", 1)
    assert await loose.take(free, "another", "more", 1)
    loose.drop("free", "b", ["0"])
    assert await loose.take(free, "b", "more", 1)
