"""What this machine has, without torch and in well under 0.1 s: from the kernel, else nvidia-smi."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import environment
from .commands import TIMED_OUT, run

SMI_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Machine:
    """vendor "nvidia", "amd" or "cpu"; `gpus` one product name (or gfx architecture) per usable GPU."""

    vendor: str
    gpus: tuple[str, ...]
    cpu_model: str
    cores: int

    @property
    def product(self) -> str:
        """Slug for the topology class: "h200", "gfx942", "amd-epyc"."""
        if not self.gpus:
            return slug(self.cpu_model)
        return slug(re.sub(r"^(NVIDIA|AMD|Tesla)\s+", "", self.gpus[0]))


@cache
def machine(root: Path = Path("/")) -> Machine:
    """This machine. `root` stands in for / in tests."""
    model, cores = _cpu(root)
    nvidia = _nvidia_from_kernel(root)
    if not nvidia and root == Path("/"):
        nvidia = _nvidia_from_smi()
    amd = () if nvidia else _amd(root)
    usable = (nvidia or amd)[: environment.visible_gpus()]
    vendor = "cpu" if not usable else "nvidia" if nvidia else "amd"
    return Machine(vendor, usable, model, cores)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _nvidia_from_kernel(root: Path) -> tuple[str, ...]:
    """Product names of the GPUs whose device file is here.

    A container sees the /proc entries of the whole host, but only the device files it was given.
    """
    found: list[tuple[int, str]] = []
    for file in root.glob("proc/driver/nvidia/gpus/*/information"):
        facts = dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", file.read_text(), re.MULTILINE))
        minor = int(facts.get("Device Minor", "-1"))
        if (root / f"dev/nvidia{minor}").exists():
            found.append((minor, facts.get("Model", "unknown")))
    return tuple(model for _, model in sorted(found))


def _nvidia_from_smi() -> tuple[str, ...]:
    """For drivers without /proc entries or device files of that name (WSL, MIG)."""
    done = run(["nvidia-smi", "-L"], timeout_s=SMI_TIMEOUT_S)
    listed = "" if done.code == TIMED_OUT else done.out  # half a list is no list
    return tuple(re.findall(r"^GPU \d+: (.+?) \(UUID", listed, re.MULTILINE))


def _amd(root: Path) -> tuple[str, ...]:
    """gfx architectures of the KFD nodes that have SIMDs (the CPUs are nodes too, with none).

    `gfx_target_version` is major * 10000 + minor * 100 + stepping: 90402 is gfx942 (stepping in hex).
    """
    found = []
    for file in sorted(root.glob("sys/class/kfd/kfd/topology/nodes/*/properties"), key=_node_number):
        facts = dict(line.split(maxsplit=1) for line in file.read_text().splitlines() if " " in line)
        if int(facts.get("simd_count", "0")):
            version = int(facts.get("gfx_target_version", "0"))
            found.append(f"gfx{version // 10000}{version // 100 % 100}{version % 100:x}")
    return tuple(found)


def _node_number(file: Path) -> int:
    return int(file.parent.name)


def _cpu(root: Path) -> tuple[str, int]:
    """Model name and number of logical cores. Arm kernels give no name, so the architecture stands in."""
    other = platform.machine() or "unknown"
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return other, 1
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    cores = re.findall(r"^processor\s*:", text, re.MULTILINE)
    return (model[1].strip() if model else other), max(1, len(cores))
