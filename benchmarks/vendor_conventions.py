"""What each vendor's benchmark times, and which of our series and reductions comes nearest to it.

docs/fidelity.md explains every convention and cites the files and functions it was read in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from collectivex.runtime.bandwidth import FORMULAS, Document
from collectivex.runtime.types import Case, Moe

WORKLOAD = "deepseek-v3"  # hidden 7168, top-8 of 256: what most of these benchmarks have as their default

PerRank = Sequence[Sequence[float]]  # microseconds, [ranks][samples]


def _rank_means(times: PerRank) -> list[float]:
    return [statistics.fmean(of_rank) for of_rank in times]


# How times of ranks and iterations become one number. Named as the table names it.
REDUCTIONS: Mapping[str, Callable[[PerRank], float]] = {
    "mean of rank means": lambda times: statistics.fmean(_rank_means(times)),
    "least rank mean": lambda times: min(_rank_means(times)),
    "mean of min": lambda times: statistics.fmean(map(min, zip(*times, strict=True))),
    "rank 0's mean": lambda times: statistics.fmean(times[0]),
    "mean of max": lambda times: statistics.fmean(map(max, zip(*times, strict=True))),
    "median of max": lambda times: statistics.median(map(max, zip(*times, strict=True))),
}


class Bytes(NamedTuple):
    """A vendor's numerator. per_rank as in bandwidth.Formula; `of`: whose bytes are divided by the time."""

    per_rank: Callable[[Document, str], list[float]]
    of: str = "mean"  # "mean", "total", or "rank 0"


def _formula(name: str) -> Callable[[Document, str], list[float]]:
    """One of ours that needs nothing but the counts that every result has."""

    def per_rank(document: Document, part: str) -> list[float]:
        moved = FORMULAS[name].per_rank(document, part)
        assert moved is not None
        return moved

    return per_rank


def _elastic(document: Document, part: str) -> list[float]:
    """Rows that arrive, the rank's own included, with what count_bytes adds: K float32 weights, and in
    dispatch K int64 ids."""
    meta = document["case"]["shape"]["topk"] * (12 if part == "dispatch" else 4)
    row = document["bytes"]["row_bytes"][part] + meta
    return [float(sum(rank["rows_received"].values()) * row) for rank in document["bytes"]["ranks"]]


BYTES = {
    "low_latency": Bytes(_formula("deepep_low_latency")),
    "normal": Bytes(_formula("deepep_normal"), "rank 0"),
    "elastic": Bytes(_elastic),
    "picks": Bytes(_formula("per_selection")),
    "flashinfer": Bytes(_formula("flashinfer"), "total"),
    "busbw": Bytes(_formula("busbw")),
}
PARTS = {
    "dispatch": ("dispatch",),
    "combine": ("combine",),
    "roundtrip": ("dispatch", "combine"),
    "call": ("call",),
}


class Ours(NamedTuple):
    """Which of our cells: a case has these values, and at least these knobs."""

    backend: str
    mode: str
    variant: str = ""
    tokens: int = 0
    dtype: str = "bf16"
    op: str = ""
    size: int = 0
    knobs: tuple[tuple[str, int], ...] = ()

    def fits(self, case: Case) -> bool:
        shape = case.shape
        if (case.backend, case.mode, case.variant, shape.dtype) != self[:3] + (self.dtype,):
            return False
        if not set(self.knobs) <= set(case.knobs):
            return False
        if isinstance(shape, Moe):
            same = (shape.workload, shape.tokens) == (WORKLOAD, self.tokens)
            return same and (shape.routing.kind, shape.routing.spread) == ("uniform", "even")
        return (shape.op, shape.bytes) == (self.op, self.size)

    def __str__(self) -> str:
        what = f"{self.op} of {self.size} bytes" if self.op else f"T = {self.tokens}"
        return f"{self.backend} {self.variant} {self.mode}, {what}, {self.dtype}".replace("  ", " ")


