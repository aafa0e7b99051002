"""Reads ONNX files, and imports ONNX Runtime."""
