"""Measuring, on a clock that the tests control: what is inside a window, what is not, in which order."""

from __future__ import annotations

from itertools import count

import pytest

from collectivex.runtime.device import ManualDevice
from collectivex.runtime.measure import (
    DROPPED_BLOCKS,
    SIZING_BLOCKS,
    Bench,
    Component,
    chain_floors,
    chained,
    fresh,
    split_fresh,
    warm_up,
)
from collectivex.runtime.ranks import run_threads
from collectivex.runtime.types import Sampling

SAMPLING = Sampling(
    warmup_iterations=4, warmup_s=0.0, trials=3, iterations=5, chain_blocks=6, chain_block=4, budget_s=60
)


def bench_of(ranks, sampling=SAMPLING, align=lambda: None):
    return Bench(ManualDevice(), ranks, sampling, align, lambda phase, iteration: None)


def solo(work):
    return run_threads(1, work)[0]


def test_only_the_window_is_timed():
    """Preparation, alignment and finishing cost time of their own that no sample contains."""

    def work(ranks):
        bench = bench_of(ranks)
        spend = bench.device.spend
        bench.align = lambda: spend(1000)
        component = Component("op", lambda _: spend(7), lambda: spend(500), lambda _: spend(300))
        return fresh(bench, [component])

    (series,) = solo(work)

    assert [7.0] * 15 == series.samples_us
    assert ("op", "fresh", "max", 3) == (series.component, series.regime, series.headline, series.trials)


def test_the_order_of_components_rotates_from_trial_to_trial():
    """No component always follows the same other one."""
    order = []

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=3, iterations=1, budget_s=60))
        fresh(bench, [Component(name, lambda _, name=name: order.append(name)) for name in "abc"])

    solo(work)

    assert ["a", "b", "c", "b", "c", "a", "c", "a", "b"] == order


def test_a_window_hands_its_result_to_finish_and_gets_what_prepare_returned():
    """A combine is given the state of the dispatch that prepared it."""
    seen = []

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=1, iterations=1))
        fresh(bench, [Component("op", lambda state: state + 1, lambda: 41, seen.append)])

    solo(work)

    assert [42] == seen


def test_paired_operations_are_split_inside_one_window():
    """Dispatch, combine and the pair come from the same three marks."""

    def work(ranks):
        bench = bench_of(ranks)

        def pair(mark):
            bench.device.spend(3)
            middle = mark()
            bench.device.spend(5)
            return middle

        return split_fresh(bench, "dispatch", "combine", pair)

    first, second, both = solo(work)

    assert ({3.0}, {5.0}, {8.0}) == (set(first.samples_us), set(second.samples_us), set(both.samples_us))


def test_a_chain_sample_is_the_mean_of_a_block_and_the_first_blocks_are_dropped():
    """Costs 1001, 1002, ... us: after the 12 calls that size the block, each kept block's mean is known."""

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=1, chain_blocks=6, chain_block=4))
        cost = iter(range(1001, 2000))
        return chained(bench, lambda: bench.device.spend(next(cost)), "op")

    series = solo(work)

    first = 1001 + 2 * SIZING_BLOCKS
    expected = [first + 4 * b + 1.5 for b in range(DROPPED_BLOCKS, DROPPED_BLOCKS + 6)]
    assert expected == series.samples_us
    assert ("median", 4) == (series.headline, series.per_sample)


def test_a_replayed_graph_counts_every_turn_it_holds():
    """One replay of eight turns that takes 800 us has a period of 100 us."""

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=1, chain_blocks=5, chain_block=8))
        return chained(bench, lambda: bench.device.spend(1600), "op", regime="graph", turns_per_call=8)

    series = solo(work)

    assert [200.0] * 5 == series.samples_us
    assert ("graph", 8) == (series.regime, series.per_sample)


