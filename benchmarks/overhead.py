"""What the harness adds: its chained period over that of a bare loop of the same calls, in one process group.

    python benchmarks/overhead.py --ranks 4          GPUs when there are any, else gloo on CPU

The bare loop is what one would write by hand: warm up, one mark, N calls, one mark. Each round is bare,
harness, bare, marked, in the same processes over the same buffers. All that the harness puts into its
loop is a mark behind each block of calls; `marked` is that loop with a mark behind every single call.

  ratio     harness over the bare loop right before it. It has whatever the host did in the meantime
  control   the second bare loop over the first: by how much the same loop differs from itself
  quiet     harness over bare again, each by its tenth percentile over the rounds: what a disturbed host only
            adds to (timeit takes the least for the same reason)
  mark_us   what a mark costs the loop: marked less the bare loop right before it
  added     1 + mark_us over the length of a block: the same ratio, found without the noise of a busy host,
            which divides by the number of calls in a block as the mark does

Each is held against one loop, not against the mean of two: where noise only adds, that mean mostly lies above
the median, and two equal loops would look unequal. The last line has ratio and control over the rounds of all
cases, since a busy host favours neither loop. Every round is kept in rounds.jsonl in the folder of the logs.

Target on GPUs: all but the control within 2 % of 1; the intervals say whether this run could tell.
Not a test: a timed test fails for reasons that are nobody's fault.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from collectivex.runtime import stats  # noqa: E402
from collectivex.runtime.types import Case, Collective, Moe, Sampling  # noqa: E402

SAMPLING = Sampling(trials=1, chain_blocks=6, chain_block=8)
ROUNDS = 50  # short and many
Round = tuple[float, float, float, float]  # us per call: bare, harness, bare, marked


def cases(ranks: int, gpu: bool) -> list[Case]:
    hidden, experts, topk = (7168, 256, 8) if gpu else (512, 16, 4)
    made = [
        Case("torch_dist", "", "in-place", Collective("all_reduce", size, "bfloat16"), ranks)
        for size in (4096, 1 << 20, 1 << 24)
    ]
    for variant, mode in (("padded", "low-latency"), ("cached", "cached"), ("full", "normal")):
        for tokens in (1, 128):
            shape = Moe("overhead", hidden, topk, experts, tokens)
            made.append(Case("torch_dist", variant, mode, shape, ranks))
    return made


def median_of(ratios: list[float]) -> tuple[float, list[float]]:
    """With its distribution-free 95 % interval, as results have it."""
    interval = stats.quantile_interval(sorted(ratios), 50)
    return round(statistics.median(ratios), 4), [round(interval[end], 4) for end in ("low", "high")]


def both(rounds: list[Round]) -> dict:
    """`ratio` and `control`."""
    ratio, ratio_interval = median_of([ours / bare for bare, ours, _, _ in rounds])
    control, control_interval = median_of([second / first for first, _, second, _ in rounds])
    return {
        "ratio": ratio,
        "ratio_interval": ratio_interval,
        "control": control,
        "control_interval": control_interval,
    }


def compare(rounds: list[Round], block: int) -> dict:
    """`block`: calls to a mark."""
    added, added_interval = median_of([1 + (marked / bare - 1) / block for *_, bare, marked in rounds])
    quietest, quietest_interval = quiet(rounds)
    return {
        "bare_us": round(
            statistics.median(us for first, _, second, _ in rounds for us in (first, second)), 2
        ),
        "harness_us": round(statistics.median(ours for _, ours, *_ in rounds), 2),
        "mark_us": round(statistics.median(marked - bare for *_, bare, marked in rounds), 2),
        **both(rounds),
        "quiet": quietest,
        "quiet_interval": quietest_interval,
        "added": added,
        "added_interval": added_interval,
    }


def quiet(rounds: list[Round]) -> tuple[float, list[float]]:
    """Tenth percentile of the harness over that of the bare loops, with its 95 % interval by resampling the
    rounds (percentile bootstrap)."""

    def ratio(drawn: list[Round]) -> float:
        bare = sorted(us for first, _, second, _ in drawn for us in (first, second))
        return stats.percentile(sorted(ours for _, ours, *_ in drawn), 10) / stats.percentile(bare, 10)

    rng = random.Random(0)
    again = sorted(ratio(rng.choices(rounds, k=len(rounds))) for _ in range(2000))
    return round(ratio(rounds), 4), [round(again[50], 4), round(again[1949], 4)]


def rank_main(gpu: bool) -> None:
    from collectivex.backends.base import Context
    from collectivex.backends.torch_dist import Backend
    from collectivex.runtime import environment, oracle, routing
    from collectivex.runtime.device import CpuDevice, GpuDevice
    from collectivex.runtime.heartbeat import Heartbeat
    from collectivex.runtime.measure import DROPPED_BLOCKS, Bench, chained, run_chain
    from collectivex.runtime.problem import MoeProblem
    from collectivex.runtime.worker import aligner, join

    where = environment.rank_environment()
    logs = Path(sys.argv[sys.argv.index("--logs") + 1])
    heart = Heartbeat(logs, where.rank)
    device = GpuDevice(where.local_rank) if gpu else CpuDevice()
    ranks, group = join(where, device, heart)
    backend = Backend()
    backend.setup(Context(ranks, device, group))
    gc.disable()  # for all alike; the harness does it for every chain
    bench = Bench(device, ranks, SAMPLING, aligner(ranks, device, group), heart.beat)

    def harness(call) -> tuple[float, int]:
        """The mean of its blocks, as the bare loop has one: a median would leave out what disturbed it."""
        series = chained(bench, call, "call")
        return statistics.fmean(series.samples_us), series.per_sample

    def bare(call, calls: int) -> float:
        """As long as the harness's chain, and warmed up as long: one mark before and one behind."""
        device.synchronize()
        ranks.barrier()
        bench.align()
        for _ in range(DROPPED_BLOCKS * calls):
            call()
        first = device.mark()
        for _ in range(SAMPLING.chain_blocks * calls):
            call()
        last = device.mark()
        device.synchronize()
        return device.elapsed_us(first, last) / (SAMPLING.chain_blocks * calls)

    def marked(call, calls: int) -> float:
        """The harness's loop again, as long, with a mark behind every call."""
        marks = run_chain(bench, call, (DROPPED_BLOCKS + SAMPLING.chain_blocks) * calls, 1)
        kept = marks[DROPPED_BLOCKS * calls :]
        return device.elapsed_us(kept[0], kept[-1]) / (len(kept) - 1)

    everything: list[Round] = []
    for case in cases(ranks.size, gpu):
        if isinstance(case.shape, Collective):
            call = backend.collective(case, case.shape).run
        else:
            problem = MoeProblem.build(case.shape, ranks, routing.build(case.shape, ranks.size), device)
            exchange = backend.moe(case, problem)
            state = exchange.dispatch()
            variant = backend.facts.variant(case)
            rows = oracle.chain_rows(exchange.received(state), problem, variant)
            staged = exchange.stage(state, rows)
            exchange.combine(state, staged)

            def call(exchange=exchange, staged=staged):
                exchange.combine(exchange.dispatch(), staged)

        for _ in range(20):
            call()
        rounds: list[Round] = []
        _, block = harness(call)
        for _ in range(ROUNDS):
            mine = [bare(call, block), harness(call)[0], bare(call, block), marked(call, block)]
            of_ranks = zip(*ranks.all_gather(mine), strict=True)
            first, ours, second, marks = map(statistics.median, of_ranks)
            rounds.append((first, ours, second, marks))
        everything += rounds
        if ranks.rank == 0:
            told = {"case": f"{case.shape.label} {case.mode}", "ranks": ranks.size, "block": block}
            print(json.dumps(told | compare(rounds, block)), flush=True)
            with (logs / "rounds.jsonl").open("a") as kept:
                kept.write(json.dumps(told | {"rounds": rounds}) + "\n")
    if ranks.rank == 0:
        told = {"case": "all together", "ranks": ranks.size, "rounds": len(everything)}
        print(json.dumps(told | both(everything)), flush=True)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--logs", default="out/overhead")
    args = parser.parse_args()
    gpu = (
        subprocess.run(
            [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"]
        ).returncode
        == 0
    )
    if "RANK" in os.environ:
        rank_main(gpu)
        return 0
    from collectivex.runtime.processes import free_port

    common = {**os.environ, "WORLD_SIZE": str(args.ranks), "LOCAL_WORLD_SIZE": str(args.ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, __file__, "--ranks", str(args.ranks), "--logs", args.logs]
    ranks = [
        subprocess.Popen(argv, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(args.ranks)
    ]
    return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
