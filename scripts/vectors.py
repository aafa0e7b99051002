"""Test vectors of the wire format, for implementations in other languages: ``tests/vectors/*.json``.

Keys, nonces and times are fixed, so every run writes the same files; a test proves that the code of today reads and
writes them. ``python scripts/vectors.py`` writes them anew after the format was changed on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nacl.bindings
import nacl.public
import nacl.signing
import numpy as np
from vectors_models import encrypted

from tether import crypto
from tether.crypto import Identity, MessageType, Role, Signer, key_id
from tether.crypto.payload_encryption import Box, DataKey, TenantKeys, WrappedKey, seal_job, seal_outcome
from tether.crypto.session_token import Session, issue_session
from tether.domain.job import Failure, Job, JobId, JobState, Outcome
from tether.domain.tensor import Tensor, from_numpy, pack_bytes
from tether.wire import codec

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "vectors"
NOW = 1_800_000_000_000
"""UTC milliseconds of every vector; receivers are asked at this time."""

YEAR = 365 * 86_400_000
LANE = "tether.infer.0.local.shared.digits.1"
JOBS = ("0" * 31 + "1", "0" * 31 + "2")


def fixed(label: str, size: int = 32) -> bytes:
    """Bytes that only a test vector would use: the start of SHA-256 of the label."""
    return hashlib.sha256(b"tether test vector " + label.encode()).digest()[:size]


def nonces(label: str, size: int) -> Callable[[], bytes]:
    """The first, second, ... nonce of one signer or key."""
    numbers = itertools.count(1)
    return lambda: fixed(f"{label} nonce {next(numbers)}", size)


IDENTITIES = {
    role: Identity(name, role, fixed(f"{name} ed25519"), fixed(f"{name} x25519"))
    for role, name in zip(Role, ("gateway", "dispatcher", "worker-1", "modelstore", "admin"), strict=True)
}
STRANGER = Identity("stranger", Role.GATEWAY, fixed("stranger ed25519"), fixed("stranger x25519"))
ROOT = fixed("root")


def keyset() -> crypto.Keyset:
    """Every identity, in force for a year."""
    records = tuple(identity.record(not_before=NOW - 1000, expires_at=NOW + YEAR) for identity in IDENTITIES.values())
    gone = crypto.Revocation(STRANGER.kid, STRANGER.name, NOW - 1)
    return crypto.Keyset(7, NOW - 1000, NOW + YEAR, records, (gone,))


def signer(role: Role, label: str, now: int = NOW) -> Signer:
    return Signer(IDENTITIES[role], lambda: now, nonces(label, 16))


# tensors, jobs, outcomes


def tensors() -> tuple[Tensor, ...]:
    """One of every datatype."""
    whole = [-1, 0, 1, 100]
    found = [
        from_numpy(kind, np.array(whole, dtype=dtype))
        for kind, dtype in (("INT8", "i1"), ("INT16", "<i2"), ("INT32", "<i4"), ("INT64", "<i8"))
    ]
    found += [
        from_numpy(kind, np.array(whole[1:], dtype=dtype))
        for kind, dtype in (("UINT8", "u1"), ("UINT16", "<u2"), ("UINT32", "<u4"), ("UINT64", "<u8"))
    ]
    found += [
        from_numpy(kind, np.array([[-1.5, 0.0], [0.25, 3e4]], dtype=dtype))
        for kind, dtype in (("FP16", "<f2"), ("FP32", "<f4"), ("FP64", "<f8"))
    ]
    found.append(Tensor("BF16", "BF16", (2,), bytes.fromhex("c03f00c0")))
    found.append(from_numpy("BOOL", np.array([True, False])))
    found.append(Tensor("BYTES", "BYTES", (3,), pack_bytes([b"", b"ab", "ä".encode()])))
    found.append(Tensor("empty", "FP32", (0, 4), b""))
    found.append(Tensor("scalar", "INT32", (), (7).to_bytes(4, "little")))
    return tuple(found)


def jobs() -> list[Job]:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    one = Job(
        JobId(JOBS[0]), "acme", (from_numpy("x", np.array([[1, 2]], "<f4")),), NOW / 1000 + 5, ("y",), "req", trace
    )
    return [one, Job(JobId(JOBS[1]), "lab", tensors(), NOW / 1000 + 6.5)]


def outcomes() -> list[Outcome]:
    at = NOW / 1000
    ends = [Outcome(JobId(JOBS[0]), JobState.SUCCEEDED, tensors()[:2], None, 1, "worker-1", at, at + 0.125)]
    failure = Failure("inference_failed", "the model raised")
    return [*ends, Outcome(JobId(JOBS[1]), JobState.FAILED, (), failure, 2, "worker-1", 0.0, at + 1)]


def shown_tensor(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": tensor.data.hex()}


def shown_job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "tenant": job.tenant,
        "deadline": job.deadline,
        "outputs": list(job.outputs),
        "request_id": job.request_id,
        "traceparent": job.traceparent,
        "inputs": [shown_tensor(tensor) for tensor in job.inputs],
    }


def shown_outcome(outcome: Outcome) -> dict[str, Any]:
    error = outcome.error
    return {
        "job": outcome.job,
        "state": outcome.state.value,
        "outputs": [shown_tensor(tensor) for tensor in outcome.outputs],
        "error": None if error is None else {"code": error.code, "message": error.message},
        "attempts": outcome.attempts,
        "worker": outcome.worker,
        "started_at": outcome.started_at,
        "finished_at": outcome.finished_at,
    }


def bodies() -> dict[str, Any]:
    return {
        "bundle": {
            "ids": list(JOBS),
            "jobs": [shown_job(job) for job in jobs()],
            "body": codec.encode_jobs(jobs()).hex(),
        },
        "outcomes": {
            "outcomes": [shown_outcome(outcome) for outcome in outcomes()],
            "body": codec.encode_outcomes(outcomes()).hex(),
        },
        "refused": [
            {"what": what, "body": body.hex(), "ids": list(JOBS), "code": "bad_encoding"} for what, body in _no_bodies()
        ],
    }


def _no_bodies() -> list[tuple[str, bytes]]:
    good = codec.encode_jobs(jobs())
    return [
        ("empty", b""),
        ("a byte is missing", good[:-1]),
        ("a byte too many", good + b"\0"),
        ("one job for two ids", codec.encode_jobs(jobs()[:1])),
        ("an extension type", b"\xc7\x00\x05"),
        ("a deadline that is a whole number", codec.pack([("acme", 5, "", "", (), ()), ("acme", 5, "", "", (), ())])),
    ]


# keys and keyset


def keys() -> dict[str, Any]:
    whole = crypto.sign_keyset(ROOT, keyset())
    shown = [
        {
            "name": identity.name,
            "role": identity.role.value,
            "ed25519_seed": identity.seed.hex(),
            "ed25519": bytes(nacl.signing.SigningKey(identity.seed).verify_key).hex(),
            "x25519_seed": identity.box_seed.hex(),
            "x25519": bytes(nacl.public.PrivateKey(identity.box_seed).public_key).hex(),
            "key_id": identity.kid.hex(),
        }
        for identity in (*IDENTITIES.values(), STRANGER)
    ]
    other = crypto.sign_keyset(fixed("another root"), keyset())
    return {
        "identities": shown,
        "root_seed": ROOT.hex(),
        "root_public": crypto.root_public_key(ROOT).hex(),
        "keyset": {"domain": crypto.KEYSET_DOMAIN.decode(), "bytes": whole.hex(), "version": 7, "now_ms": NOW},
        "refused": [
            {"what": "another root's signature", "bytes": other.hex(), "now_ms": NOW, "newer_than": 0},
            {
                "what": "a changed byte",
                "bytes": (whole[:-1] + bytes([whole[-1] ^ 1])).hex(),
                "now_ms": NOW,
                "newer_than": 0,
            },
            {"what": "older than one that was seen", "bytes": whole.hex(), "now_ms": NOW, "newer_than": 8},
            {"what": "expired", "bytes": whole.hex(), "now_ms": NOW + YEAR, "newer_than": 0},
            {
                "what": "not yet valid",
                "bytes": whole.hex(),
                "now_ms": NOW - 1001 - crypto.MAX_SKEW_MS,
                "newer_than": 0,
            },
        ],
    }


# frames


FIELDS: dict[str, Any] = {
    "reply": "tether.reply.g1",
    "message_id": "m1",
    "jobs": JOBS,
    "attempt": 3,
    "tenant": "acme",
    "expires_at": NOW + 5000,
    "traceparent": jobs()[0].traceparent,
}


def frames() -> dict[str, Any]:
    valid = [_valid(role, kind) for kind in MessageType for role in Role if kind in crypto.ROLE_TYPES[role]]
    return {
        "domain": crypto.DOMAIN.decode(),
        "now_ms": NOW,
        "valid": valid,
        "refused": [
            {"what": what, "frame": frame.hex(), "subject": subject, "now_ms": now, "code": code}
            for what, frame, subject, now, code in _refused_frames()
        ],
    }


def _valid(role: Role, kind: MessageType) -> dict[str, Any]:
    body = f"body of {kind}".encode()
    frame = signer(role, f"{role} {kind}").sign_envelope(kind, LANE, body, **FIELDS)
    nonce = fixed(f"{role} {kind} nonce 1", 16)
    fields = {
        **FIELDS,
        "jobs": list(JOBS),
        "issued_at": NOW,
        "nonce": nonce.hex(),
        "content_type": "application/msgpack",
    }
    header = {"role": role.value, "type": kind.value, "subject": LANE, **fields, "body_length": len(body)}
    digest = hashlib.sha256(body).hexdigest()
    key = key_id(bytes(nacl.signing.SigningKey(IDENTITIES[role].seed).verify_key)).hex()
    return {"key_id": key, "header": {**header, "body_digest": digest}, "body": body.hex(), "frame": frame.hex()}


def _refused_frames() -> list[tuple[str, bytes, str, int, str]]:
    """What, frame, the subject it arrived on, the receiver's time, and the code it is refused with; type is ``infer``."""
    gateway = Role.GATEWAY

    def seal(
        what: str, kind: MessageType = MessageType.INFER, role: Role = gateway, at: int = NOW, **more: Any
    ) -> bytes:
        return signer(role, what, at).sign_envelope(kind, LANE, b"body", **more)

    good = seal("good")
    head = 71 + int.from_bytes(good[5:7], "big")
    unknown = Signer(Identity("ghost", gateway, fixed("ghost"), fixed("ghost box")), lambda: NOW, nonces("ghost", 16))
    revoked = Signer(STRANGER, lambda: NOW, nonces("revoked", 16))
    return [
        ("no envelope", b"{}", LANE, NOW, "unsigned"),
        ("another version", good[:4] + b"\x02" + good[5:], LANE, NOW, "bad_encoding"),
        ("header length past the end", good[:5] + b"\xff\xff" + good[7:], LANE, NOW, "bad_encoding"),
        (
            "a key that is not in the keyset",
            unknown.sign_envelope(MessageType.INFER, LANE, b"body"),
            LANE,
            NOW,
            "unknown_key",
        ),
        ("a revoked key", revoked.sign_envelope(MessageType.INFER, LANE, b"body"), LANE, NOW, "key_revoked"),
        ("an expired key", good, LANE, NOW + YEAR, "key_expired"),
        ("a bit of the signature", good[:7] + bytes([good[7] ^ 1]) + good[8:], LANE, NOW, "bad_signature"),
        (
            "a bit of the header",
            good[: head - 1] + bytes([good[head - 1] ^ 1]) + good[head:],
            LANE,
            NOW,
            "bad_signature",
        ),
        ("a bit of the body", good[:-1] + bytes([good[-1] ^ 1]), LANE, NOW, "bad_signature"),
        ("a shorter body", good[:-1], LANE, NOW, "bad_signature"),
        ("a longer body", good + b"x", LANE, NOW, "bad_signature"),
        ("a type of another role", seal("role", role=Role.WORKER), LANE, NOW, "role_not_allowed"),
        ("a type that is not handled here", seal("type", kind=MessageType.JOB), LANE, NOW, "role_not_allowed"),
        ("another subject", good, LANE + "2", NOW, "subject_mismatch"),
        ("past its expiry", seal("expired", expires_at=NOW + 1), LANE, NOW + 1, "expired"),
        ("from the future", seal("future", at=NOW + crypto.MAX_SKEW_MS + 1), LANE, NOW, "clock_skew"),
    ]


