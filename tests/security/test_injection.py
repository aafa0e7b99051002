"""What a client chose stays what it is: no name becomes a subject, no header reaches the broker, no value forges a log
line (S21, S22, S29)."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from support.brokers.brokers import Broker
from support.brokers.taps import tapped
from support.http.served import Served
from support.http.wire import exchange, request
from support.models import models
from support.platform.services import services

from tether.domain import api_key
from tether.errors import TetherError
from tether.gateway_http import service
from tether.process import logs

NAMES = [
    "../x",
    "%2e%2e%2fx",
    "a.*.%3e",
    "a.*",
    "a%00b",
    "a%0d%0aPUB%20x%200%0d%0a",
    "a%20b",
    "A",
    "a" * 65,
    "a" * 300,
    "%D0%B0",
    "%EF%BC%8E",
    "a%E2%80%AEb",
    "%2F..%2Fetc",
    "-a",
    "_a",
    ".",
    "..",
    "%24SYS",
    "%24JS.API.STREAM.DELETE.X",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_more_than_a_name_reaches_nothing(target: Served, name: str) -> None:
    """400, or 404 where decoding made another path of it; and the answer shows it escaped."""
    key, sent = [("x-api-key", target.key)], b'{"inputs": []}'
    for line in (
        f"GET /v2/models/{name} HTTP/1.1",
        f"POST /v2/models/{name}/infer HTTP/1.1",
        f"POST /v1/models/{name}/versions HTTP/1.1",
        f"GET /v1/models/{name} HTTP/1.1",
    ):
        length = [("content-length", str(len(sent)))] if line.startswith("POST") else []
        answer = exchange(target.url, request(line, [*key, *length], sent if length else b""))
        assert answer.status in (400, 404), (line, answer)
        assert answer.code in ("bad_name", "not_found", "model_not_found"), (line, answer)
        assert answer.json()["error"].isprintable()
        assert answer.json()["error"].isascii()


@pytest.mark.parametrize("name", ["../x", "a.*.>", "a\r\nb", "a\0b", "a" * 300, "\u0430", "A", "", " "])
def test_a_name_in_a_body_is_held_to_the_same_rule(target: Served, name: str) -> None:
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    with target.client() as http:
        answers = [
            http.post("/v1/jobs", json={"model": name, "inputs": [tensor]}),
            http.post("/v1/inference", json={"modelId": name or "\t", "inputData": [[1, 2, 3, 4]]}),
            http.post("/v1/keys", json={"tenant": name, "scopes": ["infer"]}),
        ]
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_name"), answer.text
        assert answer.json()["error"].isprintable()


OURS = {
    "Nats-Msg-Id",
    "Nats-TTL",
    "Nats-Rollup",
    "Nats-Expected-Last-Subject-Sequence",
    "KV-Operation",
    "Nats-Schedule",
    "Nats-Schedule-Target",
}
"""Headers that Tether itself sets."""

MARK = "Marked-By-A-Client"

CHOSEN = [
    ("Nats-Rollup", "all"),
    ("Nats-TTL", "1"),
    ("Nats-Schedule", "@every 1s"),
    ("Nats-Schedule-Target", "cmd.shutdown"),
    ("Nats-Msg-Id", MARK),
    ("Nats-Expected-Stream", MARK),
    ("Nats-Expected-Last-Sequence", "0"),
    ("KV-Operation", "PURGE"),
    ("Reply-To", MARK),
    (MARK, MARK),
    ("x-request-id", MARK),
    ("traceparent", MARK),
    ("tracestate", MARK * 50),
    ("idempotency-key", MARK),
]


def header_blocks(buffer: bytes) -> Iterator[tuple[bytes, list[tuple[str, str]]]]:
    """Subject and headers of every message with headers that a client of the broker published."""
    for found in re.finditer(rb"HPUB (\S+) (?:\S+ )?(\d+) \d+\r\n", buffer):
        block = buffer[found.end() : found.end() + int(found[2])].decode()
        lines = [line.split(":", 1) for line in block.split("\r\n")[1:] if line]
        yield found[1], [(name, value.strip()) for name, value in lines]


async def test_no_header_of_a_client_reaches_the_broker(broker: Broker) -> None:
    """A tap on the wire hears every message: their headers are ours alone, and what a client sent is in no subject."""
    sent = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})
    job = json.dumps({"model": "bump", **json.loads(sent)})
    with tapped(broker) as (through, tap):
        async with services(through) as running, service.listen(running.gateway, "127.0.0.1", 0) as port:
            await running.push("bump", models.add())
            text = api_key.new_key_text()
            await running.gateway.keys.store(
                api_key.stored_key(text, tenant="acme", scopes=api_key.SCOPES, name="", created_at=1.0)
            )
            for path, body in (("/v2/models/bump/infer", sent), ("/v1/jobs", job)):
                chosen = [("x-api-key", text), ("content-length", str(len(body))), *CHOSEN]
                asked = request(f"POST {path} HTTP/1.1", chosen, body.encode())
                answer = await asyncio.to_thread(exchange, f"http://127.0.0.1:{port}", asked)
                assert answer.status in (200, 202), answer
        heard = [block for side in tap.sides for block in header_blocks(bytes(side.buffer))]
    assert {name for _, headers in heard for name, _ in headers} <= OURS
    assert len(heard) > 5
    assert not [value for _, headers in heard for _, value in headers if MARK in value]
    assert not [subject for subject, _ in heard if MARK.encode() in subject]
    assert not [headers for subject, headers in heard if ("Nats-Rollup", "all") in headers]
    requests = [headers for subject, headers in heard if b".infer." in subject and not subject.endswith(b".probe")]
    assert not [headers for headers in requests if ("Nats-TTL", "1") in headers]


@pytest.mark.parametrize(
    "header",
    ["x-evil: a\rb", "x-evil: a\nInjected: b", "x-evil: a\0b", "x evil: a", "x-evil : a", ": a", "Nats\x01-X: a"],
)
def test_a_header_with_a_line_break_is_no_header(target: Served, header: str) -> None:
    sent = f"GET /v2 HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{header}\r\n\r\n".encode("latin-1")
    answer = exchange(target.url, sent)
    assert answer.status in (200, 400)
    assert b"njected" not in answer.data
    if "\nI" not in header:
        assert answer.status == 400


@pytest.mark.parametrize("value", ["a\u2028b", "x" * 500, "caf\xe9", "\x1b[2J"])
def test_an_id_that_could_forge_something_is_not_used(target: Served, value: str) -> None:
    line = b"GET /v2 HTTP/1.1\r\nhost: t\r\nconnection: close\r\nx-request-id: " + value.encode() + b"\r\n\r\n"
    answer = exchange(target.url, line)
    assert value.encode() not in answer.data.partition(b"\r\n\r\n")[0]


FORGED = [
    'a\n{"level": "info", "message": "all is well"}',
    "a\r\nb",
    "\x1b[2J\x1b[1;31mred",
    "\u202egnp.exe",
    "\u2028line",
    "\0",
    "\ud800",
    '"},{"',
    "%s %n {0}",
]
KEY = api_key.new_key_text()


def logged(form: str, text: str, *, error: bool = False) -> list[str]:
    """The lines that one record with ``text`` in every place becomes."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.JsonFormatter("gateway") if form == "json" else logs.TextFormatter("gateway"))
    log = logging.Logger("test")  # noqa: LOG001 - no other test may meet it
    log.addHandler(handler)
    fields = {"action": "request_refused", "model": text, "request_id": text}
    try:
        raise ValueError(text) if error else TetherError(f"model '{text}' is not here")
    except (TetherError, ValueError) as raised:
        log.warning("refused: %s", raised, extra=fields, exc_info=raised if error else None)
    return out.getvalue().splitlines()


