"""Reading ONNX files, and ONNX Runtime itself."""
