"""The model store decides who may do what with a model, whatever a gateway let through; and what was there gets an owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import models
import msgspec
import pytest
from brokers import Broker, wait_until
from services import Services, services
from stores import Platform, platform_on
from tenancy import bound_home, has_lane, isolate

from tether import codec, config_changes
from tether.bus.connection import Bus
from tether.bus.kv import KvBucket, SignedBucket
from tether.bus.leases import ask_owner
from tether.config_changes import ConfigAction, ConfigRequest
from tether.envelope import MessageType
from tether.errors import Conflict, Forbidden, InvalidRequest, ModelNotFound, TetherError, Unavailable
from tether.gateway_http.catalog import Served
from tether.home import Home
from tether.model import OWNER_CHANGES, STORE_CHANGES, Change, ChangeRequest, Manifest, PushRequest
from tether.modelstore import service
from tether.ownership import DEFAULT_TENANT, EVERYBODY, Ownership, Right, owner_key

ACME, OTHER = "acme", "other"


@pytest.fixture
async def platform(broker: Broker) -> AsyncIterator[Platform]:
    async with platform_on(broker) as made:
        yield made


async def push(platform: Platform, tenant: str, bias: float = 1.0, *, admin: bool = False) -> Manifest:
    file, _ = await platform.upload(models.add(bias))
    return (await platform.register(PushRequest("m", (file,), tenant=tenant, admin=admin))).manifest


async def ask(platform: Platform, request: ChangeRequest | ConfigRequest) -> bytes:
    endpoint = "changeModel" if isinstance(request, ChangeRequest) else config_changes.ENDPOINT
    body = codec.encode(request)
    return await ask_owner(
        platform.bus, endpoint, 0, MessageType.CHANGE, body, answers=MessageType.CHANGED, timeout=30, again=False
    )


async def grant(
    platform: Platform, grantee: str, right: Right, *, tenant: str = ACME, admin: bool = False
) -> Ownership:
    request = ChangeRequest(Change.GRANT, "m", tenant=tenant, admin=admin, grantee=grantee, right=int(right))
    return codec.decode(await ask(platform, request), Ownership)


async def owner(platform: Platform) -> Ownership | None:
    body = await SignedBucket(platform.bus, "configs", MessageType.CONFIG).require(owner_key("m"))
    return None if body is None else codec.decode(body, Ownership)


def acts(tenant: str, *, admin: bool = False) -> Iterator[ChangeRequest | ConfigRequest]:
    """Every kind of request about a model that is there."""
    for change in set(Change) - STORE_CHANGES:
        yield ChangeRequest(change, "m", "production", 1, tenant=tenant, admin=admin, grantee="third", right=1)
    for action in ConfigAction:
        yield ConfigRequest(action, "m", {"note": "x"} if action is ConfigAction.NOTE else {}, tenant=tenant, admin=admin,
                            version=1)  # fmt: skip


def what(request: ChangeRequest | ConfigRequest) -> str:
    return str(request.change if isinstance(request, ChangeRequest) else request.action)


async def outcome(platform: Platform, request: ChangeRequest | ConfigRequest) -> type[TetherError] | None:
    try:
        await ask(platform, request)
    except TetherError as error:
        return type(error)
    return None


async def test_the_first_push_makes_the_owner_and_the_name_is_taken(platform: Platform) -> None:
    first = await push(platform, ACME)
    assert (first.owner, first.tenant) == (ACME, ACME)
    found = await owner(platform)
    assert found is not None
    assert (found.tenant, found.uses, found.writes, found.revision) == (ACME, (), (), 1)
    with pytest.raises(Conflict, match="is taken") as refused:
        await push(platform, OTHER, 2.0)
    assert ACME not in refused.value.message
    by_admin = await push(platform, DEFAULT_TENANT, 3.0, admin=True)
    assert (by_admin.version, by_admin.owner, by_admin.tenant) == (2, ACME, DEFAULT_TENANT)
    assert await owner(platform) == found


async def test_of_two_first_pushes_one_makes_the_owner(platform: Platform) -> None:
    tenants = [f"t{number}" for number in range(6)]
    tried = await asyncio.gather(
        *(push(platform, tenant, bias) for bias, tenant in enumerate(tenants)), return_exceptions=True
    )
    made = [one for one in tried if isinstance(one, Manifest)]
    found = await owner(platform)
    assert found is not None
    assert [(one.owner, one.version) for one in made] == [(found.tenant, 1)]
    assert {type(one) for one in tried if not isinstance(one, Manifest)} == {Conflict}


async def test_a_tenant_without_a_grant_can_do_nothing_with_a_model(platform: Platform) -> None:
    await push(platform, ACME)
    before = await everything(platform)
    for request in acts(OTHER):
        wanted = Conflict if what(request) == Change.ENCRYPT else ModelNotFound
        assert await outcome(platform, request) is wanted, what(request)
    assert await everything(platform) == before


async def test_a_grant_of_use_changes_nothing_and_one_of_write_all_but_the_grants(platform: Platform) -> None:
    await push(platform, ACME)
    await grant(platform, OTHER, Right.USE)
    before = await everything(platform)
    for request in acts(OTHER):
        allowed = what(request) == ConfigAction.SHOW
        assert await outcome(platform, request) is (None if allowed else Forbidden), what(request)
    with pytest.raises(Forbidden):
        await push(platform, OTHER, 2.0)
    assert await everything(platform) == before

    await grant(platform, OTHER, Right.WRITE)
    assert (await push(platform, OTHER, 2.0)).owner == ACME
    for request in acts(OTHER):
        refused = await outcome(platform, request) is Forbidden
        assert refused is (what(request) in OWNER_CHANGES), what(request)

    await grant(platform, OTHER, Right.NONE)
    with pytest.raises(Conflict):
        await push(platform, OTHER, 3.0)


async def everything(platform: Platform) -> dict[str, dict[str, bytes]]:
    """What the buckets of the model store hold."""
    names = ("models", "aliases", "configs", "modelkeys")
    buckets = {name: SignedBucket(platform.bus, name, MessageType.CONFIG).raw for name in names}
    return {name: await bucket.entries() for name, bucket in buckets.items()}


async def test_a_request_that_names_no_tenant_is_refused(platform: Platform) -> None:
    """A gateway from before models had owners: what it asks for may be anybody's."""
    await push(platform, DEFAULT_TENANT)
    for request in acts(""):
        assert await outcome(platform, request) is Forbidden, what(request)
    body = codec.encode(PushRequest("n", (await platform.manifest("m", 1)).files))  # type: ignore[union-attr]
    with pytest.raises(Forbidden, match="names no tenant"):
        await ask_owner(
            platform.bus, service.ENDPOINT, 0, MessageType.PUSH, body, answers=MessageType.PUSHED, timeout=30
        )


