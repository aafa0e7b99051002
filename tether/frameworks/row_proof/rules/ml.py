"""Rules for the operators of ai.onnx.ml: trees, linear models, and preprocessing of tables and text."""

from __future__ import annotations

from tether.frameworks.onnx.model import Many, Node
from tether.frameworks.row_proof.facts import (
    ML,
    UNKNOWN,
    Context,
    Fact,
    Inputs,
    Mixes,
    fact,
    needed,
    product,
    rest_uniform,
    rule,
)
from tether.frameworks.row_proof.rules.shape import reshaped
from tether.frameworks.row_proof.sizes import ONE, Size


def _table(inputs: Inputs) -> Fact:
    """Require rows and columns: these operators take a list for one row, and others for rows of one column."""
    value = needed(inputs, 0)
    rest_uniform(inputs)
    if value.rows is not None and (value.rank != 2 or value.rows.axis != 0):
        raise Mixes("works on a value that is not rows with columns")
    return value


@rule("LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier", domain=ML)
def classifier(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Labels, and scores of each class."""
    value = _table(inputs)
    if value.shape is None or value.rank != 2:
        return [UNKNOWN] * 2
    return [
        fact([value.dims[0]], value.rows),
        fact([value.dims[0], context.size("classes")], value.rows),
    ]


@rule("LinearRegressor", "SVMRegressor", "TreeEnsembleRegressor", "TreeEnsemble", domain=ML)
def regressor(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = _table(inputs)
    if value.shape is None or value.rank != 2:
        return [UNKNOWN]
    return [fact([value.dims[0], context.size("targets")], value.rows)]


@rule("Imputer", "Normalizer", "Scaler", domain=ML)
def per_column(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = _table(inputs)
    return [Fact(value.shape, value.rows)]


@rule("Binarizer", "CategoryMapper", "LabelEncoder", domain=ML)
def per_element(_node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    return [Fact(value.shape, value.rows)]


@rule("OneHotEncoder", domain=ML)
def one_hot_encoder(node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if value.shape is None:
        return [UNKNOWN]
    lists = [node.attributes.get(name, []) for name in ("cats_strings", "cats_int64s")]
    counts = [one.length if isinstance(one, Many) else len(one) for one in lists if isinstance(one, Many | list)]
    size = Size(sum(counts)) if counts.count(0) == 1 else context.size("categories")
    return [fact([*value.dims, size], value.rows)]


@rule("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Select columns, the last axis; a list becomes one row."""
    value, columns = needed(inputs, 0), needed(inputs, 1)
    if columns.rows is not None:
        # Each row's own column of a table, like the look-up of a classifier's labels.
        if value.rows is not None:
            raise Mixes("looks up columns of other rows")
        flat = reshaped(columns, [product(*columns.dims)], context)
        rows = flat.rows and flat.rows._replace(axis=max(value.rank - 1, 1))
        return [fact([*(value.dims[:-1] or (ONE,)), *flat.dims], rows)]
    if value.rows is None:
        return [UNKNOWN]
    if value.rank < 2 or value.rows.axis == value.rank - 1:
        raise Mixes("takes some of the rows")
    count = context.size("columns") if columns.shape is None else product(*columns.shape)
    return [fact([*value.dims[:-1], count], value.rows)]


@rule("StringNormalizer", since=10)
def string_normalizer(node: Node, inputs: Inputs, _context: Context) -> list[Fact]:
    value = needed(inputs, 0)
    if node.attributes.get("stopwords", []) != [] or value.rank != 1:
        raise Mixes("takes words out of all rows together")
    return [Fact(value.shape, value.rows)]


@rule("FeatureVectorizer", domain=ML)
def feature_vectorizer(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    """Join tables side by side."""
    values = [one for one in inputs if one is not None]
    if any(one.rows is None or one.rank != 2 or one.rows != values[0].rows or one.rows.axis for one in values):
        raise Mixes("joins values that are not all rows with columns")
    return [fact([values[0].dims[0], context.size("columns")], values[0].rows)]


@rule("TfIdfVectorizer", since=9)
def tf_idf(_node: Node, inputs: Inputs, context: Context) -> list[Fact]:
    value = _table(inputs)
    if value.shape is None or value.rank != 2:
        return [UNKNOWN]
    return [fact([value.dims[0], context.size("terms")], value.rows)]
