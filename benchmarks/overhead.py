"""What the harness adds: its chained period over that of a bare loop of the same calls, in one process group.

    python benchmarks/overhead.py --ranks 4          GPUs when there are any, else gloo on CPU

The bare loop is what one would write by hand: warm up, one mark, N calls, one mark. The two alternate
(A B B A ...) in the same processes over the same buffers.
Target on GPUs: ratio of medians within 2 % of 1.
Not a test: a timed test fails for reasons that are nobody's fault.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from collectivex.runtime.types import Case, Collective, Moe, Sampling  # noqa: E402

SAMPLING = Sampling(trials=1, chain_blocks=24, chain_block=8)
CALLS = 24 * 8
ROUNDS = 24


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


def rank_main(gpu: bool) -> None:
    from collectivex.backends.base import Context
    from collectivex.backends.torch_dist import Backend
    from collectivex.runtime import environment, oracle, routing
    from collectivex.runtime.device import CpuDevice, GpuDevice
    from collectivex.runtime.heartbeat import Heartbeat
    from collectivex.runtime.measure import Bench, chained
    from collectivex.runtime.problem import MoeProblem
    from collectivex.runtime.worker import aligner, join

    where = environment.rank_environment()
    heart = Heartbeat(Path(sys.argv[sys.argv.index("--logs") + 1]), where.rank)
    device = GpuDevice(where.local_rank) if gpu else CpuDevice()
    ranks, group = join(where, device, heart)
    backend = Backend()
    backend.setup(Context(ranks, device, group))
    gc.disable()  # for both alike; the harness does it for every chain
    bench = Bench(device, ranks, SAMPLING, aligner(ranks, device, group), heart.beat)

    def bare(call) -> float:
        device.synchronize()
        ranks.barrier()
        bench.align()
        for _ in range(3 * 8):
            call()
        first = device.mark()
        for _ in range(CALLS):
            call()
        last = device.mark()
        device.synchronize()
        return device.elapsed_us(first, last) / CALLS

    def harness(call) -> float:
        return statistics.fmean(chained(bench, call, "call").samples_us)

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
        rounds: list[tuple[float, float]] = []
        for index in range(ROUNDS):
            pair = [harness, bare] if index % 2 else [bare, harness]
            times = {way: statistics.median(ranks.all_gather(way(call))) for way in pair}
            rounds.append((times[harness], times[bare]))
        if ranks.rank == 0:
            ratios = sorted(a / b for a, b in rounds)
            line = {
                "case": f"{case.shape.label} {case.mode}",
                "ranks": ranks.size,
                "bare_us": round(statistics.median(b for _, b in rounds), 2),
                "harness_us": round(statistics.median(a for a, _ in rounds), 2),
                "ratio_of_medians": round(
                    statistics.median(a for a, _ in rounds) / statistics.median(b for _, b in rounds), 4
                ),
                "ratio_of_minima": round(min(a for a, _ in rounds) / min(b for _, b in rounds), 4),
                "ratio_quartiles": [round(ratios[len(ratios) * q // 4], 4) for q in (1, 2, 3)],
            }
            print(json.dumps(line), flush=True)
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