async def test_only_an_administrator_looks_into_the_store_of_every_tenant(platform: Platform) -> None:
    for change in STORE_CHANGES:
        assert await outcome(platform, ChangeRequest(change, "", tenant=DEFAULT_TENANT)) is Forbidden
        assert await outcome(platform, ChangeRequest(change, "", tenant=ACME, admin=True)) is None


async def test_only_an_administrator_hands_a_model_over(platform: Platform) -> None:
    await push(platform, ACME)
    request = ChangeRequest(Change.HAND_OVER, "m", tenant=ACME, grantee=OTHER)
    assert await outcome(platform, request) is Forbidden
    found = codec.decode(await ask(platform, msgspec.structs.replace(request, admin=True)), Ownership)
    assert (found.tenant, found.revision) == (OTHER, 2)
    with pytest.raises(Conflict):
        await push(platform, ACME, 2.0)


async def test_everybody_can_be_granted_use_alone(platform: Platform) -> None:
    await push(platform, ACME)
    with pytest.raises(InvalidRequest):
        await grant(platform, EVERYBODY, Right.WRITE)
    with pytest.raises(InvalidRequest):
        await grant(platform, OTHER, Right.OWN)
    assert (await grant(platform, EVERYBODY, Right.USE)).right("anybody") is Right.USE


async def test_a_name_stays_with_its_owner_when_the_last_version_is_gone(platform: Platform) -> None:
    await push(platform, ACME)
    for change in (Change.DELETE_ALIAS, Change.DELETE_VERSION):
        await ask(platform, ChangeRequest(change, "m", "latest", 1, tenant=ACME))
    with pytest.raises(Conflict):
        await push(platform, OTHER, 2.0)
    assert (await push(platform, ACME, 2.0)).version == 2


