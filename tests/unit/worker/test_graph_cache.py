"""Optimised graphs on a worker's disk: used when they are what they should be, and never otherwise."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support.models import models

from tether.domain.manifest import Batching, Manifest, ModelFile, TensorSpec
from tether.domain.tensor import Array
from tether.errors import ModelRejected
from tether.worker.runtimes import graph_cache
from tether.worker.runtimes.onnx import load, providers
from tether.worker.runtimes.process_runtime import Options

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def version(folder: Path, constant: float = 1.0) -> Manifest:
    content = models.add(constant)
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    file = ModelFile("model.onnx", len(content), digest, (digest,), (len(content),))
    outputs = (TensorSpec("y", "FP32", (-1, 4)),)
    return Manifest("m", 1, "onnxruntime_onnx", (file,), (), outputs, Batching(8), 0.0, "test")


def options(folder: Path, megabytes: int = 1) -> Options:
    return Options(graph_cache=str(folder / "graphs"), graph_cache_mb=megabytes)


def answer(manifest: Manifest, folder: Path, options: Options) -> Array:
    runtime = load(manifest, folder / "m", options)
    (found,) = runtime.run({"x": X}, ())
    runtime.close()
    return found


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "graphs").iterdir())


def test_the_second_load_takes_what_the_first_one_made(tmp_path: Path) -> None:
    manifest = version(tmp_path / "m")
    first = answer(manifest, tmp_path, options(tmp_path))
    (entry,) = entries(tmp_path)
    assert entry.stat().st_mode & 0o777 == 0o600
    (tmp_path / "m" / "model.onnx").unlink()  # so that an answer can only come from the entry
    np.testing.assert_array_equal(answer(manifest, tmp_path, options(tmp_path)), first)
    with pytest.raises(ModelRejected):
        answer(manifest, tmp_path, Options())


def test_nothing_is_kept_unless_it_is_asked_for(tmp_path: Path) -> None:
    np.testing.assert_array_equal(answer(version(tmp_path / "m"), tmp_path, Options()), X + 1)
    np.testing.assert_array_equal(answer(version(tmp_path / "m"), tmp_path, options(tmp_path, 0)), X + 1)
    assert not (tmp_path / "graphs").exists() or entries(tmp_path) == []


def test_a_version_whose_files_lie_elsewhere_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    manifest = version(tmp_path / "memory" / "m")
    np.testing.assert_array_equal(answer(manifest, tmp_path / "memory", options(tmp_path)), X + 1)
    assert not (tmp_path / "graphs").exists()


def cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-1])


def alter(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)


def empty(entry: Path) -> None:
    entry.write_bytes(b"")


def link(entry: Path) -> None:
    entry.symlink_to(entry.rename(entry.parent.parent / "elsewhere"))


def folder(entry: Path) -> None:
    entry.unlink()
    (entry / "full").mkdir(parents=True)


def pipe(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry)


def open_to_others(entry: Path) -> None:
    entry.chmod(0o666)


def another(entry: Path) -> None:
    """The entry of a version that adds something else, under this one's name."""
    place = entry.parent.parent / "other"
    place.mkdir()
    answer(version(place / "m", 5.0), place, options(place))
    entries(place)[0].rename(entry)


def no_graph(entry: Path) -> None:
    """With the right digest, which somebody can make who can write here: ONNX Runtime refuses it."""
    content = b"no graph at all"
    entry.write_bytes(content + graph_cache._end(entry.stem, content))


@pytest.mark.parametrize("harm", [cut, alter, empty, link, folder, pipe, open_to_others, another, no_graph])
def test_an_entry_that_is_not_right_is_deleted_and_made_anew(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    manifest = version(tmp_path / "m")
    answer(manifest, tmp_path, options(tmp_path))
    (entry,) = entries(tmp_path)
    good = entry.read_bytes()
    harm(entry)
    np.testing.assert_array_equal(answer(manifest, tmp_path, options(tmp_path)), X + 1)
    assert entries(tmp_path) == [entry]
    assert entry.is_file()
    assert not entry.is_symlink()
    assert entry.read_bytes() == good


def test_a_key_is_that_of_files_release_and_processor(tmp_path: Path) -> None:
    keys = {graph_cache.key_of(*what) for what in (("a", "1"), ("b", "1"), ("a", "2"), ("a", "1", "cpu"), ("a1", ""))}
    assert len(keys) == 5
    for number, constant in enumerate((1.0, 2.0)):
        manifest = version(tmp_path / "m", constant)
        np.testing.assert_array_equal(answer(manifest, tmp_path, options(tmp_path)), X + constant)
        assert len(entries(tmp_path)) == number + 1


def test_a_disk_that_takes_nothing_costs_the_cache_and_not_the_load(tmp_path: Path) -> None:
    (tmp_path / "graphs").write_text("a file where the folder should be")
    np.testing.assert_array_equal(answer(version(tmp_path / "m"), tmp_path, options(tmp_path)), X + 1)


def test_what_was_not_used_for_the_longest_time_makes_room(tmp_path: Path) -> None:
    cache = graph_cache.GraphCache(tmp_path / "graphs", 1100)
    for number, key in enumerate(("a", "b", "c")):
        draft = cache.draft(300)
        assert draft is not None
        draft.write_bytes(key.encode() * 300)
        cache.keep(key, draft)
        os.utime(tmp_path / "graphs" / f"{key}.graph", (number, number))
    assert cache.read("a") == b"a" * 300  # so that b is the one
    draft = cache.draft(300)
    assert draft is not None
    draft.write_bytes(b"d" * 300)
    cache.keep("d", draft)
    assert [path.stem for path in entries(tmp_path)] == ["a", "c", "d"]


def test_drafts_that_killed_processes_left_are_deleted(tmp_path: Path) -> None:
    cache = graph_cache.GraphCache(tmp_path / "graphs", 1 << 20)
    left, fresh, mine = cache.draft(1), cache.draft(1), cache.draft(1)
    assert left is not None
    assert fresh is not None
    assert mine is not None
    os.utime(left, (0, 0))
    folder = tmp_path / "graphs" / f"compile-x{graph_cache.DRAFT}"
    (folder / "inside").mkdir(parents=True)
    os.utime(folder, (0, 0))
    cache.keep("k", mine)
    assert entries(tmp_path) == sorted([fresh, tmp_path / "graphs" / "k.graph"])


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it has CUDA")
def test_cuda_is_taken_where_it_is_there_and_missed_where_it_is_asked_for(tmp_path: Path) -> None:
    assert providers("auto") == providers("cpu") == ["CPUExecutionProvider"]
    with pytest.raises(
        ModelRejected, match=r"'cuda' is not available: this ONNX Runtime has no CUDAExecutionProvider; install"
    ):
        load(version(tmp_path / "m"), tmp_path / "m", Options(device="cuda"))


def test_a_session_has_the_threads_that_it_is_told(tmp_path: Path) -> None:
    manifest = version(tmp_path / "m")
    started = []
    for threads in (1, 4):
        before = len(list(Path("/proc/self/task").iterdir()))
        runtime = load(manifest, tmp_path / "m", Options(threads=threads))
        started.append(len(list(Path("/proc/self/task").iterdir())) - before)
        runtime.close()
    assert started == [0, 3]
