"""The model store decides who may do what with a model, whatever a gateway let through; and what was there gets an owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import msgspec
import pytest
from support.brokers.brokers import Broker, wait_until
from support.brokers.stores import Platform, platform_on
from support.models import models
from support.platform.services import Services, first, new_job, row, services
from support.platform.tenancy import bound_home, has_lane, isolate, own_worker

from tether.bus.key_value.bucket import KvBucket, SignedBucket
from tether.bus.key_value.leases import ask_owner
from tether.bus.session import connect
from tether.crypto import MessageType
from tether.domain.manifest import OWNER_CHANGES, STORE_CHANGES, Change, ChangeRequest, Manifest, PushRequest
from tether.domain.tenant import Tenant
from tether.domain.tensor import from_numpy
from tether.errors import BadName, Conflict, Forbidden, InvalidRequest, ModelNotFound, TetherError, Unavailable
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.model import config_patch
from tether.model.config_patch import ConfigAction, ConfigRequest
from tether.model.ownership import DEFAULT_TENANT, EVERYBODY, Ownership, Right, owner_key
from tether.modelstore import service
from tether.process.data_dir import Home
from tether.wire import codec

ACME, OTHER = "acme", "other"
MODEL = "acme/m"
"""In the namespace of ``ACME``."""
PLAIN = "m"


@pytest.fixture
async def platform(broker: Broker) -> AsyncIterator[Platform]:
    async with platform_on(broker) as made:
        yield made


async def push(
    platform: Platform, tenant: str, bias: float = 1.0, *, admin: bool = False, model: str = MODEL
) -> Manifest:
    file, _ = await platform.upload(models.add(bias))
    return (await platform.register(PushRequest(model, (file,), tenant=tenant, admin=admin))).manifest


async def ask(platform: Platform, request: ChangeRequest | ConfigRequest) -> bytes:
    endpoint = "changeModel" if isinstance(request, ChangeRequest) else config_patch.ENDPOINT
    body = codec.encode(request)
    return await ask_owner(
        platform.bus, endpoint, 0, MessageType.CHANGE, body, answers=MessageType.CHANGED, timeout=30, again=False
    )


async def grant(
    platform: Platform, grantee: str, right: Right, *, tenant: str = ACME, admin: bool = False
) -> Ownership:
    request = ChangeRequest(Change.GRANT, MODEL, tenant=tenant, admin=admin, grantee=grantee, right=int(right))
    return codec.decode(await ask(platform, request), Ownership)


async def owner(platform: Platform, model: str = MODEL) -> Ownership | None:
    body = await SignedBucket(platform.bus, "configs", MessageType.CONFIG).require(owner_key(model))
    return None if body is None else codec.decode(body, Ownership)


def acts(tenant: str, *, admin: bool = False) -> Iterator[ChangeRequest | ConfigRequest]:
    """Every kind of request about a model that is there."""
    for change in set(Change) - STORE_CHANGES:
        yield ChangeRequest(change, MODEL, "production", 1, tenant=tenant, admin=admin, grantee="third", right=1)
    for action in ConfigAction:
        yield ConfigRequest(action, MODEL, {"note": "x"} if action is ConfigAction.NOTE else {}, tenant=tenant, admin=admin,
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
    with pytest.raises(Forbidden, match="push this one as 'm'"):
        await push(platform, OTHER, 2.0)
    by_admin = await push(platform, DEFAULT_TENANT, 3.0, admin=True)
    assert (by_admin.version, by_admin.owner, by_admin.tenant) == (2, ACME, DEFAULT_TENANT)
    assert await owner(platform) == found


async def test_the_model_store_makes_no_model_in_another_namespace(platform: Platform) -> None:
    """Whatever name a gateway made of what its caller wrote."""
    for tenant, model in ((ACME, PLAIN), (ACME, "other/m"), (ACME, "acme.x/m"), (DEFAULT_TENANT, MODEL)):
        with pytest.raises(Forbidden, match="push models to its namespace"):
            await push(platform, tenant, model=model)
        assert await outcome(platform, ChangeRequest(Change.ENCRYPT, model, tenant=tenant)) is Forbidden
    for model in (
        "default/m",
        "shared/m",
        "acme/../m",
        "acme//m",
        "acme/m/m",
        "ACME/m",
        "acme/ready",
        "acme/m" + "x" * 100,
    ):
        with pytest.raises(BadName):
            await push(platform, ACME, model=model, admin=True)
    assert await everything(platform) == {"models": {}, "aliases": {}, "configs": {}, "modelkeys": {}}
    assert (await push(platform, DEFAULT_TENANT, model=MODEL, admin=True)).owner == ACME
    assert (await push(platform, OTHER, model="other/m")).owner == OTHER
    assert (await push(platform, DEFAULT_TENANT, model=PLAIN)).owner == DEFAULT_TENANT
    found = await owner(platform, "other/m")
    assert found is not None
    assert (found.tenant, found.uses) == (OTHER, ())


async def test_of_first_pushes_at_once_those_of_the_namespaces_tenant_count(platform: Platform) -> None:
    tenants = [*(f"t{number}" for number in range(3)), DEFAULT_TENANT, ACME, ACME]
    tried = await asyncio.gather(
        *(push(platform, tenant, bias) for bias, tenant in enumerate(tenants)), return_exceptions=True
    )
    made = [one for one in tried if isinstance(one, Manifest)]
    assert sorted((one.owner, one.version) for one in made) == [(ACME, 1), (ACME, 2)]
    assert {type(one) for one in tried if not isinstance(one, Manifest)} == {Forbidden}
    assert (await owner(platform)) is not None


async def test_a_tenant_without_a_grant_can_do_nothing_with_a_model(platform: Platform) -> None:
    await push(platform, ACME)
    before = await everything(platform)
    for request in acts(OTHER):
        wanted = Forbidden if what(request) == Change.ENCRYPT else ModelNotFound
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
    with pytest.raises(Forbidden):
        await push(platform, OTHER, 3.0)


async def everything(platform: Platform) -> dict[str, dict[str, bytes]]:
    """What the buckets of the model store hold."""
    names = ("models", "aliases", "configs", "modelkeys")
    buckets = {name: SignedBucket(platform.bus, name, MessageType.CONFIG).raw for name in names}
    return {name: await bucket.entries() for name, bucket in buckets.items()}


async def test_a_request_that_names_no_tenant_is_refused(platform: Platform) -> None:
    """A gateway from before models had owners: what it asks for may be anybody's."""
    await push(platform, ACME)
    for request in acts(""):
        assert await outcome(platform, request) is Forbidden, what(request)
    body = codec.encode(PushRequest("n", (await platform.manifest(MODEL, 1)).files))  # type: ignore[union-attr]
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
    request = ChangeRequest(Change.HAND_OVER, MODEL, tenant=ACME, grantee=OTHER)
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
        await ask(platform, ChangeRequest(change, MODEL, "latest", 1, tenant=ACME))
    with pytest.raises(Forbidden):
        await push(platform, OTHER, 2.0)
    assert (await push(platform, ACME, 2.0)).version == 2


