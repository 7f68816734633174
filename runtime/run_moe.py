"""One MoE exchange on one rank: route, check, measure, check."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..backends.base import Exchange, Variant
from . import counts, graphs, oracle, routing
from .bandwidth import moe_bytes
from .document import Outcome
from .measure import Bench, Component, chain_floors, chained, fresh, split_fresh, warm_up
from .problem import MoeProblem
from .types import Case, Check, Moe

if TYPE_CHECKING:
    from .session import Session


def measure_moe(session: Session, case: Case, shape: Moe) -> Outcome:
    """Checks, series, bytes and routing proof of one exchange. Every rank calls it for the same case."""
    bench, ranks = session.bench(case), session.ranks
    variant = session.backend.facts.variant(case)
    assert variant is not None
    outcome = Outcome(seconds=bench.seconds)
    began = time.perf_counter()
    bench.beat("routing", 0)
    table = routing.build(shape, ranks.size)
    equal = len(set(ranks.all_gather(table.hash))) == 1
    outcome.checks.append(
        Check("routing is the same on every rank", "before", equal, detail=None if equal else "hashes differ")
    )
    outcome.routing_proof = {
        "hash": table.hash,
        "equal_across_ranks": equal,
        **counts.summary(table, shape, ranks.size),
    }
    problem = MoeProblem.build(shape, ranks, table, session.device)
    bench.beat("open", 0)
    exchange = session.backend.moe(case, problem)
    bench.spent("prepare_s", began)
    try:
        outcome.realised = dict(exchange.realised)
        Run(session, case, bench, variant, problem, exchange, outcome).all()
        outcome.realised = dict(exchange.realised)  # some libraries say only afterwards what they used
        wire = ranks.all_gather(dict(exchange.wire))
        per_rank = counts.count(table, shape, session.place.placement(case)["domains"])
        outcome.bytes = moe_bytes(shape, per_rank, wire if all(wire) else None)
    finally:
        exchange.close()
    return outcome


class Run:
    """The steps of one case, in their order; `all` is the table of contents."""

    def __init__(
        self,
        session: Session,
        case: Case,
        bench: Bench,
        variant: Variant,
        problem: MoeProblem,
        exchange: Exchange,
        outcome: Outcome,
    ):
        self.ranks, self.device, self.case, self.bench = session.ranks, session.device, case, bench
        self.variant, self.problem, self.exchange, self.outcome = variant, problem, exchange, outcome

    def all(self) -> None:
        self.first_call()
        if not self.check("before", 1):
            return
        self.stage_chain()
        if not warm_up(self.bench, self.pair, "warm-up"):
            self.outcome.warnings.append(
                "warm-up did not settle: late calls differ from early ones by more than 2 %"
            )
        if "fresh" in self.case.regimes:
            self.fresh()
        if "chained" in self.case.regimes and not self.chained():
            return
        if "kernel" in self.case.regimes:
            self.stage_chain()
            series, warnings = graphs.kernel_times(self.bench, self.components())
            self.outcome.series += series
            self.outcome.warnings += warnings
        if "graph" in self.case.regimes and not self.graph():
            return
        if self.check("after", 2) and self.case.sampling.checked_calls > 1:
            self.repeated()

    def first_call(self) -> None:
        """The first pair, as a user pays it: lazy initialisation, compilation, first allocation."""
        self.bench.beat("first call", 0)
        began = time.perf_counter()
        state = self.exchange.dispatch()
        self.device.synchronize()
        middle = time.perf_counter()
        received = self.exchange.received(state)
        staged = self.exchange.stage(state, oracle.chain_rows(received, self.problem, self.variant))
        self.device.synchronize()
        resumed = time.perf_counter()
        self.exchange.combine(state, staged)
        self.device.synchronize()
        seconds = (middle - began) + (time.perf_counter() - resumed)
        self.outcome.first_call_us = seconds * 1e6
        self.bench.seconds["first_call_s"] = seconds

    def check(self, phase: str, input_set: int) -> bool:
        """The whole oracle on one call; whether it passed on every rank."""
        began = time.perf_counter()
        self.bench.beat(f"check {phase}", 0)
        found = oracle.check_exchange(
            self.exchange, self.problem, self.variant, input_set, self.device, phase
        )
        return self.take(found, began)

    def take(self, found: list[Check], began: float) -> bool:
        self.outcome.checks += found
        self.bench.spent("checked_s", began)
        return all(self.ranks.all_gather(all(c.passed for c in found)))

    def stage_chain(self) -> None:
        """Expert output made once, outside every window: rows whose sum does not depend on their order.

        Made anew after every check: where staging is a library's registered memory, a check writes over it.
        """
        state = self.exchange.dispatch()
        received = self.exchange.received(state)
        rows = oracle.chain_rows(received, self.problem, self.variant)
        began = self.device.mark()
        self.staged = self.exchange.stage(state, rows)
        ended = self.device.mark()
        self.exchange.combine(state, self.staged)
        self.device.synchronize()
        self.outcome.seconds["stage_s"] = self.device.elapsed_us(began, ended) / 1e6

    def pair(self) -> Any:
        return self.exchange.combine(self.exchange.dispatch(), self.staged)

    def components(self) -> list[Component]:
        dispatch, combine = self.exchange.dispatch, self.exchange.combine
        return [
            Component("dispatch", lambda _: dispatch(), finish=lambda state: combine(state, self.staged)),
            Component("combine", lambda state: combine(state, self.staged), prepare=dispatch),
            Component("roundtrip", lambda _: self.pair()),
        ]

    def fresh(self) -> None:
        if not self.variant.paired:
            self.outcome.series += fresh(self.bench, self.components())
            return

        def marked(mark: Callable[[], Any]) -> Any:
            state = self.exchange.dispatch()
            middle = mark()
            self.exchange.combine(state, self.staged)
            return middle

        self.outcome.series += split_fresh(self.bench, "dispatch", "combine", marked)

    def chained(self) -> bool:
        """The period and the floors; then the chain's own last output, and the state it left behind."""
        last: list[Any] = [None]

        def turn() -> None:
            last[0] = self.exchange.combine(self.exchange.dispatch(), self.staged)

        self.outcome.series.append(chained(self.bench, turn, "roundtrip"))
        began = time.perf_counter()
        good = self.take([oracle.check_chain(last[0], self.problem, self.variant)], began)
        state: list[Any] = [None]

        def dispatch() -> None:
            state[0] = self.exchange.dispatch()

        def combine() -> None:
            self.exchange.combine(state[0], self.staged)

        self.outcome.series += chain_floors(self.bench, [("dispatch", dispatch), ("combine", combine)])
        return good and self.check("after-chain", 3)

    def graph(self) -> bool:
        """The chain captured and replayed; the replayed graph's own output and received rows are checked."""

        def turn() -> tuple[Any, Any]:
            state = self.exchange.dispatch()
            return state, self.exchange.combine(state, self.staged)

        self.stage_chain()
        turns = self.case.sampling.chain_block
        try:
            replay, (state, out) = graphs.capture(self.bench, turn, turns)
        except graphs.GraphRefused as error:
            self.outcome.warnings.append(str(error))
            return True
        self.outcome.series.append(graphs.graph_period(self.bench, replay, turns, "roundtrip"))
        began = time.perf_counter()
        self.problem.fill(4)
        oracle.poison([out])
        replay()
        self.device.synchronize()
        found = [oracle.check_chain(out, self.problem, self.variant)]
        found += oracle.check_dispatch(self.exchange.received(state), self.problem, self.variant, 4)
        return self.take([replace(c, name=f"graph: {c.name}", phase="after-chain") for c in found], began)

    def repeated(self) -> None:
        began = time.perf_counter()
        self.bench.beat("check repeated", 0)
        calls = self.case.sampling.checked_calls
        found = oracle.check_repeated(self.exchange, self.problem, self.variant, calls, self.device)
        self.take([found], began)
