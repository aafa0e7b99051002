"""Builds a version's manifest from a push: fetch, verify, inspect, decide on batching."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from tether.bus.bus import Bus
from tether.bus.key_value.keyrings import ModelKeyring
from tether.crypto.model_encryption import ChunkSeal, open_files
from tether.domain.manifest import AUTOMATIC, DECLARED, PROVEN, Batching, Isolation, Manifest, ModelFile, PushRequest
from tether.domain.model_names import check_platform_name
from tether.domain.tensor import fault_of_name
from tether.errors import BadEncoding, CorruptChunk, InvalidRequest, ModelRejected
from tether.modelstore.inspection.formats import ONNX, PYTHON, check_files, format_of
from tether.modelstore.inspection.inspector import Inspection, InspectionLimits, inspect
from tether.process.data_dir import Home
from tether.process.tmpfs_folder import MemoryFolder
from tether.sandbox import plan
from tether.settings import Settings
from tether.storage.chunk_lifecycle import ChunkLifecycle
from tether.storage.encrypted_chunk_store import SealedChunkStore
from tether.storage.model_files import Chunks, check_file, download

MAX_BATCH = 65536
MAX_DELAY_MS = 10_000.0
MAX_RUN_S = 86_400.0


def check_request(request: PushRequest, *, max_bytes: int) -> None:
    """Check a push before any of its bytes is fetched.

    Raises:
        InvalidRequest: naming the field and its allowed values.
        PayloadTooLarge: the file is over a limit.
    """
    check_platform_name(request.name, field="name")
    for file in request.files:
        try:
            check_file(file, whole=request.sealed is not None)
        except BadEncoding as error:
            raise InvalidRequest(error.message, field="files") from error
    check_files(request.platform, request.files, trusted=request.trusted, max_bytes=max_bytes)
    if not AUTOMATIC <= request.max_batch_size <= MAX_BATCH:
        raise InvalidRequest(f"max_batch_size must be -1 (automatic) to {MAX_BATCH}", field="max_batch_size")
    if request.isolation not in ("", *Isolation):
        raise InvalidRequest("isolation must be 'thread' or 'process'", field="isolation")
    if request.isolation == Isolation.THREAD and request.platform != ONNX:
        raise InvalidRequest("only ONNX runs in a thread of the worker; leave isolation out", field="isolation")
    if not 0 <= request.run_timeout_s <= MAX_RUN_S:
        raise InvalidRequest(f"run_timeout_s must be 0 (the worker's setting) to {MAX_RUN_S:g}", field="run_timeout_s")
    if request.signature and not format_of(request.platform).signatures:
        raise InvalidRequest(
            f"a model for '{request.platform[:64]}' has one signature only; leave signature out", field="signature"
        )
    if not 0 <= request.max_delay_ms <= MAX_DELAY_MS:
        raise InvalidRequest(f"max_delay_ms must be 0 to {MAX_DELAY_MS:g}", field="max_delay_ms")


class Source(NamedTuple):
    """Chunk source of a push, and the folder for its files. ``files`` have their plain digests."""

    files: tuple[ModelFile, ...]
    chunks: Chunks
    scratch: Path


async def sealed_source(request: PushRequest, bus: Bus, keyring: ModelKeyring, memory: MemoryFolder) -> Source:
    """Return the source of an encrypted push, decrypted into memory.

    Raises:
        NoDecryptionKey: this model store lacks its key.
        DecryptionFailed: its digests do not match its chunks.
        TmpfsUnavailable: there is no folder in memory for it.
    """
    if request.sealed is None:
        raise InvalidRequest("the push is not encrypted", field="sealed")
    key = await keyring.find(request.name, request.sealed.key_id)
    files = await asyncio.to_thread(open_files, key, request.name, request.files, request.sealed)
    scratch = await asyncio.to_thread(memory.path)
    await asyncio.to_thread(memory.room, sum(file.size for file in files))
    bucket = bus.names.chunk_bucket(request.name)
    return Source(files, SealedChunkStore(bus, bucket, ChunkSeal(key, request.name)), scratch)


def confined(platform: str, settings: Settings) -> plan.ConfinementRequest:
    """Return the confinement of the inspecting process. A program gets the same folder for temporary files as
    in workers.

    Raises:
        ModelRejected: the model is a program, and this machine's kernel cannot confine it.
    """
    plan.check(settings.model_confinement, platform)
    scratch_mb = 0 if platform in plan.WITHOUT_CODE else settings.model_scratch_mb
    return plan.ConfinementRequest(
        mode=plan.mode_for(settings.model_confinement, platform),
        apart=str(Home.at(settings.home).root),
        read=plan.read_dirs(settings.model_read_dirs),
        scratch_mb=scratch_mb,
        file_mb=scratch_mb,
    )


async def examine(
    store: ChunkLifecycle, request: PushRequest, source: Source, wish: plan.ConfinementRequest, *, fresh_s: float
) -> tuple[tuple[ModelFile, ...], Inspection]:
    """Claim the chunks for ``fresh_s`` seconds, fetch the files into a private folder, verify and inspect
    them, delete the folder.
    The files of ``source`` come back with their own digests, whether the push had them or not.

    Raises:
        CorruptChunk: the stored chunks do not match the files; damaged ones are marked, so the next push
    repairs them.
        ModelRejected: it cannot be served.
        Unavailable: no room on the disk, or no broker.
    """
    await store.claim((chunk for file in request.files for chunk in file.sized_chunks()), fresh_s=fresh_s)
    with tempfile.TemporaryDirectory(prefix="push-", dir=source.scratch, ignore_cleanup_errors=True) as folder:
        files = []
        for file in source.files:
            try:
                digest = await download(source.chunks, file, Path(folder) / file.path)
                files.append(msgspec.structs.replace(file, digest=digest))
            except CorruptChunk as error:
                if error.field is not None:
                    await store.discard(error.field)
                raise
        size = sum(file.size for file in request.files)
        known = format_of(request.platform)
        limits = InspectionLimits.for_size(size, known.memory_mb)
        wanted = (known.platform, request.signature)
        return tuple(files), _checked(await inspect(Path(folder), known.inspector, limits, wanted, wish))


def _checked(found: Inspection) -> Inspection:
    """Return the inspection if requests can name its inputs and outputs, and its axis names are valid.

    Raises:
        ModelRejected: naming the first invalid one.
    """
    for side, specs in (("input", found.inputs), ("output", found.outputs)):
        names = [spec.name for spec in specs]
        for spec in specs:
            if fault := fault_of_name(spec.name):
                raise ModelRejected(
                    f"the name of {side} {spec.name[:64]!a} {fault}, so requests cannot name it; rename it in the "
                    "model",
                    field="file",
                )
            if names.count(spec.name) > 1:
                raise ModelRejected(f"two {side}s are named '{spec.name[:64]}'; rename one in the model", field="file")
            if spec.axes and len(spec.axes) != len(spec.shape):
                raise ModelRejected(
                    f"{side} '{spec.name[:64]}' has {len(spec.shape)} axes and {len(spec.axes)} names of "
                    "axes; name each one, "
                    "empty where it has no name",
                    field="file",
                )
    return found


_DECLARABLE = "if no row's answer depends on another row, declare it with --max-batch-size N at the push"


def batching(request: PushRequest, found: Inspection) -> Batching:
    """Decide how jobs are batched: proven from the graph, declared by the push or the model's description, or
    not at all.

    ``max_batch_size`` of 2 or more at the push is a declaration, for which the publisher is responsible.

    Raises:
        ModelRejected: the push declares rows of a model that has none.
    """
    wanted, delay = request.max_batch_size, request.max_delay_ms
    proven = found.max_batch_size if request.platform == ONNX else 0
    if wanted == 0:
        return Batching(0, delay, reason="the push set max_batch_size 0")
    if proven:
        return Batching(proven if wanted == AUTOMATIC else wanted, delay, PROVEN, found.note)
    if wanted > 1:
        _check_rows(wanted, found)
        if found.refuted:
            raise ModelRejected(
                f"max_batch_size is {wanted}, but {found.note}; push it with max_batch_size 0", field="max_batch_size"
            )
        return Batching(wanted, delay, DECLARED, found.note)
    if request.platform == PYTHON and found.max_batch_size:
        return Batching(found.max_batch_size if wanted == AUTOMATIC else wanted, delay, DECLARED)
    return Batching(0, delay, reason=_why_not(found))


def _check_rows(wanted: int, found: Inspection) -> None:
    for side, specs in (("input", found.inputs), ("output", found.outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != -1:
                raise ModelRejected(
                    f"max_batch_size is {wanted}, but {side} '{spec.name[:64]}' has the shape "
                    f"{list(spec.shape)}, whose first "
                    "axis is no batch axis; push it with max_batch_size 0",
                    field="max_batch_size",
                )
    if not found.inputs:
        raise ModelRejected(
            "max_batch_size is for models with inputs; push it with max_batch_size 0", field="max_batch_size"
        )


def _why_not(found: Inspection) -> str:
    if found.refuted:
        return found.note
    if any(not spec.shape or spec.shape[0] != -1 for spec in (*found.inputs, *found.outputs)):
        return found.note or "not every input and output has an open first axis for the rows"
    return f"{found.note or 'only ONNX graphs are proven to be safe to batch'}; {_DECLARABLE}"


def manifest_builder(
    request: PushRequest, found: Inspection, *, created_at: float, publisher: str, partition: int = 0, owner: str = ""
) -> Callable[[int], Manifest]:
    """Return a function that builds the manifest for any version number."""
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
            isolation=request.isolation or (Isolation.PROCESS.value if found.crashed else ""),
            run_timeout_s=request.run_timeout_s,
            sealed=request.sealed,
            partition=partition,
            owner=owner,
            untried=found.untried,
            signature=found.signature,
            signatures=found.signatures,
        )

    return build
