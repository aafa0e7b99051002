"""Model push and pull: a file through the gateway into the store, and from the store to a worker's disk."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import httpx
import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bench.servers import Server
from tether.bus.key_value.bucket import KvBucket
from tether.bus.session import connect
from tether.settings import Settings
from tether.storage.chunk_store import ObjectChunkStore
from tether.storage.model_files import fetch_model, open_manifest


def make_model(path: Path, size_mb: int) -> int:
    """Write a model of random weights, so that no two chunks are equal; its size in bytes."""
    width = 512
    rows = size_mb * (1 << 20) // (4 * width)
    weights = np.random.default_rng(int.from_bytes(os.urandom(8))).standard_normal((rows, width), dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "row"], ["vector"])],
        "table",
        [helper.make_tensor_value_info("row", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(weights, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path.stat().st_size


def push(server: Server, name: str, path: Path) -> tuple[int, float]:
    """Push a file as the next version; version and seconds until the store answered, inspection included."""
    with httpx.Client(trust_env=False, headers=server.headers, timeout=180) as http, path.open("rb") as file:
        began = time.perf_counter()
        answer = http.post(f"{server.url}/v1/models/{name}/versions", content=file)
        seconds = time.perf_counter() - began
    answer.raise_for_status()
    return int(msgspec.json.decode(answer.content)["version"]), seconds


async def pull(server: Server, name: str, version: int) -> float:
    """Seconds to fetch a version as a worker does: manifest verified, every chunk hashed, files synced to disk.

    Raises:
        RuntimeError: the version is not in the store.
    """
    if server.home is None:
        raise RuntimeError("this server has no data directory to read keys from")
    nats = msgspec.json.decode(server.home.endpoints.read_bytes())["nats"]
    settings = dataclasses.replace(Settings(), nats_url=nats, home=str(server.home.root))
    async with connect(settings, server.home, "worker-1") as bus:
        key = bus.names.version_key(name, version)
        frame = await KvBucket(bus, "models").get(key)
        if frame is None:
            raise RuntimeError(f"model '{name}' has no version {version}")
        manifest = open_manifest(bus.verifier, bus.names, key, frame)
        store = ObjectChunkStore(bus, bus.names.partition_bucket(manifest.partition))
        with tempfile.TemporaryDirectory(prefix="tether-bench-cache-") as cache:
            began = time.perf_counter()
            await fetch_model(bus, store, manifest, Path(cache))
            return time.perf_counter() - began
