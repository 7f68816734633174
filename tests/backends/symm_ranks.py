"""Ranks as forked processes that share memory, and a symmetric memory that keeps torch's rules: what
test_symm_mem.py runs the real backend on, with its kernels in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/backends/symm_ranks.py RANKS SCENARIO...

prints one JSON object: scenario -> what each rank found, in rank order.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from collectivex.backends.base import Context  # noqa: E402
from collectivex.backends.symm_mem import Backend  # noqa: E402
from collectivex.runtime import oracle, routing  # noqa: E402
from collectivex.runtime.device import CpuDevice  # noqa: E402
from collectivex.runtime.problem import MoeProblem  # noqa: E402
from collectivex.runtime.types import Case, Check, Collective, Moe, Routing  # noqa: E402

if __name__ == "__main__":  # tests that only use the fakes need no Triton
    import triton
    import triton.language as tl

    from collectivex.backends._symm_kernels import _rows_before

    @triton.jit
    def counting_kernel(topk, out, first):
        tl.store(out + tl.arange(0, 4), _rows_before(topk, first, 3, 4, 4, 2, 4))


ARENA = 16 << 20
BOARD = 1 << 16


def shared(size: int) -> torch.Tensor:
    """Zeros that forked processes share, at the same address in each."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


class ProcessRanks:
    """The control plane (`runtime.ranks.Ranks`) of forked processes."""

    def __init__(self, rank: int, barrier: Any, boards: list[torch.Tensor]):
        self.rank, self.size, self.local_rank, self.ranks_per_node = rank, len(boards), rank, len(boards)
        self._barrier, self._boards = barrier, boards

    def barrier(self) -> None:
        self._barrier.wait()

    def all_gather(self, value: Any) -> list[Any]:
        text = pickle.dumps(value)
        self._boards[self.rank][: 8 + len(text)] = torch.tensor([*len(text).to_bytes(8, "little"), *text])
        self.barrier()
        raw = [board.numpy().tobytes() for board in self._boards]
        self.barrier()
        return [pickle.loads(text[8 : 8 + int.from_bytes(text[:8], "little")]) for text in raw]

    def from_zero(self, value: Any) -> Any:
        return self.all_gather(value)[0]


