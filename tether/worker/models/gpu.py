"""Reads the memory of NVIDIA GPUs through NVML; the only user of that library."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_OK = 0


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``: bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpus:
    """The GPUs of this machine; empty without a driver. Not thread-safe."""

    def __init__(self, library: str = "libnvidia-ml.so.1") -> None:
        self._devices: list[ctypes.c_void_p] = []
        with suppress(OSError, AttributeError):
            self._open(ctypes.CDLL(library))

    def _open(self, nvml: ctypes.CDLL) -> None:
        self._nvml = nvml
        count = ctypes.c_uint()
        if nvml.nvmlInit_v2() != _OK or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _OK:
            return
        for index in range(count.value):
            device = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) == _OK:
                self._devices.append(device)

    def free(self) -> float:
        """Return the free fraction of memory of the fullest GPU; 1 without a GPU."""
        parts = [1.0]
        for device in self._devices:
            memory = _Memory()
            if self._nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == _OK and memory.total:
                parts.append(memory.free / memory.total)
        return min(parts)
