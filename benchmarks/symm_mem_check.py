"""Is `symm_mem` right and fast on these GPUs, and would another launch be faster? One call answers all of it.

    python benchmarks/symm_mem_check.py --ranks 4 2 --out OUT       one process per GPU, two groups in turn
    python benchmarks/symm_mem_check.py --rehearse                  the same steps on CPU, interpreted, tiny

Prints one JSON object a line, and writes every line, and each rank's errors, below OUT:
  correct   the whole oracle, per mode and dtype: the tokens that were checked, and what was wrong
  replayed  the output of a captured chain after many replays
  pair      period of dispatch + combine in a replayed graph beside torch_dist's padded all-to-all over NCCL,
            each phase on its own from aligned ranks, bytes to other ranks over the link's speed ("floor_us"),
            and what the host spends per pair without a graph
  reduce    all_reduce: both kinds beside NCCL, in a replayed graph
  launch    period with other launches, named GROUPSxPARTSwWARPS: the present one, then the best
Ends with what failed; the exit code is 1 then. Ranks that hang or die are killed, and the next group goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from collectivex.backends import symm_mem, torch_dist  # noqa: E402
from collectivex.backends._symm_exchange import (  # noqa: E402
    Launch,
    OneSided,
    combine_launch,
    dispatch_launch,
)
from collectivex.backends.base import Context  # noqa: E402
from collectivex.runtime.types import Case, Collective, Moe  # noqa: E402

# Multicast stays off in every process: on shared hosts it can take GPUs out of service.
SAFE = {
    **symm_mem.FACTS.env,
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "OMP_NUM_THREADS": "1",
}
LINK_GBPS = 450.0  # NVLink 4, one direction, all links of an H200
TURNS = 8  # pairs in a graph
POLLS = 1 << 22  # some four seconds: a mistake in the kernels must not cost minutes


class Bed:
    """One rank's set-up and clock. On a GPU turns are captured and replayed; in rehearsal they are called."""

    def __init__(self, args: argparse.Namespace):
        import torch
        import torch.distributed as dist

        from collectivex.runtime.device import CpuDevice, GpuDevice
        from collectivex.runtime.ranks import TorchRanks

        self.args, self.rank, self.size = args, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.began, self.wrong = time.perf_counter(), list[str]()
        self.gpu = not args.rehearse
        self.device = GpuDevice(self.rank) if self.gpu else CpuDevice()
        torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if self.gpu else "gloo", device_id=self.device.torch_device if self.gpu else None
        )
        self.ranks = TorchRanks(dist.new_group(backend="gloo"), self.rank, self.size, self.rank, self.size)
        self.hidden, self.topk, self.experts = (7168, 8, 256) if self.gpu else (256, 3, 2 * self.size)
        self.one = torch.ones(1, device=self.device.torch_device)
        self.apart = dist.new_group(backend="nccl" if self.gpu else "gloo")
        self.nccl = torch_dist.Backend()
        self.nccl.setup(Context(self.ranks, self.device, dist.group.WORLD))
        self.backend = symm_mem.Backend()
        self.backend.polls = POLLS if self.gpu else 1 << 16
        self.backend.setup(
            Context(self.ranks, self.device, dist.group.WORLD if self.gpu else self.rehearsal())
        )

    def rehearsal(self) -> str:
        """Symmetric memory in shared files, with the rules of the tests' fake; the group it asks for."""
        import torch
        import torch.distributed._symmetric_memory as symmetric

        sys.path.insert(0, str(ROOT / "tests" / "backends"))
        from symm_ranks import ARENA, Symmetric, round_to_nearest_even

        names = [os.path.join(self.args.out, f"arena-{self.size}-{rank}") for rank in range(self.size)]
        arenas = [torch.from_file(name, shared=True, size=ARENA, dtype=torch.uint8) for name in names]
        fake = Symmetric(self.ranks, arenas)
        symmetric.empty, symmetric.rendezvous = fake.empty, fake.rendezvous
        round_to_nearest_even()
        return Symmetric.GROUP

    def say(self, what: str, **found: Any) -> None:
        if self.rank == 0:
            print(json.dumps({"what": what, "R": self.size, **found}), flush=True)

    def late(self, share: float) -> bool:
        """Whether that share of the time is gone; rank 0 decides."""
        return self.ranks.from_zero(time.perf_counter() - self.began > share * self.args.budget)

    def align(self) -> None:
        import torch.distributed as dist

        dist.all_reduce(self.one, group=self.apart)

    def quiet(self) -> None:
        self.device.synchronize()
        self.ranks.barrier()

    def capture(self, turn: Callable[[], Any], turns: int = TURNS) -> tuple[Callable[[], None], Any]:
        """(replay of `turns` turns, what the last captured turn returned)."""
        import torch

        if not self.gpu:
            return (lambda: [turn() for _ in range(turns)] and None), turn()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                turn()
        torch.cuda.current_stream().wait_stream(stream)
        self.quiet()
        graph, result = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(turns):
                result = turn()
        self.quiet()
        return graph.replay, result

    def period(self, turn: Callable[[], Any], rounds: int = 5, replays: int = 20) -> float:
        """Microseconds a turn in a replayed graph: each rank's median round, the slowest rank's."""
        replay, _ = self.capture(turn)
        rounds, replays = (rounds, replays) if self.gpu else (1, 1)
        found = []
        for _ in range(rounds):
            self.quiet()
            self.align()
            replay()
            replay()
            first = self.device.mark()
            for _ in range(replays):
                replay()
            last = self.device.mark()
            self.device.synchronize()
            found.append(self.device.elapsed_us(first, last) / replays / TURNS)
        return round(max(self.ranks.all_gather(statistics.median(found))), 2)


