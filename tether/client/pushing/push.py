"""Pushes models as a flow: list missing chunks, upload them, register the version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import msgspec

from tether.client.operations import Json, ProgressCounter, model_path, post
from tether.client.protocol import (
    Concurrently,
    Flow,
    OperationDeadline,
    Progress,
    Request,
    RetryPolicy,
    Waiting,
    exchange,
    exchange_json,
    unwatched,
)
from tether.client.pushing.local_model import LocalModel, read_chunk
from tether.client.pushing.sample import Sample, sample_of

PUSH_TIMEOUT_S = 600.0

WIDTH = 4
"""Chunks uploaded at a time."""

LOOKUP = 4096
"""Chunks in one ``chunks:missing`` request."""


class PushOptions(TypedDict, total=False):
    """Options of a push; omitted ones, and None, are decided by the platform."""

    max_batch_size: int | None
    """Maximum rows of one run. 2 or more declares rows independent of one another; 0: not batched."""
    max_delay_ms: float | None
    """Maximum time to wait for more requests to fill a batch."""
    isolation: str | None
    """'thread' of the worker, or 'process' of its own."""
    run_timeout_s: float | None
    """A run that takes longer ends the model's process."""
    config: Json | None
    """As for ``configure``."""
    version: int | None
    """Expected number; the push fails if another one is next."""
    labels: Mapping[str, str] | None
    note: str | None
    """Both as for ``annotate``."""
    encrypt: bool | None
    """Only the platform's services can decrypt the stored files; None: as the model's earlier versions."""
    sample: Sample | None
    """Real inputs by name, or an .npz or JSON file, for trial runs, warm-up and the row check. Stored with
    the version."""
    signature: str | None
    """The served signature of a SavedModel or TensorFlow Lite file."""


def checked(options: PushOptions) -> dict[str, Any]:
    """Return the options as the platform takes them. Reads the sample's file.

    Raises:
        TypeError: an option is unknown.
        InvalidRequest: the sample cannot be read.
    """
    unknown = options.keys() - PushOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"push() has no argument {min(unknown)!r}")
    return {**options, "sample": sample_of(options.get("sample"))}


class _Missing(msgspec.Struct):
    """A gateway's reply; older ones do not report ``encrypt``."""

    missing: list[str]
    encrypt: bool | None = None


def push(
    policy: RetryPolicy,
    name: str,
    model: LocalModel,
    params: Mapping[str, Any],
    progress: Progress | None,
    *,
    waiting: Waiting | None = None,
) -> Flow[Json]:
    """Upload missing chunks, then register a version; ``progress`` counts stored chunks as done.

    All requests share one deadline, ``policy.timeout`` seconds from now: a gateway, broker or model store
    that restarts is retried, and ``waiting`` is called with the reason.
    """
    patience = OperationDeadline(policy.monotonic() + policy.timeout, waiting or unwatched)
    policy = replace(policy, patience=patience)
    platform, files, skipped = model
    chunks = {digest: (file.source, offset, size) for file in files for digest, offset, size in file.chunks}
    missing, encrypt = yield from _missing(policy, name, list(chunks), params.get("encrypt"))
    how = {} if encrypt is None else {"encrypt": str(encrypt).lower()}
    whole = sum(size for _, _, size in chunks.values())
    left = sum(chunks[digest][2] for digest in missing)
    counted = ProgressCounter(progress, whole - left)

    def stored(digest: str) -> Flow[int]:
        chunk = read_chunk(*chunks[digest])
        headers = {"content-type": "application/octet-stream"}
        path = f"{model_path(name)}/chunks/{digest}"
        yield from exchange(policy, Request("PUT", path, chunk, headers=headers, params=how))
        return len(chunk)

    yield Concurrently(map(stored, missing), WIDTH, counted.add)
    given = {key: value for key, value in {**params, "encrypt": encrypt}.items() if value is not None}
    body = {"files": [file.described() for file in files], "platform": platform, **given}
    patience.waiting("the model store is inspecting the model")
    told = yield from exchange_json(policy, post(f"{model_path(name)}/versions:register", body), dict[str, Any])
    return {**told, "stored_bytes": left} | ({"skipped": list(skipped)} if skipped else {})


def _missing(
    policy: RetryPolicy, name: str, digests: Sequence[str], encrypt: bool | None
) -> Flow[tuple[list[str], bool | None]]:
    """Return the missing chunks, and whether the version will be encrypted."""
    missing: list[str] = []
    for start in range(0, len(digests), LOOKUP):
        body: Json = {"chunks": digests[start : start + LOOKUP]}
        if encrypt is not None:
            body["encrypt"] = encrypt
        told = yield from exchange_json(policy, post(f"{model_path(name)}/chunks:missing", body), _Missing)
        missing += told.missing
        encrypt = told.encrypt
    return missing, encrypt
