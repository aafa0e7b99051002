"""What a model's process gets in order to compile: a compiler that it finds, and a folder for as long as it loads.

Such a process has no PATH otherwise. It keeps its limits, and so do the compilers that it starts.
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
"""The variable that names the folder."""


@contextmanager
def made(directory: Path, cache: str, *, sealed: bool) -> Iterator[dict[str, str]]:
    """The variables for the process; the folder goes when the block ends. It lies in the folder ``cache`` where there is one,
    and beside the model's own files where those are in memory only.

    Raises:
        ModelRejected: there is no compiler, or nowhere to put what it makes.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name, path=PATH))), None)
    if compiler is None:
        raise _refused(f"needs a C++ compiler, and there is no {' or '.join(COMPILERS)} in {PATH} of this worker")
    folder = _folder(directory if sealed else Path(cache) if cache else None)
    try:
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            raise _refused("puts programs where the model's files are, and that is mounted with 'noexec'")
        yield _environment(compiler, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder(where: Path | None) -> str:
    try:
        if where is not None:
            where.mkdir(mode=0o700, parents=True, exist_ok=True)
        return tempfile.mkdtemp(DRAFT, "compile-", where)
    except OSError as error:
        raise _refused(f"needs a folder that can be written ({error.strerror})") from error


def _environment(compiler: str, folder: str) -> dict[str, str]:
    return {
        "PATH": PATH,
        "CXX": compiler,
        FOLDER: folder,
        "TMPDIR": folder,
        # no processes that wait for work, each with a PyTorch of its own
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # 150 MB in a folder of everybody's, made again at each load
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }


def _refused(what: str) -> ModelRejected:
    return ModelRejected(f"'compile' {what}; set compile to false, or mend that", field="compile")
