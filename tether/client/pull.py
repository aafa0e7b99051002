"""Downloads a version's files as a flow, chunk by chunk, verifying each digest."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import msgspec

from tether.client.operations import Json, ProgressCounter, model_path
from tether.client.protocol import Concurrently, Flow, Progress, Request, RetryPolicy, exchange, exchange_json
from tether.domain.file_names import fault_of
from tether.errors import Conflict, CorruptChunk, InvalidRequest

WIDTH = 4
GROUP = 16
"""Chunks of a file that are downloaded before any is written, ``WIDTH`` of them at a time."""


class _File(msgspec.Struct, frozen=True):
    path: str
    size: int
    digest: str
    chunks: tuple[str, ...]


class _Files(msgspec.Struct, frozen=True):
    version: int
    platform: str
    files: tuple[_File, ...]


def pull(policy: RetryPolicy, name: str, version: str, folder: Path, progress: Progress | None) -> Flow[Json]:
    """Write the files of a version below ``folder``; ``progress`` counts bytes. Identical existing files are
    kept.

    Raises:
        Conflict: a file of that name exists with other content.
        CorruptChunk: the content does not match the version's digests.
        InvalidRequest: the folder cannot be written, or the server names a path outside of it.
    """
    path = f"{model_path(name)}/versions/{quote(version, safe='')}"
    version_files = yield from exchange_json(policy, Request("GET", f"{path}/files"), _Files)
    done, counted = 0, ProgressCounter(progress)
    for file in version_files.files:
        if fault_of(file.path):
            raise InvalidRequest(f"the server names an invalid file path {file.path[:64]!r}", field="path")
        target = folder / file.path
        if _is_there(target, file):
            counted.add(file.size)
        else:
            yield from _fetch(policy, f"{path}/chunks", file, target, counted)
        done += file.size
    files = [file.path for file in version_files.files]
    return {
        "model": name,
        "version": version_files.version,
        "platform": version_files.platform,
        "files": files,
        "size": done,
    }


def _is_there(target: Path, file: _File) -> bool:
    if not target.exists():
        return False
    with target.open("rb") as content:
        if hashlib.file_digest(content, "sha256").hexdigest() == file.digest:
            return True
    raise Conflict(f"{target} exists with other content; choose another folder", field="path")


def _fetch(policy: RetryPolicy, path: str, file: _File, target: Path, counted: ProgressCounter) -> Flow[None]:
    def chunk(digest: str) -> Flow[bytes]:
        return (yield from exchange(policy, Request("GET", f"{path}/{digest}"))).body

    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    whole = hashlib.sha256()
    try:
        with _created(temporary) as out:
            for start in range(0, len(file.chunks), GROUP):
                group = file.chunks[start : start + GROUP]
                for content in (yield Concurrently(map(chunk, group), WIDTH, lambda chunk: counted.add(len(chunk)))):
                    whole.update(content)
                    out.write(content)
        if whole.hexdigest() != file.digest:
            raise CorruptChunk(f"'{file.path}' does not match the version's digest; try again", field=file.path)
        temporary.replace(target)
    except OSError as error:
        raise InvalidRequest(f"cannot write {target}: {error.strerror}", field="path") from error
    finally:
        temporary.unlink(missing_ok=True)


def _created(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("xb")
