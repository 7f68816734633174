"""What vendors' own benchmarks print, read by its words: times and bandwidths by the name of what was timed.

Every reader raises Unreadable for output that is cut short, of another shape than asked for, or not of a form
known here. What it takes for the end of each output is the last thing that benchmark prints.
Forms: DeepEP dd758ca and hybrid-ep 94a9f8f (tests/), UCCL 0.1.1 (ep/bench), MSCCL++ feature/ep 3d02152
(test/python/ep), FlashInfer 0.6.18 (benchmarks/routines/moe_comm.py), nccl-tests 2.13 to 2.19.6.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from collectivex.backends._tests_output import Unreadable, read_text

DIGITS = r"[\d.]+"
NUMBER = f"({DIGITS})"


class Told(NamedTuple):
    """One quantity as the benchmark quotes it: microseconds, and GB/s where it prints a bandwidth. Where
    every rank prints a line of its own, the mean of the lines."""

    us: float
    gbps: float | None = None


@dataclass
class Output:
    """`told` by the name of what was timed; `notes` are facts that the numbers do not show."""

    told: dict[str, Told] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Shape(NamedTuple):
    """What was asked of the benchmark. `sms`: that its kernels may use, None where it decides itself."""

    ranks: int
    tokens: int = 0
    sms: int | None = None


Reader = Callable[[str, Shape], Output]


def low_latency(text: str, shape: Shape) -> Output:
    """DeepEP's and UCCL's test_low_latency.py: a line of every rank for the pair and for each kernel."""
    pair = rf"\[rank (\d+)\] Dispatch \+ combine bandwidth: {NUMBER} GB/s, avg_t={NUMBER} us"
    kernels = (
        rf"\[rank (\d+)\] Dispatch bandwidth: {NUMBER} GB/s, avg_t={NUMBER} us \| "
        rf"Combine bandwidth: {NUMBER} GB/s, avg_t={NUMBER} us"
    )
    both, split = (_of_all_ranks(text, pattern, shape.ranks) for pattern in (pair, kernels))
    _of_all_ranks(text, r"\[rank (\d+)\] Dispatch send/recv time: .* us\n", shape.ranks)  # printed last
    return Output(
        {
            "dispatch + combine": _mean([Told(us, gbps) for gbps, us in both]),
            "dispatch": _mean([Told(line[1], line[0]) for line in split]),
            "combine": _mean([Told(line[3], line[2]) for line in split]),
        }
    )


def intranode(text: str, shape: Shape) -> Output:
    """DeepEP's and UCCL's test_intranode.py: rank 0's times with each chunk size, with the default, and the
    best. `told` is the default's, which is what users get."""
    config = re.search(r"\[config\] num_tokens=(\d+),", text)
    _expect("tokens", int(config[1]) if config else None, shape.tokens)
    tuned = (
        rf"\[tuning\] SMs (?P<sms>\d+), NVL chunk (?P<chunk>\w+): (?P<gbps>{DIGITS}) GB/s \(NVL\), "
        rf"(?:avg_t: )?(?P<us>{DIGITS}) us"
    )
    best = (
        r"\[tuning\] Best (?P<what>dispatch|combine)(?: \((?P<dtype>\w+)\))?: SMs \d+, "
        rf"NVL chunk (?P<best>\d+)[,:] {NUMBER} GB/s \(NVL\), t: (?P<best_us>{DIGITS}) us"
    )
    output = Output()
    default: Told | None = None
    for found in re.finditer(f"{tuned}|{best}", text):
        if found["chunk"] == "default":
            _expect("SMs", int(found["sms"]), shape.sms)
            default = Told(float(found["us"]), float(found["gbps"]))
        elif found["what"]:
            name = f"{found['dtype'].lower()} dispatch" if found["dtype"] else found["what"]
            if default is None:
                raise Unreadable(f"has no default configuration of {name}")
            output.told[name], default = default, None
            gain = 100 * (1 - float(found["best_us"]) / output.told[name].us)
            best_of = f"chunk {found['best']} takes {found['best_us']} µs, {gain:.1f} % less than the default"
            output.notes.append(f"{name}: its best, {best_of}")
    _require(output, "fp8 dispatch", "bf16 dispatch", "combine")
    return output


def elastic(text: str, shape: Shape) -> Output:
    """DeepEP's elastic/test_ep.py with its first configuration, fp8 dispatch and bf16 combine: both kernels
    of each operation, added; its bytes over that sum. A line of every rank."""
    if re.findall(r"use_fp8_dispatch=(\d)", text) != ["1"]:
        raise Unreadable("is not of one configuration with use_fp8_dispatch=1")
    most = re.search(r"> Tokens: \d+ \(max: (\d+)\)", text)
    _expect("tokens", int(most[1]) if most else None, shape.tokens)
    output = Output()
    for name in ("dispatch", "expanded dispatch", "cached dispatch", "combine", "reduced combine"):
        pattern = (
            rf"\S EP: +(\d+)/{shape.ranks} \| {name}: .*\(SU\), {NUMBER} us, (\d+) bytes \| "
            rf"(?:copy|reduce): .*GB/s, {NUMBER} us\n"
        )
        lines = _of_all_ranks(text, pattern, shape.ranks)
        output.told[name] = _mean([Told(a + b, moved / (a + b) / 1e3) for a, moved, b in lines])
    if sms := re.search(r"> #SM: (\d+),", text):
        output.notes.append(f"{sms[1]} SMs")
    return output


