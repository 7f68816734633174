"""Runs of the fake backend with a fault per cell, and what such a run leaves: records and processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

SUITE = """\
schema: collectivex.suite.v1
name: faults
description: cells that go wrong as their fault says, and one that does not
runs: 1
order: declared
deadline_s: %d
sampling: {warmup_iterations: 1, warmup_s: 0, trials: 1, iterations: 4, chain_blocks: 4, chain_block: 2}
groups:
"""
GROUP = """\
  - {family: moe, backends: [fake], workloads: [tiny], dtypes: [bf16], tokens: [%d], modes: [normal],
     variants: [rank-sum], regimes: [fresh, chained], knobs: {latency_us: "dispatch=10,combine=20"%s}}
"""


def write_suite(folder: Path, faults: Sequence[str], deadline: int) -> str:
    """Path of a suite with one cell a fault, in this order; "" is an honest cell."""
    groups = [GROUP % (t, f", fault: {fault}" if fault else "") for t, fault in enumerate(faults, 1)]
    path = folder / "faults.yaml"
    path.write_text(SUITE % deadline + "".join(groups))
    return str(path)


def records(out: Path) -> list[dict]:
    """The records of an execution, in the order of its manifest."""
    cells = json.loads((out / "manifest.json").read_text())["cells"]
    return [json.loads((out / cell["file"]).read_text()) for cell in cells]


def processes(out: Path) -> list[str]:
    """Processes whose command line names the output folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if str(out).encode() in text:
            found.append(text.decode(errors="replace").replace("\0", " "))
    return found
