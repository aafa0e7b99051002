"""What a pushed ONNX file is taken for, and why one is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.models import graphs, mixing, models

from tether.domain.manifest import TensorSpec
from tether.errors import ModelRejected
from tether.modelstore.inspection.inspector import Inspection, InspectionLimits, inspect

LIMITS = InspectionLimits(memory_mb=3072, cpu_s=20, wall_s=40)


async def look(folder: Path, content: bytes, limits: InspectionLimits = LIMITS) -> Inspection:
    (folder / "model.onnx").write_bytes(content)
    return await inspect(folder, "onnx", limits)


async def refusal(folder: Path, content: bytes, limits: InspectionLimits = LIMITS) -> str:
    with pytest.raises(ModelRejected) as caught:
        await look(folder, content, limits)
    message = caught.value.message
    assert "\n" not in message
    assert str(folder) not in message
    assert not re.search(r"onnxruntime_src|/tmp/|\.cc:", message)
    return message


@pytest.mark.parametrize("datatype", list(models.ELEMENTS))
async def test_every_datatype_has_its_oip_name(tmp_path: Path, datatype: str) -> None:
    found = await look(tmp_path, models.identity(datatype))
    assert found.inputs == (TensorSpec("x", datatype, (-1, 4), ("n", "")),)
    assert found.outputs == (TensorSpec("y", datatype, (-1, 4), ("n", "")),)
    assert found.max_batch_size > 1


async def test_a_classifier_with_two_outputs_is_batched(tmp_path: Path) -> None:
    found = await look(tmp_path, models.classifier())
    assert [spec.name for spec in found.outputs] == ["label", "probabilities"]
    assert (found.outputs[0].name, found.outputs[0].datatype, found.outputs[0].shape) == ("label", "INT64", (-1,))
    assert (found.max_batch_size, found.note) == (512, "")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (models.identity(shape=(1, 4)), "free first axis"),
        (models.over_batch(), "Softmax (output 'y') works across the rows; a trial run showed that rows depend"),
        (models.first_row(), "Compress (output 'y') keeps as many rows as it likes"),
        (models.reshaping(), "Reshape (output 'y') reshapes"),
        (models.identity(shape=()), "free first axis"),
    ],
)
async def test_rows_never_share_a_run_that_could_change_an_answer(tmp_path: Path, content: bytes, why: str) -> None:
    found = await look(tmp_path, content)
    assert found.max_batch_size == 0
    assert why in found.note


@pytest.mark.parametrize("name", list(mixing.MODELS))
async def test_a_model_whose_rows_mix_is_not_batched_and_may_not_be_declared(tmp_path: Path, name: str) -> None:
    content, why, refuted = mixing.MODELS[name]
    found = await look(tmp_path, content)
    assert found.max_batch_size == 0
    assert why in found.note
    assert found.refuted == refuted


async def test_sizes_that_nobody_knows_end_no_proof(tmp_path: Path) -> None:
    """The graph proves it; which width the model takes is never found out."""
    nodes = [graphs.node("Softmax", "x", "p", axis=1), graphs.node("MatMul", "p w", "y")]
    content = graphs.build(nodes, [("x", "FP32", ("n", "w"))], weights={"w": np.ones((11, 2), np.float32)})
    found = await look(tmp_path, content)
    assert found.max_batch_size == 32
    assert "no made-up inputs" in found.note


async def test_an_output_that_is_declared_as_one_row_has_them_all(tmp_path: Path) -> None:
    content = (Path(__file__).parents[2] / "exports" / "lightgbm_classifier.onnx").read_bytes()
    found = await look(tmp_path, content)
    assert (found.outputs[0].name, found.outputs[0].datatype, found.outputs[0].shape) == ("label", "INT64", (-1,))
    assert found.max_batch_size == 512


async def test_a_models_own_functions_are_allowed(tmp_path: Path) -> None:
    assert (await look(tmp_path, models.with_function())).max_batch_size > 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty: it has 0 bytes"),
        (b"PK\x03\x04 a zip", "not an ONNX model"),
        (b"\x80\x04\x95pickle", "not an ONNX model"),
        (b"\x08\x09" * 40, "not an ONNX model"),
        (models.add()[:-7], f"begins as an ONNX model and is cut off: it ends after {len(models.add()) - 7} bytes"),
        (models.add()[: len(models.add()) // 2], "is cut off"),
    ],
)
async def test_what_is_not_onnx_or_not_all_of_it_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in await refusal(tmp_path, content)


@pytest.mark.parametrize("location", ["weights.bin", "../../etc/passwd", "*/_ORT_MEM_ADDR_/1234"])
async def test_external_data_that_is_not_there_is_refused(tmp_path: Path, location: str) -> None:
    assert "external data" in await refusal(tmp_path, models.external(location))


@pytest.mark.parametrize("location", ["weights.bin", "parts/w.0"])
async def test_weights_may_lie_in_files_beside_the_model(tmp_path: Path, location: str) -> None:
    found = await inspect(models.split(tmp_path, location), "onnx", LIMITS)
    assert found.inputs == (TensorSpec("x", "FP32", (-1, 256), ("n", "")),)
    assert found.max_batch_size == 512


async def test_a_range_beyond_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(20))
    assert (await look(tmp_path, models.external(offset="4"))).max_batch_size > 1
    assert "tensor 'c'" in (reason := await refusal(tmp_path, models.external(offset="5")))
    assert "exceeds the end" in reason


async def test_a_link_is_no_file_of_the_version(tmp_path: Path) -> None:
    weights, folder = tmp_path / "elsewhere", tmp_path / "m"
    weights.write_bytes(bytes(16))
    folder.mkdir()
    (folder / "soft").symlink_to(weights)
    (folder / "hard").hardlink_to(weights)
    (folder / "linked").symlink_to(tmp_path)
    for location in ("soft", "hard", "linked/elsewhere"):
        assert "names a link" in await refusal(folder, models.external(location))


async def test_a_file_that_no_weights_are_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme").write_text("x")
    assert "the file 'readme'" in await refusal(tmp_path, models.add())


@pytest.mark.parametrize("nested", [False, True])
async def test_operators_from_outside_are_refused_in_any_graph(tmp_path: Path, nested: bool) -> None:
    assert "'evil.ops'" in await refusal(tmp_path, models.operator("Run", "evil.ops", nested=nested))
    assert "EPContext" in await refusal(tmp_path, models.operator("EPContext", "com.microsoft", nested=nested))


async def test_a_zipmap_is_refused_with_its_fix(tmp_path: Path) -> None:
    assert "'zipmap': False" in await refusal(tmp_path, models.zipmap())


async def test_an_input_without_rank_is_refused_with_its_fix(tmp_path: Path) -> None:
    content = models.identity(shape=None)
    message = await refusal(tmp_path, content)
    assert "input 'x' declares no shape" in message
    model = onnx.load_from_string(content)
    (i,) = model.graph.input
    fix = re.search(r"make_tensor_value_info\(.*?\]\)", message)
    assert fix is not None
    assert fix[0] == "make_tensor_value_info('x', i.type.tensor_type.elem_type, ['n', 4])"
    i.CopyFrom(onnx.helper.make_tensor_value_info("x", i.type.tensor_type.elem_type, ["n", 4]))
    found = await look(tmp_path, model.SerializeToString())
    assert found.inputs[0].shape == (-1, 4)


async def test_an_operator_that_does_not_exist_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "Nonsense" in await refusal(tmp_path, models.operator("Nonsense", ""))


async def test_an_endless_loop_ends_at_the_limit(tmp_path: Path) -> None:
    message = await refusal(tmp_path, models.looping(), InspectionLimits(memory_mb=3072, cpu_s=2, wall_s=30))
    assert "longer than 2 s" in message


async def test_a_wall_clock_limit_ends_it_too(tmp_path: Path) -> None:
    message = await refusal(tmp_path, models.looping(), InspectionLimits(memory_mb=3072, cpu_s=60, wall_s=1.5))
    assert "longer than 1.5 s" in message


async def test_a_model_that_swells_is_refused(tmp_path: Path) -> None:
    assert "memory" in await refusal(tmp_path, models.swelling())


async def test_nothing_is_written_beside_the_model(tmp_path: Path) -> None:
    await look(tmp_path, models.add())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
