"""From a pushed file to the manifest of a version: fetch, verify, look at it, decide how it is batched."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from tether.bus.keeping import PieceKeeper
from tether.bus.model_files import check_file, download
from tether.errors import BadEncoding, CorruptChunk, InvalidRequest, ModelRejected
from tether.model import AUTOMATIC, Batching, Isolation, Manifest, PushRequest, check_name
from tether.modelstore.formats import ONNX, check_files, format_of
from tether.modelstore.inspection import Inspection, Limits, inspect

MAX_BATCH = 65536
MAX_DELAY_MS = 10_000.0
MAX_RUN_S = 86_400.0


def check_request(request: PushRequest, *, max_bytes: int) -> None:
    """Prove that a push can be acted on, before any of its bytes is fetched.

    Raises:
        InvalidRequest: naming the field and what it may be.
        PayloadTooLarge: the file is over a limit.
    """
    check_name(request.name, field="name")
    for file in request.files:
        try:
            check_file(file)
        except BadEncoding as error:
            raise InvalidRequest(error.message, field="files") from error
    check_files(request.platform, request.files, trusted=request.trusted, max_bytes=max_bytes)
    if not AUTOMATIC <= request.max_batch_size <= MAX_BATCH:
        raise InvalidRequest(f"max_batch_size must be -1 (automatic) to {MAX_BATCH}", field="max_batch_size")
    if request.isolation not in ("", *Isolation):
        raise InvalidRequest("isolation must be 'thread' or 'process'", field="isolation")
    if request.isolation == Isolation.THREAD and request.platform != ONNX:
        raise InvalidRequest("only ONNX runs in the worker's own process; leave isolation out", field="isolation")
    if not 0 <= request.run_timeout_s <= MAX_RUN_S:
        raise InvalidRequest(f"run_timeout_s must be 0 (the worker's setting) to {MAX_RUN_S:g}", field="run_timeout_s")
    if not 0 <= request.max_delay_ms <= MAX_DELAY_MS:
        raise InvalidRequest(f"max_delay_ms must be 0 to {MAX_DELAY_MS:g}", field="max_delay_ms")


async def examine(store: PieceKeeper, request: PushRequest, scratch: Path, *, fresh_s: float) -> Inspection:
    """Make sure of the pieces for ``fresh_s`` seconds, fetch the files into a private folder below ``scratch``, verify and look at them; the folder is gone afterwards.

    Raises:
        CorruptChunk: the stored pieces are not the files; damaged ones are marked, so that the next push mends them.
        ModelRejected: it cannot be served.
        Unavailable: no room on the disk, or no broker.
    """
    await store.claim((piece for file in request.files for piece in file.pieces()), fresh_s=fresh_s)
    with tempfile.TemporaryDirectory(prefix="push-", dir=scratch, ignore_cleanup_errors=True) as folder:
        for file in request.files:
            try:
                await download(store, file, Path(folder) / file.path)
            except CorruptChunk as error:
                if error.field is not None:
                    await store.discard(error.field)
                raise
        size = sum(file.size for file in request.files)
        known = format_of(request.platform)
        limits = Limits.for_size(size, known.memory_mb)
        return await inspect(Path(folder), known.inspector, limits, known.platform)


def batching(request: PushRequest, found: Inspection) -> Batching:
    """How jobs of the version are joined: as the push says, within what the model can.

    Raises:
        ModelRejected: the push wants batches of a model that has none.
    """
    wanted = found.max_batch_size if request.max_batch_size == AUTOMATIC else request.max_batch_size
    if found.max_batch_size or found.unproven:
        return Batching(wanted, request.max_delay_ms)
    if wanted > 1:
        raise ModelRejected(
            f"max_batch_size is {wanted}, but the model cannot be batched: {found.note}; push it with max_batch_size 0",
            field="max_batch_size",
        )
    return Batching(0, request.max_delay_ms)


def manifest_builder(
    request: PushRequest, found: Inspection, *, created_at: float, publisher: str
) -> Callable[[int], Manifest]:
    """What makes the manifest of any version number."""
    joined = batching(request, found)

    def build(version: int) -> Manifest:
        return Manifest(
            name=request.name,
            version=version,
            platform=request.platform,
            files=request.files,
            inputs=found.inputs,
            outputs=found.outputs,
            batching=joined,
            created_at=created_at,
            publisher=publisher,
            tenant=request.tenant,
            isolation=request.isolation,
            run_timeout_s=request.run_timeout_s,
        )

    return build
