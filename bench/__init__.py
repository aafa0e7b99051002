"""Measurements of Tether beside raw ONNX Runtime and a bare FastAPI server; run with ``make bench``."""
