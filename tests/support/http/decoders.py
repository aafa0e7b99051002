"""Every decoder that reads bytes somebody else chose: how to call it, what it is given, which errors it may raise."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

import msgspec
import nacl.signing
import numpy as np
from support.models import models

from tether import crypto
from tether.bus.errors import parse_ack
from tether.crypto import MessageType, Role, Signer, Verifier, model_encryption, payload_encryption
from tether.crypto.payload_encryption import new_data_key
from tether.domain import api_key, job, partition, tenant, worker_protocol
from tether.domain import manifest as model
from tether.domain.job import Job, JobId, JobState, Outcome
from tether.domain.tensor import Tensor
from tether.errors import DecryptionFailed, TetherError
from tether.gateway_http.api import route_table
from tether.gateway_http.api.route_engine import read_query
from tether.gateway_http.api.routes import jobs
from tether.gateway_http.http.request import BodyReader, RequestHeaders, read_body
from tether.gateway_http.schemas import triton_config
from tether.model import config as model_config
from tether.model import config_patch, version_metadata
from tether.model.config import ModelConfig
from tether.modelstore.inspection.file_formats import onnx_parser
from tether.storage import model_files, object_meta
from tether.wire import codec, json_duplicates, oip, oip_json
from tether.wire.subjects import Names

NOW = 1_800_000_000_000
YEAR = 365 * 86_400_000
ROOT = os.urandom(32)
GATEWAY = crypto.new_identity("gateway", Role.GATEWAY)
MODELSTORE = crypto.new_identity("modelstore", Role.MODELSTORE)
SUBJECT = "tether.infer.0.local.shared.m.1"


@dataclass(frozen=True)
class Decoder:
    """``seeds`` are well-formed inputs to start from; ``read`` may raise nothing but our own errors."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]


def keyset() -> crypto.Keyset:
    records = tuple(who.record(not_before=NOW - 1000, expires_at=NOW + YEAR) for who in (GATEWAY, MODELSTORE))
    return crypto.Keyset(3, NOW - 1000, NOW + YEAR, records)


def seal(body: bytes, **more: Any) -> bytes:
    return Signer(GATEWAY, lambda: NOW).sign_envelope(MessageType.INFER, SUBJECT, body, **more)


def _resigned(header: bytes) -> bytes:
    """A frame whose signature is good whatever its header holds: what a stolen key can send."""
    whole = GATEWAY.kid + header[:16_000]
    signature = nacl.signing.SigningKey(GATEWAY.seed).sign(crypto.DOMAIN + whole).signature
    return b"TTHR\x01" + len(whole).to_bytes(2, "big") + signature + whole


def _tensors() -> tuple[Tensor, ...]:
    return (Tensor("x", "FP32", (1, 4), b"\0" * 16), Tensor("b", "BYTES", (2,), b"\1\0\0\0a\0\0\0\0"))


def _jobs() -> bytes:
    return codec.encode_jobs([Job(JobId(str(n)), "acme", _tensors(), 1.5, ("y",), "r", "00-x") for n in range(3)])


def _outcomes() -> bytes:
    failed = Outcome(JobId("b"), JobState.FAILED, (), job.Failure("x", "y"), 1, "w", 1.0, 2.0)
    return codec.encode_outcomes([Outcome(JobId("a"), JobState.SUCCEEDED, _tensors(), None, 1, "w", 1.0, 2.0), failed])


def structs() -> list[type[msgspec.Struct]]:
    """Every control value of the modules that define them."""
    kinds = [crypto.Keyset, crypto.IdentityRecord, crypto.Revocation]
    modules = (
        model,
        model_config,
        config_patch,
        version_metadata,
        worker_protocol,
        tenant,
        api_key,
        job,
        payload_encryption,
        model_encryption,
        partition,
    )
    for module in modules:
        found = [
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__
        ]
        kinds += [kind for kind in found if issubclass(kind, msgspec.Struct)]
    return kinds  # type: ignore[return-value]


def _example(kind: Any) -> Any:
    """Some value of a struct's shape, from its annotations alone."""
    return codec.pack({name: _filler(typ) for name, typ in _types(kind)})


def _types(kind: Any) -> list[tuple[str, Any]]:
    return [(field.encode_name, field.type) for field in msgspec.structs.fields(kind)]


def _filler(typ: Any) -> Any:
    text = str(typ)
    if isinstance(typ, type) and issubclass(typ, msgspec.Struct):
        return {name: _filler(inner) for name, inner in _types(typ)}
    for word, value in (("tuple", []), ("dict", {}), ("bytes", b"\1" * 16), ("float", 1.0), ("int", 1), ("bool", True)):
        if word in text:
            return value
    return "queued" if "State" in text else "a"


