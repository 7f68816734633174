"""Timing: the regimes `fresh` and `chained`, and the warm-up before them. docs/methodology.md is normative.

A backend offers operations; which of them are inside a timed window, what precedes it and how often it is
repeated is decided here, once, for every library. Every rank runs the same number of calls: whoever decides
to stop is rank 0, at a trial boundary, and says so to all.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .device import Device, Mark
from .ranks import Ranks
from .stats import late_over_early, settled
from .types import Reduction, Sampling, Series

# A block of a chain lasts at least this long. Its mark costs a loop that the host bounds about what a launch
# does: 11 us where the host is quiet, 15 to 67 us where it was busy (benchmarks/README.md, four H200). Where
# the host does not bound it, in a replayed graph, it is 4 us, and on CPU next to nothing.
BLOCK_US = 1000.0
LAUNCHED_BLOCK_US = 5000.0
SIZING_BLOCKS = 6  # short ones, to find out how many calls that is
DROPPED_BLOCKS = 3  # of each chain: the pipeline fills, ranks fall into step
WARMUP_BATCH = 8


@dataclass(frozen=True)
class Component:
    """One timed thing: `prepare` is issued before the window without waiting for it, `run` is the window,
    `finish` completes what the window began (a dispatch is always followed by its combine)."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    finish: Callable[[Any], Any] = lambda result: None


