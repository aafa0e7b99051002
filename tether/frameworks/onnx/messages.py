"""What ONNX Runtime says of a model, in one line for the person who pushed it: without places in its source, with the way out."""

from __future__ import annotations

import re

LONGEST = 300

_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PLACE = re.compile(r"\S*(?:onnxruntime_src/\S+|\.(?:cc|h|hpp):\d+)\S*(?: [^\n]*?\)(?: const)? (?=[A-Z]))?")
"""A file of its source and, where it follows, the C++ signature of a function."""
_OPSET = re.compile(r"Opset (\d+) is under development.*support for domain (\S*) is till opset (\d+)", re.DOTALL)
_IR = re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)")
_UNKNOWN = re.compile(r"No Op registered for (\S+) with domain_version of (\d+)")
_UNBUILT = re.compile(r"Could not find an implementation for (\w+)\((\d+)\) node")


def told(text: str) -> str:
    """Its words in one line, or ours where it is known what helps."""
    if found := _OPSET.search(text):
        opset, domain, most = found.groups()
        how = f"opset_version={most} or less" if domain in ("", "ai.onnx") else f"version {most} or less of that set"
        return f"it uses opset {opset} of '{domain or 'ai.onnx'}', and up to {most} are supported here; export it with {how}"
    if found := _IR.search(text):
        version, most = found.groups()
        return (
            f"it is of ONNX IR version {version}, and up to {most} are supported here; export it with an older onnx package, "
            f"or load it with onnx, set model.ir_version = {most} and save it"
        )
    if found := _UNKNOWN.search(text):
        operator, opset = found.groups()
        return f"there is no operator '{operator[:64]}' in opset {opset}, which it declares; export it with a newer opset_version"
    if found := _UNBUILT.search(text):
        operator, since = found.groups()
        return (
            f"ONNX Runtime has operator '{operator[:64]}' (of opset {since}) not for these types on the processor; "
            "export it with other types (FP32) or another opset_version"
        )
    return plain(text)


def plain(text: str) -> str:
    """Its words in one line, without what could be a path."""
    text = _PLACE.sub("", _PREFIX.sub("", text))
    return " ".join(word for word in text.split() if "/" not in word)[:LONGEST]
