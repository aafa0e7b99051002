"""Decodes JSON bodies of framework routes that may be large, with the same result for every size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from tether.domain.file_names import shown
from tether.errors import InvalidRequest, PayloadTooLarge
from tether.gateway_http.schemas.common import InferenceBody
from tether.gateway_http.schemas.models import NewVersion, WantedChunks
from tether.wire import oip_json

LARGEST_CONFIG = 64 << 10
"""Maximum size of a configuration patch, in bytes of JSON."""

_DIGEST_LENGTH = 64


def check_config(patch: Mapping[str, Any]) -> None:
    """Reject a configuration patch that exceeds the size limit.

    Raises:
        PayloadTooLarge
    """
    if patch and len(msgspec.json.encode(patch)) > LARGEST_CONFIG:
        raise PayloadTooLarge(f"a configuration patch must have at most {LARGEST_CONFIG} bytes", field="config")


def _inference(body: InferenceBody) -> None:
    oip_json.check_parameters(body.parameters, "parameters")


def _nothing(_: WantedChunks) -> None:
    """No check: its list is bounded by its type."""


def _version(body: NewVersion) -> None:
    check_config(body.config)
    oip_json.check_count(body.sample, "sample")
    oip_json.check_parameters(body.labels, "labels")
    for file in body.files:
        if any(len(digest) != _DIGEST_LENGTH for digest in file.chunks):
            raise InvalidRequest(f"the digests of the file {shown(file.path)} must be hex SHA-256", field="files")
        if file.sizes and len(file.sizes) != len(file.chunks):
            raise InvalidRequest(f"the chunks of the file {shown(file.path)} must have one size each", field="files")


_CHECKS: Mapping[Any, Callable[[Any], None]] = {InferenceBody: _inference, WantedChunks: _nothing, NewVersion: _version}
_DECODERS = {kind.__name__: (msgspec.json.Decoder(kind), check) for kind, check in _CHECKS.items()}


def read_document(kind: str, body: bytes) -> Any:
    """Decode and check a body as the struct of that name. Its structs are few, so decoding it twice is cheap.

    Raises:
        BadJson: it does not match the struct.
        InvalidRequest, PayloadTooLarge: a value exceeds its limits.
    """
    decoder, check = _DECODERS[kind]
    found = oip_json.parse_body(decoder, body)
    check(found)
    return found


def decoded(kind: str, body: bytes) -> Any:
    """Decode a body that was checked before."""
    return _DECODERS[kind][0].decode(body)
