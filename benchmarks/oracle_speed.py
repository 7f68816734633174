"""What the oracle costs beside the library: milliseconds per checked call, and the fp8 kernel.

    python benchmarks/oracle_speed.py [--tokens 4096] [--hidden 7168] [--ranks 4]

One device stands for rank 0 of R ranks. Its exchange delivers rows that were made beforehand and combines in
no time, so that all that is timed is the harness: fill, expert step, row sums, comparison.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from collectivex.backends.base import Received, Variant
from collectivex.runtime import fp8, oracle, routing
from collectivex.runtime.device import CpuDevice, GpuDevice
from collectivex.runtime.problem import MoeProblem, chunks
from collectivex.runtime.types import Check, Moe

MODELS = (("token-rank", "rank-sum", "final"), ("token-expert", "weighted-sum", "rank-partials"))


class Prepared:
    """An exchange whose every answer was computed beforehand, for each input set."""

    realised: dict[str, Any] = {}
    wire: dict[str, int] = {}

    def __init__(self, problem: MoeProblem, variant: Variant):
        self.problem, wanted = problem, problem.arrivals(variant.layout)
        self.answers = {}
        for s in oracle.REPEATED_SETS:
            rows = torch.empty(
                len(wanted.ids), problem.shape.hidden, dtype=torch.bfloat16, device=problem.device
            )
            for part in chunks(*rows.shape):
                rows[part] = problem.pattern(wanted.ids[part], s).to(torch.bfloat16)
            scales = None
            if problem.shape.dtype == "fp8":
                rows, scales = problem.quantise(rows)
            received = Received(rows, wanted.experts, scales, wanted.weights)
            self.answers[s] = received, oracle.expected_combined(problem, variant, s)

    def dispatch(self) -> int:
        return self.problem.input_set

    def received(self, state: int) -> Received:
        return self.answers[state][0]

    def stage(self, state: int, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def combine(self, state: int, staged: torch.Tensor) -> torch.Tensor:
        return self.answers[state][1]

    def outputs(self) -> tuple[torch.Tensor, ...]:
        return ()

    def close(self) -> None:
        return None


def milliseconds(work: Callable[[], object], device: Any, times: int = 1) -> float:
    device.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        work()
    device.synchronize()
    return (time.perf_counter() - began) * 1e3 / times


def time_oracle(problem: MoeProblem, variant: Variant, device: Any, calls: int) -> bool:
    """Print one line; whether every check passed."""
    exchange = Prepared(problem, variant)
    found: list[Check] = []

    def repeated(times: int) -> None:
        found.append(oracle.check_repeated(exchange, problem, variant, times, device))

    def once() -> None:
        found.extend(oracle.check_exchange(exchange, problem, variant, 1, device))

    repeated(2)
    gpu = device.kind != "cpu"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    once()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20 if gpu else float("nan")
    single, short, long = (
        milliseconds(w, device) for w in (once, lambda: repeated(3), lambda: repeated(3 + calls))
    )
    rows = len(problem.arrivals(variant.layout).ids)
    print(
        f"{variant.combine:13} {problem.shape.dtype}  {rows:6} rows  "
        f"check_exchange {single:8.1f} ms, {extra:5.0f} MiB"
        # the preparation is paid once: taken out by the difference of two lengths
        f"  check_repeated {(long - short) / calls:6.2f} ms per call, {short:7.1f} ms for the first three"
    )
    return all(c.passed for c in found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("tokens", 4096), ("hidden", 7168), ("ranks", 4), ("calls", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = GpuDevice(0) if gpu else CpuDevice()
    passed = []
    for layout, combine, casts in MODELS:
        for dtype in ("bf16", "fp8"):
            shape = Moe("speed", args.hidden, 8, 256, args.tokens, dtype)
            table = routing.build(shape, args.ranks)
            problem = MoeProblem(shape, 0, args.ranks, args.ranks, table, device.torch_device)
            variant = Variant("", "normal", (dtype,), {}, layout=layout, combine=combine, casts=casts)
            passed.append(time_oracle(problem, variant, device, args.calls))
    x = problem.x
    one = milliseconds(lambda: fp8.quantise(x), device, 3)
    one = milliseconds(lambda: fp8.quantise(x), device, 100 if gpu else 3)
    moved = x.numel() * 3 + x.numel() // 128 * 4
    print(f"quantise {tuple(x.shape)}: {one * 1e3:.1f} us, {moved / one / 1e6:.0f} GB/s")
    print("passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