def problem_of(bed: Bed, tokens: int, dtype: str) -> Any:
    from collectivex.runtime import routing
    from collectivex.runtime.problem import MoeProblem

    shape = Moe("deepseek-v3", bed.hidden, bed.topk, bed.experts, tokens, dtype)
    return MoeProblem.build(shape, bed.ranks, routing.build(shape, bed.size), bed.device)


class Chain:
    """One exchange of `symm_mem`, staged for a chain."""

    def __init__(
        self, bed: Bed, problem: Any, mode: str = "low-latency", launches: tuple[Launch, Launch] | None = None
    ):
        from collectivex.runtime import oracle

        self.bed, self.problem = bed, problem
        case = Case("symm_mem", "one-sided", mode, problem.shape, bed.size)
        reason = bed.backend.why_not(case)
        assert reason is None, reason
        self.variant = bed.backend.facts.variant(case)
        self.exchange = OneSided(bed.backend, problem, known=mode == "cached", launches=launches)
        state = self.exchange.dispatch()
        received = self.exchange.received(state)
        self.staged = self.exchange.stage(state, oracle.chain_rows(received, problem, self.variant))
        self.exchange.combine(state, self.staged)

    def pair(self) -> Any:
        state = self.exchange.dispatch()
        return state, self.exchange.combine(state, self.staged)

    def sound(self) -> None:
        """Raises RuntimeError where a wait was given up."""
        self.bed.quiet()
        self.bed.backend.check(self.exchange.private)