class Line(NamedTuple):
    """One quantity of a benchmark and what it is compared with.

    quantity     its name in the reader's answer
    component, regime, over   our series and its reduction; "a + b" adds two series sample by sample
    differs      what is known to be different, from the sources of both sides; "" for nothing
    shown        the heading of docs/fidelity.md under which numbers show how much that makes
    """

    quantity: str
    ours: Ours
    component: str
    regime: str
    over: str
    differs: str = ""
    shown: str = ""


class Bench(NamedTuple):
    """One file of output: its reader, what was asked of it, its bytes, its lines."""

    name: str
    title: str
    reader: str
    numerator: str
    lines: tuple[Line, ...]
    tokens: int = 0
    sms: int | None = None


# How far theirs is from the nearest of ours, as the sources say it; see docs/fidelity.md.
MEAN = "mean of rank means"
_COLD = "theirs flushes L2 before each call"
_MASKED = "up to 10 of a rank's 1024 picks masked in theirs"
_ONCE = "ranks aligned before dispatch only in theirs, before each in ours"
_REPEATS = "theirs repeats one operation, ours alternates dispatch and combine"
_LAST = "a lower bound: the rank that comes last finds what its peers sent"
_QUANTISED = "ours quantises inside dispatch, theirs before its clock"
_CHAINED = "theirs aligns the ranks once before 30 pairs, ours before each operation"
_PAIR = "dispatch_floor + combine_floor"
_EVENTS = "What an event costs"  # headings of docs/fidelity.md
_QUANTISING = "Quantising inside the window"
_COPIES = "Copies inside the window"
_WARM = "Rows still in L2"
_DRY = "A queue that runs dry"
_HOST = "Bound by the host"

# Contracts whose regime `kernel` aligned the ranks not right before the window, and where that is shown.
UNALIGNED = ("2026.11-1", "2026.11-2")
SKEW = ("until contract 2026.11-2 ours aligned the ranks too early", "Kernel times before contract 2026.11-3")
UNBOUNDED = frozenset({SKEW[1], _DRY, _HOST})  # what is shown there may make any ratio


def _kernel(quantity: str, ours: Ours, component: str, over: str, differs: str) -> tuple[Line, Line]:
    """By their reduction, and what of it cannot be waiting for a rank that came late."""
    return (
        Line(quantity, ours, component, "kernel", over, differs),
        Line(quantity, ours, component, "kernel", "mean of min", _LAST, SKEW[1]),
    )


def _low_latency(
    name: str, title: str, backend: str, dispatch: str, combine: str, waits: bool = False
) -> Bench:
    """`dispatch`, `combine`: how their kernel times come about; `waits`: their pairs do for a busy host."""
    ours = Ours(backend, "low-latency", "ll", 128, "fp8")
    around, shown = "an event on either side of each pair in theirs", _EVENTS
    if waits:
        around, shown = f"{around}; its pairs wait for a busy host", _HOST
    lines = (
        *_kernel("dispatch", ours, "dispatch", MEAN, f"{dispatch}; {_MASKED}"),
        *_kernel("combine", ours, "combine", MEAN, f"{combine}; {_MASKED}"),
        Line("dispatch + combine", ours, "roundtrip", "chained", MEAN, f"{around}; {_MASKED}", shown),
    )
    return Bench(name, title, "low_latency", "low_latency", lines, 128)


def _intranode(name: str, title: str, backend: str, differs: str) -> Bench:
    """`num_sms`: theirs asks for 24 whatever the library's default is."""

    def line(quantity: str, component: str, dtype: str, differs: str, shown: str = "") -> Line:
        ours = Ours(backend, "cached", "cached", 4096, dtype, knobs=(("num_sms", 24),))
        return Line(quantity, ours, component, "chained", "rank 0's mean", differs, shown)

    lines = (
        line("bf16 dispatch", "dispatch_floor", "bf16", differs),
        line("fp8 dispatch", "dispatch_floor", "fp8", _QUANTISED, _QUANTISING),
        line("combine", "combine_floor", "bf16", differs),
    )
    return Bench(name, title, "intranode", "normal", lines, 4096, 24)