async def as_before_owners(broker: Broker, platform: Platform, *pushers: str) -> None:
    """Store versions of a plain name as tenants pushed them before models had owners."""
    for number, _ in enumerate(pushers):
        await push(platform, DEFAULT_TENANT, number + 1.0, model=PLAIN)
    async with connect(broker.settings, broker.home, "modelstore") as bus:
        versions = SignedBucket(bus, "models", MessageType.MANIFEST)
        for key, body in (await versions.entries()).items():
            old = codec.decode(body, Manifest)
            old = msgspec.structs.replace(old, owner="", tenant=pushers[old.version - 1])
            await versions.put(key, codec.encode(old))
        await SignedBucket(bus, "configs", MessageType.CONFIG).raw.forget(
            owner_key(PLAIN), (await SignedBucket(bus, "configs", MessageType.CONFIG).latest(owner_key(PLAIN))).sequence
        )
    assert await owner(platform, PLAIN) is None


async def test_a_model_from_before_gets_its_owner_when_a_model_store_starts(broker: Broker) -> None:
    async with platform_on(broker) as platform:
        await as_before_owners(broker, platform, ACME, OTHER)
    async with platform_on(broker) as platform:
        found = await patiently_owner(platform)
        assert (found.tenant, found.uses, found.writes) == (ACME, (EVERYBODY,), ())
        with pytest.raises(Forbidden):
            await push(platform, OTHER, 3.0, model=PLAIN)
        assert (await push(platform, ACME, 3.0, model=PLAIN)).version == 3
        assert (await push(platform, OTHER, 3.0, model="other/m")).version == 1


