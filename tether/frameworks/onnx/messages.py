"""Rewrites ONNX Runtime's errors for the publisher of a model: one line, no source locations, with a fix."""

from __future__ import annotations

import re

LONGEST = 300

_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PLACE = re.compile(r"\S*(?:onnxruntime_src/\S+|\.(?:cc|h|hpp):\d+)\S*(?: [^\n]*?\)(?: const)? (?=[A-Z]))?")
"""A file of its source and, if it follows, the C++ signature of a function."""
_OPSET = re.compile(r"Opset (\d+) is under development.*support for domain (\S*) is till opset (\d+)", re.DOTALL)
_IR = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_UNKNOWN = re.compile(r"No Op registered for (\S+) with domain_version of (\d+)")
_UNBUILT = re.compile(r"Could not find an implementation for (\w+)\((\d+)\) node")


def told(text: str) -> str:
    """Return its message in one line, or ours if the fix is known."""
    if found := _OPSET.search(text):
        opset, domain, most = found.groups()
        how = f"opset_version={most} or less" if domain in ("", "ai.onnx") else f"version {most} or less of that set"
        return (
            f"it uses opset {opset} of '{domain or 'ai.onnx'}', but at most {most} is supported here; "
            f"export it with {how}"
        )
    if found := _IR.search(text):
        version, most = found.groups()
        return (
            f"it has ONNX IR version {version}, but at most {most} is supported here; export it with an older "
            f"onnx package, or load it with onnx, set model.ir_version = {most} and save it"
        )
    if found := _UNKNOWN.search(text):
        operator, opset = found.groups()
        return f"there is no operator '{operator[:64]}' in opset {opset}, which it declares; export it with a newer opset_version"
    if found := _UNBUILT.search(text):
        operator, since = found.groups()
        return (
            f"ONNX Runtime lacks operator '{operator[:64]}' (of opset {since}) for these types on the processor; "
            "export it with other types (FP32) or another opset_version"
        )
    return plain(text)


def plain(text: str) -> str:
    """Return its message in one line, without anything that could be a path."""
    text = _PLACE.sub("", _PREFIX.sub("", text))
    return " ".join(word for word in text.split() if "/" not in word)[:LONGEST]