@dataclass
class Bench:
    """What measuring needs to know about where it is.

    align      issued between preparation and window: makes the ranks start together (a one-element
               collective on the device, or a host barrier on CPU)
    beat       called with (phase, iteration) between windows, for the heartbeat
    """

    device: Device
    ranks: Ranks
    sampling: Sampling
    align: Callable[[], None]
    beat: Callable[[str, int], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def spent(self, what: str, since: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - since

    def agree(self, value: Any) -> Any:
        return self.ranks.from_zero(value)


class Trials:
    """Trial numbers from 0, as many as configured, or fewer: no new one starts after the budget.

    Rank 0 decides for all. Afterwards `done` says how many there were and `reason` why no more.
    """

    def __init__(self, bench: Bench, most: int, budget_s: float):
        self.bench, self.most, self.budget_s = bench, most, budget_s
        self.done, self.reason = 0, "complete"

    def __iter__(self) -> Iterator[int]:
        began = time.perf_counter()
        while True:
            yield self.done
            self.done += 1
            if self.done == self.most:
                break
            if self.bench.agree(time.perf_counter() - began > self.budget_s):
                self.reason = f"budget of {self.budget_s:g} s reached"
                break
        self.bench.spent("measured_s", began)

    def series(
        self, component: str, regime: str, headline: Reduction, samples: list[float], **more: Any
    ) -> Series:
        """What was measured; settled where late and early half agree on most ranks. Collective."""
        votes = self.bench.ranks.all_gather(settled(samples))
        return Series(
            component,
            regime,
            headline,
            samples,
            trials=self.done,
            stop_reason=self.reason,
            settled=2 * sum(votes) > len(votes),
            **more,
        )


def warm_up(bench: Bench, call: Callable[[], Any], phase: str) -> bool:
    """Call until the floor of iterations and seconds is reached and the calls have settled; say whether.

    Settled: see stats.settled, over the last calls. An unsettled warm-up is extended once, by as much again.
    """
    began = time.perf_counter()
    sampling, device = bench.sampling, bench.device
    steady = False
    for _ in (0, 1):
        samples: list[float] = []
        start = time.perf_counter()
        while True:
            bench.beat(phase, len(samples))
            for _ in range(WARMUP_BATCH):
                first = device.mark()
                call()
                last = device.mark()
                device.synchronize()
                samples.append(device.elapsed_us(first, last))
            enough = len(samples) >= sampling.warmup_iterations
            enough = enough and time.perf_counter() - start >= sampling.warmup_s
            if bench.agree(enough):
                break
        steady = bench.agree(settled(samples[-8 * WARMUP_BATCH :]))
        if steady:
            break
    bench.spent("warmup_s", began)
    return steady


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection while the clock runs: a pause of the interpreter is not the library's."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def fresh(bench: Bench, components: Sequence[Component]) -> list[Series]:
    """Each component alone, from a drained device: [drain] prepare, align, |window|, drain.

    Nothing waits between the preparation and the start of the window. The order of the components rotates
    from trial to trial, so that no component always follows the same one.
    """
    sampling, device = bench.sampling, bench.device
    samples: dict[str, list[float]] = {c.name: [] for c in components}
    trials = Trials(bench, sampling.trials, sampling.budget_s)
    for trial in trials:
        shift = trial % len(components)
        for component in [*components[shift:], *components[:shift]]:
            bench.beat(f"fresh {component.name}", trial * sampling.iterations)
            samples[component.name] += _fresh_trial(device, component, sampling.iterations, bench.align)
    return [trials.series(name, "fresh", "max", values) for name, values in samples.items()]


def _fresh_trial(
    device: Device, component: Component, iterations: int, align: Callable[[], None]
) -> list[float]:
    samples = []
    with _undisturbed():
        for _ in range(iterations):
            device.synchronize()
            state = component.prepare()
            align()
            start = device.mark()
            result = component.run(state)
            end = device.mark()
            component.finish(result)
            device.synchronize()
            samples.append(device.elapsed_us(start, end))
    return samples


def split_fresh(
    bench: Bench, first: str, second: str, pair: Callable[[Callable[[], Mark]], Mark]
) -> list[Series]:
    """For libraries whose two operations only go in turns: one window a pair, with a mark inside it.

    pair(mark)   runs first, calls mark() and returns that mark, runs second
    Gives the series `first`, `second` and "roundtrip".
    """
    sampling, device = bench.sampling, bench.device
    names = (first, second, "roundtrip")
    samples: dict[str, list[float]] = {name: [] for name in names}
    trials = Trials(bench, sampling.trials, sampling.budget_s)
    for trial in trials:
        bench.beat("fresh pair", trial * sampling.iterations)
        with _undisturbed():
            for _ in range(sampling.iterations):
                device.synchronize()
                bench.align()
                start = device.mark()
                middle = pair(device.mark)
                end = device.mark()
                device.synchronize()
                for name, a, b in zip(names, (start, middle, start), (middle, end, end), strict=True):
                    samples[name].append(device.elapsed_us(a, b))
    return [trials.series(name, "fresh", "max", values) for name, values in samples.items()]


def chained(
    bench: Bench, call: Callable[[], Any], component: str, regime: str = "chained", turns_per_call: int = 1
) -> Series:
    """Turns back to back with no host synchronisation, as a decode loop issues them: the period of a turn.

    One mark a block and nothing else between them, so that measuring costs the loop next to nothing that it
    would not pay anyway; one sample is a block's mean. A block has `chain_block` turns, or more where that is
    less than BLOCK_US (on GPUs, launched call by call: LAUNCHED_BLOCK_US). With the regime "graph" `call` is
    one replay of a graph that holds `turns_per_call` turns.
    """
    sampling, device = bench.sampling, bench.device
    block_us = BLOCK_US if regime == "graph" or device.kind == "cpu" else LAUNCHED_BLOCK_US
    calls = _calls_per_block(bench, call, max(1, sampling.chain_block // turns_per_call), block_us)
    samples: list[float] = []
    trials = Trials(bench, sampling.trials, sampling.budget_s)
    for trial in trials:
        bench.beat(f"{regime} {component}", trial)
        marks = run_chain(bench, call, sampling.chain_blocks + DROPPED_BLOCKS, calls)
        kept = marks[DROPPED_BLOCKS:]
        for first, last in zip(kept, kept[1:], strict=False):
            samples.append(device.elapsed_us(first, last) / (calls * turns_per_call))
    return trials.series(
        component,
        regime,
        "median",
        samples,
        per_sample=calls * turns_per_call,
        health={"settle_drift": late_over_early(samples)},
    )


def _calls_per_block(bench: Bench, call: Callable[[], Any], least: int, block_us: float) -> int:
    """How many calls make a block, by a short chain on rank 0: a power of two times `least`, at most 64.

    By the median of its blocks: the first call after a drain takes the host several times as long, and would
    make blocks that are shorter than they should be.
    """
    few = max(1, least // 2)
    _, *marks = run_chain(bench, call, SIZING_BLOCKS, few)
    lasted = [bench.device.elapsed_us(a, b) for a, b in zip(marks, marks[1:], strict=False)]
    call_us, calls = statistics.median(lasted) / few, least
    while calls * call_us < block_us and calls < 64 * least:
        calls *= 2
    return bench.agree(calls)


def run_chain(bench: Bench, call: Callable[[], Any], blocks: int, block: int) -> list[Mark]:
    """One mark, then a mark behind each of `blocks` blocks of `block` calls; drained afterwards."""
    device = bench.device
    device.reserve(blocks + 1)
    device.synchronize()
    with _undisturbed():
        bench.ranks.barrier()
        bench.align()
        marks = [device.mark()]
        for _ in range(blocks):
            for _ in range(block):
                call()
            marks.append(device.mark())
        device.synchronize()
    return marks


def chain_floors(bench: Bench, calls: Sequence[tuple[str, Callable[[], Any]]]) -> list[Series]:
    """The sibling chain with a mark after every operation: the floor of each (headline: cross-rank MIN).

    calls   (name, operation) in the order of one turn of the chain; the whole turn is repeated back to back
    """
    sampling, device = bench.sampling, bench.device
    turns = (sampling.chain_blocks + DROPPED_BLOCKS) * sampling.chain_block
    dropped = DROPPED_BLOCKS * sampling.chain_block
    samples: dict[str, list[float]] = {name: [] for name, _ in calls}
    trials = Trials(bench, max(1, sampling.trials // 4), sampling.budget_s / 4)
    for trial in trials:
        bench.beat("chained floors", trial)
        device.reserve(turns * len(calls) + 1)
        device.synchronize()
        with _undisturbed():
            bench.ranks.barrier()
            bench.align()
            marks = [device.mark()]
            for _ in range(turns):
                for _, operation in calls:
                    operation()
                    marks.append(device.mark())
            device.synchronize()
        for index, (name, _) in enumerate(calls):
            for turn in range(dropped, turns):
                at = turn * len(calls) + index
                samples[name].append(device.elapsed_us(marks[at], marks[at + 1]))
    return [trials.series(f"{name}_floor", "chained", "min", values) for name, values in samples.items()]
