"""How long `summarize.py` takes over 10,000 result files, and how much memory.

    python benchmarks/summarize_10k.py [--files N] [--format text|markdown|json]

The target is 5 s on 2 cores with bounded memory. The results are made up (seeded): two thirds MoE over the
token ladder, one third collectives over a size sweep, several backends, five runs of each case, and a few
cells of every bad status. Prints seconds and peak memory (of the largest process).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from factory import collective_case, execution, moe_case, result  # noqa: E402

from collectivex.runtime.types import COLLECTIVE_OPS, Case, Routing  # noqa: E402

RUNS = 5
BACKENDS = tuple(f"backend_{letter}" for letter in "abcdefgh")
BAD = ("incorrect", "failed", "timeout", "infra", "unsupported", "not-run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        total = write(Path(folder), args.files)
        print(f"{args.files} files, {total / args.files / 1e3:.1f} KB each, {os.cpu_count()} cores")
        for _ in range(args.repeat):
            began, before = time.perf_counter(), cpu_seconds()
            command = [sys.executable, str(ROOT / "summarize.py"), folder, "--format", args.format]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            lines = done.stdout.count(b"\n")
            busy = cpu_seconds() - before
            print(f"{seconds:.2f} s ({busy:.2f} s of CPU), peak {peak:.0f} MiB in one process, {lines} lines")
            if done.returncode not in (0, 1) or not done.stdout:
                return 1
    return 0


def cpu_seconds() -> float:
    """Of all children so far: what other load on the machine does not change much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write(folder: Path, files: int) -> int:
    """Write executions of up to 1000 cells each; returns the bytes written."""
    documents = generate(files)
    total = 0
    for number in itertools.count():
        name = f"20261120-{number:06d}-bench"
        some = list(itertools.islice(documents, 1000))
        if not some:
            return total
        for document in some:
            document["identity"]["execution"] = name
        path = execution(folder / name, some)
        total += sum(file.stat().st_size for file in (path / "cells").iterdir())
    raise AssertionError("unreachable")


def generate(files: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(20261120)
    cells = ((case, run) for case in cases() for run in range(RUNS))
    for case, run in itertools.islice(cells, files):
        status = rng.choice(BAD) if rng.random() < 0.02 else "ok"
        yield result(case, run=run, runs=RUNS, status=status, speed=rng.uniform(0.7, 1.4))


def cases() -> Iterator[Case]:
    """Endless: seeds of the routing make ever new cases."""
    for seed in itertools.count(1):
        for backend, dtype, tokens in itertools.product(
            BACKENDS, ("bf16", "fp8"), [1 << p for p in range(14)]
        ):
            yield moe_case(tokens, dtype, Routing(seed=seed), backend=backend)
        if seed == 1:
            for backend, op, power in itertools.product(BACKENDS, COLLECTIVE_OPS, range(10, 30)):
                yield collective_case(op, 1 << power, backend=backend)


if __name__ == "__main__":
    sys.exit(main())
