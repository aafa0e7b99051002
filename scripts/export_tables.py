"""The part of ``export_models.py`` that makes models of tables: scikit-learn, LightGBM and XGBoost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MAKERS: dict[str, Callable[[Path], None]] = {}


def maker(function: Callable[[Path], None]) -> Callable[[Path], None]:
    MAKERS[function.__name__] = function
    return function


def _table() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((80, 5)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] > 0).astype(int) + (x[:, 2] > 1)


def _sklearn(model: Any, path: Path, **options: Any) -> None:
    from skl2onnx import to_onnx

    x, y = _table()
    model.fit(x, y)
    made = to_onnx(model, x[:1], options={id(model): options} if options else None, target_opset=17)
    path.write_bytes(made.SerializeToString())


@maker
def sklearn_logistic(path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _sklearn(make_pipeline(StandardScaler(), LogisticRegression()), path, zipmap=False)


@maker
def sklearn_forest(path: Path) -> None:
    from sklearn.ensemble import RandomForestClassifier

    _sklearn(RandomForestClassifier(3, max_depth=3), path, zipmap=False)


@maker
def sklearn_gradient_boosting(path: Path) -> None:
    from sklearn.ensemble import GradientBoostingRegressor

    _sklearn(GradientBoostingRegressor(n_estimators=3, max_depth=2), path)


@maker
def sklearn_svm(path: Path) -> None:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler
    from sklearn.svm import SVC

    _sklearn(make_pipeline(MinMaxScaler(), SVC(max_iter=50)), path, zipmap=False)


@maker
def sklearn_mlp(path: Path) -> None:
    from sklearn.decomposition import PCA
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline

    _sklearn(make_pipeline(PCA(3), MLPClassifier((6,), max_iter=20)), path, zipmap=False)


@maker
def sklearn_columns(path: Path) -> None:
    """Text and numbers in inputs of their own, and labels that are text."""
    import pandas as pd
    from skl2onnx import to_onnx
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    x, y = _table()
    table = pd.DataFrame({"age": x[:, 0], "pay": x[:, 1], "town": np.where(x[:, 2] > 0, "Ulm", "Bonn")})
    columns = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["age", "pay"]),
            ("text", OneHotEncoder(handle_unknown="ignore"), ["town"]),
        ]
    )
    model = make_pipeline(columns, LogisticRegression()).fit(table, np.array(["no", "yes", "may"])[y])
    made = to_onnx(model, table[:1], options={id(model): {"zipmap": False}}, target_opset=17)
    path.write_bytes(made.SerializeToString())


@maker
def sklearn_text(path: Path) -> None:
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import StringTensorType
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["a good day", "a bad day", "good night", "bad night"]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [1, 0, 1, 0])
    made = to_onnx(
        model,
        initial_types=[("text", StringTensorType([None, 1]))],
        options={id(model): {"zipmap": False}},
        target_opset=17,
    )
    path.write_bytes(made.SerializeToString())


def _trees(model: Any, convert: Callable[..., Any], path: Path, **more: Any) -> None:
    from onnxmltools.convert.common.data_types import FloatTensorType

    x, y = _table()
    model.fit(x, y)
    made = convert(model, initial_types=[("x", FloatTensorType([None, 5]))], target_opset=15, **more)
    path.write_bytes(made.SerializeToString())


@maker
def lightgbm_classifier(path: Path) -> None:
    from lightgbm import LGBMClassifier
    from onnxmltools import convert_lightgbm

    _trees(LGBMClassifier(n_estimators=3, max_depth=2, verbose=-1), convert_lightgbm, path, zipmap=False)


@maker
def lightgbm_regressor(path: Path) -> None:
    from lightgbm import LGBMRegressor
    from onnxmltools import convert_lightgbm

    _trees(LGBMRegressor(n_estimators=3, max_depth=2, verbose=-1), convert_lightgbm, path)


@maker
def xgboost_classifier(path: Path) -> None:
    from onnxmltools import convert_xgboost
    from xgboost import XGBClassifier

    _trees(XGBClassifier(n_estimators=3, max_depth=2), convert_xgboost, path)


@maker
def xgboost_regressor(path: Path) -> None:
    from onnxmltools import convert_xgboost
    from xgboost import XGBRegressor

    _trees(XGBRegressor(n_estimators=3, max_depth=2), convert_xgboost, path)