async def patiently_owner(platform: Platform) -> Ownership:
    found: list[Ownership] = []

    async def recorded() -> bool:
        with suppress(Unavailable):
            known = await owner(platform, PLAIN)
            found.extend([known] if known is not None else [])
        return bool(found)

    while not await recorded():
        await asyncio.sleep(0.05)
    return found[-1]


async def test_before_it_is_recorded_a_models_owner_follows_from_its_versions(
    broker: Broker, platform: Platform
) -> None:
    await as_before_owners(broker, platform, ACME)
    with pytest.raises(Forbidden):
        await push(platform, OTHER, 2.0, model=PLAIN)
    await push(platform, ACME, 2.0, model=PLAIN)
    found = await owner(platform, PLAIN)
    assert found is not None
    assert (found.tenant, found.uses) == (ACME, (EVERYBODY,))


async def test_a_model_whose_versions_cannot_be_read_is_nobodys(broker: Broker, platform: Platform) -> None:
    await as_before_owners(broker, platform, ACME)
    async with connect(broker.settings, broker.home, "modelstore") as bus:
        await KvBucket(bus, "models").put("m.1", b"no frame")
    delete = ChangeRequest(Change.DELETE_VERSION, PLAIN, version=1, tenant=OTHER)
    for tenant, error in ((OTHER, Forbidden), (DEFAULT_TENANT, Conflict)):
        with pytest.raises(error):
            await push(platform, tenant, 2.0, model=PLAIN)
    assert await outcome(platform, delete) is ModelNotFound
    for change in (Change.DELETE_ALIAS, Change.DELETE_VERSION):
        await ask(platform, msgspec.structs.replace(delete, change=change, alias="latest", admin=True))
    assert (await push(platform, DEFAULT_TENANT, 2.0, model=PLAIN)).owner == DEFAULT_TENANT


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
        assert MODEL not in usable(running)
        request = ChangeRequest(Change.GRANT, MODEL, tenant=ACME, grantee=OTHER, right=int(Right.USE))
        await running.change(request)
        await wait_until(lambda: has_lane(running, served, OTHER), "the tenant may use it now")
        await running.change(msgspec.structs.replace(request, right=int(Right.NONE)))
        await wait_until(lambda: MODEL not in usable(running), "it may not any more")
        assert "open" in usable(running)


async def test_a_model_of_an_isolated_tenants_namespace_is_run_beside_the_plain_one_of_that_name(
    broker: Broker,
) -> None:
    async with services(broker, workers=1) as running:
        plain, chunks = await running.push(PLAIN, models.add(1.0)), await running.push("chunks", models.add(5.0))
        await running.gateway.tenants.store(Tenant(OTHER, isolated=True))
        own = await running._register(PushRequest("other/m", chunks.manifest.files, tenant=OTHER), 1)
        await own_worker(running, "own", own, OTHER)
        await wait_until(lambda: running.gateway.catalog.workers(plain, OTHER) == ("own",), "the plain one is held")

        async def infer(served: ResolvedVersion, number: int) -> float:
            inputs = (from_numpy("x", row(number)),)
            outputs = await running.gateway.infer(served, OTHER, inputs, (), request_id="r", timeout_s=20)
            return float(first(outputs)[0, 0])

        asked = [infer(served, number) for number in range(20) for served in (own, plain)]
        assert await asyncio.gather(*asked) == [number + more for number in range(20) for more in (5.0, 1.0)]
        jobs = await running.gateway.jobs.submit(OTHER, [new_job(own, row(1)), new_job(plain, row(1))])
        ended = await running.gateway.jobs.get_many(OTHER, [job["id"] for job in jobs], 20)
        assert [job["result"]["outputs"][0]["data"][0] for job in ended] == [6.0, 2.0]


def usable(running: Services) -> set[str]:
    """The models whose lanes the dispatcher keeps for the isolated tenant, and which its workers are given."""
    assert running.dispatcher is not None
    return {ref.model for ref in running.dispatcher._usable()[OTHER]}


async def push_as(running: Services, tenant: str) -> ResolvedVersion:
    file = (await running.push("chunks", models.add())).manifest.files[0]
    return await running._register(PushRequest(MODEL, (file,), tenant=tenant), 1)
