"""What a request has instead of JSON, and numbers that JSON does not have."""

from __future__ import annotations

import pytest

from tether.errors import BadJson, InvalidRequest
from tether.wire import oip


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(
    "text",
    [
        '{"inputs":[{"name":"x","shape":[2],"datatype":"FP32","data":[1,%s]}]}',
        '{"inputs":[{"name":"before","data":[1]},{"data":[[[%s]]], "parameters":{"a":{}}, "name" : "x"}, {"name":"after"}]}',
    ],
)
def test_a_number_that_json_does_not_have_is_told_with_its_tensor_and_a_way_out(text: str, word: str) -> None:
    with pytest.raises(BadJson) as caught:
        oip.parse_infer_request((text % word).encode(), None)
    for said in (word, f"byte {text.index('%s')}", "'x'", "binary", "base64"):
        assert said in caught.value.message
    assert caught.value.field == "x"


@pytest.mark.parametrize("literal", ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "01", "1.", "+1", "0x1"])
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT32"])
def test_numbers_that_json_does_not_have_are_refused(literal: str, datatype: str) -> None:
    raw = b'{"inputs":[{"name":"x","shape":[1],"datatype":"%s","data":[%s]}]}' % (datatype.encode(), literal.encode())
    with pytest.raises(InvalidRequest):
        oip.parse_infer_request(raw, None)


@pytest.mark.parametrize("body", [b"", b" \n"])
def test_an_empty_body_is_told_as_that(body: bytes) -> None:
    with pytest.raises(BadJson, match="the body is empty; expected JSON"):
        oip.parse_infer_request(body, None)
