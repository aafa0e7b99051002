"""What the gateway answers while a part of the platform is missing: typed, at once, and with when to come again."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import httpx
import pytest
from support.http.documented import Document
from support.http.served import Served, served, until
from support.models import models

from tether.broker.embedded_server import Binary

BODY = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}


def push(http: httpx.Client, name: str) -> None:
    assert http.post(f"/v1/models/{name}/versions", content=models.add()).status_code == 201
    until(lambda: http.get(f"/v1/models/{name}").status_code == 200, "the gateway knows the model")


@pytest.fixture
def alone(nats_binary: Binary) -> Iterator[Served]:
    """A platform without workers."""
    with served(nats_binary, workers=0, request_timeout_s=1.0) as running:
        yield running


def test_a_model_that_no_worker_holds_is_there_but_not_ready(alone: Served) -> None:
    with Document.of(alone).client(alone) as http:
        push(http, "m")
        ready = http.get("/v2/models/m/ready")
        assert (ready.status_code, ready.json()) == (400, {"name": "m", "ready": False})
        (entry,) = http.post("/v2/repository/index").json()
        assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "no worker has it loaded")
        assert http.post("/v2/repository/index", json={"ready": True}).json() == []
        assert http.get("/v1/models").json()["models"][0]["ready"] is False
        assert http.get("/v1/models/m").json()["versions"][0]["workers"] == 0
        assert http.get("/v1/workers").json() == {"workers": []}
        assert http.get("/v2/models/m").status_code == 200


def test_a_request_that_nobody_takes_ends_by_its_deadline_and_a_job_waits_and_can_be_cancelled(alone: Served) -> None:
    with Document.of(alone).client(alone) as http:
        push(http, "m")
        until(lambda: http.post("/v1/jobs", json={"model": "m", **BODY}).status_code == 202, "the lanes are there")
        answer = http.post("/v2/models/m/infer", json=BODY)
        assert answer.status_code in (503, 504)
        assert answer.json()["code"] in ("model_not_ready", "unavailable", "deadline_exceeded")
        made = http.post("/v1/jobs", json={"model": "m", **BODY}).json()
        waited = http.get(f"/v1/jobs/{made['id']}", params={"wait": 0.2}).json()
        assert (waited["state"], waited["attempts"]) == ("queued", 0)
        assert "started_at" not in waited
        listed = http.get("/v1/jobs", params={"state": "queued"}).json()["jobs"]
        assert made["id"] in [job["id"] for job in listed]
        assert http.delete(f"/v1/jobs/{made['id']}").json()["state"] == "cancelled"


def test_without_the_broker_every_route_answers_what_it_can_and_says_when_to_come_again(alone: Served) -> None:
    server = alone.broker.server
    assert server is not None
    with Document.of(alone).client(alone) as http:
        push(http, "m")
        alone.run(server.kill())
        until(lambda: http.get("/readyz").status_code == 503, "the gateway notices")
        readiness = http.get("/readyz").json()
        assert (readiness["ready"], readiness["checks"]["broker"]) == (False, "not connected")
        assert http.get("/v2/health/ready").status_code == 400
        assert http.get("/v2/health/live").status_code == 200
        assert http.get("/healthz").status_code == 200
        assert http.get("/v2/models/m").status_code == 200
        for answer in (
            http.post("/v1/keys", json={"tenant": "a", "scopes": ["infer"]}),
            http.get("/v1/jobs"),
            http.get(f"/v1/jobs/{'0' * 32}"),
            http.get("/v1/workers"),
        ):
            assert answer.status_code == 503, f"{answer.request.url}: {answer.text}"
            assert answer.json()["code"] == "broker_unavailable"
            assert int(answer.headers["retry-after"]) >= 1
        alone.run(server.start())
        until(lambda: http.get("/readyz").status_code == 200, "the gateway is back")
        until(lambda: http.get("/v1/workers").status_code == 200, "what asks the broker works again")


def test_a_push_is_worked_on_no_longer_than_its_client_waits(alone: Served) -> None:
    server = alone.broker.server
    assert server is not None
    with Document.of(alone).client(alone) as http:

        def ask(waits: str) -> httpx.Response:
            wanted = {"chunks": ["0" * 64]}
            return http.post("/v1/models/m/chunks:missing", json=wanted, headers={"x-tether-timeout-s": waits})

        os.kill(server.pid, signal.SIGSTOP)
        try:
            answer = ask("0.5")
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded"), answer.text
        until(lambda: ask("5").status_code == 200, "the broker goes on")
        for wrong in ("0", "-1", "nan", "inf", "soon"):
            answer = ask(wrong)
            assert answer.status_code == 400, answer.text
            assert "x-tether-timeout-s" in answer.json()["error"]


def test_a_model_file_over_the_limit_is_refused_with_and_without_its_length(nats_binary: Binary) -> None:
    with served(nats_binary, workers=0, max_upload_bytes=1 << 20) as small, Document.of(small).client(small) as http:
        content = b"\0" * ((1 << 20) + 1)

        def parts() -> Iterator[bytes]:
            yield from (content[:500_000], content[500_000:])

        for answer in (
            http.post("/v1/models/m/versions", content=content),
            http.post("/v1/models/m/versions", content=parts()),
        ):
            assert (answer.status_code, answer.json()["code"]) == (413, "payload_too_large")
            assert "1048576 bytes" in answer.json()["error"]