# sealed payloads


def data_key(label: str = "data key") -> DataKey:
    return DataKey(fixed(label), 1, nonces(label, 24))


def sealed() -> dict[str, Any]:
    key = data_key()
    job = seal_job(key, jobs()[0])
    end = seal_outcome(key, "acme", outcomes()[0])
    failed = seal_outcome(key, "acme", outcomes()[1])
    worker = IDENTITIES[Role.WORKER]
    box = sealed_box(key, worker)
    entry = TenantKeys("acme", 7, (WrappedKey(key.id, 1, NOW, (Box(worker.kid, box),)),))
    return {
        "data_key": fixed("data key").hex(),
        "data_key_id": key.id.hex(),
        "tenant": "acme",
        "box": {"for": worker.name, "sealed": box.hex()},
        "entry": codec.encode(entry).hex(),
        "digest": {"of": "00" * 32, "stored": key.digest("00" * 32)},
        "bundle": {"ids": [JOBS[0]], "jobs": [shown_job(jobs()[0])], "body": codec.encode_jobs([job]).hex()},
        "outcomes": {
            "outcomes": [shown_outcome(outcome) for outcome in outcomes()],
            "body": codec.encode_outcomes([end, failed]).hex(),
        },
        "refused": [
            {"what": "under another job's id", "id": JOBS[1], "tenant": "acme", "code": "decryption_failed"},
            {"what": "as another tenant's", "id": JOBS[0], "tenant": "lab", "code": "decryption_failed"},
        ],
    }


