"""The steps of a collective case on thread ranks, with libraries that are wrong only while nobody looks."""

from __future__ import annotations

from pathlib import Path

import pytest
from faking import collective_case

from collectivex.backends.base import Context
from collectivex.backends.fake import Backend
from collectivex.runtime import graphs
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.document import Place
from collectivex.runtime.ranks import run_threads
from collectivex.runtime.run_collective import measure_collective
from collectivex.runtime.session import Session
from collectivex.runtime.types import Sampling, Series

SAMPLING = Sampling(1, 0.0, 1, 2, 4, 1, 1, checked_calls=4, budget_s=60)
REGIMES = ("fresh", "chained", "graph")


class Lazy:
    """A call that finds its output unpoisoned, so right behind another, adds one to it."""

    def __init__(self, call):
        self.call, self.left = call, None
        self.input, self.output = call.input, call.output
        self.realised, self.close = call.realised, call.close

    def run(self):
        again = self.left is not None and bool((self.output == self.left).all())
        self.call.run()
        if again:
            self.output += 1
        self.left = self.output.clone()


class OnlyAlone(Backend):
    """Right in every call that is drained, poisoned and looked at, wrong in a chain."""

    def collective(self, case, shape):
        return Lazy(super().collective(case, shape))


def outcome_of(case, backend=Backend):
    def work(ranks):
        device, library = ManualDevice(), backend()
        library.setup(Context(ranks, device))
        place = Place("e", "a", "s", "local", "t", "cpu")
        session = Session(ranks, device, library, place, ranks.barrier, lambda p, i: None, "", Path(), {}, {})
        return measure_collective(session, case, case.shape)

    return run_threads(case.ranks, work)[0]


@pytest.fixture
def eager_graphs(monkeypatch):
    """Graphs without a GPU: a replay runs the captured calls again."""
    captured = []

    def capture(bench, turn, turns):
        captured.append(turns)
        return (lambda: [turn() for _ in range(turns)]), None

    def period(bench, replay, turns, component):
        replay()
        return Series(component, "graph", "median", [1.0])

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "graph_period", period)
    return captured


def wrong(found):
    return [check.name for check in found.checks if not check.passed]


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize(
    "op", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce"]
)
def test_an_honest_collective_passes_in_every_regime(op: str):
    """What the chain left and what a replay left are checked, out of place and the input with it."""
    found = outcome_of(collective_case(op, ranks=2, regimes=REGIMES, sampling=SAMPLING))

    assert [] == wrong(found)
    names = [check.name for check in found.checks]
    assert {"chain output", "chain inputs unchanged", "graph: output"} <= set(names)
    assert set(REGIMES) == {series.regime for series in found.series}


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("op", ["all_gather", "broadcast"])
def test_a_copy_in_place_can_be_checked_after_a_chain(op: str):
    """Nobody's own part changes, so every call does the same."""
    case = collective_case(op, ranks=2, mode="in-place", regimes=REGIMES, sampling=SAMPLING)

    found = outcome_of(case)

    assert [] == wrong(found)
    assert "chain output" in [check.name for check in found.checks]


def test_a_sum_in_place_is_checked_by_one_captured_call(eager_graphs):
    """Its output is the next call's input: the chain says nothing; a graph of one call is replayed."""
    case = collective_case("all_reduce", ranks=2, mode="in-place", regimes=REGIMES, sampling=SAMPLING)

    found = outcome_of(case)

    assert [] == wrong(found)
    names = [check.name for check in found.checks]
    assert "chain output" not in names
    assert "graph: output" in names
    assert 1 in eager_graphs


def test_a_library_that_is_wrong_only_back_to_back_is_incorrect():
    """Every drained call of it is right; the last output of its chain is not."""
    found = outcome_of(
        collective_case("all_reduce", ranks=2, regimes=("fresh", "chained"), sampling=SAMPLING), OnlyAlone
    )

    assert ["chain output"] == wrong(found)


@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("mode", ["out-of-place", "in-place"])
def test_a_graph_that_writes_nothing_is_incorrect(monkeypatch, mode: str):
    """A capture that recorded nothing would have been the fastest of all."""
    monkeypatch.setattr(graphs, "capture", lambda bench, turn, turns: (lambda: None, None))
    found = outcome_of(collective_case("all_reduce", ranks=2, mode=mode, regimes=REGIMES, sampling=SAMPLING))

    assert "graph: output" in wrong(found)


def test_a_case_that_is_wrong_before_timing_is_not_timed():
    """No latency exists to be published by mistake."""
    found = outcome_of(collective_case("all_gather", ranks=2, fault="nan", sampling=SAMPLING))

    assert [] == found.series
    assert "output" in wrong(found)
