"""The store of chunks over HTTP and the command line."""

from __future__ import annotations

import json

import pytest
from support.http.served import Served, until
from support.models import models
from typer.testing import CliRunner

from tether import Client
from tether.errors import Forbidden
from tether_cli.main import application

MB = 1 << 20


def test_an_administrator_sees_a_damaged_chunk_and_a_push_mends_it(served: Served) -> None:
    content = models.padded(3 * MB, seed=77)
    version = served.push("kept", content)
    with Client(served.url, served.key) as client:
        before = client.store()
        assert before["damaged"] == []
        assert before["chunks"] >= before["named_chunks"] > 0
        assert min(before["stored_bytes"], before["named_bytes"]) > 3 * MB, "random weights do not compress"
        digest = damage(served, "kept", version)
        assert client.scrub()["named_chunks"] == before["named_chunks"]
        until(lambda: client.store()["damaged"] != [], "the pass finds it")
        assert client.store()["damaged"] == [{"digest": digest, "versions": [f"kept:{version}"]}]
        assert served.push("kept", content) == version
        assert client.store()["damaged"] == []


def damage(served: Served, model: str, version: int) -> str:
    """Write other bytes where the first chunk of a version lies, and take it from the workers that could mend it."""
    gateway = served.services.gateway
    manifest = gateway.catalog.resolve(model, str(version)).manifest
    digest = manifest.files[0].chunks[0]
    for worker in served.services.workers:
        cache = worker.holder.files.cache
        until(lambda cache=cache: cache.held([digest]), "the worker keeps the chunk")
        cache.drop("disk")
    names = gateway.bus.names
    subject = names.object_chunk(names.chunk_bucket(model), digest)
    served.run(gateway.bus.publish_acked(subject, b"evil", headers={"Nats-Rollup": "sub"}))
    return digest


def test_the_command_line_asks_for_a_collection(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETHER_API_KEY", served.key)
    served.push("kept", models.padded(3 * MB, seed=77))
    for command in ("gc", "store"):
        result = CliRunner().invoke(application(), ["model", command, "--url", served.url, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["named_chunks"] > 0


def test_only_administrators_may(served: Served) -> None:
    with Client(served.url, served.new_key("models:read", "models:write")) as client:
        for ask in (client.store, client.collect, client.scrub):
            with pytest.raises(Forbidden):
                ask()
