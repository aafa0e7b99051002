"""Fetches a version's files to a local disk and verifies them, then again at every use."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import BinaryIO, Protocol

from tether.bus.bus import Bus
from tether.crypto import MessageType, Role, Verifier
from tether.domain.chunking import LARGEST, digest_of
from tether.domain.file_names import fault_of, shown
from tether.domain.manifest import FIXED_CHUNK, Manifest, ModelFile
from tether.domain.model_names import check_platform_name
from tether.errors import BadEncoding, CorruptChunk, RoleNotAllowed, SubjectMismatch, TetherError, Unavailable
from tether.process.os_process import alive
from tether.wire import codec
from tether.wire.subjects import Names

log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")


def open_manifest(verifier: Verifier, names: Names, key: str, frame: bytes) -> Manifest:
    """Verify an entry of the ``models`` bucket and return its manifest.

    Raises:
        EnvelopeError: not signed by a model store, moved from another key, or not a well-formed manifest.
    """
    subject = names.bucket_key("models", key)
    envelope = verifier.verify_envelope(frame, subject=subject, types=(MessageType.MANIFEST,), stored=True)
    if envelope.header.role is not Role.MODELSTORE:
        raise RoleNotAllowed(f"'{envelope.sender}' is not a model store and may not sign manifests")
    manifest = codec.decode(envelope.body, Manifest)
    if names.version_key(manifest.name, manifest.version) != key:
        raise SubjectMismatch("the manifest is for another version than its key")
    if not manifest.files:
        raise BadEncoding("the manifest names no file", field="files")
    for file in manifest.files:
        check_file(file)
    if len({file.path for file in manifest.files}) != len(manifest.files):
        raise BadEncoding("the manifest names a file twice", field="files")
    return manifest


def check_file(file: ModelFile, *, whole: bool = True) -> None:
    """Check a file's description: a plain name, valid digests, as many chunks as its size needs. Unless
    ``whole`` it may lack the digest of the file itself.

    Raises:
        BadEncoding: naming the invalid field.
    """
    if fault := fault_of(file.path):
        raise BadEncoding(f"the file {shown(file.path)} cannot be stored: {fault}", field="path")
    known = (file.digest,) if whole or file.digest else ()
    if not all(_DIGEST.fullmatch(digest) for digest in (*known, *file.chunks)):
        raise BadEncoding(f"the digests of the file {shown(file.path)} must be hex SHA-256", field="chunks")
    if not _adds_up(file):
        raise BadEncoding(f"the chunks of the file {shown(file.path)} do not add up to its size", field="size")


def _adds_up(file: ModelFile) -> bool:
    if file.size <= 0:
        return file.size == 0 and not file.chunks and not file.sizes
    if not file.sizes:
        return len(file.chunks) == -(-file.size // FIXED_CHUNK)
    fits = all(0 < size <= LARGEST for size in file.sizes)
    return fits and len(file.sizes) == len(file.chunks) and sum(file.sizes) == file.size


def version_digest(manifest: Manifest) -> str:
    """Return one digest over all files of a version: two versions with the same files share it."""
    rows = sorted((file.path, file.size, file.digest) for file in manifest.files)
    return hashlib.sha256(codec.pack(rows)).hexdigest()


class Chunks(Protocol):
    """Source of chunks."""

    def get(self, digests: Sequence[str]) -> AsyncGenerator[bytes, None]: ...


Salvage = Callable[[ModelFile, Path], object]
"""Receives a damaged file before it is deleted; runs in a thread."""


async def fetch_model(
    bus: Bus, store: Chunks, manifest: Manifest, cache_dir: Path, salvage: Salvage | None = None
) -> Path:
    """Return the directory below ``cache_dir`` that has the version's files, complete and just verified.

    Cached files are hashed again; damaged or missing ones are fetched. Safe to run concurrently for the same
    version: files appear atomically.

    Raises:
        CorruptChunk: the store's chunks are missing, altered, or do not make up the signed file.
        Unavailable: the disk has no room, or the broker does not answer.
    """
    check_platform_name(manifest.name, field="name")
    directory = cache_dir / version_digest(manifest)
    await asyncio.to_thread(_prepare, directory)
    for file in manifest.files:
        if not await asyncio.to_thread(intact, directory / file.path, file):
            began = bus.clock.monotonic()
            await download(store, file, directory / file.path, salvage)
            seconds = bus.clock.monotonic() - began
            log.info(
                "fetched %d bytes in %.2f s",
                file.size,
                seconds,
                extra={"action": "model_fetched", "model": manifest.name, "version": manifest.version},
            )
    return directory


def _prepare(directory: Path) -> None:
    """Create the folder, and remove unfinished files of killed processes."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    clear_leftovers(directory)


