"""Tensors as bytes: what fits, what does not, and the way to numpy and back."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.domain.tensor import (
    NUMPY_DTYPES,
    Datatype,
    Tensor,
    check,
    element_count,
    from_numpy,
    pack_bytes,
    to_numpy,
    unpack_bytes,
)
from tether.errors import BadTensor


def test_every_datatype_has_a_numpy_dtype_but_bytes() -> None:
    assert set(Datatype) == {*NUMPY_DTYPES, "BYTES"}


@pytest.mark.parametrize("datatype", NUMPY_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 0, 4)])
def test_arrays_of_every_datatype_survive(datatype: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, dtype=NUMPY_DTYPES[datatype])
    tensor = from_numpy("x", array)
    assert (tensor.datatype, tensor.shape) == (datatype, shape)
    back = to_numpy(tensor)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_reading_is_a_view_that_cannot_be_written() -> None:
    tensor = from_numpy("x", np.arange(4))
    view = to_numpy(tensor)
    assert not view.flags.writeable
    assert view.base is not None


def test_order_and_endianness_of_the_source_do_not_matter() -> None:
    plain = np.arange(6, dtype="<i4").reshape(2, 3)
    assert from_numpy("x", plain.astype(">i4")) == from_numpy("x", plain)
    assert from_numpy("x", np.asfortranarray(plain)) == from_numpy("x", plain)
    assert from_numpy("x", plain[:, ::2]).data == np.array([0, 2, 3, 5], dtype="<i4").tobytes()


def test_bfloat16_is_two_bytes() -> None:
    assert from_numpy("x", np.array([1], dtype=ml_dtypes.bfloat16)).data == b"\x80\x3f"


@pytest.mark.parametrize(
    "array", [np.array(["a", "grüß"]), np.array([b"a", "grüß".encode()]), np.array(["a", "grüß"], dtype=object)]
)
def test_text_becomes_bytes(array: Any) -> None:
    assert unpack_bytes(from_numpy("x", array)) == [b"a", "grüß".encode()]


@pytest.mark.parametrize(
    "array",
    [np.array([1 + 2j]), np.array(["2020-01-01"], dtype="M8[D]"), np.array([1], dtype=object), np.array(["\ud800"])],
)
def test_what_oip_has_no_datatype_for_is_refused(array: Any) -> None:
    with pytest.raises(BadTensor, match="'x'"):
        from_numpy("x", array)


@given(st.lists(st.binary()))
def test_bytes_elements_survive(elements: list[bytes]) -> None:
    tensor = Tensor("x", "BYTES", (len(elements),), pack_bytes(elements))
    assert unpack_bytes(tensor) == elements
    assert list(to_numpy(tensor)) == elements


@given(st.lists(st.binary(max_size=9), min_size=1), st.data())
def test_torn_bytes_are_refused(elements: list[bytes], data: st.DataObject) -> None:
    packed = pack_bytes(elements)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(BadTensor):
        check(Tensor("x", "BYTES", (len(elements),), packed[:cut]))


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("x", "FP32", (2,), bytes(7)),
        Tensor("x", "FP32", (2,), bytes(12)),
        Tensor("x", "FP32", (-1,), b""),
        Tensor("x", "FP32", (1,) * 33, bytes(4)),
        Tensor("x", "FP32", (2**40, 2), b""),
        Tensor("x", "FLOAT", (1,), bytes(4)),
        Tensor("x", "BYTES", (2,), pack_bytes([b"a"])),
        Tensor("x", "BYTES", (0,), pack_bytes([b""])),
    ],
)
def test_what_does_not_agree_is_refused(tensor: Tensor) -> None:
    for look in (check, to_numpy):
        with pytest.raises(BadTensor, match="'x'"):
            look(tensor)


def test_elements_are_counted_without_overflow() -> None:
    assert element_count((), name="x") == 1
    assert element_count((3, 0, 2**40), name="x") == 0
    with pytest.raises(BadTensor):
        element_count((2**64, 2**64), name="x")
