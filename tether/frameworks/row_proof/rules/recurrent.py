"""Rules for recurrent layers, whose batch is the second axis of their input."""

from __future__ import annotations

from tether.frameworks.onnx.model import Node
from tether.frameworks.row_proof.facts import (
    Context,
    Fact,
    Inputs,
    Mixes,
    Rows,
    fact,
    flag,
    given,
    needed,
    rule,
    uniform,
    whole,
)
from tether.frameworks.row_proof.sizes import ONE, Size


@rule("GRU", "LSTM", "RNN")
def recurrent(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """X is [time, batch, features]; Y [time, directions, batch, state]; the last states [directions, batch, state]."""
    value = needed(inputs, 0)
    if value.rows is None:
        uniform(inputs, *range(1, len(inputs)))
        raise Mixes("starts from values that are the same for all rows")
    if flag(node, "layout"):
        raise Mixes("has the batch first, which ONNX Runtime does not run")
    if value.rank != 3 or value.rows.axis != 1:
        raise Mixes("runs along the rows as if they were time")
    uniform(inputs, 1, 2, 3, 7)
    _states(inputs, 4, value.rows._replace(axis=0))
    for index in (5, 6):
        _states(inputs, index, value.rows)
    hidden = whole(node, "hidden_size", 0)
    state = Size(hidden) if hidden > 0 else context.size("state")
    directions = Size(2) if node.attributes.get("direction") == b"bidirectional" else ONE
    last = fact([directions, value.dims[1], state], value.rows)
    return [fact([value.dims[0], directions, value.dims[1], state], value.rows._replace(axis=2)), last, last]


def _states(inputs: Inputs, index: int, wanted: Rows) -> None:
    """Require lengths and first states to be omitted or per row: shared ones would fit a single number of rows only."""
    found = given(inputs, index)
    if found is not None and found.rows != wanted:
        raise Mixes("starts from states that are not those of the rows")
