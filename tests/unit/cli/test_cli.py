"""The command line before it reaches a platform: arguments, inputs, exit statuses, and how little it loads."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tether
from tether.client import blocking
from tether.client.inputs import UNNAMED, named
from tether.domain.tensor import from_numpy
from tether.errors import ConfigError, InvalidRequest, Unavailable
from tether.wire import oip
from tether_cli import inputs, main, output
from tether_cli.commands.jobs import print_outputs
from tether_cli.main import application

TETHER = (sys.executable, "-m", "tether_cli")
NOBODY = "http://127.0.0.1:1"


def run(*words: str, stdin: bytes = b"", timeout: float = 60.0) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*TETHER, *words], input=stdin, capture_output=True, timeout=timeout, check=False)


def invoke(*words: str) -> Any:
    return CliRunner().invoke(application(), list(words))


# what the system refuses


@pytest.mark.parametrize("below", ["", "/deeper/home"])
@pytest.mark.parametrize("words", [("up",), ("up", "--detach"), ("init",), ("doctor",), ("status",), ("key", "list")])
def test_a_file_where_the_data_directory_should_be_is_told_in_one_line(
    words: tuple[str, ...], below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file"
    place.write_text("")
    monkeypatch.setenv("TETHER_HOME", f"{place}{below}")
    monkeypatch.setenv("TETHER_URL", NOBODY)
    done = run(*words)
    assert b"Traceback" not in done.stderr
    if words[0] in ("up", "init"):
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"error: {place} is not a folder; choose another with --data-dir or TETHER_HOME (config_invalid)".encode()
        ]


@pytest.mark.parametrize(
    "words", [("config", "show"), ("config", "schema"), ("--help",), ("up", "--help"), ("--version",)]
)
def test_standard_output_that_is_full_closed_or_left_ends_without_a_traceback(words: tuple[str, ...]) -> None:
    command = [*TETHER, *words]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, b"error: cannot write the output: No space left on device\n")
    closed = subprocess.run(["/bin/sh", "-c", '"$@" >&-', "-", *command], capture_output=True, timeout=60, check=False)
    assert closed.stderr == b""
    reading, writing = os.pipe()
    os.close(reading)
    left = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert left.returncode == 1
    assert b"Traceback" not in left.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "TimeoutError"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
        (OSError(28, "No space left on device"), "cannot write the output: No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied; use another user or another path"),
    ],
)
def test_a_fault_of_the_system_is_told_as_what_it_is(error: OSError, words: str) -> None:
    assert main._os_error_text(error).startswith(words)


def test_a_data_directory_whose_name_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETHER_HOME", os.fsdecode(b"/tmp/\xff"))
    done = run("up")
    assert done.returncode == 1
    assert b"is not valid UTF-8" in done.stderr


# starting


def test_help_takes_under_three_tenths_of_a_second_of_processor() -> None:
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom tether_cli.main import application\n"
        "application()(['submit', '--help'], standalone_mode=False)\n"
        "heavy = {'numpy', 'httpx', 'nats', 'rich.progress', 'msgspec', 'nacl', 'onnxruntime', 'granian'}\n"
        "print('loaded', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == b"loaded []"


def test_importing_the_package_loads_no_client() -> None:
    program = "import sys, tether\nprint(sorted({'numpy', 'httpx', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert done.stdout.strip() == b"[]"


def test_everything_the_package_exports_is_there() -> None:
    for name in tether.__all__:
        assert getattr(tether, name)
    assert tether.Client is blocking.Client
    assert tether.AsyncClient is blocking.AsyncClient
    with pytest.raises(AttributeError, match="Clinet"):
        tether.Clinet  # noqa: B018 - the access is the test


def test_the_version_is_one_line() -> None:
    assert invoke("--version").output == "tether 0.1.0\n"


COMMANDS = (
    "submit",
    "infer",
    *(f"job {name}" for name in ("list", "get", "wait", "cancel")),
    *(
        f"model {name}"
        for name in (
            *("push", "pull", "list", "show", "promote", "rollback", "delete"),
            *("shadows", "store", "gc", "scrub"),
        )
    ),
    *(f"key {name}" for name in ("create", "list", "revoke", "rotate")),
    "session create",
    *(f"tenant {name}" for name in ("create", "list", "show", "set", "delete")),
    *(f"config {name}" for name in ("show", "check", "schema")),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(command: str) -> None:
    told = invoke(*command.split(), "--help")
    assert told.exit_code == 0
    assert "--json" in told.output


# exit statuses


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("submit",),
        ("infer", "m", "x.npy", "--nonsense"),
        ("key", "create", "--tenant", "t"),
        ("job", "list", "--limit", "0"),
        ("config", "show", "nonsense"),
        ("submit", "m", "x.npy", "--rows", "--idempotency-key", "k"),
    ],
)
def test_wrong_usage_is_status_two(words: tuple[str, ...]) -> None:
    assert invoke(*words).exit_code == 2


def test_a_failure_is_one_line_with_its_code_and_status_one(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones(1, dtype=np.float32))
    for words in (
        ("infer", "m", str(tmp_path / "absent.npy"), "--url", NOBODY),
        ("infer", "m", str(tmp_path / "x.npy"), "--url", NOBODY, "--timeout", "0.3"),
        ("model", "push", "m", str(tmp_path / "absent.onnx"), "--url", NOBODY),
        ("model", "list", "--url", "nonsense"),
    ):
        done = run(*words)
        assert done.returncode == 1
        assert done.stdout == b""
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("error: ")
        assert line.endswith(")")


def test_an_interrupted_command_ends_with_130(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones(1, dtype=np.float32))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        words = [*TETHER, "infer", "m", str(tmp_path / "x.npz"), "--url", url]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            connection, _ = server.accept()
            with connection:
                assert connection.recv(1)
                process.send_signal(signal.SIGINT)
                _, words_for_a_person = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in words_for_a_person


# settings


def test_config_prints_and_checks_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETHER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("TETHER_WORKERS", "5")
    assert json.loads(invoke("config", "show", "worker", "--json").output)["workers"] == 5
    assert "workers" in invoke("config", "show").output
    assert json.loads(invoke("config", "check", "--json").output)["ok"]
    assert json.loads(invoke("config", "schema").output) == json.loads(invoke("config", "schema", "--json").output)
    (tmp_path / "worker.json").write_text('{"wrokers": 1}')
    wrong = invoke("config", "check")
    assert isinstance(wrong.exception, ConfigError)
    assert "'workers'" in wrong.exception.message


# inputs

ARRAY = np.arange(6, dtype=np.float32).reshape(3, 2)


def saved(tmp_path: Path, data: Any) -> str:
    path = tmp_path / "input"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return str(path)


def npy(array: Any, **more: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **more)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_the_form_is_told_by_the_content(tmp_path: Path) -> None:
    np.testing.assert_array_equal(inputs.read(saved(tmp_path, npy(ARRAY)))[UNNAMED], ARRAY)
    found = inputs.read(saved(tmp_path, npz(a=ARRAY, b=ARRAY * 2)))
    assert sorted(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"], ARRAY * 2)
    assert inputs.read(saved(tmp_path, {"x": [[1, 2]]})) == {"x": [[1, 2]]}
    assert inputs.read(saved(tmp_path, [[1, 2]])) == {UNNAMED: [[1, 2]]}
    body = {"inputs": [oip.tensor_to_json(from_numpy("x", ARRAY))]}
    np.testing.assert_array_equal(inputs.read(saved(tmp_path, body))["x"], ARRAY)


def test_json_may_be_given_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert inputs.read('{"x": [[1, 2]]}') == {"x": [[1, 2]]}
    assert inputs.read("[[1, 2]]") == {UNNAMED: [[1, 2]]}
    with pytest.raises(InvalidRequest, match="is not JSON"):
        inputs.read("[[1, 2]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[1]").write_text("[2]")
    assert inputs.read("[1]") == {UNNAMED: [2]}, "the file of that name comes first"


def test_a_terminal_is_shown_the_first_numbers_of_a_large_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = {"label": np.array([3]), "boxes": np.full((1, 2000), 0.1, np.float32)}
    print_outputs(outputs, json_output=False)
    assert capsys.readouterr().out.count("0.1") == 2000, "another program gets all of them"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_outputs(outputs, json_output=False)
    out, err = capsys.readouterr()
    few = ", ".join(["0.1"] * 8)
    assert out == f"label  [3]\nboxes  shape [1, 2000]: [{few}, ...]\n"
    assert "--output FILE.npz" in err


def test_an_input_may_be_called_inputs(tmp_path: Path) -> None:
    assert inputs.read(saved(tmp_path, {"inputs": [1, 2]})) == {"inputs": [1, 2]}


@pytest.mark.parametrize("body", [{}, {"inputs": []}])
def test_a_model_without_inputs_is_given_none(tmp_path: Path, body: dict[str, Any]) -> None:
    assert inputs.read(saved(tmp_path, body)) == {}


@pytest.mark.parametrize(
    "data",
    [b"", b"text", b"7", b"\x93NUMPY", b"PK\x03\x04", npy(np.array([{}]), allow_pickle=True), b"[" * 100_000],
)
def test_what_is_no_input_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        inputs.read(saved(tmp_path, data))


def test_objects_in_an_archive_are_never_unpickled(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"astype\('U'\)"):
        inputs.read(saved(tmp_path, npz(a=np.array([{}], dtype=object))))


def test_an_unnamed_input_is_the_models_only_one() -> None:
    assert named({UNNAMED: 1}, ["image"]) == {"image": 1}
    assert named({"x": 1}, []) == {"x": 1}
    for names, words in ((["a", "b"], "the inputs 'a', 'b'"), ([], "has no inputs")):
        with pytest.raises(InvalidRequest, match=words):
            named({UNNAMED: 1}, names)


def test_rows_keep_the_first_axis() -> None:
    found = list(inputs.rows({"x": ARRAY, "y": np.arange(3)}))
    assert [row["x"].shape for row in found] == [(1, 2)] * 3
    np.testing.assert_array_equal(np.concatenate([row["x"] for row in found]), ARRAY)
    assert [row["y"].tolist() for row in found] == [[0], [1], [2]]
    assert list(inputs.rows({"x": np.zeros((0, 2))})) == []


@pytest.mark.parametrize("given", [{"x": np.float32(1)}, {"x": np.ones(2), "y": np.ones(3)}])
def test_rows_need_one_first_axis(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="--rows"):
        inputs.rows({name: np.asarray(value) for name, value in given.items()})


# output


def test_tables_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(("A", "BB"), [("long", 1), (None, ["x", "y"])])
    output.print_fields({"a": 1, "long": ""})
    told = capsys.readouterr()
    assert told.out == "A     BB\nlong  1\n-     x, y\na     1\nlong  -\n"
    assert told.err == ""


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("working", 3) as done:
        done(3)
    assert capsys.readouterr() == ("", "")


def test_nobody_listening_is_unavailable() -> None:
    told = invoke("job", "list", "--url", NOBODY)
    assert isinstance(told.exception, Unavailable)
