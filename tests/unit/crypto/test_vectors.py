"""The checked-in test vectors: written by the code of today byte for byte, and read by it as they say."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import msgpack
import msgspec
import nacl.bindings
import nacl.signing
import pytest
import vectors
import vectors_models
import zstandard

from tether import crypto
from tether.crypto import MessageType, Verifier
from tether.crypto.model_encryption import opened_manifest
from tether.crypto.payload_encryption import KeyOpener, TenantKeys, open_job, open_outcome
from tether.crypto.session_token import open_session
from tether.domain.manifest import Manifest
from tether.errors import KeysetError, TetherError
from tether.wire import codec


def read(name: str) -> Any:
    return json.loads((vectors.FOLDER / f"{name}.json").read_text())


KEYS, FRAMES, BODIES, SEALED, SESSIONS = map(read, ("keys", "frames", "bodies", "sealed", "sessions"))
ENCRYPTED = read("encrypted")


def named(cases: list[dict[str, Any]], *fields: str) -> list[Any]:
    return [pytest.param(case, id="-".join(str(case[field]) for field in fields)) for case in cases]


def verifier(now: int = vectors.NOW) -> Verifier:
    data = bytes.fromhex(KEYS["keyset"]["bytes"])
    keyset = crypto.open_keyset(data, bytes.fromhex(KEYS["root_public"]), now_ms=vectors.NOW)
    return Verifier(keyset, lambda: now)


def code(act: Any) -> str:
    with pytest.raises(TetherError) as caught:
        act()
    return caught.value.code


@pytest.mark.parametrize("name", sorted(vectors.files()))
def test_the_code_of_today_writes_what_is_checked_in(name: str) -> None:
    """If not, the wire format changed: on purpose? Then run scripts/vectors.py."""
    assert (vectors.FOLDER / name).read_text() == vectors.files()[name]
    assert {path.name for path in vectors.FOLDER.glob("*.json")} == set(vectors.files())


@pytest.mark.parametrize("case", named(KEYS["identities"], "name"))
def test_keys(case: dict[str, Any]) -> None:
    public = bytes(nacl.signing.SigningKey(bytes.fromhex(case["ed25519_seed"])).verify_key)
    box = nacl.bindings.crypto_scalarmult_base(bytes.fromhex(case["x25519_seed"]))
    assert (public.hex(), box.hex(), crypto.key_id(public).hex()) == (case["ed25519"], case["x25519"], case["key_id"])


@pytest.mark.parametrize("case", named(KEYS["refused"], "what"))
def test_keysets_that_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(KeysetError):
        crypto.open_keyset(
            bytes.fromhex(case["bytes"]),
            bytes.fromhex(KEYS["root_public"]),
            now_ms=case["now_ms"],
            newer_than=case["newer_than"],
        )


@pytest.mark.parametrize("case", named(FRAMES["valid"], "key_id", "body"))
def test_frames(case: dict[str, Any]) -> None:
    header = case["header"]
    frame = bytes.fromhex(case["frame"])
    opened = verifier().verify_envelope(frame, subject=header["subject"], types=(MessageType(header["type"]),))
    assert opened.body.hex() == case["body"]
    for field, value in header.items():
        found = getattr(opened.header, field)
        assert (found.hex() if isinstance(found, bytes) else list(found) if field == "jobs" else found) == value


@pytest.mark.parametrize("case", named(FRAMES["valid"], "key_id", "body"))
def test_frames_by_the_letter_of_the_document(case: dict[str, Any]) -> None:
    """As somebody would who has the document and none of our code."""
    frame = bytes.fromhex(case["frame"])
    assert frame[:5] == b"TTHR\x01"
    end = 71 + int.from_bytes(frame[5:7], "big")
    signature, head, body = frame[7:71], frame[71:end], frame[end:]
    public = next(who["ed25519"] for who in KEYS["identities"] if who["key_id"] == head[:16].hex())
    nacl.bindings.crypto_sign_open(signature + FRAMES["domain"].encode() + head, bytes.fromhex(public))
    fields = [value.hex() if isinstance(value, bytes) else value for value in msgpack.unpackb(head[16:])]
    names = [
        "role",
        "type",
        "subject",
        "reply",
        "message_id",
        "jobs",
        "attempt",
        "tenant",
        "issued_at",
        "expires_at",
        "nonce",
        "content_type",
    ]
    names += ["body_length", "body_digest", "traceparent"]
    assert dict(zip(names, fields, strict=True)) == case["header"]
    assert body.hex() == case["body"]


@pytest.mark.parametrize("case", named(FRAMES["refused"], "what"))
def test_frames_that_are_refused(case: dict[str, Any]) -> None:
    receiver = verifier(case["now_ms"])
    found = code(
        lambda: receiver.verify_envelope(
            bytes.fromhex(case["frame"]), subject=case["subject"], types=(MessageType.INFER,)
        )
    )
    assert found == case["code"]


def test_every_reason_to_refuse_a_frame_has_a_vector() -> None:
    """But for a replay, which is no matter of one frame."""
    codes = {case["code"] for case in FRAMES["refused"]}
    assert codes >= {"unsigned", "bad_encoding", "unknown_key", "key_revoked", "key_expired", "bad_signature"}
    assert codes >= {"role_not_allowed", "subject_mismatch", "expired", "clock_skew"}


def test_bundles_and_outcomes() -> None:
    bundle, ends = BODIES["bundle"], BODIES["outcomes"]
    jobs = codec.decode_jobs(bytes.fromhex(bundle["body"]), bundle["ids"])
    assert [vectors.shown_job(job) for job in jobs] == bundle["jobs"]
    outcomes = codec.decode_outcomes(bytes.fromhex(ends["body"]))
    assert [vectors.shown_outcome(outcome) for outcome in outcomes] == ends["outcomes"]


@pytest.mark.parametrize("case", named(BODIES["refused"], "what"))
def test_bodies_that_are_refused(case: dict[str, Any]) -> None:
    assert code(lambda: codec.decode_jobs(bytes.fromhex(case["body"]), case["ids"])) == case["code"]


def test_a_data_key_comes_out_of_its_box_and_opens_payloads() -> None:
    entry = codec.decode(bytes.fromhex(SEALED["entry"]), TenantKeys)
    assert entry.keys[0].boxes[0].sealed.hex() == SEALED["box"]["sealed"]
    (owner,) = [who for who in vectors.IDENTITIES.values() if who.name == SEALED["box"]["for"]]
    key = KeyOpener(owner).open(entry.keys[0])
    assert key is not None
    assert key.id.hex() == SEALED["data_key_id"]
    assert key.digest(SEALED["digest"]["of"]) == SEALED["digest"]["stored"]
    (job,) = codec.decode_jobs(bytes.fromhex(SEALED["bundle"]["body"]), SEALED["bundle"]["ids"])
    assert job.inputs == ()
    assert [vectors.shown_job(open_job(key, job))] == SEALED["bundle"]["jobs"]
    ends = codec.decode_outcomes(bytes.fromhex(SEALED["outcomes"]["body"]))
    opened = [open_outcome(key, SEALED["tenant"], end) for end in ends]
    assert [vectors.shown_outcome(outcome) for outcome in opened] == SEALED["outcomes"]["outcomes"]


@pytest.mark.parametrize("case", named(SEALED["refused"], "what"))
def test_sealed_payloads_that_do_not_open(case: dict[str, Any]) -> None:
    (job,) = codec.decode_jobs(bytes.fromhex(SEALED["bundle"]["body"]), [case["id"]])
    moved = msgspec.structs.replace(job, tenant=case["tenant"])
    assert code(lambda: open_job(vectors.data_key(), moved)) == case["code"]


def test_sealed_payloads_by_the_letter_of_the_document() -> None:
    (row,) = msgpack.unpackb(bytes.fromhex(SEALED["bundle"]["body"]))
    tenant, key_id, sealed = row[0], row[4], row[5]
    bound = b"tether/sealed/v1\0" + msgpack.packb(["inputs", SEALED["bundle"]["ids"][0], tenant, key_id])
    secret = bytes.fromhex(SEALED["data_key"])
    plain = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(sealed[24:], bound, sealed[:24], secret)
    outputs, tensors = msgpack.unpackb(plain)
    (job,) = SEALED["bundle"]["jobs"]
    assert outputs == job["outputs"]
    assert [[name, kind, shape, data.hex()] for name, kind, shape, data in tensors] == [
        list(tensor.values()) for tensor in job["inputs"]
    ]


def test_encrypted_models_by_the_letter_of_the_document() -> None:
    secret, model = bytes.fromhex(ENCRYPTED["data_key"]), ENCRYPTED["model"]
    key_id = hashlib.sha256(b"tether/data-key/v1\0" + secret).digest()[:16]

    def keyed(content: str, person: bytes) -> str:
        return hashlib.blake2b(bytes.fromhex(content), digest_size=32, key=secret, person=person).hexdigest()

    def opened(domain: bytes, rest: bytes, sealed: bytes) -> bytes:
        decrypt = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_decrypt
        return decrypt(sealed[24:], domain + rest, sealed[:24], secret)

    for chunk in ENCRYPTED["pieces"]:
        assert hashlib.sha256(bytes.fromhex(chunk["plain"])).hexdigest() == chunk["digest"]
        assert keyed(chunk["digest"], b"tether-piece") == chunk["name"]
        rest = msgpack.packb([model, key_id, chunk["name"]])
        inner = opened(b"tether/model-piece/v1\0", rest, bytes.fromhex(chunk["stored"]))
        unpacked = inner[1:] if inner[:1] == b"\0" else zstandard.ZstdDecompressor().decompress(inner[1:])
        assert (inner[0], unpacked.hex()) == (chunk["form"], chunk["plain"])
    manifest = msgpack.unpackb(bytes.fromhex(ENCRYPTED["manifest"]))
    (file,), sealed = manifest["files"], manifest["sealed"]
    assert file["digest"] == keyed(ENCRYPTED["file_digest"], b"tether-file")
    rows = [[file["path"], file["size"], file["digest"], *file["chunks"], *file["sizes"]]]
    rest = hashlib.sha256(msgpack.packb([model, key_id, rows])).digest()
    plain = msgpack.unpackb(opened(b"tether/model-files/v1\0", rest, base64.b64decode(sealed["box"])))
    assert base64.b64decode(sealed["key_id"]) == key_id
    digests = b"".join(bytes.fromhex(chunk["digest"]) for chunk in ENCRYPTED["pieces"])
    assert plain == [[bytes.fromhex(ENCRYPTED["file_digest"]), digests]]
    manifest_now = codec.decode(bytes.fromhex(ENCRYPTED["manifest"]), Manifest)
    assert opened_manifest(vectors.data_key("model key"), manifest_now).files == (vectors_models.plain_file(),)


def test_session_tokens() -> None:
    session = open_session(verifier(), SESSIONS["token"])
    shown = {field: getattr(session, field) for field in SESSIONS["session"]}
    assert json.loads(json.dumps(shown)) == SESSIONS["session"]


@pytest.mark.parametrize("case", named(SESSIONS["refused"], "what"))
def test_session_tokens_that_are_refused(case: dict[str, Any]) -> None:
    assert code(lambda: open_session(verifier(), case["token"])) == case["code"]
