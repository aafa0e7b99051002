"""The walk over an ONNX file's bytes: it ends, and whatever it is given it raises one error only."""

from __future__ import annotations

import models
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tether.errors import ModelRejected
from tether.modelstore import onnx_wire

WHOLE = models.looping()


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def holding(tensor: bytes) -> bytes:
    """A model whose graph has one initializer of these bytes."""
    return b"\x08\x08" + field(7, field(5, tensor))


def test_nodes_are_counted_in_subgraphs_too() -> None:
    assert onnx_wire.check_file(WHOLE).nodes == 3


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    walk(data)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(1, len(WHOLE)))
def test_damaged_models_raise_nothing_else(position: int, byte: int, length: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[position] = byte
    walk(bytes(damaged[:length]))


def walk(data: bytes) -> None:
    try:
        onnx_wire.check_file(data)
    except ModelRejected as error:
        assert "\n" not in error.message  # noqa: PT017 - most damage is still a model


@pytest.mark.parametrize(
    "tensor",
    [
        field(13, b""),
        b"\x68\x01",  # external_data as a varint
        b"\x70\x01",  # data_location
        field(14, b"\x01"),  # data_location, packed
    ],
)
def test_no_way_of_writing_external_data_passes(tensor: bytes) -> None:
    with pytest.raises(ModelRejected, match="external data"):
        onnx_wire.check_file(holding(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        varint((1 << 35) | 13 << 3 | 2) + b"\x00",  # a tag that 32 bits cut to external_data
        b"\x6b\x6c",  # a group
        b"\xff" * 11 + b"\x01",  # an endless varint
        varint(9 << 3 | 2) + varint(1 << 40),  # longer than the file
    ],
)
def test_what_parsers_read_differently_is_refused(tensor: bytes) -> None:
    with pytest.raises(ModelRejected, match="not an ONNX model"):
        onnx_wire.check_file(holding(tensor))


def test_a_deep_nest_of_graphs_is_refused() -> None:
    graph = b""
    for _ in range(onnx_wire.MAX_DEPTH + 2):
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(ModelRejected, match="nested deeper"):
        onnx_wire.check_file(b"\x08\x08" + field(7, graph))


def test_a_graph_of_too_many_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MAX_NODES", 10)
    nodes = [helper.make_node("Identity", ["x"], [f"y{n}"]) for n in range(11)]
    proto = models.model(nodes, [models.value("x", "FP32", [1])], [models.value("y0", "FP32", [1])])
    with pytest.raises(ModelRejected, match="more than 10 nodes"):
        onnx_wire.check_file(models.to_bytes(proto))


def test_a_graph_of_too_many_fields_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MAX_FIELDS", 10)
    with pytest.raises(ModelRejected, match="more than 10 protobuf fields"):
        onnx_wire.check_file(WHOLE)
