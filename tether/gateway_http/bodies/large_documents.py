"""The JSON bodies of cold routes that may be large, as values: a body of any size means the same."""

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
"""Bytes of a change of a configuration, as JSON."""

_DIGEST_LENGTH = 64


def check_config(patch: Mapping[str, Any]) -> None:
    """Refuse a change that says more than any configuration.

    Raises:
        PayloadTooLarge
    """
    if patch and len(msgspec.json.encode(patch)) > LARGEST_CONFIG:
        raise PayloadTooLarge(f"a change of a configuration has at most {LARGEST_CONFIG} bytes", field="config")


def _inference(body: InferenceBody) -> None:
    oip_json.check_parameters(body.parameters, "parameters")


def _nothing(_: WantedChunks) -> None:
    """Its list has a bound of its own."""


def _version(body: NewVersion) -> None:
    check_config(body.config)
    oip_json.check_count(body.sample, "sample")
    oip_json.check_parameters(body.labels, "labels")
    for file in body.files:
        if any(len(digest) != _DIGEST_LENGTH for digest in file.chunks):
            raise InvalidRequest(f"the digests of the file {shown(file.path)} must be hex SHA-256", field="files")
        if file.sizes and len(file.sizes) != len(file.chunks):
            raise InvalidRequest(f"the chunks of the file {shown(file.path)} do not add up to its size", field="files")


_CHECKS: Mapping[Any, Callable[[Any], None]] = {InferenceBody: _inference, WantedChunks: _nothing, NewVersion: _version}
_DECODERS = {kind.__name__: (msgspec.json.Decoder(kind), check) for kind, check in _CHECKS.items()}


def read_document(kind: str, body: bytes) -> Any:
    """A body as the struct of that name. What it holds has so few parts that it is decoded again in little time.

    Raises:
        BadJson: it is not as that struct.
        InvalidRequest, PayloadTooLarge: it has more of something than it may.
    """
    decoder, check = _DECODERS[kind]
    found = oip_json.parse_body(decoder, body)
    check(found)
    return found


def decoded(kind: str, body: bytes) -> Any:
    """The same of a body that was proven."""
    return _DECODERS[kind][0].decode(body)
