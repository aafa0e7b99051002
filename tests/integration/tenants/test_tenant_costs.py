"""What a tenant asks about its jobs costs by its own jobs, and tells nothing of others'."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from support.models import models
from support.platform.services import TENANT, Services, new_job, row

from tether.domain.job import JobRecord, new_durable_job_id
from tether.errors import InvalidRequest

CROWD = 4000


@pytest.fixture
async def crowd(one: Services) -> JobRecord:
    """Another tenant has thousands of jobs; a job's record to copy."""
    served = await one.push("bump", models.add())
    (job,) = await one.gateway.jobs.submit("crowd", [new_job(served, row(1))])
    await one.gateway.jobs.get("crowd", job["id"], 20)
    (record,) = (await one.gateway.jobs._records.find([job["id"]])).values()
    await stored(one, record, "crowd", CROWD)
    return record


async def stored(running: Services, record: JobRecord, tenant: str, count: int) -> list[str]:
    """Records of jobs, oldest first."""
    ids = [new_durable_job_id(tenant) for _ in range(count)]
    made = [msgspec.structs.replace(record, id=job, tenant=tenant) for job in ids]
    for start in range(0, count, 200):
        await asyncio.gather(*[running.gateway.jobs._records._put(one) for one in made[start : start + 200]])
    return [str(job) for job in ids]


class Cost:
    """What the gateway opened, and how often it asked the broker."""

    opened = 0
    asked = 0


@contextmanager
def counting(running: Services, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cost]:
    cost, bus, records = Cost(), running.bus, running.gateway.jobs._records
    opened, batch = records.opened, bus._batch

    def count_opened(*args: Any) -> Any:
        cost.opened += 1
        return opened(*args)

    async def count_asked(*args: Any) -> Any:
        cost.asked += 1
        return await batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(records, "opened", count_opened)
        patch.setattr(running.gateway.jobs.room.open._records, "opened", count_opened)
        patch.setattr(bus, "_batch", count_asked)
        yield cost


async def listed(running: Services, tenant: str, cursor: str = "", limit: int = 100) -> tuple[list[str], str]:
    page, more = await running.gateway.jobs.list(tenant, state="", model="", limit=limit, cursor=cursor)
    return [job["id"] for job in page], more or ""


async def test_a_list_and_a_count_cost_a_tenants_own_jobs_alone(
    one: Services, crowd: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counting(one, monkeypatch) as cost:
        assert await listed(one, "idle") == ([], "")
        assert await one.gateway.jobs.room.open.count("idle") == 0
    assert cost.opened == 0
    assert cost.asked <= 6
    early = await stored(one, crowd, "modest", 3)
    await stored(one, crowd, "crowd", CROWD)
    late = await stored(one, crowd, "modest", 2)
    with counting(one, monkeypatch) as cost:
        assert await listed(one, "modest") == ([*late[::-1], *early[::-1]], "")
    assert cost.opened == 5
    assert cost.asked <= 20


async def test_a_cursor_tells_when_a_job_was_stored_and_nothing_of_others(one: Services, crowd: JobRecord) -> None:
    ids = await stored(one, crowd, TENANT, 7)
    await stored(one, crowd, "crowd", 10)
    newest, cursor = await listed(one, TENANT, limit=3)
    assert newest == ids[:-4:-1]
    text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
    records = one.gateway.jobs._records
    item = await one.bus.direct_get(records.raw.stream, records.raw.subject(f"{ids[4][:8]}.{ids[4][8:24]}"))
    assert item is not None
    assert text == item.headers["Nats-Time-Stamp"]
    await stored(one, crowd, TENANT, 1)
    await records.raw.forget(f"{ids[4][:8]}.{ids[4][8:24]}", item.sequence)
    assert await listed(one, TENANT, cursor) == (ids[3::-1], "")


@pytest.mark.parametrize("cursor", ["12345", "-1", "abc", "MjAyNi0xMS0yOQ", "_" * 64])
async def test_what_is_no_cursor_is_refused(one: Services, cursor: str) -> None:
    with pytest.raises(InvalidRequest, match="cursor"):
        await listed(one, TENANT, cursor)


async def test_a_dense_window_is_read_in_parts(
    one: Services, crowd: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few jobs lately make a window grow, and many before do not make it too large."""
    monkeypatch.setattr("tether.gateway_http.jobs.listing._WINDOW", 8)
    ids = await stored(one, crowd, TENANT, 120)
    await stored(one, crowd, "crowd", 300)
    ids += await stored(one, crowd, TENANT, 1)
    found: list[str] = []
    cursor = ""
    while True:
        page, cursor = await listed(one, TENANT, cursor, 50)
        found += page
        if not cursor:
            break
    assert found == ids[::-1]


async def test_others_have_turns_while_a_tenants_records_are_read(
    one: Services, crowd: JobRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator asks what a tenant with thousands of kept jobs uses: each record is verified."""
    counter, opened, turns = one.gateway.jobs.room.open, 0, [0]
    read = counter._records.opened

    def noted(*args: Any) -> Any:
        nonlocal opened
        opened += 1
        return read(*args)

    async def others() -> None:
        while True:
            turns.append(opened)
            await asyncio.sleep(0)

    monkeypatch.setattr(counter._records, "opened", noted)
    task = asyncio.create_task(others())
    try:
        await counter.count("crowd")
    finally:
        task.cancel()
    assert opened >= CROWD
    assert max(after - before for before, after in itertools.pairwise(turns)) <= 32