async def as_before_owners(broker: Broker, platform: Platform) -> None:
    """Take out of what is stored all that says whose model it is."""
    async with Bus.connect(broker.settings, broker.home, "modelstore") as bus:
        versions = SignedBucket(bus, "models", MessageType.MANIFEST)
        for key, body in (await versions.entries()).items():
            old = msgspec.structs.replace(codec.decode(body, Manifest), owner="")
            await versions.put(key, codec.encode(old))
        await SignedBucket(bus, "configs", MessageType.CONFIG).raw.forget(
            owner_key("m"), (await SignedBucket(bus, "configs", MessageType.CONFIG).latest(owner_key("m"))).sequence
        )
    assert await owner(platform) is None


async def test_a_model_from_before_gets_its_owner_when_a_model_store_starts(broker: Broker) -> None:
    async with platform_on(broker) as platform:
        await push(platform, ACME)
        await grant(platform, OTHER, Right.WRITE)
        await push(platform, OTHER, 2.0)
        await as_before_owners(broker, platform)
    async with platform_on(broker) as platform:
        found = await patiently_owner(platform)
        assert (found.tenant, found.uses, found.writes) == (ACME, (EVERYBODY,), ())
        with pytest.raises(Forbidden):
            await push(platform, OTHER, 3.0)
        assert (await push(platform, ACME, 3.0)).version == 3


async def patiently_owner(platform: Platform) -> Ownership:
    found: list[Ownership] = []

    async def recorded() -> bool:
        with suppress(Unavailable):
            known = await owner(platform)
            found.extend([known] if known is not None else [])
        return bool(found)

    while not await recorded():
        await asyncio.sleep(0.05)
    return found[-1]


async def test_before_it_is_recorded_a_models_owner_follows_from_its_versions(
    broker: Broker, platform: Platform
) -> None:
    await push(platform, ACME)
    await as_before_owners(broker, platform)
    with pytest.raises(Forbidden):
        await push(platform, OTHER, 2.0)
    await push(platform, ACME, 2.0)
    found = await owner(platform)
    assert found is not None
    assert (found.tenant, found.uses) == (ACME, (EVERYBODY,))


async def test_a_model_whose_versions_cannot_be_read_is_nobodys(broker: Broker, platform: Platform) -> None:
    await push(platform, ACME)
    await as_before_owners(broker, platform)
    async with Bus.connect(broker.settings, broker.home, "modelstore") as bus:
        await KvBucket(bus, "models").put("m.1", b"no frame")
    delete = ChangeRequest(Change.DELETE_VERSION, "m", version=1, tenant=OTHER)
    with pytest.raises(Conflict):
        await push(platform, OTHER, 2.0)
    assert await outcome(platform, delete) is ModelNotFound
    for change in (Change.DELETE_ALIAS, Change.DELETE_VERSION):
        await ask(platform, msgspec.structs.replace(delete, change=change, alias="latest", admin=True))
    assert (await push(platform, OTHER, 2.0)).owner == OTHER


# isolated tenants


@pytest.fixture
def home() -> Iterator[Home]:
    with bound_home(own=OTHER) as made:
        yield made


async def test_workers_of_an_isolated_tenant_get_no_model_that_it_may_not_use(broker: Broker) -> None:
    async with services(broker, workers=1) as running:
        served = await push_as(running, ACME)
        shared = await running.push("open", models.add(2.0))
        await isolate(running, OTHER, shared)
        assert not has_lane(running, served, OTHER)
        assert "m" not in usable(running)
        request = ChangeRequest(Change.GRANT, "m", tenant=ACME, grantee=OTHER, right=int(Right.USE))
        await running.change(request)
        await wait_until(lambda: has_lane(running, served, OTHER), "the tenant may use it now")
        await running.change(msgspec.structs.replace(request, right=int(Right.NONE)))
        await wait_until(lambda: "m" not in usable(running), "it may not any more")
        assert "open" in usable(running)


def usable(running: Services) -> set[str]:
    """The models whose lanes the dispatcher keeps for the isolated tenant, and which its workers are given."""
    assert running.dispatcher is not None
    return {ref.model for ref in running.dispatcher._usable()[OTHER]}


async def push_as(running: Services, tenant: str) -> Served:
    file = (await running.push("pieces", models.add())).manifest.files[0]
    return await running._register(PushRequest("m", (file,), tenant=tenant), 1)
