"""The part of the test vectors that is about encrypted models; :mod:`vectors` writes it."""

from __future__ import annotations

import hashlib
from typing import Any

from tether.crypto.model_encryption import ChunkSeal, seal_files
from tether.crypto.payload_encryption import DataKey
from tether.domain.manifest import Batching, Manifest, ModelFile
from tether.wire import codec

MODEL = "digits"
CHUNKS = (b"the first piece", b"a second one that compresses " * 40)
FORMS = (0, 1)
"""Stored as it is, and as a Zstandard frame."""


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def plain_file() -> ModelFile:
    whole = b"".join(CHUNKS)
    return ModelFile("model.onnx", len(whole), digest(whole), tuple(map(digest, CHUNKS)), tuple(map(len, CHUNKS)))


def encrypted(key: DataKey, secret: bytes) -> dict[str, Any]:
    """Chunks and a manifest of an encrypted model whose data key is ``secret``."""
    seal = ChunkSeal(key, MODEL)
    chunks = [
        {
            "form": form,
            "plain": chunk.hex(),
            "digest": digest(chunk),
            "name": name,
            "stored": seal.encrypt(name, chunk).hex(),
        }
        for form, chunk in zip(FORMS, CHUNKS, strict=True)
        for name in [seal.name(digest(chunk))]
    ]
    hidden, sealed = seal_files(key, MODEL, (plain_file(),))
    manifest = Manifest(
        MODEL, 1, "onnxruntime_onnx", hidden, (), (), Batching(), 1_800_000_000.0, "key:x", sealed=sealed
    )
    return {
        "data_key": secret.hex(),
        "model": MODEL,
        "pieces": chunks,
        "file_digest": plain_file().digest,
        "manifest": codec.encode(manifest).hex(),
    }
