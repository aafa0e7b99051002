"""A tenant's models that use up the time of their inspection keep no other tenant's push waiting."""

from __future__ import annotations

import asyncio

import pytest
from support.models import models
from support.platform.services import Services

from tether.bus.key_value.leases import ask_owner
from tether.crypto import MessageType
from tether.domain.manifest import PushAnswer, PushRequest
from tether.errors import InspectionLimitExceeded
from tether.model.ownership import Asker
from tether.modelstore.inspection.inspector import InspectionLimits
from tether.wire import codec


async def push(running: Services, tenant: str, name: str, model: bytes) -> PushAnswer:
    target = await running.gateway.encrypted_models.target(name, None, Asker(tenant, False, "key:test"))
    file = await running._upload(target, model)
    request, partition = PushRequest(name, (file,), tenant=tenant), running.bus.names.partition(name)
    body = codec.encode(request)
    answer = await ask_owner(
        running.bus, "registerModel", partition, MessageType.PUSH, body, answers=MessageType.PUSHED, timeout=60
    )
    return codec.decode(answer, PushAnswer)


async def test_two_pushes_of_one_tenant_do_not_hold_inspection_for_all(
    one: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = InspectionLimits(cpu_s=8, wall_s=8.0)
    monkeypatch.setattr(InspectionLimits, "for_size", lambda *_: limits)
    endless = [
        asyncio.create_task(push(one, "hostile", f"hostile/endless-{number}", models.looping())) for number in range(2)
    ]
    assert one.modelstore is not None
    turns = one.modelstore._inspections
    while not (turns._began and turns._waiting):
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in endless)
    made = await push(one, "modest", "modest/bump", models.add())
    assert made.created
    assert not any(task.done() for task in endless)
    refused = await asyncio.gather(*endless, return_exceptions=True)
    assert [type(error) for error in refused] == [InspectionLimitExceeded, InspectionLimitExceeded]
