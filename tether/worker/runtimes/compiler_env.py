"""Environment of a model's process that compiles: a PATH with a compiler, and a temporary folder.

Other model processes have no PATH. Its limits apply to the compilers too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tether.errors import ModelRejected
from tether.worker.runtimes.graph_cache import DRAFT

PATH = "/usr/local/bin:/usr/bin:/bin"
COMPILERS = ("g++", "clang++")
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable with the path of the folder."""


@contextmanager
def made(directory: Path, cache: str, *, sealed: bool) -> Iterator[dict[str, str]]:
    """Yield the environment variables; delete the folder when the block ends.

    The folder lies in ``cache`` if given, or beside the model's files if these are in memory only.

    Raises:
        ModelRejected: there is no compiler, or no folder for its output.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name, path=PATH))), None)
    if compiler is None:
        raise _refused(f"needs a C++ compiler, and this worker has no {' or '.join(COMPILERS)} in {PATH}")
    folder = _folder(directory if sealed else Path(cache) if cache else None)
    try:
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise _refused(
                "needs to execute programs beside the model's files, and that folder is mounted with 'noexec'"
            )
        yield _environment(compiler, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder(where: Path | None) -> str:
    try:
        if where is not None:
            where.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.mkdtemp(DRAFT, "compile-", where)
    except OSError as error:
        raise _refused(f"needs a writable folder ({error.strerror})") from error


def _environment(compiler: str, folder: str) -> dict[str, str]:
    return {
        "PATH": PATH,
        "CXX": compiler,
        FOLDER: folder,
        "TMPDIR": folder,
        # no worker processes, each with its own PyTorch
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # 150 MB in a shared folder, rebuilt at each load
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }


def _refused(what: str) -> ModelRejected:
    return ModelRejected(f"'compile' {what}; set compile to false, or fix that", field="compile")