def _elastic_bench() -> Bench:
    sizes = "rank r has T - r tokens in theirs; buffers for 4096 tokens in theirs, for 8192 in ours"

    def line(quantity: str, mode: str, variant: str, component: str, regime: str) -> Line:
        ours = Ours("deepep", mode, variant, 4096, "fp8")
        if component == "combine":
            differs = f"weights go back too in theirs; {_COLD}; {sizes}"
            return Line(quantity, ours, component, regime, MEAN, differs)
        return Line(quantity, ours, component, regime, MEAN, f"{_QUANTISED}; {_COLD}; {sizes}", _QUANTISING)

    lines = (
        line("dispatch", "normal", "plain", "dispatch_floor", "chained"),
        line("expanded dispatch", "normal", "expand", "dispatch_floor", "chained"),
        line("cached dispatch", "cached", "plain", "dispatch", "kernel"),
        line("combine", "cached", "plain", "combine", "kernel"),
        line("reduced combine", "cached", "expand", "combine", "kernel"),
    )
    return Bench("deepep_elastic", "DeepEP tests/elastic/test_ep.py", "elastic", "elastic", lines, 4096)


def _mscclpp_lines(ours: Ours, combine: str, shown: str, kernel: bool) -> tuple[Line, ...]:
    """`combine`: what differs in combine, and so in the total; `shown`: where that is shown."""
    marks = "theirs has an event more inside"
    total = f"{marks}; {combine}" if combine else marks
    lines = (
        Line("dispatch", ours, "dispatch_floor", "chained", MEAN),
        Line("combine", ours, "combine_floor", "chained", MEAN, combine, shown),
        Line("total", ours, _PAIR, "chained", MEAN, total, shown or _EVENTS),
    )
    if kernel:
        alone = f"{_COLD} and repeats combine alone"
        lines += (
            *_kernel("dispatch kernel, least rank", ours, "dispatch", "least rank mean", _COLD),
            *_kernel("combine kernel", ours, "combine", MEAN, alone),
        )
    return lines


def _mscclpp_bench(name: str, title: str, *lines: tuple[Line, ...]) -> Bench:
    return Bench(name, title, "mscclpp_bench", "picks", sum(lines, ()), lines[0][0].ours.tokens)


def _mscclpp_graph(name: str, title: str, ours: Ours) -> Bench:
    line = Line("total", ours, "roundtrip", "graph", MEAN, "50 pairs a graph in theirs")
    return Bench(name, title, "mscclpp_bench", "picks", (line,), ours.tokens)


def _flashinfer_benches() -> Iterator[Bench]:
    script = "FlashInfer benchmarks/routines/moe_comm.py"
    for tokens in (128, 4096):
        ours = Ours("flashinfer_ep", "low-latency", "one-sided-zero-copy", tokens)
        drawn = "routing drawn anew in theirs, 1.4 % more bytes at T = 128"
        differs = f"{drawn}; 10 pairs a graph over rotating inputs in theirs; printed to the microsecond"
        total = Line("total", ours, "roundtrip", "graph", "median of max", differs)
        dry = "the queue of theirs runs dry: its windows hold the host's time"
        phases = tuple(
            Line(name, ours, component, "chained", "median of max", dry, _DRY)
            for name, component in (
                ("dispatch", "dispatch_floor"),
                ("combine", "combine_floor"),
                ("total", _PAIR),
            )
        )
        title = f"{script} --num_tokens {tokens}"
        yield Bench(f"flashinfer_t{tokens}", title, "flashinfer", "flashinfer", (total,), tokens)
        name = f"flashinfer_t{tokens}_phases"
        yield Bench(name, f"{title} --per_phase_timing", "flashinfer", "flashinfer", phases, tokens)


def _hybrid_bench() -> Bench:
    ours = Ours("deepep_hybrid", "cached", "plain", 4096)
    waits = f"theirs waits for the host in dispatch (it gives no num_dispatched_tokens); {_COLD}; {_REPEATS}"
    copies = f"one kernel in theirs, the copies beside it too in ours; {_COLD}"
    lines = (
        Line("dispatch", ours, "dispatch_floor", "chained", MEAN, waits),
        Line("combine", ours, "combine_floor", "chained", MEAN, f"{_COLD}; {_REPEATS}"),
        Line("dispatch kernel", ours, "dispatch", "kernel", MEAN, copies),
        Line("combine kernel", ours, "combine", "kernel", MEAN, copies),
    )
    return Bench("hybrid", "DeepEP hybrid-ep tests/test_hybrid_ep.py", "hybrid", "normal", lines, 4096)