def _binary() -> tuple[bytes, int]:
    body, length = oip.build_infer_request(
        {"x": np.ones((1, 4), np.float32), "b": np.array([b"a", b""], np.object_)}, outputs=["y"]
    )
    assert length is not None
    return body, length


def _answer() -> tuple[bytes, int]:
    """What a gateway answers to the request of :func:`_binary`."""
    request = oip.parse_infer_request(*_binary())
    outputs = tuple(msgspec.structs.replace(tensor, name="y") for tensor in request.inputs[:1])
    body, length = oip.build_infer_response(model="m", version=1, request=request, outputs=outputs)
    assert length is not None
    return body, length


class _Given:
    """A request of these bytes: headers as lines, an empty line, the body."""

    def __init__(self, data: bytes) -> None:
        head, _, self.body = data.partition(b"\n\n")
        lines = [line.decode("latin-1").partition(":") for line in head.split(b"\n")]
        self.headers = [(name.lower(), value.strip()) for name, _, value in lines]

    @property
    def peer(self) -> str:
        return "127.0.0.1:9"

    async def read(self, limit: int, announced: int) -> bytes:
        del limit, announced
        return self.body


class _AtOnce(BodyReader):
    async def read(self, body: Any) -> bytes:
        found: bytes = await body
        return found


def _request(data: bytes) -> bytes:
    incoming = _Given(data)
    coroutine = read_body(RequestHeaders(incoming.headers), incoming, 1 << 20, _AtOnce())
    if len(incoming.body) >= 4 << 10:  # such a one may be unpacked in a thread
        return bytes(asyncio.run(coroutine))
    try:
        coroutine.send(None)
    except StopIteration as done:
        return bytes(done.value)
    raise AssertionError("nothing here waits")


def _many(read: Callable[[bytes, Any], object], kinds: list[Any]) -> Callable[[bytes], object]:
    """One input read as each of several types."""

    def each(data: bytes) -> None:
        for kind in kinds:
            with contextlib.suppress(TetherError):
                read(data, kind)

    return each


HEAD = b"x-api-key: k\ncontent-length: 4\ntraceparent: 00-aa\nidempotency-key: i\naccept-encoding: gzip\ncontent-encoding: %b\n\n"
MANIFEST = model.Manifest(
    "m", 1, "p", (model.ModelFile("model.onnx", 9, "f" * 64, ("e" * 64,)),), (), (), model.Batching(), 1.0, "modelstore"
)


@cache
def _chunk_meta(data: bytes) -> object:
    meta = object_meta.read_meta(data)
    return None if meta is None else (meta.state, meta.chunk_size, meta.stored_digest)


KEY = new_data_key(1)


def _sealed_digests() -> tuple[bytes, ...]:
    hidden, sealed = model_encryption.seal_files(KEY, "m", MANIFEST.files)
    return (
        codec.encode(msgspec.structs.replace(MANIFEST, files=hidden, sealed=sealed)),
        codec.pack([[b"1" * 32, b"2" * 32]]),
    )


def _open_digests(data: bytes) -> object:
    """A manifest whose digests are closed; and digests that a holder of the key closed itself."""
    with contextlib.suppress(DecryptionFailed):
        bound = model_encryption._bound_files(KEY, "m", MANIFEST.files)
        model_encryption.open_files(KEY, "m", MANIFEST.files, model.SealedDigests(KEY.id, KEY.close(bound, data)))
    return model_encryption.opened_manifest(KEY, codec.decode(data, model.Manifest))