def test_a_line_of_text_has_the_records_fields() -> None:
    (line,) = logged("text", "digits")
    assert line.endswith("gateway refused: model 'digits' is not here request_id=digits model=digits")


@pytest.mark.parametrize("text", FORGED)
def test_every_record_is_one_line_of_json(text: str) -> None:
    for error in (False, True):
        (line,) = logged("json", text, error=error)
        assert line.isascii()
        assert line.isprintable()
        assert json.loads(line)["model"] == text


@pytest.mark.parametrize("text", FORGED)
def test_a_line_for_eyes_is_one_line_too(text: str) -> None:
    (line,) = logged("text", text)
    assert line.isprintable()
    first, *trace = logged("text", text, error=True)
    assert first.isprintable()
    assert all(part.startswith("  ") for part in trace), "an exception's lines cannot be taken for records"


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize(
    "text",
    [KEY, f"/v2/models/{KEY}", f"a{KEY}b", f'{{"key": "{KEY}"}}', f"{KEY}\n{KEY}"],
    ids=["alone", "path", "inside", "json", "twice"],
)
def test_a_key_is_cut_wherever_somebody_put_it(form: str, text: str) -> None:
    whole = "\n".join(logged(form, text) + logged(form, text, error=True))
    assert KEY[12:] not in whole
    assert KEY[:11] in whole, "which key it was can still be told"


def test_a_key_in_a_url_a_body_or_a_name_is_in_no_log(target: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), target.client() as http:
        http.get(f"/v2/models/{target.key}")
        http.get(f"/{target.key}")
        http.get("/v1/jobs", params={target.key: target.key})
        http.post("/v1/jobs", content=f'{{"model": "{target.key}"')
        http.post("/v2/models/bump/infer", content=target.key)
        http.post(f"/v2/models/{target.key}/infer", json={"inputs": []})
    formatter = logs.JsonFormatter("gateway")
    lines = [formatter.format(record) for record in caplog.records if record.name.startswith("tether")]
    assert lines
    assert not [line for line in lines if target.key[12:] in line]
