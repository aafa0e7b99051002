"""What a package's runtime answers is what its model's signature says, or the run fails and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tether.domain.manifest import TensorSpec
from tether.errors import InferenceFailed, ModelRejected
from tether.frameworks import plugins


class Model:
    """Answers with whatever it was given to answer with."""

    inputs = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs = (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "BYTES", (1,)))

    def __init__(self, answer: list[Any]) -> None:
        self.answer = answer
        self.closed = False

    def run(self, _inputs: Any, outputs: tuple[str, ...]) -> list[Any]:
        return self.answer[: len(outputs)]

    def close(self) -> None:
        self.closed = True


A = np.zeros((3, 2), np.float32)
B = np.array([b"text"], dtype=np.object_)


def test_an_answer_that_fits_is_given_on() -> None:
    model = Model([A, B])
    checked = plugins.Checked(model)
    assert checked.output_names == ("a", "b")
    assert checked.run({"x": A}, ()) == [A, B]
    assert checked.run({"x": A}, ("a",)) == [A]
    checked.close()
    assert model.closed


@pytest.mark.parametrize("answer", [[A], [A.astype(np.float64), B], [A[:, :1], B], [A[0], B], [A, np.array(["text"])]])
def test_an_answer_that_does_not_fit_is_refused(answer: list[Any]) -> None:
    with pytest.raises(InferenceFailed, match=r"were requested|the signature says"):
        plugins.Checked(Model(answer)).run({"x": A}, ())


@pytest.mark.parametrize(
    "change", [{"outputs": ()}, {"run": None}, {"inputs": ("x",)}, {"inputs": (TensorSpec("x", "FP8", ()),)}]
)
def test_what_is_no_model_is_refused(change: dict[str, Any]) -> None:
    model = Model([])
    vars(model).update(change)
    with pytest.raises(ModelRejected, match="the runtime's model needs"):
        plugins.Checked(model)


def test_a_package_that_cannot_be_imported_tells_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_module.py").write_text("from json import absent\n")
    information = tmp_path / "half-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: half\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[tether.runtimes]\nhalf = half_module\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.installed.cache_clear()
    try:
        with pytest.raises(ModelRejected, match="'half' cannot be imported") as caught:
            plugins.load(plugins.RUNTIMES, "half", "runtime", "platform")
    finally:
        plugins.installed.cache_clear()
    assert "/" not in caught.value.message
