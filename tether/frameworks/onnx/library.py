"""Imports ONNX Runtime with its telemetry off.

Since 1.32 its Linux wheels write a device id into the home folder and send usage to their maker, unless this
variable is set before they are loaded (https://github.com/microsoft/onnxruntime/pull/27379). Set it to 0 to
allow that.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]
