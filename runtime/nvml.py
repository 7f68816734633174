"""Clocks, temperature, power, health and fabric of NVIDIA GPUs from NVML, the library that nvidia-smi asks.

A reading takes about a millisecond, so it stands right beside the measurement; starting nvidia-smi takes
hundreds, in which a GPU already slows down again. Standard library only.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from .smi import Value, throttle_words

# Values of the enums in nvml.h.
_CLOCK_SM, _CLOCK_MEM = 1, 2
_TEMPERATURE_GPU = 0
_CORRECTED, _UNCORRECTED = 0, 1
_VOLATILE = 0
_FABRIC_COMPLETED = 3


class _FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_t, of drivers from 535 on."""

    _fields_ = (
        ("cluster_uuid", ctypes.c_ubyte * 16),
        ("status", ctypes.c_int),
        ("clique", ctypes.c_uint),
        ("state", ctypes.c_ubyte),
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """NVML, initialised; None where there is no driver or no GPU."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None


def clocks(uuid: str | None = None) -> list[dict[str, Value]] | None:
    """One record per GPU of this machine, or only of the one with this UUID ("GPU-..."); fields as in
    smi.CLOCK_FIELDS, None for what a GPU does not tell. None without NVML."""
    library = _library()
    if library is None:
        return None
    if uuid is not None:
        handle = ctypes.c_void_p()
        status = library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
        return [_record(library, handle, 0)] if status == 0 else []
    count = ctypes.c_uint()
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    found = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
            found.append(_record(library, handle, index))
    return found


def fabric(uuid: str) -> str | None:
    """What GPUs that reach each other over NVLink from other nodes have in common: the UUID of their NVLink
    cluster and their clique in it. None where the fabric ends at the node (no cluster), is not up, or cannot
    be asked for. It names a machine: compare it, publish it nowhere."""
    library = _library()
    handle, info = ctypes.c_void_p(), _FabricInfo()
    if library is None or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) != 0:
        return None
    try:
        status = library.nvmlDeviceGetGpuFabricInfo(handle, ctypes.byref(info))
    except AttributeError:  # an older driver
        return None
    if status != 0 or info.status != 0 or info.state != _FABRIC_COMPLETED or not any(info.cluster_uuid):
        return None
    return f"{bytes(info.cluster_uuid).hex()}.{info.clique}"


def _record(library: Any, handle: ctypes.c_void_p, index: int) -> dict[str, Value]:
    def ask(function: str, *which: int, wide: bool = False) -> int | None:
        value = ctypes.c_ulonglong() if wide else ctypes.c_uint()
        status = library[function](handle, *(ctypes.c_int(w) for w in which), ctypes.byref(value))
        return value.value if status == 0 else None

    power, limit = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetEnforcedPowerLimit")  # milliwatts
    reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", wide=True)
    return {
        "gpu": index,
        "sm_mhz": ask("nvmlDeviceGetClockInfo", _CLOCK_SM),
        "memory_mhz": ask("nvmlDeviceGetClockInfo", _CLOCK_MEM),
        "temperature_c": ask("nvmlDeviceGetTemperature", _TEMPERATURE_GPU),
        "power_w": None if power is None else power / 1000,
        "power_limit_w": None if limit is None else limit / 1000,
        "ecc_corrected": ask("nvmlDeviceGetTotalEccErrors", _CORRECTED, _VOLATILE, wide=True),
        "ecc_uncorrected": ask("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, _VOLATILE, wide=True),
        "throttle": None if reasons is None else throttle_words(reasons),
    }