@pytest.mark.parametrize(
    ("kind", "regime", "call_us", "turns"),
    [
        *(
            ("cpu", "chained", call_us, turns)
            for call_us, turns in [(1000, 8), (50, 32), (10, 128), (0.1, 512)]
        ),
        *(("cuda", "chained", call_us, turns) for call_us, turns in [(1000, 8), (50, 128), (10, 512)]),
        *(("cuda", "graph", call_us, turns) for call_us, turns in [(1000, 8), (50, 32), (10, 128)]),
    ],
)
def test_a_block_is_long_enough_to_hide_its_mark(kind, regime, call_us, turns):
    """At least 1 ms, or 5 ms where the host launches each call on a GPU and may be what bounds it; in
    doublings of the least block, at most 64 of them."""

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=1, chain_blocks=4, chain_block=8))
        bench.device.kind = kind
        return chained(bench, lambda: bench.device.spend(call_us), "op", regime)

    series = solo(work)

    assert turns == series.per_sample
    assert pytest.approx([call_us] * 4) == series.samples_us


def test_a_host_that_is_slow_to_start_does_not_make_blocks_short():
    """After a drain the first calls take it many times as long; that is not what a call takes."""

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=1, chain_blocks=4, chain_block=8))
        calls = count()
        return chained(bench, lambda: bench.device.spend(1500 if next(calls) < 4 else 50), "op")

    assert 32 == solo(work).per_sample


def test_floors_time_each_operation_of_the_chain():
    """Two operations in turns give two series, without the dropped blocks."""

    def work(ranks):
        bench = bench_of(ranks)
        spend = bench.device.spend
        return chain_floors(bench, [("dispatch", lambda: spend(2)), ("combine", lambda: spend(9))])

    dispatch, combine = solo(work)

    assert ("dispatch_floor", "combine_floor") == (dispatch.component, combine.component)
    assert ({2.0}, {9.0}) == (set(dispatch.samples_us), set(combine.samples_us))
    assert SAMPLING.chain_blocks * SAMPLING.chain_block == len(dispatch.samples_us)
    assert "min" == dispatch.headline


def test_every_rank_makes_the_same_number_of_calls_though_only_one_is_out_of_time():
    """Rank 0's clock decides for all: no rank waits in a collective that the others left."""
    counts = [0, 0, 0]

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=50, iterations=2, budget_s=0.0))

        def call(_):
            counts[ranks.rank] += 1

        return fresh(bench, [Component("op", call)])[0]

    all_series = run_threads(3, work)

    assert [2, 2, 2] == counts
    assert all("budget" in s.stop_reason for s in all_series)


def test_a_warm_up_that_does_not_settle_is_extended_once_and_then_says_so():
    """Ever slower calls never settle; steady ones do at once."""
    calls = [0]

    def drifting(ranks):
        bench = bench_of(ranks)

        def call():
            calls[0] += 1
            bench.device.spend(100 * calls[0])

        return warm_up(bench, call, "warm-up")

    def steady(ranks):
        bench = bench_of(ranks)
        return warm_up(bench, lambda: bench.device.spend(100), "warm-up")

    assert not solo(drifting)
    assert 16 == calls[0]
    assert solo(steady)


def test_a_drifting_series_is_flagged_and_kept():
    """Not settled is a flag beside the samples, never a reason to drop them."""

    def work(ranks):
        bench = bench_of(ranks, Sampling(trials=1, iterations=20))
        cost = iter(range(100, 200, 5))
        return fresh(bench, [Component("op", lambda _: bench.device.spend(next(cost)))])[0]

    series = solo(work)

    assert not series.settled
    assert 20 == len(series.samples_us)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_chain_starts_with_every_rank_present(ranks):
    """The chain's start is a barrier: it cannot begin while a rank is still elsewhere."""
    entered = []

    def work(r):
        bench = bench_of(r, Sampling(trials=1, chain_blocks=1, chain_block=1))
        entered.append(r.rank)
        chained(bench, lambda: None, "op")
        return len(entered)

    assert [ranks] * ranks == run_threads(ranks, work)
