"""The bare server to compare with: FastAPI and ONNX Runtime, as their documentation would have it.

It answers the same JSON as Tether does, for one model, in one process, without a queue, signatures, keys or workers::

    python -m bench.fastapi_server --port 8080

``--http h11`` is what ``pip install fastapi uvicorn`` gives, ``--http httptools`` the faster parser of fastapi[standard].
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

MODEL = Path(__file__).resolve().parent.parent / "examples" / "digits" / "digits.onnx"
DATATYPES = {"float32": "FP32", "int64": "INT64"}


class Tensor(BaseModel):
    """An input as the Open Inference Protocol writes it."""

    name: str
    datatype: str
    shape: list[int]
    data: list[float]


class InferRequest(BaseModel):
    """The inputs of one inference."""

    inputs: list[Tensor]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Load the model once, at the start."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    app.state.session = ort.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
    yield


app = FastAPI(lifespan=lifespan)


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answers when the server is up."""
    return {"status": "ok"}


@app.post("/v2/models/digits/infer")
async def infer(request: InferRequest) -> dict[str, Any]:
    """Run the model on one request."""
    session: Any = app.state.session
    feeds = {item.name: np.asarray(item.data, dtype=np.float32).reshape(item.shape) for item in request.inputs}
    names = [output.name for output in session.get_outputs()]
    outputs = [
        {
            "name": name,
            "datatype": DATATYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data": array.ravel().tolist(),
        }
        for name, array in zip(names, session.run(names, feeds), strict=True)
    ]
    return {"model_name": "digits", "model_version": "1", "outputs": outputs}


def main() -> None:
    """Serve on loopback until told to stop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--http", choices=("h11", "httptools"), default="h11")
    given = parser.parse_args()
    uvicorn.run(app, host="127.0.0.1", port=given.port, http=given.http, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
