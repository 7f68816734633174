"""Is a node fit to be measured on? `report` looks (on the node, standard library only); `judge` decides.

A GPU that is missing, throttled or still holding somebody's memory gives a slow number that looks like any
other. It ends as `infra` instead.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import smi
from .commands import Run, run
from .detect import machine, slug
from .errors import InfraError
from .smi import number

# What slows a GPU for a reason that is not its own work. A power cap under load is normal.
NORMAL = ("power-cap",)
THROTTLED = {bit: name for bit, name in smi.THROTTLE.items() if name in smi.SLOWED and name not in NORMAL}
USED_GIB = 2.0  # above this, somebody else's work is still there
_NVIDIA = ("index", "name", "memory.used", "memory.total", "clocks_event_reasons.active")


class Unhealthy(InfraError):
    """Nodes that cannot be measured on. `nodes` are their names, for the scheduler only."""

    def __init__(self, problems: Sequence[str], nodes: Sequence[str]):
        super().__init__("; ".join(problems), "retry on other nodes, and tell whoever runs the machine")
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class Wanted:
    """What a node must have: GPUs of this product (a slug such as "h200"; None: any), and this vendor."""

    vendor: str
    gpus: int
    product: str | None = None


def command(args: argparse.Namespace) -> int:
    """Write this node's report to --out/<node>.json. Runs where the ranks will run."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = report(args.vendor)
    name = f"{found['node']}.json"
    (out / f".{name}").write_text(json.dumps(found))
    (out / f".{name}").rename(out / name)
    return 0


def report(vendor: str, execute: Run = run) -> dict[str, Any]:
    """What this node has: {"node", "vendor", "gpus", "cores", "error"}, where a GPU is {"index", "name",
    "used_bytes", "throttle"}; "throttle" has what holds it back, None where nobody can tell."""
    found: dict[str, Any] = {"node": socket.gethostname().partition(".")[0], "vendor": vendor}
    found |= {"gpus": [], "error": None, "cores": os.cpu_count()}
    if vendor == "nvidia":
        query = f"--query-gpu={','.join(_NVIDIA)}"
        done = execute(["nvidia-smi", query, "--format=csv,noheader,nounits"], timeout_s=60)
        if "is not a valid field" in done.out + done.err:  # drivers before 535
            query = query.replace(_NVIDIA[-1], smi.OLD_THROTTLE_FIELD)
            done = execute(["nvidia-smi", query, "--format=csv,noheader,nounits"], timeout_s=60)
        found["gpus"] = nvidia_gpus(done.out) if done.code == 0 else []
        found["error"] = done.said if done.code else None
    elif vendor == "amd":
        done = execute(["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"], timeout_s=60)
        found["gpus"] = amd_gpus(done.out) if done.code == 0 else []
        found["error"] = done.said if done.code else None
        if done.code == 127:  # an image without the tool: the kernel still says which GPUs are there
            names = enumerate(machine().gpus)
            found["gpus"] = [{"index": i, "name": g, "used_bytes": None, "throttle": None} for i, g in names]
            found["error"] = None
        held = amd_throttle(execute)
        if len(held) == len(found["gpus"]):
            for gpu, reasons in zip(found["gpus"], held, strict=True):
                gpu["throttle"] = reasons
    return found


def amd_throttle(execute: Run) -> list[list[str] | None]:
    """What holds each GPU back, as smi.amd_violations; empty where no tool tells. rocm-smi does not: it has
    the driver's older throttle_status, which is always 0 on an MI300 (amdgpu, smu_v13_0_6_ppt.c)."""
    for option in ("--violation", "--throttle"):  # the newer name, and ROCm 6.3's
        done = execute(["amd-smi", "metric", option, "--json"], timeout_s=60)
        held = smi.amd_violations(done.out) if done.code == 0 else []
        if held:
            return [None if of is None else [word for word in of if word not in NORMAL] for of in held]
    return []


def nvidia_gpus(text: str) -> list[dict[str, Any]]:
    """GPUs out of nvidia-smi's CSV. Lines cut short are left out: then GPUs are missing, which is said."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) != len(_NVIDIA):
            continue
        used, bits = number(row[2]), row[4].strip()
        active = int(bits, 16) if bits.startswith("0x") else None
        gpus.append(
            {
                "index": number(row[0]),
                "name": row[1].strip(),
                "used_bytes": None if used is None else int(used * 2**20),
                "throttle": None if active is None else [n for bit, n in THROTTLED.items() if active & bit],
            }
        )
    return gpus


def amd_gpus(text: str) -> list[dict[str, Any]]:
    """GPUs out of rocm-smi's JSON, which says nothing dependable of throttling: see amd_throttle."""
    start = text.find("{")
    try:
        cards = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        cards = {}
    gpus = []
    for name in sorted((n for n in cards if n.startswith("card")), key=lambda n: int(n[4:])):
        card = cards[name]
        used = number(str(card.get("VRAM Total Used Memory (B)")))
        model = str(card.get("Card Series") or card.get("Card series") or "AMD GPU")
        gpus.append({"index": int(name[4:]), "name": model, "used_bytes": used, "throttle": None})
    return gpus


def judge(found: dict[str, Any], wanted: Wanted) -> list[str]:
    """What is wrong with a node, in sentences without its name; nothing when it is fit."""
    gpus = found["gpus"]
    if wanted.vendor == "cpu":
        return []
    if found["error"]:
        return [f"a node cannot be asked for its GPUs: {found['error']}"]
    said = []
    if len(gpus) < wanted.gpus:
        said.append(f"a node has {len(gpus)} of {wanted.gpus} GPUs")
    for gpu in gpus:
        if wanted.product and wanted.vendor == "nvidia" and wanted.product not in slug(gpu["name"]):
            said.append(f"GPU {gpu['index']} is a {gpu['name']}, not of the product {wanted.product}")
        if gpu["throttle"]:
            said.append(f"GPU {gpu['index']} is held back: {', '.join(gpu['throttle'])}")
        used = (gpu["used_bytes"] or 0) / 2**30
        if used > USED_GIB:
            said.append(f"GPU {gpu['index']} has {used:.1f} GiB of its memory in use")
    return said


def untold(reports: Sequence[dict[str, Any]]) -> str | None:
    """Of which GPUs nobody could say whether they are held back, in a sentence; None when it is known of all.
    It is no reason to stop, and not the same as being fit."""
    gpus = [gpu for found in reports for gpu in found["gpus"]]
    unknown = sum(gpu["throttle"] is None for gpu in gpus)
    if not unknown:
        return None
    return f"whether {unknown} of {len(gpus)} GPUs are throttled is unknown: no tool here tells"


def check(folder: Path, nodes: int, wanted: Wanted, when: str) -> None:
    """Judge the reports in a folder. Raises Unhealthy, with the names of the bad nodes. What cannot be judged
    is said on stderr."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*.json"))]
    if remark := untold(reports):
        print(f"note: {when} measuring: {remark}", file=sys.stderr)
    problems, bad = [], []
    if len(reports) != nodes:
        problems.append(f"{len(reports)} of {nodes} nodes answered the health check")
    for found in reports:
        said = judge(found, wanted)
        if said:
            problems += said
            bad.append(found["node"])
    if problems:
        raise Unhealthy([f"{when} measuring: {problem}" for problem in dict.fromkeys(problems)], bad)
