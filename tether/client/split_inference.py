"""Synchronous inference as a flow; splits requests that are too large if rows are independent."""

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
"""Requests of one call in flight at a time."""

_TOO_LARGE = (PayloadTooLarge, ResultTooLarge)
_UNSPLIT = "; it cannot be split into several requests: "


def infer(policy: RetryPolicy, model: str, inputs: Inputs, version: Version, outputs: Sequence[str]) -> Flow[Outputs]:
    """Run a model; if a request is too large and the model is batched, split it, :data:`WIDTH` parts at a
    time.

    All parts are answered by the version that answered the first one, within ``policy.timeout`` seconds in
    total.

    Raises:
        PayloadTooLarge, ResultTooLarge, BadTensor: too large, and not batched or only one row.
        TetherError: the server's error. Outputs of other parts are dropped.
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
    """Common fields of all requests of one call; ``until`` is on the clock of the policy."""

    model: str
    version: Version
    outputs: tuple[str, ...]
    until: float


def _whole(policy: RetryPolicy, asked: _Asked, given: Mapping[str, Array]) -> Flow[InferResponse]:
    """Send one request."""
    body, length = oip.build_infer_request(given, outputs=asked.outputs)
    kind = {"content-type": "application/json"}  # for a model without inputs
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
    """Send a request in parts: halve the rows until a part is accepted, then send the rest in parts of that
    size.

    Raises:
        TetherError: ``error``, if splitting cannot help.
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
    """Return the maximum rows of one run; raise ``error`` with a reason if the rows cannot be split."""
    path = served_path(asked.model, asked.version)
    try:
        found = yield from exchange_json(policy, Request("GET", f"{path}/config"), _Config)
        specs = yield from signature(policy, asked.model, asked.version)
    except Forbidden:
        _refuse(error, "splitting needs a key with the scope models:read")
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
    """Send some of the rows, in halves if they are too large; return row counts and outputs."""
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
    """Concatenate outputs in order.

    Raises:
        OutputMisfit: an output does not have one row per input row.
    """
    return {name: np.concatenate(list(_each(parts, name))) for name in parts[0][1]}


def _each(parts: Sequence[tuple[int, Outputs]], name: str) -> Iterator[Array]:
    for rows, outputs in parts:
        array = outputs.get(name)
        if array is None or not array.ndim or len(array) != rows:
            raise OutputMisfit(f"output '{name}' does not have {rows} rows, so the parts cannot be joined")
        yield array
