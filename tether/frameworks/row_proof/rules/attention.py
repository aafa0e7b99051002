"""Rules for attention operators, and for sums in equation form (Einsum)."""

from __future__ import annotations

from tether.frameworks.onnx.model import Node
from tether.frameworks.row_proof.facts import (
    MICROSOFT,
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    Rows,
    fact,
    given,
    needed,
    rule,
    text,
    uniform,
)
from tether.frameworks.row_proof.sizes import ONE, Size

FIRST = Rows(0)


def _rows_first(inputs: Inputs, *indices: int) -> None:
    """Raise unless these inputs are omitted or have one entry per row on their first axis."""
    for index in indices:
        found = given(inputs, index)
        if found is not None and (found.rows != FIRST or found.rank < 2):
            raise Mixes("does not get the rows on the first axis of each input")


def _mask(inputs: Inputs, index: int, rank: int) -> None:
    """Check an added mask: one per row, or one for all."""
    found = given(inputs, index)
    if found is None or found.rows == FIRST:
        if found is not None and found.rank != rank:
            raise Mixes("has a mask that lines up with other axes than the rows")
        return
    if found.rows is not None or found.rank > rank or (found.rank == rank and found.dims[0] != ONE):
        raise Mixes("has a mask that lines up with other axes than the rows")


@rule("Attention", since=23)
def attention(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Q, K and V of the rows, a mask of up to four axes; without a cache."""
    _rows_first(inputs, 0, 1, 2)
    query, value = needed(inputs, 0), needed(inputs, 2)
    if any(given(inputs, index) is not None for index in (4, 5, 6)) or any(node.outputs[1:]):
        raise Mixes("keeps a cache, which is not followed")
    _mask(inputs, 3, 4)
    if query.rank not in (3, 4) or value.rank != query.rank:
        raise Mixes("has queries of another rank")
    width = value.dims[-1] if query.rank == 4 else context.size("width")
    return [fact([*query.dims[:-1], width], FIRST)]


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Query, key, value, bias, key_padding_mask, attention_bias; without a cache and without packed inputs."""
    query = needed(inputs, 0)
    _rows_first(inputs, 0, 1, 2, 4)
    uniform(inputs, 3)
    if query.rank != 3 or any(given(inputs, index) is None or needed(inputs, index).rank != 3 for index in (1, 2)):
        raise Mixes("has packed inputs, which are not followed")
    if any(given(inputs, index) is not None for index in range(6, len(inputs))) or any(node.outputs[1:]):
        raise Mixes("keeps a cache, which is not followed")
    padding = given(inputs, 4)
    if padding is not None and padding.rank not in (2, 3):
        raise Mixes("has a mask that lines up with other axes than the rows")
    _mask(inputs, 5, 4)
    return [fact([*query.dims[:2], context.size("width")], FIRST)]


@rule("Attention", domain=MICROSOFT)
def fused_attention(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Input, weights, bias and a mask per row; without a cache."""
    value = needed(inputs, 0)
    _rows_first(inputs, 0, 3)
    uniform(inputs, 1, 2)
    if value.rank != 3 or any(given(inputs, index) is not None for index in (4, 6)) or any(node.outputs[1:]):
        raise Mixes("keeps a cache, which is not followed")
    _mask(inputs, 5, 4)
    return [fact([*value.dims[:2], context.size("width")], FIRST)]


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Input ids, segment ids, five tables, a mask, position ids."""
    _rows_first(inputs, 0, 1, 7, 8)
    uniform(inputs, 2, 3, 4, 5, 6)
    ids = needed(inputs, 0)
    if ids.rank != 2 or any(node.outputs[2:]):
        raise Mixes("has outputs that are not followed")
    return [fact([*ids.dims, context.size("width")], FIRST), fact([ids.dims[0]], FIRST)]


@rule("RotaryEmbedding", since=23)
def rotary_embedding(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    """X, and caches for all rows with the positions of each; caches for each row without positions."""
    value = needed(inputs, 0)
    _rows_first(inputs, 0)
    if given(inputs, 3) is None:
        for index in (1, 2):
            if needed(inputs, index).rows != FIRST or needed(inputs, index).rank != 3:
                raise Mixes("turns by angles that are not those of the rows")
    else:
        _rows_first(inputs, 3)
        uniform(inputs, 1, 2)
    return [Fact(value.shape, value.rows)]


@rule("Einsum", since=12)
def einsum(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    values = [needed(inputs, index) for index in range(len(inputs))]
    if all(one.rows is None for one in values):
        return [UNKNOWN]
    terms, result = _equation(text(node, "equation", ""))
    if len(terms) != len(values) or any(len(term) != one.rank for term, one in zip(terms, values, strict=True)):
        raise Mixes("has an equation that does not fit its inputs")
    letters = {term[one.rows.axis] for term, one in zip(terms, values, strict=True) if one.rows is not None}
    if len(letters) != 1:
        raise Mixes("pairs each row with every other")
    letter = letters.pop()
    if result.count(letter) != 1 or any(term.count(letter) > 1 for term in terms):
        raise Mixes("sums over the rows")
    sizes: dict[str, Size] = {}
    rows: set[tuple[Size, Size]] = set()
    for term, one in zip(terms, values, strict=True):
        if letter in term:
            if one.rows is None:
                raise Mixes("joins the rows with a value that has other elements along them")
            rows.add((one.rows.outer, one.rows.inner))
        for axis, name in enumerate(term):
            known = sizes.get(name, ONE)
            sizes[name] = one.dims[axis] if known == ONE else known
    if len(rows) != 1 or any(name not in sizes for name in result):
        raise Mixes("joins rows that lie on different axes")
    outer, inner = rows.pop()
    return [fact([sizes[name] for name in result], Rows(result.index(letter), outer, inner))]


def _equation(equation: str) -> tuple[list[str], str]:
    """Return the letters of each operand and of the result."""
    plain = equation.replace(" ", "")
    left, arrow, right = plain.partition("->")
    terms = left.split(",")
    letters = "".join(terms)
    if not arrow:
        right = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    if not all(part.isascii() and (part.isalpha() or not part) for part in (*terms, right)):
        raise Mixes("has an equation with an ellipsis, which is not followed")
    return terms, right
