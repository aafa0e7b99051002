"""Small TensorFlow Lite files, made field by field."""

from __future__ import annotations

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tether.domain.tensor import Array


def recurrent() -> schema.ModelT:
    """``y = x + state``, and ``y`` is the next state: two numbers, one row."""
    model = schema.ModelT()
    model.version = 3
    model.buffers = [_buffer(None), _buffer(np.eye(2, dtype=np.float32)), _buffer(np.zeros(2, np.float32))]
    graph = schema.SubGraphT()
    graph.tensors = [
        _tensor("x", [1, 2], 0),
        _tensor("weights", [2, 2], 1),
        _tensor("recurrent", [2, 2], 1),
        _tensor("bias", [2], 2),
        _tensor("state", [1, 2], 0),
        _tensor("y", [1, 2], 0),
    ]
    graph.tensors[4].isVariable = True
    graph.inputs, graph.outputs = [0], [5]
    graph.operators = [_operator([0, 1, 2, 3, 4], [5])]
    model.subgraphs = [graph]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RNN
    model.operatorCodes = [code]
    model.signatureDefs = [_signature("serving_default")]
    return model


def written(model: schema.ModelT) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _buffer(content: Array | None) -> schema.BufferT:
    made = schema.BufferT()
    if content is not None:
        made.data = np.frombuffer(content.tobytes(), np.uint8)
    return made


def _tensor(name: str, shape: list[int], buffer: int) -> schema.TensorT:
    made = schema.TensorT()
    made.name, made.shape, made.buffer, made.type = name, shape, buffer, schema.TensorType.FLOAT32
    return made


def _operator(inputs: list[int], outputs: list[int]) -> schema.OperatorT:
    made = schema.OperatorT()
    made.inputs, made.outputs = inputs, outputs
    made.builtinOptionsType, made.builtinOptions = schema.BuiltinOptions.RNNOptions, schema.RNNOptionsT()
    return made


def _signature(name: str) -> schema.SignatureDefT:
    made = schema.SignatureDefT()
    made.signatureKey, made.subgraphIndex = name, 0
    made.inputs, made.outputs = [schema.TensorMapT()], [schema.TensorMapT()]
    made.inputs[0].name, made.inputs[0].tensorIndex = "x", 0
    made.outputs[0].name, made.outputs[0].tensorIndex = "y", 5
    return made
