"""The machine as it is: GPUs, links, clocks, CPU, NICs. No serial numbers, UUIDs, bus addresses or names of
hosts leave this file.

A tool or file that is absent, fails or hangs gives None or an empty list: a machine that cannot be described
can still be measured. Standard library only; torch is used when the caller has it.
"""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from types import ModuleType

from . import detect, nvml, smi
from .smi import Links, Value

TOOL_TIMEOUT_S = 20.0


class Tool:
    """A program that was started and is read later, so that slow ones run beside each other."""

    def __init__(self, *argv: str):
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )
        except (FileNotFoundError, PermissionError, NotADirectoryError):
            return

    def output(self, timeout_s: float = TOOL_TIMEOUT_S) -> str:
        """What it printed; empty when it is not there, failed, or did not end in time."""
        if self._process is None:
            return ""
        try:
            text, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            try:  # a process in an uninterruptible driver call does not even die; do not wait for it
                self._process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired:
                self._process = None
            return ""
        return text if self._process.returncode == 0 else ""


# ------------------------------------------------------------------------------------------------- GPUs


def gpus(torch: ModuleType | None = None) -> list[dict[str, Value]]:
    """Name, arch ("sm_90", "gfx942"), memory_bytes and sms of every GPU that this process may use."""
    if torch is not None and torch.cuda.is_available():
        return [_torch_gpu(torch, index) for index in range(torch.cuda.device_count())]
    vendor = detect.machine().vendor
    if vendor == "nvidia":
        return smi.nvidia_gpus(_query(smi.GPU_FIELDS))
    if vendor == "amd":
        found = smi.amd_gpus(Tool("amd-smi", "static", "--asic", "--vram", "--json").output())
        rocm = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")
        return found or smi.rocm_gpus(Tool(*rocm).output())
    return []


def _torch_gpu(torch: ModuleType, index: int) -> dict[str, Value]:
    props = torch.cuda.get_device_properties(index)
    arch = props.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{props.major}{props.minor}"
    return {
        "name": props.name,
        "arch": arch,
        "memory_bytes": props.total_memory,
        "sms": props.multi_processor_count,
    }


def _query(fields: tuple[str, ...], *options: str) -> str:
    return Tool(
        "nvidia-smi", *options, "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"
    ).output()


def links() -> Links | None:
    """How the GPUs of this node are joined, or None where nobody can say."""
    vendor = detect.machine().vendor
    if vendor == "nvidia":
        tools = Tool("nvidia-smi", "nvlink", "-s"), Tool("nvidia-smi", "topo", "-m")
        return smi.nvidia_links(tools[0].output(), tools[1].output())
    if vendor == "amd":
        return smi.rocm_links(Tool("rocm-smi", "--showtopotype", "--json").output())
    return None


def driver() -> str | None:
    """Version of the GPUs' kernel driver."""
    nvidia = smi.nvidia_driver(_read(Path("/proc/driver/nvidia/version")))
    if nvidia is None and detect.machine().vendor == "nvidia":  # not every container shows that file
        rows = smi.query(_query(("driver_version", "index")), 2)
        nvidia = rows[0][0] if rows else None
    return nvidia or _read(Path("/sys/module/amdgpu/version")).strip() or None


# ----------------------------------------------------------------------------------------------- clocks


def clocks(uuid: str | None = None, root: Path = Path("/")) -> list[dict[str, Value]]:
    """Clocks, temperature, power, ECC and throttle reasons of every GPU, or of the NVIDIA GPU with this UUID.

    About 1 ms per GPU with NVML or AMD's sysfs files; hundreds through nvidia-smi where NVML is missing.
    """
    found = nvml.clocks(uuid)
    if found is not None:
        return found
    if detect.machine(root).vendor != "nvidia":
        return _amd_clocks(root)
    only = ("-i", uuid) if uuid else ()
    fields = tuple(name for name, _ in smi.CLOCK_FIELDS)
    text = _query(fields, *only) or _query((*fields[:-1], smi.OLD_THROTTLE_FIELD), *only)
    return smi.nvidia_clocks(text)


def _amd_clocks(root: Path) -> list[dict[str, Value]]:
    """From the hwmon files of the amdgpu driver: Hz, microwatts, millidegrees."""
    found: list[dict[str, Value]] = []
    monitors = [
        m for m in root.glob("sys/class/drm/card*/device/hwmon/hwmon*") if _read(m / "name") == "amdgpu\n"
    ]
    for monitor in sorted(monitors, key=lambda m: int(m.parents[2].name.removeprefix("card"))):
        labels = {_read(file).strip(): file.name.split("_")[0] for file in monitor.glob("*_label")}
        power = _scaled(monitor / "power1_average", 1e6)
        found.append(
            {
                "gpu": len(found),
                "sm_mhz": _scaled(monitor / f"{labels.get('sclk', 'freq1')}_input", 1e6),
                "memory_mhz": _scaled(monitor / f"{labels.get('mclk', 'freq2')}_input", 1e6),
                "temperature_c": _scaled(monitor / f"{labels.get('junction', 'temp2')}_input", 1e3),
                "power_w": _scaled(monitor / "power1_input", 1e6) if power is None else power,
                "power_limit_w": _scaled(monitor / "power1_cap", 1e6),
                "throttle": None,
            }
        )
    return found


def _scaled(file: Path, unit: float) -> float | None:
    value = smi.number(_read(file).strip())
    return None if value is None else value / unit


# ------------------------------------------------------------------------------------------ CPU and NICs


def cpu(root: Path = Path("/")) -> dict[str, str | int]:
    """{"model", "cores"}: logical cores. Arm kernels give no model name, so the architecture stands in."""
    found = detect.machine(root)
    model = found.cpu_model if found.cpu_model != "unknown" else platform.machine() or "unknown"
    return {"model": model, "cores": found.cores}


def boot_id() -> str | None:
    """The kernel's random id of this boot. Publish it only hashed."""
    return _read(Path("/proc/sys/kernel/random/boot_id")).strip() or None


# udev's persistent names carry the bus address of the card (ibp26s0, rocep65s0f0); the kernel's do not.
_BUS_NAME = re.compile(r"(?:ib|roce|iw|rdma)(?:P\d+)?[pso]\d+")


def nics(root: Path = Path("/")) -> list[dict[str, str | float | int | None]]:
    """RDMA ports: name, port, rate_gbps (10**9 bits per second), rate ("4X NDR"), link_layer, state."""
    found: list[dict[str, str | float | int | None]] = []
    for index, device in enumerate(sorted(root.glob("sys/class/infiniband/*"))):
        name = f"rdma{index}" if _BUS_NAME.match(device.name) else device.name
        for port in sorted(device.glob("ports/*")):
            rate = re.match(r"([\d.]+) Gb/sec(?: \((.+)\))?", _read(port / "rate"))
            state = re.match(r"\d+: (\w+)", _read(port / "state"))
            found.append(
                {
                    "name": name,
                    "port": smi.number(port.name),
                    "rate_gbps": smi.number(rate[1]) if rate else None,
                    "rate": rate[2] if rate else None,
                    "link_layer": _read(port / "link_layer").strip() or None,
                    "state": state[1] if state else None,
                }
            )
    return found


def _read(path: Path) -> str:
    """The text of a small kernel file, or nothing: they come and go, and some refuse to be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
