"""Which files make a version of which platform, before any of their bytes is looked at."""

from __future__ import annotations

import pytest

from tether.domain.manifest import ModelFile
from tether.errors import FormatNotAllowed, InvalidRequest, PayloadTooLarge
from tether.modelstore.inspection.formats import ONNX, TORCH_EXPORT, check_files
from tether.storage.upload import LARGEST_ONNX


def file(path: str, size: int = 1) -> ModelFile:
    return ModelFile(path, size, "0" * 64, ())


def check(platform: str, *files: ModelFile, trusted: bool = False, max_bytes: int = 1 << 40) -> None:
    check_files(platform, files, trusted=trusted, max_bytes=max_bytes)


def test_only_the_graph_of_an_onnx_model_ends_where_protobuf_ends() -> None:
    check(ONNX, file("model.onnx", LARGEST_ONNX), file("weights.bin", 3 << 30))
    with pytest.raises(PayloadTooLarge, match=r"'model\.onnx' has 2147483648 bytes.*in a file beside it"):
        check(ONNX, file("model.onnx", LARGEST_ONNX + 1))
    with pytest.raises(PayloadTooLarge, match="the model has 4 bytes; at most 3"):
        check(ONNX, file("model.onnx", 2), file("weights.bin", 2), max_bytes=3)


@pytest.mark.parametrize("paths", [("weights.bin",), ("model.onnx", "model.onnx"), ()])
def test_a_version_has_what_its_platform_needs_each_once(paths: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match=r"at least the file 'model\.onnx', each once"):
        check(ONNX, *map(file, paths))


def test_a_program_needs_a_trusted_publisher_and_brings_nothing_else() -> None:
    check(TORCH_EXPORT, file("model.pt2"), trusted=True)
    with pytest.raises(FormatNotAllowed, match="models:code"):
        check(TORCH_EXPORT, file("model.pt2"))
    with pytest.raises(InvalidRequest, match=r"exactly the file 'model\.pt2'"):
        check(TORCH_EXPORT, file("model.pt2"), file("more"), trusted=True)
    with pytest.raises(InvalidRequest, match="unknown platform 'caffe'"):
        check("caffe", file("model.pt2"), trusted=True)