class Symmetric:
    """What `symm_mem` may use of torch.distributed._symmetric_memory, with its rules: a buffer is made by
    `empty`, holds anything, and has one rendezvous, by all ranks, of equal sizes, in the context's group.
    """

    GROUP = "the group"

    def __init__(self, ranks: Any, arenas: list[torch.Tensor]):
        self.ranks, self.arenas, self.used, self.fresh = ranks, arenas, 0, dict[int, int]()

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        (count,) = size
        assert dtype == torch.uint8, "the fake has buffers of bytes"
        start, self.used = self.used, self.used + -(-count // 4096) * 4096
        assert self.used <= ARENA, "out of memory"
        buffer = self.arenas[self.ranks.rank][start : start + count]
        buffer.fill_(0xA5)
        self.fresh[buffer.data_ptr()] = start
        return buffer

    def rendezvous(self, tensor: torch.Tensor, group: Any) -> Handle:
        assert group == self.GROUP, "the context's group"
        start = self.fresh.pop(tensor.data_ptr(), None)
        assert start is not None, "not from `empty`, or a second rendezvous"
        seen = self.ranks.all_gather((start, tensor.numel()))
        assert len(set(seen)) == 1, f"ranks differ: {seen}"
        return Handle([arena[start : start + tensor.numel()] for arena in self.arenas])


class Handle:
    def __init__(self, buffers: list[torch.Tensor]):
        self.buffers = buffers

    def get_buffer(
        self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0
    ) -> torch.Tensor:
        (count,) = sizes
        assert dtype == torch.uint8, "the fake has buffers of bytes"
        assert storage_offset + count <= self.buffers[rank].numel(), "beyond the buffer"
        return self.buffers[rank][storage_offset : storage_offset + count]


class Scenarios:
    """Each method runs on every rank and returns what its test looks at."""

    def __init__(self, ranks: ProcessRanks):
        self.ranks, self.device = ranks, CpuDevice()
        self.backend = Backend()
        self.backend.polls = 1 << 20
        self.backend.setup(Context(ranks, self.device, Symmetric.GROUP))

    def problem(self, tokens: int, dtype: str = "bf16", **more: Any) -> MoeProblem:
        fields = {"hidden": 128, "topk": 4, "experts": 4 * self.ranks.size, **more}
        shape = Moe("test", tokens=tokens, dtype=dtype, **fields)
        return MoeProblem.build(shape, self.ranks, routing.build(shape, self.ranks.size), self.device)

    def case(self, problem: MoeProblem, mode: str = "low-latency") -> Case:
        case = Case("symm_mem", "one-sided", mode, problem.shape, self.ranks.size)
        assert self.backend.why_not(case) is None
        return case

    def checked(self, problem: MoeProblem, mode: str = "low-latency") -> list[Any]:
        """The oracle's whole check of two calls, then three more without it looking between them."""
        case = self.case(problem, mode)
        variant = self.backend.facts.variant(case)
        exchange = self.backend.moe(case, problem)
        checks = [
            *oracle.check_exchange(exchange, problem, variant, 0, self.device),
            *oracle.check_exchange(exchange, problem, variant, 1, self.device),
            oracle.check_repeated(exchange, problem, variant, 3, self.device),
        ]
        exchange.close()
        return verdict(checks)

    def modes(self) -> Any:
        """Every mode and dtype, with tokens and top-k that are no powers of two."""
        return {
            f"{mode} {dtype}": self.checked(self.problem(3, dtype, topk=3), mode)
            for mode in ("low-latency", "normal", "cached")
            for dtype in ("bf16", "fp8")
        }

    def shapes(self) -> Any:
        """One token, rows in parts, uneven and missing tokens."""
        return {
            "one token, fp8 in parts": self.checked(self.problem(1, "fp8", hidden=2304)),
            "parts that end within a block": self.checked(self.problem(2, hidden=1112)),
            "linear": self.checked(self.problem(5, routing=Routing(spread="linear"))),
            "one empty": self.checked(self.problem(3, routing=Routing("zipf", 1.0, spread="one-empty"))),
        }

    def skew(self) -> Any:
        """Pairs back to back without a barrier, each rank late in its turn, input that changes every time."""
        problem = self.problem(2)
        case = self.case(problem)
        variant = self.backend.facts.variant(case)
        exchange = self.backend.moe(case, problem)
        checks = list[Check]()
        for call in range(12):
            problem.fill(call)
            if (call + self.ranks.rank) % 3 == 0:
                time.sleep(0.02)
            state = exchange.dispatch()
            received = exchange.received(state)
            checks += oracle.check_dispatch(received, problem, variant, call)
            staged = exchange.stage(state, oracle.expert_step(received, problem, variant))
            checks.append(oracle.check_combined(exchange.combine(state, staged), problem, variant, call))
        return verdict(checks)

    def launches(self) -> Any:
        """Programs with several tokens each, and programs with none."""
        from collectivex.backends._symm_exchange import Launch, OneSided

        found = {}
        for groups, parts in ((1, 1), (3, 1), (2, 3), (9, 2)):
            problem = self.problem(7, "fp8", hidden=384, topk=2)
            launch = Launch(groups, parts, 4)
            exchange = OneSided(self.backend, problem, known=False, launches=(launch, launch))
            variant = self.backend.facts.variant(self.case(problem))
            checks = oracle.check_exchange(exchange, problem, variant, 0, self.device)
            found[f"{groups} x {parts}"] = verdict(checks)
        return found

    def counted(self) -> Any:
        """[calls, ranks]: rows before a token, counted in blocks of 4 tokens, beside the count in torch."""
        topk = torch.stack([torch.randperm(6)[:3] for _ in range(11)])
        topk[5, 1] = -1
        found = []
        for first in range(12):
            out = torch.full((4,), -1, dtype=torch.int32)
            counting_kernel[(1,)](topk, out, first)
            owners = [{int(e) // 2 for e in ids if e >= 0} for ids in topk[:first]]
            found.append([out.tolist(), [sum(r in o for o in owners) for r in range(4)]])
        return found

    def collectives(self) -> Any:
        """Sizes below and above one program's block; five calls, so that halves and counters come round."""
        found = {}
        for variant in ("one-shot", "two-shot"):
            for mode in ("out-of-place", "in-place"):
                for dtype, size in (("float32", 192), ("bfloat16", 18432), ("float16", 1536)):
                    shape = Collective("all_reduce", size, dtype)
                    case = Case("symm_mem", variant, mode, shape, self.ranks.size)
                    assert self.backend.why_not(case) is None
                    call = self.backend.collective(case, shape)
                    where = (self.ranks.rank, self.ranks.size)
                    checks = [
                        check
                        for input_set in range(4)
                        for check in oracle.check_collective(call, shape.op, *where, input_set, self.device)
                    ]
                    call.close()
                    found[f"{variant} {mode} {dtype}"] = verdict(checks)
        return found

    def wire(self) -> Any:
        problem = self.problem(6, "fp8")
        exchange = self.backend.moe(self.case(problem), problem)
        state = exchange.dispatch()
        counts = state.counts.tolist()
        rows = torch.zeros(sum(counts), 128, dtype=torch.bfloat16)
        exchange.combine(state, exchange.stage(state, rows))
        return {"wire": dict(exchange.wire), "counts": counts, "programs": exchange.sending.programs}

    def turns(self) -> Any:
        """Calls out of turn are refused on the host, before anything is overwritten."""
        problem = self.problem(2)
        exchange = self.backend.moe(self.case(problem), problem)
        state = exchange.dispatch()
        rows = torch.zeros(len(exchange.received(state).rows), 128, dtype=torch.bfloat16)
        old = exchange.stage(state, rows)
        exchange.stage(state, rows)
        new = exchange.stage(state, rows)
        said = [refusal(exchange.dispatch), refusal(lambda: exchange.combine(state, old))]
        exchange.combine(state, new)
        return [*said, refusal(lambda: exchange.combine(state, new))]

    def absent(self) -> Any:
        """The last rank stays away: the others give up after `polls`, and at once in the next call."""
        problem = self.problem(2)
        self.backend.polls = 5000
        exchange = self.backend.moe(self.case(problem), problem)
        if self.ranks.rank == self.ranks.size - 1:
            return None
        began = time.perf_counter()
        state = exchange.dispatch()
        first = time.perf_counter() - began
        said = refusal(lambda: exchange.received(state))
        rows = torch.zeros(len(exchange._valid(state)), 128, dtype=torch.bfloat16)
        staged = exchange.stage(state, rows)
        began = time.perf_counter()
        exchange.combine(state, staged)
        return {"said": said, "seconds": [first, time.perf_counter() - began]}


def verdict(checks: list[Check]) -> list[Any]:
    """[number of checks, what failed]."""
    return [len(checks), [f"{c.name} ({c.phase}): {c.detail}" for c in checks if not c.passed]]


def refusal(call: Callable[[], Any]) -> str | None:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return None


def round_to_nearest_even() -> None:
    """Triton's interpreter truncates float32 to bf16 and loses a carry on the way to fp8; GPUs do neither."""
    from triton.runtime import interpreter

    kinds = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8e4nv": torch.float8_e4m3fn,
    }

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        values = torch.frombuffer(bytearray(data.tobytes()), dtype=kinds[str(source)])
        there = values.to(torch.float32).to(kinds[str(target)]).view(torch.uint8).numpy()
        return there.view(f"uint{target.primitive_bitwidth}").reshape(data.shape)

    assert callable(interpreter._convert_float)
    interpreter._convert_float = convert


def one_rank(names: list[str], ranks: ProcessRanks, arenas: list[torch.Tensor], results: Any) -> None:
    import torch.distributed._symmetric_memory as symmetric

    torch.set_num_threads(1)
    fake = Symmetric(ranks, arenas)
    symmetric.empty, symmetric.rendezvous = fake.empty, fake.rendezvous
    round_to_nearest_even()
    try:
        found = {name: getattr(Scenarios(ranks), name)() for name in names}
    except BaseException:
        traceback.print_exc()
        ranks._barrier.abort()
        raise
    results.put((ranks.rank, found))


def main() -> int:
    size, names = int(sys.argv[1]), sys.argv[2:]
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(size, timeout=240), fork.SimpleQueue()
    boards, arenas = ([shared(n) for _ in range(size)] for n in (BOARD, ARENA))
    boards, arenas = list(boards), list(arenas)
    every = [
        fork.Process(target=one_rank, args=(names, ProcessRanks(r, barrier, boards), arenas, results))
        for r in range(size)
    ]
    for rank in every:
        rank.start()
    ends = time.monotonic() + 300
    while any(rank.is_alive() for rank in every) and time.monotonic() < ends:
        if any(rank.exitcode for rank in every):
            break
        time.sleep(0.02)
    if any(rank.exitcode != 0 for rank in every):
        for rank in every:
            rank.kill()
        return 1
    found = dict(results.get() for _ in every)
    print(json.dumps({name: [found[rank][name] for rank in range(size)] for name in names}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
