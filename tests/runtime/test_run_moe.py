"""The steps of a MoE case on thread ranks, with libraries that are awkward in ways that real ones are."""

from __future__ import annotations

from pathlib import Path

import pytest
from faking import moe_case

from collectivex.backends.base import Context
from collectivex.backends.fake import Backend
from collectivex.runtime import graphs
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.document import Place
from collectivex.runtime.ranks import run_threads
from collectivex.runtime.run_moe import measure_moe
from collectivex.runtime.session import Session
from collectivex.runtime.types import Sampling, Series

SAMPLING = Sampling(1, 0.0, 1, 2, 4, 1, 1, checked_calls=4, budget_s=60)


class Registered:
    """Staged rows live in one registered buffer: staging again writes over what was staged before."""

    def __init__(self, exchange):
        self.exchange, self.turn = exchange, 0
        self.realised, self.wire = exchange.realised, exchange.wire
        self.dispatch, self.received = exchange.dispatch, exchange.received
        self.outputs, self.close = exchange.outputs, exchange.close

    def stage(self, state, rows):
        self.turn += 1
        return self.turn, self.exchange.stage(state, rows)

    def combine(self, state, staged):
        turn, rows = staged
        if turn != self.turn:
            raise RuntimeError("these staged rows have been overwritten")
        return self.exchange.combine(state, rows)


class WithRegistered(Backend):
    def moe(self, case, problem):
        return Registered(super().moe(case, problem))


def outcome_of(case, backend=Backend):
    def work(ranks):
        device, library = ManualDevice(), backend()
        library.setup(Context(ranks, device))
        place = Place("e", "a", "s", "local", "t", "cpu")
        session = Session(ranks, device, library, place, ranks.barrier, lambda p, i: None, "", Path(), {}, {})
        return measure_moe(session, case, case.shape)

    return run_threads(case.ranks, work)[0]


@pytest.fixture
def eager_graphs(monkeypatch):
    """Graph and kernel regimes without a GPU: a replay runs the turn again, a profile is empty."""

    def capture(bench, turn, turns):
        return turn, turn()

    def period(bench, replay, turns, component):
        replay()
        return Series(component, "graph", "median", [1.0])

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "graph_period", period)
    monkeypatch.setattr(graphs, "kernel_times", lambda bench, components: _run_each(components))


def _run_each(components):
    for component in components:
        component.finish(component.run(component.prepare()))
    return [], []


@pytest.mark.usefixtures("eager_graphs")
def test_a_check_may_write_over_what_was_staged_for_the_chain():
    """The chain is staged anew after every check: on GPUs a registered buffer has room for one staging."""
    case = moe_case(ranks=2, regimes=("fresh", "chained", "kernel", "graph"), sampling=SAMPLING)

    found = outcome_of(case, WithRegistered)

    # the stand-in for a graph replays into new tensors, so what the graph itself left is no matter here
    assert all(check.passed for check in found.checks if not check.name.startswith("graph:")), found.checks
    assert {"fresh", "chained", "graph"} == {series.regime for series in found.series}


@pytest.mark.usefixtures("eager_graphs")
def test_a_graph_that_writes_nothing_is_caught_by_what_its_replay_left(monkeypatch):
    """The replayed graph's own output is checked, not that of the calls that were captured."""
    monkeypatch.setattr(graphs, "capture", lambda bench, turn, turns: (lambda: None, turn()))
    case = moe_case(ranks=2, regimes=("graph",), sampling=SAMPLING)

    found = outcome_of(case)

    wrong = [check.name for check in found.checks if not check.passed]
    assert any(name.startswith("graph:") for name in wrong), found.checks


def test_a_case_that_is_wrong_before_timing_is_not_timed():
    """No latency exists to be published by mistake."""
    found = outcome_of(moe_case(ranks=2, fault="wrong-expert", sampling=SAMPLING))

    assert [] == found.series
    assert not all(check.passed for check in found.checks)


def test_every_regime_that_was_asked_for_is_there_with_its_components():
    """Fresh: dispatch, combine and the pair; chained: the period and two floors."""
    found = outcome_of(moe_case(ranks=2, regimes=("fresh", "chained"), sampling=SAMPLING))

    measured = {(s.regime, s.component) for s in found.series}
    fresh = {("fresh", name) for name in ("dispatch", "combine", "roundtrip")}
    assert (
        fresh | {("chained", name) for name in ("roundtrip", "dispatch_floor", "combine_floor")} == measured
    )
    assert "repeated" in {check.phase for check in found.checks}