def clear_leftovers(directory: Path) -> None:
    """Remove unfinished files of killed processes."""
    for path in directory.rglob(".*"):
        owner = path.name.split(".")[-2]
        if not owner.isdecimal() or not alive(int(owner)):
            path.unlink(missing_ok=True)


def intact(path: Path, file: ModelFile) -> bool:
    """Return whether ``path`` is a plain file with exactly the signed bytes. Blocks: it reads all of them."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as content:  # noqa: PTH123 - an open descriptor has no path
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
                return False
            return hashlib.file_digest(content, "sha256").hexdigest() == file.digest
    except OSError:
        return False


async def download(store: Chunks, file: ModelFile, target: Path, salvage: Salvage | None = None) -> str:
    """Write one file: into a temporary one, renamed once every chunk and the whole are verified. Return its
    SHA-256, which is not compared if ``file`` has none.

    Raises:
        CorruptChunk: a chunk, or the file as a whole, differs from the signed one.
        Unavailable: the disk has no room, or the broker does not answer.
    """
    check_file(file, whole=False)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(8)}")
    try:
        try:
            digest = await _write(store, file, temporary)
        except TetherError:
            if salvage is not None:
                await asyncio.to_thread(salvage, file, temporary)
            raise
        await asyncio.to_thread(temporary.replace, target)
    except OSError as error:
        raise Unavailable(
            f"the model file cannot be written: {error.strerror}; free some disk", retry_after=30
        ) from error
    finally:
        await asyncio.to_thread(temporary.unlink, missing_ok=True)
    return digest


async def _write(store: Chunks, file: ModelFile, target: Path) -> str:
    """Receive chunks while earlier ones are verified in one thread, hashed as a whole in another and written
    in a third.
    """
    whole, digests, came = hashlib.sha256(), iter(file.chunks), 0
    out = await asyncio.to_thread(_create, target)

    async def add(group: list[bytes]) -> None:
        ended = await asyncio.gather(
            asyncio.to_thread(_prove, list(zip(group, digests, strict=False))),
            asyncio.to_thread(_add, whole, group),
            asyncio.to_thread(out.writelines, group),
            return_exceptions=True,
        )
        for error in filter(None, ended):
            raise error

    writing: asyncio.Task[None] | None = None
    with out:
        try:
            async with aclosing(store.get(file.chunks)) as chunks:
                async for group in _groups(chunks):
                    if writing is not None:
                        await writing
                    writing = asyncio.create_task(add(group), name="write-chunks")
                    came += sum(map(len, group))
                    if came > file.size:
                        break  # a chunk that decompresses to more than its size is not the signed one
        finally:
            if writing is not None:
                await asyncio.wait({writing})
        if writing is not None:
            writing.result()
        size = out.tell()
    digest = whole.hexdigest()
    if size != file.size or digest != (file.digest or digest):
        raise CorruptChunk("the stored chunks do not make up the file that was signed; push the model again")
    return digest


def _prove(chunks: Sequence[tuple[bytes, str]]) -> None:
    for chunk, digest in chunks:
        if digest_of(chunk) != digest:
            raise CorruptChunk(f"chunk {digest} is altered in the store; push the model again", field=digest)


def _add(whole: hashlib._Hash, group: Sequence[bytes]) -> None:
    for chunk in group:
        whole.update(chunk)


async def _groups(chunks: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    async for chunk in chunks:
        group.append(chunk)
        size += len(chunk)
        if size >= LARGEST:
            yield group
            group, size = [], 0
    if group:
        yield group


def _create(path: Path) -> BinaryIO:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