def correctness(bed: Bed, tokens: Sequence[int]) -> None:
    from collectivex.runtime import oracle

    for mode, dtype in itertools.product(("low-latency", "normal", "cached"), ("bf16", "fp8")):
        wrong, did = {}, []
        ladder = tokens if mode == "low-latency" else tokens[:: max(1, len(tokens) // 3)]
        for count in ladder:
            c = Chain(bed, problem_of(bed, count, dtype), mode)
            checks = oracle.check_exchange(c.exchange, c.problem, c.variant, 1, bed.device)
            checks += oracle.check_exchange(c.exchange, c.problem, c.variant, 2, bed.device)
            calls = 12 if bed.gpu else 2
            checks.append(oracle.check_repeated(c.exchange, c.problem, c.variant, calls, bed.device))
            failed = [f"{x.name}: {x.detail}" for x in checks if not x.passed]
            of_ranks = bed.ranks.all_gather(failed)
            if any(of_ranks):
                wrong[count] = next(f for f in of_ranks if f)[:2]
            did.append(count)
        bed.say("correct", mode=mode, dtype=dtype, tokens=did, wrong=wrong)
        bed.wrong += [f"{mode} {dtype} T={count}" for count in wrong]


def replayed(bed: Bed, tokens: Iterable[int]) -> None:
    """A captured chain, replayed with new input, must give what the oracle expects of its last pair."""
    from collectivex.runtime import oracle

    for count, dtype in itertools.product(tokens, ("bf16", "fp8")):
        c = Chain(bed, problem_of(bed, count, dtype))
        replay, (state, out) = bed.capture(c.pair)
        for input_set in (3, 4):
            bed.quiet()
            c.problem.fill(input_set)
            oracle.poison([out])
            bed.quiet()
            for _ in range(40 if bed.gpu else 1):
                replay()
            c.sound()
            checks = oracle.check_dispatch(c.exchange.received(state), c.problem, c.variant, input_set)
            checks.append(oracle.check_chain(out, c.problem, c.variant))
            failed = bed.ranks.all_gather([f"{x.name}: {x.detail}" for x in checks if not x.passed])
            if any(failed):
                bed.wrong.append(f"replayed {dtype} T={count}")
        bed.say("replayed", T=count, dtype=dtype, wrong=next((f for f in failed if f), []))


def pairs(bed: Bed, tokens: Iterable[int]) -> None:
    for count, dtype in itertools.product(tokens, ("bf16", "fp8")):
        c = Chain(bed, problem_of(bed, count, dtype))
        symm = bed.period(c.pair)
        line = {"T": count, "dtype": dtype, "symm_us": symm, **phases(bed, c)}
        wire = {part: max(bed.ranks.all_gather(c.exchange.wire[part])) for part in ("dispatch", "combine")}
        line["floor_us"] = round(sum(wire.values()) / LINK_GBPS / 1e3, 2)
        line["host_us"] = host(bed, c.pair)
        c.sound()
        line["nccl_us"] = padded(bed, c)
        line["faster"] = round(line["nccl_us"] / symm, 2)
        bed.say("pair", **line)


def padded(bed: Bed, c: Chain) -> float:
    """The period of torch_dist's padded exchange of the same rows."""
    from collectivex.runtime import oracle

    case = Case("torch_dist", "padded", "low-latency", c.problem.shape, bed.size)
    variant, exchange = bed.nccl.facts.variant(case), bed.nccl.moe(case, c.problem)
    state = exchange.dispatch()
    staged = exchange.stage(state, oracle.chain_rows(exchange.received(state), c.problem, variant))
    exchange.combine(state, staged)
    return bed.period(lambda: exchange.combine(exchange.dispatch(), staged))


def phases(bed: Bed, c: Chain) -> dict[str, Any]:
    """Each phase between events, ranks aligned, host far ahead: median of the slowest rank's."""
    import torch

    samples: dict[str, list[float]] = {"dispatch": [], "combine": []}
    for _ in range(30 if bed.gpu else 2):
        bed.device.synchronize()
        if bed.gpu:
            torch.cuda._sleep(600_000)
        bed.align()
        marks = [bed.device.mark()]
        state = c.exchange.dispatch()
        marks.append(bed.device.mark())
        c.exchange.combine(state, c.staged)
        marks.append(bed.device.mark())
        bed.device.synchronize()
        samples["dispatch"].append(bed.device.elapsed_us(marks[0], marks[1]))
        samples["combine"].append(bed.device.elapsed_us(marks[1], marks[2]))
    found = {}
    for name, mine in samples.items():
        slowest = [max(of_ranks) for of_ranks in zip(*bed.ranks.all_gather(mine), strict=True)]
        found[f"{name}_us"] = round(statistics.median(slowest), 2)
    return found


def host(bed: Bed, turn: Callable[[], Any]) -> float:
    """Microseconds that the host spends on a turn without a graph, the device being far behind."""
    bed.quiet()
    calls = 100 if bed.gpu else 1
    began = time.perf_counter()
    for _ in range(calls):
        turn()
    spent = (time.perf_counter() - began) / calls * 1e6
    bed.quiet()
    return round(max(bed.ranks.all_gather(spent)), 1)


def reduces(bed: Bed, sizes: Iterable[int]) -> None:
    from collectivex.runtime import oracle

    for size, dtype in itertools.product(sizes, ("bfloat16", "float32")):
        line: dict[str, Any] = {"bytes": size, "dtype": dtype}
        for variant in ("one-shot", "two-shot", ""):
            shape = Collective("all_reduce", size, dtype)
            library = bed.backend if variant else bed.nccl
            case = Case(library.facts.name, variant, "in-place", shape, bed.size)
            if library.why_not(case) is not None:
                continue
            call = library.collective(case, shape)
            checks = [
                check
                for input_set in range(5)
                for check in oracle.check_collective(
                    call, "all_reduce", bed.rank, bed.size, input_set, bed.device
                )
            ]
            failed = [x for x in bed.ranks.all_gather([c.detail for c in checks if not c.passed]) if x]
            if failed:
                line[f"{variant or 'nccl'}_wrong"] = failed[0][0]
                bed.wrong.append(f"all_reduce {variant} {size} {dtype}")
            line[f"{variant or 'nccl'}_us"] = bed.period(call.run)
            call.close()
        bed.say("reduce", **line)


def candidates(bed: Bed, which: str, tokens: int) -> list[Launch]:
    """Launches worth a try: rows whole or in parts, few or many programs, few or many warps."""
    hidden, found = bed.hidden, set()
    programs = (132, 264, 528) if which == "dispatch" else (264, 528, 1056, 2112)
    for parts, count in itertools.product((1, 2, 4, 7, 14), programs):
        width = -(-hidden // parts)
        groups = max(1, min(tokens, count // parts))
        warps = {4, 8} if width > 1024 else {2, 4}
        if width <= 512:
            warps = {1, 2, 4}
        found |= {Launch(groups, parts, w) for w in warps}
    return sorted(found)


def launches(bed: Bed, tokens: int, share: float) -> None:
    """Every candidate for one kernel, the other as it is now, until that share of the time is gone."""
    present = (dispatch_launch(bed.hidden, tokens), combine_launch(bed.hidden, tokens))
    # combine is the same kernel for bf16 and fp8
    for which, dtype in (("dispatch", "bf16"), ("combine", "bf16"), ("dispatch", "fp8")):
        problem, at = problem_of(bed, tokens, dtype), ("dispatch", "combine").index(which)
        every = [present[at], *candidates(bed, which, tokens)]
        times: dict[str, float] = {}
        for launch in every if bed.gpu else every[:3]:
            if bed.late(share):
                break
            both = (launch, present[1]) if which == "dispatch" else (present[0], launch)
            c = Chain(bed, problem, launches=both)
            times["{}x{}w{}".format(*launch)] = bed.period(c.pair, rounds=3, replays=10)
            c.sound()
        if not times:
            return
        first, *others = times.items()
        best = sorted(others, key=lambda item: item[1])[:4]
        bed.say("launch", kernel=which, T=tokens, dtype=dtype, present=first, best=best, tried=len(others))
        if bed.rank == 0:
            path = Path(bed.args.out) / f"launch-{bed.size}-{which}-{dtype}-{tokens}.json"
            path.write_text(json.dumps(times))


def machine(bed: Bed) -> dict[str, Any]:
    import torch

    if not bed.gpu:
        return {"gpu": None, **bed.backend.versions()}
    found = torch.cuda.get_device_properties(bed.device.torch_device)
    return {"gpu": found.name, "processors": found.multi_processor_count, **bed.backend.versions()}


def links(bed: Bed) -> None:
    """Torch reads every peer's memory before any kernel of ours writes to it."""
    window = bed.backend.open({"probe": 4096})
    window.region("probe", (4096,), window.buffer.dtype).fill_(bed.rank + 1)
    bed.quiet()
    start = window._starts["probe"]
    for rank in range(bed.size):
        theirs = window.handle.get_buffer(rank, (window.size,), window.buffer.dtype)[start : start + 4096]
        assert theirs.eq(rank + 1).all(), f"rank {bed.rank} does not see the memory of rank {rank}"
    bed.quiet()
    bed.say("links", ok=True, multicast=bool(getattr(window.handle, "multicast_ptr", 0)))


def one_rank(args: argparse.Namespace) -> int:
    bed = Bed(args)
    bed.say("machine", **machine(bed))
    decode = [1, 2, 3, 8, 16, 32, 64, 100, 128, 256, 512] if bed.gpu else [1, 3]
    links(bed)
    correctness(bed, decode)
    replayed(bed, [1, 37, 128, 512] if bed.gpu else [2])
    bed.say("time", after="correctness", s=round(time.perf_counter() - bed.began, 1))
    pairs(bed, [1, 16, 64, 128, 256, 512, 1024, 4096] if bed.gpu else [2])
    bed.say("time", after="pairs", s=round(time.perf_counter() - bed.began, 1))
    reduces(bed, [4**n << 10 for n in range(9)] if bed.gpu else [4096])
    bed.say("time", after="reduces", s=round(time.perf_counter() - bed.began, 1))
    if not args.no_launches:
        for share, count in ((0.7, 128), (0.8, 1), (0.9, 512), (0.95, 32), (1.0, 4096)):
            launches(bed, count if bed.gpu else min(count, 2), share)
    bed.say("done", s=round(time.perf_counter() - bed.began, 1), wrong=bed.wrong)
    bed.quiet()
    sys.stdout.flush()
    os._exit(1 if bed.wrong else 0)  # no teardown: nothing may hang now


def group(args: argparse.Namespace, size: int) -> int:
    """Start `size` ranks; the exit code once they are done, or were killed because one failed or hung."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {
        **os.environ,
        **SAFE,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if args.rehearse:
        env["TRITON_INTERPRET"] = "1"
    argv = [sys.executable, __file__, "--child", "--out", args.out, "--budget", str(args.budget)]
    argv += [f"--{flag}" for flag in ("rehearse", "no-launches") if getattr(args, flag.replace("-", "_"))]
    errors = [Path(args.out) / f"errors-{size}-{rank}.txt" for rank in range(size)]
    lines = Path(args.out) / f"lines-{size}.jsonl"
    with lines.open("w") as out:
        ranks = [
            subprocess.Popen(
                argv,
                env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=out if r == 0 else subprocess.DEVNULL,
                stderr=errors[r].open("w"),
            )
            for r in range(size)
        ]
        code = watch(ranks, lines, args.budget + 100)
    for rank, path in enumerate(errors):
        text = path.read_text().strip()
        if code and text:
            print(json.dumps({"what": "errors", "R": size, "rank": rank, "tail": text[-700:]}), flush=True)
    return code


def watch(ranks: list[subprocess.Popen], lines: Path, limit_s: float) -> int:
    """Repeat the lines as they come. Ranks that outlive a failed one by 10 s, or the limit, are killed."""
    ends, shown = time.monotonic() + limit_s, 0
    try:
        while True:
            running = [r for r in ranks if r.poll() is None]
            text = lines.read_text()[shown:]
            whole = text[: text.rfind("\n") + 1]
            sys.stdout.write(whole)
            sys.stdout.flush()
            shown += len(whole)
            if not running:
                return max(abs(r.returncode) for r in ranks)
            if any(r.returncode for r in ranks):
                ends = min(ends, time.monotonic() + 10)
            if time.monotonic() > ends:
                print(json.dumps({"what": "killed", "running": len(running)}), flush=True)
                return 1
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 2], help="sizes of the groups, in turn")
    parser.add_argument("--budget", type=float, default=150, help="seconds for each group, launches included")
    parser.add_argument("--out", default="", help="folder for lines, errors and all launches")
    parser.add_argument("--no-launches", action="store_true", help="try no other launches")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, in Triton's interpreter")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return one_rank(args)
    args.out = args.out or tempfile.mkdtemp(prefix="symm_mem_check-")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    codes = [group(args, size) for size in ([2] if args.rehearse else args.ranks)]
    print(json.dumps({"what": "end", "out": args.out, "codes": codes}))
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
