"""The walk over an ONNX file's bytes: it ends, and whatever it is given it raises one error only."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from support.models import models

from tether.errors import ModelRejected, UnsafeModel
from tether.modelstore.inspection.file_formats import onnx_parser
from tether.modelstore.inspection.file_formats.onnx_external_data import External

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


def entry(key: bytes, value: bytes) -> bytes:
    """One entry of a tensor's ``external_data``."""
    return field(13, field(1, key) + field(2, value))


EXTERNAL = b"\x08\x01\x10\x01\x70\x01" + entry(b"location", b"w.bin")
"""A tensor of one FP32 in another file; what is added to it makes it hostile."""

HOSTILE = [
    b"", b".", b"..", b"/etc/passwd", b"a/../../x", b"../x", b"a//b", b"a/", b"./x", b".hidden", b"a/.git", b"~/x",
    b"a\\b", b"C:x", b"x\0y", b"x\ny", b"\xff", b"\xd9\xa3", b"file:///etc/passwd", b"*/_ORT_MEM_ADDR_/1234", b"model.onnx",
    b"a/b/c/d/e/f/g/h/i", b"-x",
]  # fmt: skip


def test_nodes_are_counted_in_subgraphs_too() -> None:
    assert onnx_parser.check_file(WHOLE).nodes == 3


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
        onnx_parser.check_file(data)
    except ModelRejected as error:
        assert "\n" not in error.message  # noqa: PT017 - most damage is still a model


@pytest.mark.parametrize(
    "tensor",
    [
        field(13, b""),
        b"\x68\x01",  # external_data as a varint
        b"\x70\x01",  # data_location without data
        field(14, b"\x01"),  # data_location, packed
        EXTERNAL + b"\x70\x00",  # the last one counts
        EXTERNAL + b"\x70\x01",
        EXTERNAL + field(9, b"1234"),  # values of its own as well
        EXTERNAL + b"\x10\x08",  # a second element type: strings
        b"\x08\x01\x10\x08\x70\x01" + entry(b"location", b"w.bin"),  # strings
        EXTERNAL + entry(b"location", b"/etc/passwd"),
        EXTERNAL + entry(b"prepacked_0", b"0;4;0"),
        EXTERNAL + entry(b"offset", b"-4"),
        EXTERNAL + entry(b"offset", b"0x4"),
        EXTERNAL + entry(b"offset", b"9" * 30),
        EXTERNAL + entry(b"length", b"8"),
        EXTERNAL + field(13, field(1, b"offset") + field(2, b"4") + field(2, b"8")),
        EXTERNAL + field(13, field(2, b"4") + field(1, b"offset")),
        EXTERNAL + b"\x08" + varint((1 << 64) - 1),  # a negative axis
        EXTERNAL + field(1, b"\x01" * 65),  # too many axes
        EXTERNAL + entry(b"checksum", b"a" * 2000),
    ],
)
def test_no_other_way_of_writing_external_data_passes(tensor: bytes) -> None:
    with pytest.raises(UnsafeModel, match=r"tensor '[a-z]*', whose values .*external data"):
        onnx_parser.check_file(holding(tensor))


@pytest.mark.parametrize("location", HOSTILE)
def test_a_location_is_a_plain_name_below_the_model(location: bytes) -> None:
    tensor = b"\x08\x01\x10\x01\x70\x01" + field(8, b"weight") + entry(b"location", location)
    with pytest.raises(UnsafeModel, match=r"tensor 'weight'.*does not name a plain file") as caught:
        onnx_parser.check_file(holding(tensor))
    assert "passwd" not in caught.value.message


def test_external_data_is_a_range_of_a_file() -> None:
    tensor = b"\x0a\x02\x02\x03\x10\x0a\x70\x01" + entry(b"location", b"a/w.bin") + entry(b"offset", b"64")
    for more in (b"", entry(b"length", b"12"), entry(b"checksum", b"abc")):
        (found,) = onnx_parser.check_file(holding(tensor + more)).external
        assert found == External("", "a/w.bin", 64, 12)


def test_an_attribute_keeps_its_values() -> None:
    with pytest.raises(UnsafeModel, match="tensor 'c', an attribute"):
        onnx_parser.check_file(models.external_attribute())


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
        onnx_parser.check_file(holding(tensor))


def test_a_deep_nest_of_graphs_is_refused() -> None:
    graph = b""
    for _ in range(onnx_parser.MAX_DEPTH + 2):
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(ModelRejected, match="nested deeper"):
        onnx_parser.check_file(b"\x08\x08" + field(7, graph))


def test_a_graph_of_too_many_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_parser, "MAX_NODES", 10)
    nodes = [helper.make_node("Identity", ["x"], [f"y{n}"]) for n in range(11)]
    proto = models.model(nodes, [models.value("x", "FP32", [1])], [models.value("y0", "FP32", [1])])
    with pytest.raises(ModelRejected, match="more than 10 nodes"):
        onnx_parser.check_file(models.to_bytes(proto))


def test_a_graph_of_too_many_fields_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_parser, "MAX_FIELDS", 10)
    with pytest.raises(ModelRejected, match="more than 10 protobuf fields"):
        onnx_parser.check_file(WHOLE)
