"""Proves from an ONNX graph that rows of a batch are independent."""
