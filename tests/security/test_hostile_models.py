"""Files that are programs: refused by their form, before anything of them is loaded (S15 to S19)."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.http.served import Served
from support.models import models

from tether.errors import InspectionLimitExceeded, ModelRejected, UnsafeModel
from tether.modelstore.inspection.file_formats import onnx_parser
from tether.modelstore.inspection.inspector import InspectionLimits, inspect


def pickled(sentinel: Path) -> bytes:
    """What creates ``sentinel`` wherever somebody unpickles it."""
    return f"cposix\nsystem\n(S'touch {sentinel}'\ntR.".encode()


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return out.getvalue()


def escaping() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../../../tmp/escaped", b"x")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
        archive.writestr("bomb", b"\0" * (64 << 20), compress_type=zipfile.ZIP_DEFLATED)
    return out.getvalue()


def programs(sentinel: Path) -> dict[str, bytes]:
    """One file of every format that can carry code."""
    evil = pickled(sentinel)
    lambda_ = {"class_name": "Lambda", "config": {"function": base64.b64encode(evil).decode()}}
    header = str({"descr": "|O", "fortran_order": False, "shape": (1,)}).ljust(117).encode() + b"\n"
    npy = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + evil
    return {
        "pickle": evil,
        "binary pickle": b"\x80\x04\x95" + evil,
        "joblib": b"\x78\x9c" + evil,
        "npy of objects": npy,
        "npz of objects": zipped(a_dot_npy=npy),
        "torch checkpoint": zipped(archive__data_dot_pkl=evil, archive__version=b"3\n"),
        "torchscript": zipped(m__code____torch___dot_py=b"import os", m__data_dot_pkl=evil, m__constants_dot_pkl=evil),
        "keras lambda": zipped(config_dot_json=json.dumps(lambda_).encode(), metadata_dot_json=b"{}"),
        "keras h5": b"\x89HDF\r\n\x1a\n" + evil,
        "saved model": b"\x08\x01\x12\x20" + b"\x0a\x09WriteFile" + evil,
        "zip slip, link and bomb": escaping(),
        "gzip bomb": b"\x1f\x8b\x08" + b"\0" * 100,
        "shared library": b"\x7fELF\x02\x01\x01" + evil,
        "python": b"import os; os.system('true')",
    }


NAMES = list(programs(Path("x")))


def test_the_payload_would_work_where_it_is_unpickled(tmp_path: Path) -> None:
    """The control: without it, a sentinel that never appears would prove nothing."""
    sentinel = tmp_path / "sentinel"
    load = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    subprocess.run([sys.executable, "-c", load], input=pickled(sentinel), check=True)
    assert sentinel.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_format_that_carries_code_is_refused_as_a_model(target: Served, tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "sentinel"
    with target.client() as http:
        answer = http.post("/v1/models/program/versions", content=programs(sentinel)[name])
        assert (answer.status_code, answer.json()["code"]) == (422, "format_not_allowed"), answer.text
        assert http.get("/v1/models/program").status_code == 404
    assert not sentinel.exists()
    assert not Path("/tmp/escaped").exists()  # noqa: S108 - where the archive wants to write


@pytest.mark.parametrize("name", ["pickle", "binary pickle", "npy of objects", "npz of objects"])
@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream", "application/x-pickle"])
def test_a_format_that_carries_code_is_no_payload(target: Served, tmp_path: Path, name: str, content_type: str) -> None:
    """No content type selects another reader: there is only the one of the protocol."""
    sentinel = tmp_path / "sentinel"
    content, headers = programs(sentinel)[name], {"content-type": content_type}
    content += b"." * (len(content) % 16 == 0)  # in a raw request, whole rows of any bytes are rows of numbers
    with target.client() as http:
        for path in ("/v2/models/bump/infer", "/v1/jobs", "/v1/inference"):
            assert http.post(path, content=content, headers=headers).json()["code"] == "bad_json"
        raw = {**headers, "inference-header-content-length": "0"}
        assert http.post("/v2/models/bump/infer", content=content, headers=raw).json()["code"] == "bad_tensor"
    assert not sentinel.exists()


@pytest.mark.parametrize("datatype", ["OBJECT", "O", "|O", "PICKLE", "object"])
def test_there_is_no_datatype_of_objects(target: Served, datatype: str) -> None:
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": datatype, "data": ["gASV"]}]}
    with target.client() as http:
        answer = http.post("/v2/models/bump/infer", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_tensor")


SHORT = InspectionLimits(memory_mb=3072, cpu_s=2, wall_s=30)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (models.external("/etc/passwd"), UnsafeModel),
        (models.external("a/../../x"), UnsafeModel),
        (models.external("link"), UnsafeModel),
        (models.external("hard"), UnsafeModel),
        (models.external(prepacked_0="0;4;0"), UnsafeModel),
        (models.external_attribute(), UnsafeModel),
        (models.external("*/_ORT_MEM_ADDR_/1234"), UnsafeModel),
        (models.operator("EPContext", "com.microsoft", nested=True), UnsafeModel),
        (models.operator("Run", "evil.ops", nested=True), UnsafeModel),
        (models.swelling(), InspectionLimitExceeded),
        (models.looping(), InspectionLimitExceeded),
        (models.zipmap(), ModelRejected),
    ],
    ids=[
        "absolute",
        "climbing",
        "symlink",
        "hardlink",
        "prepacked",
        "attribute",
        "memory address",
        "compiled",
        "custom",
        "1 TB",
        "endless",
        "zipmap",
    ],
)
async def test_a_model_is_refused_with_the_code_of_its_reason(
    tmp_path: Path, content: bytes, kind: type[ModelRejected]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if b"link" in content:
        (folder / "link").symlink_to("/etc/passwd")
    if b"hard" in content:
        (tmp_path / "secret").write_bytes(bytes(16))
        (folder / "hard").hardlink_to(tmp_path / "secret")
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelRejected) as caught:
        await inspect(folder, "onnx", SHORT)
    assert type(caught.value) is kind
    assert "passwd" not in caught.value.message


def test_a_million_nodes_are_not_walked_to_the_end() -> None:
    node = b"\x0a\x03\x22\x01A" * 600_000
    length = b"".join(bytes([(len(node) >> shift & 0x7F) | 0x80]) for shift in (0, 7, 14)) + bytes([len(node) >> 21])
    with pytest.raises(InspectionLimitExceeded, match="500000 nodes"):
        onnx_parser.check_file(b"\x08\x09\x3a" + length + node)


def test_the_platform_still_serves_afterwards(target: Served) -> None:
    sent = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    with target.client() as http:
        answer = http.post("/v2/models/bump/infer", json={"inputs": [sent]})
    assert np.allclose(answer.json()["outputs"][0]["data"], [2, 3, 4, 5])