def decoders() -> tuple[Decoder, ...]:
    verifier, strict = Verifier(keyset(), lambda: NOW), {"subject": SUBJECT, "types": (MessageType.INFER,)}
    (answer, answer_length), (binary, length) = _answer(), _binary()
    frame = seal(_jobs(), jobs=("0", "1", "2"), reply="r")
    plain, _ = oip.build_infer_request({"x": np.ones((1, 4), np.float32)}, binary=False, parameters={"timeout": 1})
    empty = seal(b"", jobs=("0",))
    header = empty[71 + 16 : 71 + int.from_bytes(empty[5:7], "big")]
    names, root = Names("tether"), crypto.root_public_key(ROOT)
    signed = crypto.sign_keyset(ROOT, keyset())
    manifest = codec.encode(MANIFEST)
    stored = Signer(MODELSTORE, lambda: NOW).sign_envelope(
        MessageType.MANIFEST, names.bucket_key("models", "m.1"), manifest
    )
    kinds = structs()
    job_body = b'{"model": "m", "inputs": [%b], "outputs": [{"name": "y"}], "deadline_ms": 5}' % plain
    return (
        Decoder("frame", (frame, seal(b"")), lambda data: verifier.verify_envelope(data, **strict)),  # type: ignore[arg-type]
        Decoder("signed header", (header,), lambda data: verifier.verify_envelope(_resigned(data), **strict)),  # type: ignore[arg-type]
        Decoder("msgpack", (_jobs(), _outcomes(), manifest, header), codec.unpack),
        Decoder("jobs", (_jobs(),), lambda data: codec.decode_jobs(data, ["0", "1", "2"])),
        Decoder("outcomes", (_outcomes(),), codec.decode_outcomes),
        Decoder("structs", (manifest, *map(_example, kinds)), _many(codec.decode, kinds)),
        Decoder("keyset", (signed,), lambda data: crypto.open_keyset(data, root, now_ms=NOW)),
        Decoder("manifest", (stored,), lambda data: model_files.open_manifest(verifier, names, "m.1", data)),
        Decoder("sealed digests", _sealed_digests(), _open_digests),
        Decoder("oip json", (plain,), lambda data: oip.parse_infer_request(data, None)),
        Decoder("oip binary", (binary,), lambda data: oip.parse_infer_request(data, length)),
        Decoder("oip answer", (answer,), lambda data: oip.parse_infer_response(data, answer_length)),
        Decoder("json keys", (plain, job_body, b'{"a": {"a\\u0061": ":"}}'), json_duplicates.refuse_duplicates),
        Decoder("onnx", (models.add(), models.looping(), models.with_function(), models.external(offset="64", length="16"), models.external_attribute()), onnx_parser.check_file),
        Decoder("chunk meta", (b'{"name":"a","bucket":"b","nuid":"c","size":1,"mtime":"","chunks":1,"digest":""}', b'{"name":"a","bucket":"b","nuid":"c","size":0,"mtime":"","chunks":0,"digest":"","deleted":true,"metadata":{"tether":"leaving","size":"7"}}'), _chunk_meta),
        Decoder("ack", (b'{"stream":"S","seq":1}', b'{"stream":"S","seq":1,"error":{"code":400,"err_code":10071}}'), lambda data: parse_ack(data, None, "s")),
        Decoder("key text", (api_key.new_key_text().encode(),), lambda data: api_key.key_id(data.decode("latin-1"))),
        Decoder("headers", tuple(HEAD % word + b"body" for word in (b"", b"gzip", b"br")), _request),
        Decoder("query", (b"ids=a&wait=1.5", b"state=queued&limit=5&cursor=77&model=m"), _query),
        Decoder("bodies", (plain, job_body, b'{"tenant": "a", "scopes": ["infer"]}'), _many(_body, _body_kinds())),
        Decoder("config patch", (PATCH, b'{"queue": {"max_size": 5}, "labels": {"a": "b"}, "cache_ttl_s": 2}', b'{"warmup": [{"shapes": {"x": [4]}}], "versions": null}'), _patched),
        Decoder("triton config", (TRITON,), lambda data: triton_config.patch_of(data.decode("latin-1"), "m", ModelConfig("m"))),
        Decoder("version note", (b'{"labels": {"a": "b", "c": null}, "note": "n"}',), _noted),
    )  # fmt: skip


PATCH = b'{"queue": {"max_size": 5}, "labels": {"a": "b"}, "preferred_batch_sizes": [2], "shadows": [{"version": 1}]}'
TRITON = (
    b'{"max_batch_size": 8, "dynamic_batching": {"preferred_batch_size": [4], "default_queue_policy": {"max_queue_size": 1}}, '
    b'"version_policy": {"specific": {"versions": [1]}}, "instance_group": [{"count": 2, "kind": "KIND_CPU"}], '
    b'"model_warmup": [{"batch_size": 1, "inputs": {"x": {"data_type": "TYPE_FP32", "dims": [4], "zero_data": true}}}]}'
)


def _object(data: bytes) -> Any:
    return oip_json.parse_body(msgspec.json.Decoder(dict[str, Any]), data)


def _patched(data: bytes) -> object:
    config = config_patch.patched(ModelConfig("m"), _object(data))
    config_patch.check_against(config, ModelConfig("m"), [MANIFEST], [model.Alias("m", "a", 1)])
    return codec.encode(config)


def _noted(data: bytes) -> object:
    note = version_metadata.noted(version_metadata.VersionNote("m", 1), version_metadata.patch_of(_object(data)))
    return codec.encode(note)


def _query(data: bytes) -> object:
    return read_query(parse_qsl(data.decode("latin-1"), keep_blank_values=True), jobs.JobsQuery)


def _body_kinds() -> list[Any]:
    return list(dict.fromkeys(row.body for row in route_table.table() if row.body is not None))


def _body(data: bytes, kind: Any) -> object:
    return oip_json.parse_body(msgspec.json.Decoder(kind), data)