def mscclpp_bench(text: str, shape: Shape) -> Output:
    """MSCCL++'s run_ep_bench_python.py with one backend: what rank 0 sums up."""
    config = re.search(r"num_ranks=(\d+) tokens/rank=(\d+) ", text)
    _expect("ranks", int(config[1]) if config else None, shape.ranks)
    _expect("tokens", int(config[2]) if config else None, shape.tokens)
    if text.count("=== Summary [") != 1 or "Byte counts: " not in text:
        raise Unreadable("has no whole summary of one backend")
    host, _, kernel = text.partition("--- Kernel-only performance")
    throughput = rf"\s+throughput: avg={NUMBER} GB/s"
    output = Output()
    for name, words in (("dispatch", "Dispatch"), ("combine", "Combine"), ("total", r"Total \(D\+C\)")):
        found = re.search(rf"^{words}(?: \(BF16\))?: +avg={NUMBER} us.*\n{throughput}", host, re.MULTILINE)
        if found is None:
            raise Unreadable(f"has no {name} time")
        output.told[name] = Told(float(found[1]), float(found[2]))
    first = rf"^Dispatch: +avg={NUMBER} us, min={NUMBER} us.*\n{throughput}, @min={NUMBER} GB/s"
    second = rf"^Combine: +avg={NUMBER} us.*\n{throughput}"
    if found := re.search(first, kernel, re.MULTILINE):
        output.told["dispatch kernel, least rank"] = Told(float(found[2]), float(found[4]))
    if found := re.search(second, kernel, re.MULTILINE):
        output.told["combine kernel"] = Told(float(found[1]), float(found[2]))
    if "cuda_graph captured" in text:
        output.notes.append("captured in a CUDA graph")
    return output


def flashinfer(text: str, shape: Shape) -> Output:
    """FlashInfer's moe_comm.py, one shape a file: rank 0's [PERF] lines. TB/s become GB/s."""
    size = re.search(r"\[INFO\] ep_size=(\d+)", text)
    if size is not None:
        _expect("ranks", int(size[1]), shape.ranks)
    line = rf"\[PERF\] a2a_(\w+) *:: median time {NUMBER} ms; .* achieved tb_per_sec {NUMBER} TB/sec\n"
    output = Output({name: Told(float(ms) * 1e3, float(tb) * 1e3) for name, ms, tb in re.findall(line, text)})
    _require(output, "total")
    if "aggregate FLOPS/bandwidth of all participating ranks" not in text:
        raise Unreadable("ends before its last line")
    return output


def hybrid(text: str, shape: Shape) -> Output:
    """DeepEP hybrid-ep's test_hybrid_ep.py in bf16: averages over the ranks, GB/s of rank 0's bytes."""
    if (ranks := re.search(r"=== Torch API Benchmark \(BF16, (\d+) ranks\)", text)) is None:
        raise Unreadable("has no bf16 benchmark")
    _expect("ranks", int(ranks[1]), shape.ranks)
    output = Output()
    for name, words in {
        "dispatch": r"dispatch \(BF16\):",
        "combine": "combine:",
        "dispatch kernel": r"dispatch kernel \(BF16\)\(NVL\):",
        "combine kernel": r"combine kernel\(NVL\):",
        "last": r"fused combine\+unpermute kernel\(NVL\):",
    }.items():
        line = rf"^{words} +{NUMBER} GB/s(?: \(NVL\))?, (?:t: |avg_t=){NUMBER} us"
        if (found := re.search(line, text, re.MULTILINE)) is None:
            raise Unreadable(f"has no line of {name}")
        output.told[name] = Told(float(found[2]), float(found[1]))
    del output.told["last"]  # there only to show that the output is whole
    return output


def nccl_tests(text: str, shape: Shape) -> Output:
    """An nccl-tests table: out-of-place time and bus bandwidth by size in bytes, means over cycles (-N)."""
    report = read_text(text)
    if not report.passed or report.errors or report.unreadable:
        raise Unreadable("is cut short, or its check failed")
    _expect("ranks", report.ranks, shape.ranks)
    cycles: dict[str, list[Told]] = {}
    for row in report.rows:
        timing = row.at["out-of-place"]
        cycles.setdefault(f"{row.size} bytes of {row.dtype}", []).append(Told(timing.us, timing.busbw))
    output = Output({name: _mean(each) for name, each in cycles.items()})
    if report.nccl:
        output.notes.append(f"NCCL {report.nccl}")
    return output


def _of_all_ranks(text: str, pattern: str, ranks: int) -> list[tuple[float, ...]]:
    """The numbers of a line that every rank prints once, by rank (the pattern's first group)."""
    by_rank: dict[int, tuple[float, ...]] = {}
    for found in re.finditer(pattern, text):
        rank, *numbers = found.groups()
        if int(rank) in by_rank:
            raise Unreadable(f"has two lines of rank {rank}: {found[0].strip()[:60]}")
        by_rank[int(rank)] = tuple(map(float, numbers))
    if sorted(by_rank) != list(range(ranks)):
        raise Unreadable(f"has the lines of {len(by_rank)} ranks of {ranks}: {pattern[:48]}")
    return [by_rank[rank] for rank in range(ranks)]


def _mean(lines: list[Told]) -> Told:
    """Their averages; a bandwidth is the average of the bandwidths."""
    gbps = [line.gbps for line in lines if line.gbps is not None]
    return Told(sum(line.us for line in lines) / len(lines), sum(gbps) / len(gbps) if gbps else None)


def _expect(what: str, found: int | None, wanted: int | None) -> None:
    if wanted is not None and found != wanted:
        raise Unreadable(
            f"says {what} {found}, not {wanted}" if found is not None else f"does not say {what}"
        )


def _require(output: Output, *names: str) -> None:
    if missing := [name for name in names if name not in output.told]:
        raise Unreadable(f"has no {', '.join(missing)}")


READERS: Mapping[str, Reader] = {
    reader.__name__: reader
    for reader in (low_latency, intranode, elastic, mscclpp_bench, flashinfer, hybrid, nccl_tests)
}
