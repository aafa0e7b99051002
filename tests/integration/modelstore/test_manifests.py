"""Manifests that are not what the model store signed, or describe what is not there: no worker loads them, and it says why."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from support.brokers.brokers import wait_until
from support.models import models
from support.platform.services import Services, row

from tether.bus.key_value.bucket import KvBucket
from tether.bus.session import connect
from tether.crypto import MessageType, Signer
from tether.domain.manifest import Manifest, ModelFile, ModelRef
from tether.gateway_http.models.catalog import ResolvedVersion
from tether.wire import codec

NUMBER = 2
Forge = Callable[[Manifest, Signer, Signer, str], bytes]
"""An entry for version 2, of version 1's manifest, by the model store, a gateway, and the entry's subject."""


def signed(manifest: Manifest, signer: Signer, subject: str) -> bytes:
    return signer.sign_envelope(MessageType.MANIFEST, subject, codec.encode(manifest))


def second(manifest: Manifest, **changes: object) -> Manifest:
    return msgspec.structs.replace(manifest, version=NUMBER, **changes)


def described(manifest: Manifest, **changes: object) -> tuple[ModelFile, ...]:
    return (msgspec.structs.replace(manifest.files[0], **changes),)


def flipped(manifest: Manifest, store: Signer, subject: str) -> bytes:
    frame = bytearray(signed(second(manifest), store, subject))
    frame[-1] ^= 1
    return bytes(frame)


NOBODY_HAS = ModelFile("more.bin", 4, "ab" * 32, ("cd" * 32,), (4,))

UNSIGNED: dict[str, tuple[Forge, str]] = {
    "without a signature": (lambda made, *_: codec.encode(second(made)), "unsigned"),
    "with a bit flipped": (lambda made, store, _, at: flipped(made, store, at), "bad_signature"),
    "by a gateway": (lambda made, _, other, at: signed(second(made), other, at), "role_not_allowed"),
    "of another key": (lambda made, store, _, at: signed(made, store, at[:-1] + "1"), "subject_mismatch"),
}
"""Nobody believes these."""

UNTRUE: dict[str, tuple[Forge, str]] = {
    "of another version": (lambda made, store, _, at: signed(made, store, at), "subject_mismatch"),
    "with a path that climbs": (
        lambda made, store, _, at: signed(second(made, files=described(made, path="../model.onnx")), store, at),
        "bad_encoding",
    ),
    "with a file twice": (
        lambda made, store, _, at: signed(second(made, files=made.files * 2), store, at),
        "bad_encoding",
    ),
    "of another digest": (
        lambda made, store, _, at: signed(second(made, files=described(made, digest="0" * 64)), store, at),
        "corrupt_chunk",
    ),
    "with a file that is not there": (
        lambda made, store, _, at: signed(second(made, files=(*made.files, NOBODY_HAS)), store, at),
        "corrupt_chunk",
    ),
    "without a file": (lambda made, store, _, at: signed(second(made, files=()), store, at), "bad_encoding"),
}
"""Signed by the model store, or by who has its key."""


async def reasons(running: Services, served: ResolvedVersion, forge: Forge) -> str:
    """Why the worker does not load the entry, though it was told to."""
    worker, names = running.workers[0], running.bus.names
    key = names.version_key("m", NUMBER)
    async with connect(running.settings, running.home, "modelstore") as bus:
        frame = forge(served.manifest, bus.signer, running.bus.signer, names.bucket_key("models", key))
        await KvBucket(bus, "models").put(key, frame)
    worker.holder.want([ModelRef("m", 1), ModelRef("m", NUMBER)])
    label = f"m:{NUMBER}"
    await wait_until(lambda: label in dict(worker.holder.failed()), "the worker says why")
    return dict(worker.holder.failed())[label]


@pytest.mark.parametrize("name", [*UNSIGNED, *UNTRUE])
async def test_no_worker_loads_a_manifest_that_is_not_what_it_says(one: Services, name: str) -> None:
    forge, code = {**UNSIGNED, **UNTRUE}[name]
    served = await one.push("m", models.add())
    reason = await reasons(one, served, forge)
    assert reason.partition(":")[0] == code, reason
    assert (await one.infer(served, row(1.0)))[0, 0] == 2.0
    found = one.gateway.catalog.find("m", NUMBER)
    if name in UNSIGNED or code == "subject_mismatch":
        assert found is None
    else:
        assert found is None or not one.gateway.catalog.workers(found)
    assert [ref.version for ref in one.workers[0].holder.ready()] == [1]
