"""Runs of the fake backend with a fault per cell, and what such a run leaves: records and processes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
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


DEADLINE_S = 3  # an honest cell takes a tenth of a second


def write_suite(folder: Path, faults: Sequence[str], deadline: int = DEADLINE_S) -> str:
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


def until(what: Callable[[], object], seconds: float) -> bool:
    """Whether it became true in time."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(what())


class Box:
    """A machine of a test: the environment of commands that write to `out`, and what they leave."""

    def __init__(self, folder: Path, env: Mapping[str, str]):
        self.folder, self.out = folder, folder / "out"
        self.env = {**env, "OMP_NUM_THREADS": "1"}
        self.env.pop("SLURM_JOB_ID", None)

    def run(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, check=False, timeout=180)

    def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        null = subprocess.DEVNULL
        return subprocess.Popen(argv, env=self.env, stdout=null, stderr=null)

    def started(self) -> bool:
        """Whether the last of two ranks is at work."""
        return until(lambda: list(self.out.glob("logs/fake.r0.0/rank1.beat.json")), 60)

    def records(self) -> list[dict]:
        return records(self.out)

    def left(self) -> list[str]:
        return processes(self.out)

    def ends(self, seconds: float = 20) -> bool:
        return until(lambda: not self.left(), seconds)
