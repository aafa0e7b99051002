"""What tests of encrypted models share: a platform of their own, and searches for what should not be found."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from support.http.served import Served, served, until
from support.models import models
from support.platform.services import Services

from tether import Client
from tether.broker.embedded_server import Binary
from tether.bus.key_value.keyrings import ModelKeyring
from tether.bus.session import connect
from tether.crypto import Keyset
from tether.domain.chunking import cut_file
from tether.domain.manifest import Manifest, ModelRef
from tether.modelstore.records.registry import Registry
from tether.modelstore.upkeep.chunk_collector import ChunkCollector
from tether.process import metrics

MB = 1 << 20


@contextmanager
def platform(binary: Binary, **changes: Any) -> Iterator[tuple[Served, Client]]:
    with served(binary, **changes) as running, Client(running.url, running.key) as sdk:
        yield running, sdk


def model_file(path: Path, size: int = 6 * MB, seed: int = 1) -> Path:
    path.write_bytes(models.padded(size, seed=seed))
    return path


def pattern(path: Path) -> bytes:
    """64 bytes of the middle of a file: a known weight pattern."""
    content = path.read_bytes()
    return content[len(content) // 2 : len(content) // 2 + 64]


def digests(path: Path) -> list[bytes]:
    """The SHA-256 of a file and of each of its chunks, as hex and as bytes."""
    with path.open("rb") as file:
        cutter = cut_file(file)
    every = [hashlib.sha256(path.read_bytes()).hexdigest(), *cutter.digests]
    return [digest.encode() for digest in every] + [bytes.fromhex(digest) for digest in every]


def found_below(folder: Path, *patterns: bytes) -> list[Path]:
    """Every file below a folder that holds one of the patterns."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(wanted in path.read_bytes() for wanted in patterns)]


def manifest(running: Served, name: str, version: int) -> Manifest:
    return running.services.gateway.catalog.resolve(name, str(version)).manifest


def answers(running: Served, name: str, version: int) -> None:
    """A worker answers for a version."""
    with running.client() as http:
        ready = f"/v2/models/{name}/versions/{version}/ready"
        until(lambda: http.get(ready).status_code == 200, f"{name}:{version} is ready", 40)
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
        answer = http.post(f"/v2/models/{name}/versions/{version}/infer", json=body)
        assert answer.status_code == httpx.codes.OK, answer.text


def loaded(running: Served, name: str, version: int) -> None:
    """A worker holds a version, and its chunks are in the worker's cache."""
    answers(running, name, version)
    holder = running.services.workers[0].holder
    assert ModelRef(name, version) in holder.ready()
    until(lambda: not holder._tasks.named("remember-"), "its chunks are in the cache")
    chunks = manifest(running, name, version).files[0].chunks
    assert holder.files.cache.held(chunks) == set(chunks)


def fetched() -> float:
    """Bytes of chunks that workers of this process had from the broker."""
    return float(metrics.CHUNKS_BYTES.labels("broker")._value.get())


def ours_in_memory(running: Served) -> list[Path]:
    """Files of the first worker's and the model store's folders in memory."""
    memory = running.services.workers[0].holder.files._memory
    return [path for path in memory._own.rglob("*") if path.is_file() and not path.name.startswith(".")]


def believe(running: Services, change: Callable[[Keyset], Keyset]) -> None:
    """Let the model store's keeper of keys go by another keyset than everybody else."""
    assert running.modelstore is not None
    before = running.modelstore.keys.keyset()
    changed = msgspec.structs.replace(change(before), version=before.version + 1)
    running.modelstore.keys.keyset = lambda: changed


def without(name: str) -> Callable[[Keyset], Keyset]:
    def change(keyset: Keyset) -> Keyset:
        left = tuple(record for record in keyset.identities if record.name != name)
        return msgspec.structs.replace(keyset, identities=left)

    return change


async def collected(running: Served) -> None:
    """Remove what no version names, as if it had been so for long."""
    settings = dataclasses.replace(running.broker.settings, unreferenced_ttl_s=0.0, gc_grace_s=0.0)
    async with connect(settings, running.home, "modelstore") as bus:
        keeper = ChunkCollector(bus, Registry(bus), ModelKeyring(bus, running.home, every=True))
        for _ in range(3):
            await keeper.collect()
