"""Synchronous inference as a flow. What is too large for one request is sent as several, where rows are independent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import msgspec
import numpy as np

from tether.client.inputs import Inputs, Version, fitted, served_path, signature
from tether.client.operations import Outputs
from tether.client.protocol import Concurrently, Flow, Request, RetryPolicy, exchange, exchange_json
from tether.domain.signature import MOST_RUNS
from tether.domain.tensor import Array
from tether.errors import (
    BadTensor,
    Forbidden,
    InvalidRequest,
    OutputMisfit,
    PayloadTooLarge,
    ResultTooLarge,
    TetherError,
)
from tether.wire import oip
from tether.wire.oip import InferResponse

WIDTH = 4
"""Requests of one call that are on their way at a time."""

_TOO_LARGE = (PayloadTooLarge, ResultTooLarge)
_UNSPLIT = "; it is not sent as several requests: "


def infer(policy: RetryPolicy, model: str, inputs: Inputs, version: Version, outputs: Sequence[str]) -> Flow[Outputs]:
    """Run a model. A request that is refused as too large is sent in parts, :data:`WIDTH` at a time, where the model is batched.

    All parts are answered by the version that answered the first one, within ``policy.timeout`` seconds together.

    Raises:
        PayloadTooLarge, ResultTooLarge, BadTensor: it is too large, and has one row or is for a model that is not batched.
        TetherError: what the server refused. Answers of other parts are dropped.
    """
    asked = _Asked(model, version, tuple(outputs), policy.monotonic() + policy.timeout)

    def sent(given: dict[str, Array]) -> Flow[Outputs]:
        try:
            return (yield from _whole(policy, asked, given)).outputs
        except (*_TOO_LARGE, BadTensor) as error:
            return (yield from _split(policy, asked, given, error))

    return (yield from fitted(policy, model, version, inputs, sent))


@dataclass(frozen=True)
class _Asked:
    """What all requests of one call have in common; ``until`` is by the clock of the policy."""

    model: str
    version: Version
    outputs: tuple[str, ...]
    until: float


def _whole(policy: RetryPolicy, asked: _Asked, given: Mapping[str, Array]) -> Flow[InferResponse]:
    """One request."""
    body, length = oip.build_infer_request(given, outputs=asked.outputs)
    kind = {"content-type": "application/json"}  # of a model without inputs
    binary = {"content-type": "application/octet-stream", oip.HEADER_LENGTH: str(length)}
    headers = kind if length is None else binary
    policy = replace(policy, timeout=max(0.05, asked.until - policy.monotonic()))
    ask = Request("POST", f"{served_path(asked.model, asked.version)}/infer", body, headers=headers)
    reply = yield from exchange(policy, ask)
    told = reply.headers.get(oip.HEADER_LENGTH)
    if told is not None and not told.isdecimal():
        raise InvalidRequest(f"the server sent {oip.HEADER_LENGTH}: {told[:40]!r}", field=oip.HEADER_LENGTH)
    return oip.parse_infer_response(reply.body, None if told is None else int(told))


class _Config(msgspec.Struct):
    max_batch_size: int = 0


def _split(policy: RetryPolicy, asked: _Asked, given: dict[str, Array], error: TetherError) -> Flow[Outputs]:
    """The same in parts: half of the rows first, then half of that, until one is taken; then the others of that size.

    Raises:
        TetherError: ``error``, where parts cannot help.
    """
    lengths = {array.shape[0] if array.ndim else 0 for array in given.values()}
    rows = min(lengths, default=0)
    if rows < 2 or (isinstance(error, BadTensor) and rows <= MOST_RUNS):
        raise error
    limit = (yield from _run_rows(policy, asked, given, error)) * MOST_RUNS
    if len(lengths) > 1 or (isinstance(error, BadTensor) and rows <= limit):
        raise error
    step, first = min(limit, -(-rows // 2)), None
    while first is None:
        try:
            first = yield from _whole(policy, asked, _rows(given, 0, step))
        except _TOO_LARGE:
            if step == 1:
                raise
            step = -(-step // 2)
    asked = replace(asked, version=first.version or asked.version)
    parts = (_part(policy, asked, given, at, min(at + step, rows)) for at in range(step, rows, step))
    rest = yield Concurrently(parts, WIDTH, lambda _: None)
    return _joined([(step, first.outputs), *(part for found in rest for part in found)])


def _run_rows(policy: RetryPolicy, asked: _Asked, given: Mapping[str, Array], error: TetherError) -> Flow[int]:
    """How many rows one run of the model takes; ``error``, with the reason, where its inputs have no rows of their own."""
    path = served_path(asked.model, asked.version)
    try:
        found = yield from exchange_json(policy, Request("GET", f"{path}/config"), _Config)
        specs = yield from signature(policy, asked.model, asked.version)
    except Forbidden:
        _refuse(error, "that needs a key with the scope models:read")
    if not found.max_batch_size:
        _refuse(error, f"model '{asked.model}' is not batched, so its rows may depend on one another")
    optional = [spec.name for spec in specs if spec.optional and spec.name in given]
    if optional:
        _refuse(error, f"input '{optional[0]}' has no rows")
    return found.max_batch_size


def _refuse(error: TetherError, reason: str) -> NoReturn:
    raise type(error)(f"{error.message}{_UNSPLIT}{reason}", field=error.field) from error


def _part(
    policy: RetryPolicy, asked: _Asked, given: Mapping[str, Array], start: int, stop: int
) -> Flow[list[tuple[int, Outputs]]]:
    """Some of the rows, in halves where they are larger than those of the first part: how many rows each answer is for, and the answers."""
    try:
        return [(stop - start, (yield from _whole(policy, asked, _rows(given, start, stop))).outputs)]
    except _TOO_LARGE:
        if stop - start < 2:
            raise
    middle = (start + stop) // 2
    first = yield from _part(policy, asked, given, start, middle)
    return first + (yield from _part(policy, asked, given, middle, stop))


def _rows(given: Mapping[str, Array], start: int, stop: int) -> dict[str, Array]:
    return {name: array[start:stop] for name, array in given.items()}


def _joined(parts: Sequence[tuple[int, Outputs]]) -> Outputs:
    """Answers put together, in order.

    Raises:
        OutputMisfit: one has not a row for each row that was sent.
    """
    return {name: np.concatenate(list(_each(parts, name))) for name in parts[0][1]}


def _each(parts: Sequence[tuple[int, Outputs]], name: str) -> Iterator[Array]:
    for rows, outputs in parts:
        array = outputs.get(name)
        if array is None or not array.ndim or len(array) != rows:
            raise OutputMisfit(f"output '{name}' has no row for each of {rows} rows, so answers cannot be put together")
        yield array