def sealed_box(key: DataKey, to: Identity) -> bytes:
    """What :meth:`DataKey.wrapped` makes with a random key, with a fixed one: libsodium's crypto_box_seal."""
    own = nacl.public.PrivateKey(fixed("ephemeral"))
    public = bytes(own.public_key)
    other = nacl.public.PrivateKey(to.box_seed).public_key
    nonce = nacl.bindings.crypto_generichash_blake2b_salt_personal(public + bytes(other), digest_size=24)
    secret = fixed("data key")
    if DataKey(secret, 1).id != key.id:
        raise ValueError("the box holds the vectors' own data key")
    return public + bytes(nacl.public.Box(own, other).encrypt(secret, nonce).ciphertext)


# session tokens


def sessions() -> dict[str, Any]:
    session = Session("s1", "k1", "acme", ("infer", "jobs"), ("digits", "face-*"), NOW / 1000, NOW / 1000 + 900)
    token = issue_session(signer(Role.GATEWAY, "session"), session)
    forged = issue_session(signer(Role.WORKER, "session"), session)
    payload, signature = token[3:].split(".")
    raw = bytearray(base64.urlsafe_b64decode(signature + "=="))
    raw[0] ^= 1
    changed = base64.urlsafe_b64encode(bytes(raw)).rstrip(b"=").decode()
    return {
        "token": token,
        "issuer": "gateway",
        "session": {
            "id": "s1",
            "key": "k1",
            "tenant": "acme",
            "scopes": ["infer", "jobs"],
            "models": ["digits", "face-*"],
            "issued_at": NOW / 1000,
            "expires_at": NOW / 1000 + 900,
        },
        "refused": [
            {"what": "no token", "token": "tk_x", "code": "unsigned"},
            {"what": "a changed signature", "token": f"ts_{payload}.{changed}", "code": "bad_signature"},
            {"what": "issued by a worker", "token": forged, "code": "role_not_allowed"},
            {"what": "no base64url", "token": "ts_!.!", "code": "bad_encoding"},
        ],
    }


def files() -> dict[str, str]:
    """Name and text of every file."""
    made = {"keys": keys(), "frames": frames(), "bodies": bodies(), "sealed": sealed(), "sessions": sessions()}
    made["encrypted"] = encrypted(data_key("model key"), fixed("model key"))
    return {f"{name}.json": json.dumps(content, indent=1, ensure_ascii=False) + "\n" for name, content in made.items()}


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
