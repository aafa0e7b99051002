"""Rules for operators with inner graphs: branches and loops."""

from __future__ import annotations

from collections.abc import Sequence

from tether.frameworks.onnx.model import Graph, Node
from tether.frameworks.row_proof.facts import (
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    fact,
    needed,
    numbers,
    rule,
    uniform,
)
from tether.frameworks.row_proof.sizes import Size

MAX_ROUNDS = 4
"""Maximum passes over the body of a loop until the facts of its values stay the same."""


def _graph(node: Node, name: str) -> Graph:
    found = node.attributes.get(name)
    if not isinstance(found, Graph):
        raise Mixes(f"has no graph '{name}'")
    return found


@rule("If")
def branch(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Return the facts of the taken branch, if known; else those common to both."""
    condition = needed(inputs, 0)
    uniform(inputs, 0)
    known = numbers(condition)
    names = ("then_branch", "else_branch") if not known else (("then_branch",) if known[0] else ("else_branch",))
    found = [context.run_graph(_graph(node, name), []) for name in names]
    return [joined(values, context, index) for index, values in enumerate(zip(*found, strict=True))]


def joined(values: Sequence[Fact], context: Context, index: int) -> Fact:
    """Return the facts common to several values.

    Raises:
        Mixes: they have the rows on different axes.
    """
    first = values[0]
    if len(values) == 1:
        return first
    if any(one.counts for one in values):
        raise Mixes("computes with the number of rows")
    if any(one.shape is None or one.rank != values[0].rank for one in values):
        if any(one.rows is not None for one in values):
            raise Mixes("has branches whose shapes differ")
        return UNKNOWN
    if any(one.rows != first.rows for one in values):
        raise Mixes("has branches with rows on different axes")
    shape: list[Size] = []
    for axis, sizes in enumerate(zip(*(one.dims for one in values), strict=True)):
        shape.append(sizes[0] if len(set(sizes)) == 1 else context.size(index, axis))
    return fact(shape, first.rows)


@rule("Loop")
def loop(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Require the same number of rounds for all rows; changed values must keep the rows on the same axis."""
    uniform(inputs, 0, 1)
    body = _graph(node, "body")
    state = [needed(inputs, index) for index in range(2, len(inputs))]
    count = len(state)
    if len(body.inputs) != count + 2 or len(body.outputs) < count + 1:
        raise Mixes("has a body that does not fit")
    if any(one.counts for one in (*state, *(one for one in inputs[:2] if one is not None))):
        raise Mixes("computes with the number of rows")
    state = [Fact(one.shape, one.rows) for one in state]
    for _ in range(MAX_ROUNDS):
        # The round number and the condition are the same for all rows, and unknown.
        found = context.run_graph(body, [Fact(()), UNKNOWN, *state])
        if found[0].rows is not None or found[0].counts:
            raise Mixes("goes on for as long as the rows say")
        changed = [joined(pair, context, index) for index, pair in enumerate(zip(state, found[1:], strict=False))]
        if all(_same(old, new) for old, new in zip(state, changed, strict=True)):
            changed = [_afterwards(one, context, index) for index, one in enumerate(changed)]
            return [*changed, *(_stacked(one, context, index) for index, one in enumerate(found[count + 1 :]))]
        state = changed
    raise Mixes("changes its values in a way that is not followed")


def _same(old: Fact, new: Fact) -> bool:
    return old.shape == new.shape and old.rows == new.rows


def _afterwards(value: Fact, context: Context, index: int) -> Fact:
    """Return a value's facts after the last round, whose symbolic sizes may have changed."""
    if value.shape is None:
        return UNKNOWN
    if value.rows is not None and not (value.rows.outer.constant and value.rows.inner.constant):
        raise Mixes("has rows of a size that a round may change")
    shape = [size if size.constant else context.size("after", index, axis) for axis, size in enumerate(value.dims)]
    return fact(shape, value.rows)


def _stacked(value: Fact, context: Context, index: int) -> Fact:
    """Return the facts of one value per round, stacked on a new first axis."""
    if value.counts:
        raise Mixes("computes with the number of rows")
    if value.shape is None:
        return UNKNOWN
    one = _afterwards(value, context, -1 - index)
    rows = one.rows and one.rows._replace(axis=one.rows.axis + 1)
    return fact([context.size("rounds"), *one.dims], rows)
