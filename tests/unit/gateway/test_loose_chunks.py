"""Chunks that no version names count against the quota, each once, for a day."""

from __future__ import annotations

import pytest

from tether.domain.tenant import Quotas, Tenant
from tether.errors import QuotaExceeded
from tether.gateway_http.models import unreferenced_chunks
from tether.gateway_http.models.unreferenced_chunks import KEPT_S, UnreferencedChunks

ACME = Tenant("acme", quotas=Quotas(stored_bytes=100))


def test_a_chunk_counts_once_until_a_version_names_it_or_a_day_is_over() -> None:
    now = [0.0]
    loose = UnreferencedChunks(lambda: now[0], lambda _: 40)
    assert loose.take(ACME, "b", "1", 30)
    assert not loose.take(ACME, "b", "1", 30)
    now[0] = 10.0
    assert loose.take(ACME, "b", "2", 30)
    with pytest.raises(QuotaExceeded, match="stored_bytes is 100"):
        loose.take(ACME, "c", "1", 1)
    loose.drop("acme", "c", ["1"])
    loose.drop("acme", "b", ["2", "3"])
    assert loose.bytes_of("acme") == 30
    now[0] = KEPT_S
    assert loose.take(ACME, "b", "4", 60)


def test_so_many_are_counted_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreferenced_chunks, "MOST", 2)
    loose = UnreferencedChunks(lambda: 0.0, lambda _: 0)
    assert loose.take(ACME, "b", "1", 0)
    assert loose.take(ACME, "b", "2", 0)
    with pytest.raises(QuotaExceeded, match="2 chunks"):
        loose.take(ACME, "b", "3", 0)


def test_who_has_no_quota_is_not_counted() -> None:
    loose = UnreferencedChunks(lambda: 0.0, lambda _: 0)
    assert not loose.take(Tenant("free"), "b", "1", 1 << 50)
    assert loose.bytes_of("free") == 0
