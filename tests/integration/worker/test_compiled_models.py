"""Models that ``torch.compile`` compiles while they load: answers, what is kept, and what happens where it cannot be done."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.brokers.brokers import wait_until
from support.models import frameworks

from tether.domain.manifest import Batching, Manifest, ModelFile, TensorSpec
from tether.domain.tensor import Array
from tether.errors import ModelRejected
from tether.process.os_process import alive
from tether.sandbox import plan
from tether.worker import runtimes
from tether.worker.runtimes import compiler_env
from tether.worker.runtimes.process_runtime import Options, ProcessRuntime

LABEL, PROBABILITIES = "label", "probabilities"
COUNTING = """#!/bin/sh
echo "$*" >> "{log}"
exec {real} "$@"
"""
BROKEN = """#!/bin/sh
case "$*" in *--version*|*-v) exec {real} "$@";; esac
echo "x.cpp:1:1: fatal error: no luck today" >&2
exit 1
"""
HANGING = """#!/bin/sh
case "$*" in *--version*|*-v) exec {real} "$@";; esac
echo $$ > "{log}"
exec sleep 600
"""


@pytest.fixture(scope="module")
def torch_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frameworks.need("torch")
    if shutil.which("g++", path=compiler_env.PATH) is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs g++")
    return frameworks.make(tmp_path_factory.mktemp("torch"), "torch")


def compiler(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have models find this g++, which may leave word in the file that is returned."""
    (folder / "bin").mkdir()
    (folder / "log").mkdir()
    log, real = folder / "log" / "calls", shutil.which("g++", path=compiler_env.PATH)
    (folder / "bin" / "g++").write_text(code.format(log=log, real=real))
    (folder / "bin" / "g++").chmod(0o755)
    monkeypatch.setattr(compiler_env, "PATH", f"{folder / 'bin'}:{compiler_env.PATH}")
    wish = ProcessRuntime._confinement_request

    def with_log(runtime: ProcessRuntime, more: Mapping[str, str]) -> plan.ConfinementRequest:
        found = wish(runtime, more)
        return msgspec.structs.replace(found, write=(*found.write, str(log.parent)))

    monkeypatch.setattr(ProcessRuntime, "_confinement_request", with_log)
    return log


def version(folder: Path, source: Path) -> tuple[Manifest, Path]:
    directory = folder / "version"
    directory.mkdir()
    shutil.copy(source, directory / "model.pt2")
    file = ModelFile("model.pt2", source.stat().st_size, "0" * 64, ("0" * 64,), (1,))
    inputs = (TensorSpec("image", "FP32", (-1, 64)),)
    outputs = (TensorSpec(LABEL, "INT64", (-1,)), TensorSpec(PROBABILITIES, "FP32", (-1, 10)))
    return Manifest("m", 1, "pytorch_export", (file,), inputs, outputs, Batching(512), 0.0, "test"), directory


@contextmanager
def loaded(manifest: Manifest, directory: Path, options: Options) -> Iterator[ProcessRuntime]:
    made = runtimes.load(manifest, directory, options)
    assert isinstance(made, ProcessRuntime)
    try:
        yield made
    finally:
        made.close()


def answers(runtime: ProcessRuntime) -> Mapping[int, list[Array]]:
    return {rows: runtime.run({"image": frameworks.images()[:rows]}, ()) for rows in (1, 2, 7, 449)}


@pytest.mark.alone  # compilers of two tests beside each other take longer than a load may
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_compiled_model_answers_as_it_does_uncompiled_and_is_compiled_while_it_loads_only(
    torch_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, directory = version(tmp_path, torch_models / "digits.pt2")
    graphs = tmp_path / "graphs"
    options = Options(graph_cache=str(graphs), graph_cache_mb=64, memory_mb=16384, compile=True)
    log = compiler(tmp_path, COUNTING, monkeypatch)
    with loaded(manifest, directory, Options()) as plain:
        expected = answers(plain)
    with loaded(manifest, directory, options) as first:
        calls = log.read_text().splitlines()
        assert sum("-shared" in call for call in calls) >= 2  # for several rows and for one
        found = [answers(first)]
        assert log.read_text().splitlines() == calls
    (entry,) = graphs.glob("processes/*/*")
    kept = entry.read_bytes()
    log.write_text("")
    with loaded(manifest, directory, options) as second:
        found.append(answers(second))
    assert "-shared" not in log.read_text()
    assert [path.read_bytes() for path in graphs.glob("processes/*/*")] == [kept]
    for one in found:
        for rows, (label, probabilities) in one.items():
            np.testing.assert_array_equal(label, expected[rows][0])
            np.testing.assert_allclose(probabilities, expected[rows][1], rtol=0, atol=1e-6)


def test_without_a_compiler_a_load_says_so(tmp_path: Path, torch_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, directory = version(tmp_path, torch_models / "digits.pt2")
    monkeypatch.setattr(compiler_env, "PATH", str(tmp_path))
    with pytest.raises(
        ModelRejected, match=r"'compile' needs a C\+\+ compiler, and this worker has no g\+\+ or clang"
    ) as caught:
        runtimes.load(manifest, directory, Options(compile=True))
    assert caught.value.field == "compile"


def test_what_the_compiler_complains_of_is_told_and_nothing_is_kept(
    tmp_path: Path, torch_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, directory = version(tmp_path, torch_models / "digits.pt2")
    compiler(tmp_path, BROKEN, monkeypatch)
    options = Options(graph_cache=str(tmp_path / "graphs"), graph_cache_mb=64, compile=True)
    with pytest.raises(ModelRejected, match=r"cannot compile the model: \w+: .*no luck today") as caught:
        runtimes.load(manifest, directory, options)
    assert "/" not in caught.value.message
    assert list((tmp_path / "graphs").glob("processes/*/*")) == []


async def test_a_compiler_is_ended_with_the_load_that_nobody_wants_any_more(
    tmp_path: Path, torch_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, directory = version(tmp_path, torch_models / "digits.pt2")
    log, closed = compiler(tmp_path, HANGING, monkeypatch), threading.Event()
    options = Options(graph_cache=str(tmp_path / "graphs"), graph_cache_mb=64, compile=True)
    loading = asyncio.create_task(asyncio.to_thread(runtimes.load, manifest, directory, options, closed))
    try:
        await wait_until(lambda: log.exists() and log.read_text().endswith("\n"), "the compiler runs", 90)
    finally:
        closed.set()
        with pytest.raises(ModelRejected, match="the model is being unloaded"):
            await loading
    pid = int(log.read_text())
    await wait_until(lambda: not alive(pid), "the compiler is ended")
    assert list((tmp_path / "graphs").glob("processes/*/*")) == []


def test_the_compiler_gets_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETHER_NATS_URL", "nats://secret")
    with compiler_env.made(tmp_path, str(tmp_path / "graphs"), sealed=False) as environment:
        folder = Path(environment[compiler_env.FOLDER])
        assert set(environment) == {
            "PATH",
            "CXX",
            "TMPDIR",
            compiler_env.FOLDER,
            "TORCHINDUCTOR_COMPILE_THREADS",
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS",
        }
        assert folder.parent == tmp_path / "graphs"
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()
    with compiler_env.made(tmp_path, str(tmp_path / "graphs"), sealed=True) as environment:
        assert Path(environment[compiler_env.FOLDER]).parent == tmp_path