def _nccl_benches() -> Iterator[Bench]:
    programs = {
        "all_reduce": "all_reduce_perf",
        "all_gather": "all_gather_perf",
        "all_to_all": "alltoall_perf",
    }
    copy = "torch reduces in place, so ours copies the input first, inside the window"
    for op, program in programs.items():
        lines = []
        for size in (1 << 20, 64 << 20):
            quantity = f"{size} bytes of bfloat16"
            loop = Ours("nccl_tests", "out-of-place", dtype="bfloat16", op=op, size=size)
            torch = loop._replace(backend="torch_dist")
            clock, shown = "one thread and one host clock for all GPUs in theirs", ""
            if op == "all_reduce":
                clock, shown = f"{copy}; {clock}", _COPIES
            itself = ("", "")
            if size == 1 << 20:
                shown = _HOST  # launching takes longer than the call, with or without a copy
                itself = ("theirs differs from itself by as much", _HOST)
            lines += [
                Line(quantity, loop, "call", "loop", "mean of max", *itself),
                Line(quantity, torch, "call", "chained", "mean of max", clock, shown),
                Line(quantity, torch, "call", "graph", "mean of max", f"no graph in theirs; {clock}", shown),
            ]
        yield Bench(f"nccl_tests_{op}", f"nccl-tests {program}", "nccl_tests", "busbw", tuple(lines))


_MSCCLPP = "MSCCL++ test/python/ep/run_ep_bench_python.py"
_EXPERT_MAJOR = Ours("mscclpp_ep", "low-latency", "expert-major", 128)
_THROUGHPUT = Ours("mscclpp_ep", "cached", "throughput", 4096)
_IN_PLACE = _THROUGHPUT._replace(variant="throughput-in-place")
_NCCL_EP = _EXPERT_MAJOR._replace(backend="nccl_ep")
_RECEIVED = ("theirs combines the very rows that dispatch has just written, ours rows of its own", _WARM)
_COPIED = ("ours combines rows of its own, which the library copies into its pool first", _COPIES)
BENCHES: tuple[Bench, ...] = (
    *_nccl_benches(),
    _elastic_bench(),
    _low_latency(
        "deepep_low_latency",
        "DeepEP tests/legacy/test_low_latency.py",
        "deepep_legacy",
        _COLD,
        f"{_COLD}; {_ONCE}",
    ),
    _intranode(
        "deepep_intranode",
        "DeepEP tests/legacy/test_intranode.py",
        "deepep_legacy",
        f"{_COLD}; {_REPEATS}",
    ),
    _hybrid_bench(),
    _mscclpp_bench(
        "mscclpp_latency", f"{_MSCCLPP} --mode latency", _mscclpp_lines(_EXPERT_MAJOR, *_RECEIVED, True)
    ),
    _mscclpp_graph("mscclpp_latency_graph", f"{_MSCCLPP} --mode latency --cuda-graph", _EXPERT_MAJOR),
    _mscclpp_bench(
        "mscclpp_throughput",
        f"{_MSCCLPP} --mode throughput",
        _mscclpp_lines(_IN_PLACE, "", "", False),
        _mscclpp_lines(_THROUGHPUT, *_COPIED, False),
    ),
    _mscclpp_bench("nccl_ep_latency", f"{_MSCCLPP} --backend nccl", _mscclpp_lines(_NCCL_EP, "", "", True)),
    _mscclpp_graph("nccl_ep_latency_graph", f"{_MSCCLPP} --backend nccl --cuda-graph", _NCCL_EP),
    *_flashinfer_benches(),
    _low_latency(
        "uccl_low_latency",
        "UCCL ep/bench/test_low_latency.py",
        "uccl_ep",
        _CHAINED,
        _CHAINED,
        waits=True,
    ),
    _intranode("uccl_intranode", "UCCL ep/bench/test_intranode.py", "uccl_ep", _REPEATS),
)
