"""What nvidia-smi, rocm-smi, amd-smi and the NVIDIA kernel module print, turned into plain values.

Pure functions of text. Output that is cut short, empty or an error message gives fewer values, never an
exception: a machine that cannot be described can still be measured.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Value = float | int | str | None

# Bits of clocks_event_reasons.active (NVML nvmlClocksEventReasons).
THROTTLE = {
    0x1: "gpu-idle",
    0x2: "application-clocks",
    0x4: "power-cap",
    0x8: "hw-slowdown",
    0x10: "sync-boost",
    0x20: "sw-thermal",
    0x40: "hw-thermal",
    0x80: "hw-power-brake",
    0x100: "display-clocks",
}
# These make a number slow for a reason outside the library; idling and a chosen clock do not.
SLOWED = ("power-cap", "hw-slowdown", "sw-thermal", "hw-thermal", "hw-power-brake")

# What `amd-smi metric` says of GPUs from MI300 on, as <name>_violation_status (AMD SMI documentation, "GPU
# violations"). Its further fields, such as low_utilization, are ACTIVE on an idle GPU and left out.
AMD_THROTTLE = {
    "prochot": "prochot",
    "ppt": "power-cap",
    "socket_thermal": "socket-thermal",
    "vr_thermal": "vr-thermal",
    "hbm_thermal": "hbm-thermal",
    "gfx_clk_below_host_limit_thermal": "gfx-thermal",
}

GPU_FIELDS = ("name", "memory.total", "compute_cap")
CLOCK_FIELDS = (
    ("index", "gpu"),
    ("clocks.sm", "sm_mhz"),
    ("clocks.mem", "memory_mhz"),
    ("temperature.gpu", "temperature_c"),
    ("power.draw", "power_w"),
    ("enforced.power.limit", "power_limit_w"),
    ("ecc.errors.corrected.volatile.total", "ecc_corrected"),
    ("ecc.errors.uncorrected.volatile.total", "ecc_uncorrected"),
    ("clocks_event_reasons.active", "throttle"),
)
# Drivers before 535 know the same bits only under this name.
OLD_THROTTLE_FIELD = "clocks_throttle_reasons.active"


@dataclass(frozen=True)
class Links:
    """How the GPUs of this node are joined.

    kind     "nvlink", "xgmi", "pcie", or "mixed" where some pairs have a link and others do not
    per_gpu  links of one GPU, None where unknown
    GBps     their sum per GPU and direction (1e9 bytes per second), None where unknown
    matrix   GPU by GPU what joins them, as the tool spells it ("X" on the diagonal), for people
    """

    kind: str
    per_gpu: int | None
    GBps: float | None = None
    matrix: tuple[tuple[str, ...], ...] = ()


# ----------------------------------------------------------------------------------------------- nvidia


def query(text: str, columns: int) -> list[list[str]]:
    """Rows of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits` that have this many cells."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [[cell.strip() for cell in row] for row in rows if len(row) == columns]


def number(text: str) -> float | int | None:
    """A number, or None for [N/A], [Not Supported], [Unknown Error] and whatever else is not one."""
    if not re.fullmatch(r"-?\d+(?:\.\d+)?", text):
        return None
    return float(text) if "." in text else int(text)


def nvidia_gpus(text: str) -> list[dict[str, Value]]:
    """GPUs out of a query of GPU_FIELDS. Memory comes in MiB; the number of SMs is not to be had here."""
    found: list[dict[str, Value]] = []
    for name, memory, capability in query(text, len(GPU_FIELDS)):
        mib = number(memory)
        arch = "sm_" + capability.replace(".", "") if number(capability) is not None else None
        found.append({"name": name, "arch": arch, "memory_bytes": mib and int(mib * 2**20), "sms": None})
    return found


def nvidia_clocks(text: str) -> list[dict[str, Value]]:
    """One record per GPU out of a query of CLOCK_FIELDS."""
    found: list[dict[str, Value]] = []
    for row in query(text, len(CLOCK_FIELDS)):
        cells = dict(zip((name for _, name in CLOCK_FIELDS), row, strict=True))
        reasons = cells.pop("throttle")
        record: dict[str, Value] = {name: number(cell) for name, cell in cells.items()}
        hexadecimal = re.fullmatch(r"0x[0-9a-fA-F]+", reasons)
        record["throttle"] = throttle_words(int(reasons, 16)) if hexadecimal else None
        found.append(record)
    return found


def throttle_words(mask: int) -> str:
    """0x44 -> "power-cap,hw-thermal"; 0 -> "none"."""
    words = [word for bit, word in THROTTLE.items() if mask & bit]
    unknown = mask & ~sum(THROTTLE)
    return ",".join([*words, *([hex(unknown)] if unknown else [])]) or "none"


def nvidia_driver(text: str) -> str | None:
    """The driver's version out of /proc/driver/nvidia/version."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)?)", text)
    return found[1] if found else None


def nvlink_status(text: str) -> list[tuple[int, float]]:
    """Per GPU the active links and their summed GB/s in one direction, out of `nvidia-smi nvlink -s`."""
    found: list[tuple[int, float]] = []
    for line in text.splitlines():
        if re.match(r"GPU \d+:", line):
            found.append((0, 0.0))
        elif found and (link := re.match(r"\s+Link \d+: ([\d.]+) GB/s", line)):
            count, rate = found[-1]
            found[-1] = (count + 1, rate + float(link[1]))
    return found


def topology(text: str) -> tuple[tuple[str, ...], ...]:
    """The GPU by GPU part of the matrix of `nvidia-smi topo -m`; empty unless it is whole."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    header = next((line for line in lines if re.match(r"\s*GPU0\b", line)), "")
    count = len(re.findall(r"\bGPU\d+\b", header))
    rows = [
        line.split()[1 : count + 1] for line in lines if re.match(r"GPU\d+\s+\S+", line) and line != header
    ]
    whole = len(rows) == count and all(len(row) == count for row in rows)
    return tuple(tuple(row) for row in rows) if whole else ()


def nvidia_links(status_text: str, topology_text: str) -> Links | None:
    """Links out of both tools: `nvlink -s` counts them, the matrix says who is joined to whom.

    Without `nvlink -s` (it fails in some virtual machines) the count comes from the matrix. There NV18
    towards every GPU means 18 links to a switch, but NV6 towards each of three others means 3 * 6. More than
    18 in total exists on no GPU so far, so such a sum is a switch.
    """
    matrix = topology(topology_text)
    status = [gpu for gpu in nvlink_status(status_text) if gpu[0]]
    per_gpu = min((count for count, _ in status), default=None)
    rate = min((rate for _, rate in status), default=None)
    pairs = [cell for i, row in enumerate(matrix) for j, cell in enumerate(row) if i != j]
    if not pairs:
        return Links("nvlink", per_gpu, rate) if per_gpu else None
    joined = [cell.startswith("NV") for cell in pairs]
    if not any(joined):
        return Links("pcie", None, None, matrix)
    if per_gpu is None:
        first = [int(cell[2:]) for cell in matrix[0] if re.fullmatch(r"NV\d+", cell)]
        per_gpu = sum(first) if sum(first) <= 18 else max(first)
    return Links("nvlink" if all(joined) else "mixed", per_gpu, rate, matrix)


# -------------------------------------------------------------------------------------------------- amd


def _json(text: str) -> Any:
    """The JSON document in a tool's output, after any warnings printed before it; None when there is none."""
    start = min((i for i in (text.find("{"), text.find("[")) if i >= 0), default=-1)
    try:
        return json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None


def _cards(text: str) -> list[dict[str, str]]:
    """rocm-smi writes {"card0": {...}, "card1": {...}, "system": {...}}."""
    document = _json(text)
    if not isinstance(document, dict):
        return []
    names = sorted((n for n in document if re.fullmatch(r"card\d+", n)), key=lambda n: int(n[4:]))
    return [document[name] for name in names]


def rocm_gpus(text: str) -> list[dict[str, Value]]:
    """GPUs out of `rocm-smi --showproductname --showmeminfo vram --json`. Memory in bytes."""
    return [
        {
            "name": card.get("Card Series") or card.get("Card series") or "AMD GPU",
            "arch": card.get("GFX Version"),
            "memory_bytes": number(str(card.get("VRAM Total Memory (B)"))),
            "sms": None,
        }
        for card in _cards(text)
    ]


def rocm_links(text: str) -> Links | None:
    """Links out of `rocm-smi --showtopotype --json`: every pair once. Each XGMI peer is one link."""
    document = _json(text)
    system = document.get("system") if isinstance(document, dict) else None
    pairs = []
    for name, kind in (system or {}).items():
        if found := re.search(r"Link type between DRM devices (\d+) and (\d+)", name):
            pairs.append((int(found[1]), int(found[2]), str(kind)))
    if not pairs:
        return None
    count = 1 + max(max(i, j) for i, j, _ in pairs)
    matrix = [["X" if i == j else "?" for j in range(count)] for i in range(count)]
    for i, j, kind in pairs:
        matrix[i][j] = matrix[j][i] = kind
    xgmi = [kind == "XGMI" for _, _, kind in pairs]
    kind = "xgmi" if all(xgmi) else "mixed" if any(xgmi) else "pcie"
    peers = min(row.count("XGMI") for row in matrix)
    return Links(kind, peers or None, None, tuple(tuple(row) for row in matrix))


def amd_gpus(text: str) -> list[dict[str, Value]]:
    """GPUs out of `amd-smi static --asic --vram --json`: a list, in newer versions under "gpu_data"."""
    document = _json(text)
    records = document.get("gpu_data") if isinstance(document, dict) else document
    found: list[dict[str, Value]] = []
    for record in records if isinstance(records, list) else ():
        asic, size = record.get("asic", {}), record.get("vram", {}).get("size", {})
        mib = size.get("value") if isinstance(size, dict) and size.get("unit") == "MB" else None
        units = asic.get("num_compute_units")
        found.append(
            {
                "name": asic.get("market_name", "AMD GPU"),
                "arch": asic.get("target_graphics_version"),
                "memory_bytes": mib and int(mib) * 2**20,
                "sms": units if isinstance(units, int) else None,
            }
        )
    return found


def amd_violations(text: str) -> list[list[str] | None]:
    """For each GPU what holds it back now, out of `amd-smi metric --throttle --json` (ROCm 6.3; --violation
    from 7.0): a list, in newer versions under "gpu_data". None for a GPU of which the tool says nothing: one
    of them is older. A status is a word or, by partition and die, words in lists in a dictionary."""
    document = _json(text)
    records = document.get("gpu_data") if isinstance(document, dict) else document
    found: list[list[str] | None] = []
    for record in records if isinstance(records, list) else ():
        told = record.get("throttle") if isinstance(record, dict) else None
        fields = told if isinstance(told, dict) else {}
        states = {
            word: _states(fields.get(f"{name}_violation_status")) for name, word in AMD_THROTTLE.items()
        }
        known = any(state & {"ACTIVE", "NOT ACTIVE"} for state in states.values())
        found.append([word for word, state in states.items() if "ACTIVE" in state] if known else None)
    return found


def _states(value: Any) -> set[str]:
    """Every word in a value, however deep."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(_states, value)) if value else set()
    return {value} if isinstance(value, str) else set()


def slowed(clocks: Sequence[dict[str, Value]], when: str) -> list[str]:
    """Sentences about GPUs that were held back, out of clock records."""
    said = []
    for record in clocks:
        reasons = [word for word in str(record.get("throttle") or "").split(",") if word in SLOWED]
        if reasons:
            said.append(f"GPU {record['gpu']} was held back {when}: {', '.join(reasons)}")
    return said
