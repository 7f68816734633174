"""One collective case on one rank: check, measure, check."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..backends.base import CollectiveCall
from . import collective_oracle as oracle
from . import graphs
from .bandwidth import collective_bytes
from .document import Outcome
from .measure import Bench, Component, chain_floors, chained, fresh, warm_up
from .types import Case, Check, Collective

if TYPE_CHECKING:
    from .session import Session


def measure_collective(session: Session, case: Case, shape: Collective) -> Outcome:
    """Checks, series and bytes of one collective. Every rank of the group calls it for the same case."""
    bench = session.bench(case)
    outcome = Outcome(seconds=bench.seconds, bytes=collective_bytes(shape, session.ranks.size))
    assert session.backend.facts.variant(case) is not None
    began = time.perf_counter()
    bench.beat("open", 0)
    call = session.backend.collective(case, shape)
    bench.spent("prepare_s", began)
    try:
        outcome.realised = dict(call.realised)
        Run(session, case, shape, bench, call, outcome).all()
    finally:
        call.close()
    return outcome


class Run:
    """The steps of one case, in their order; `all` is the table of contents."""

    def __init__(
        self,
        session: Session,
        case: Case,
        shape: Collective,
        bench: Bench,
        call: CollectiveCall,
        outcome: Outcome,
    ):
        self.ranks, self.device, self.case, self.bench = session.ranks, session.device, case, bench
        self.op, self.call, self.outcome = shape.op, call, outcome
        self.repeats = oracle.repeats(call, shape.op)
        self.component = Component("call", lambda _: call.run())

    def all(self) -> None:
        self.first_call()
        if not self.check("before", 0):
            return
        if not warm_up(self.bench, self.call.run, "warm-up"):
            self.outcome.warnings.append(
                "warm-up did not settle: late calls differ from early ones by more than 2 %"
            )
        if "fresh" in self.case.regimes:
            self.outcome.series += fresh(self.bench, [self.component])
        if "chained" in self.case.regimes and not self.chained():
            return
        if "kernel" in self.case.regimes:
            series, warnings = graphs.kernel_times(self.bench, [self.component])
            self.outcome.series += series
            self.outcome.warnings += warnings
        if "graph" in self.case.regimes and not self.graph():
            return
        if self.check("after", 2) and self.case.sampling.checked_calls > 1:
            self.check("repeated", 3, self.case.sampling.checked_calls)

    def first_call(self) -> None:
        """As a user pays it: lazy initialisation, compilation, first allocation."""
        began = time.perf_counter()
        self.call.run()
        self.device.synchronize()
        self.outcome.first_call_us = (time.perf_counter() - began) * 1e6
        self.bench.seconds["first_call_s"] = time.perf_counter() - began

    def check(self, phase: str, input_set: int, calls: int = 1) -> bool:
        """The whole oracle on so many calls, each with its own inputs; whether all passed on every rank."""
        began = time.perf_counter()
        found: list[Check] = []
        for again in range(calls):
            self.bench.beat(f"check {phase}", again)
            self.fill(input_set + again)
            self.call.run()
            latest = self.left(phase, input_set + again)
            found = [b if a.passed else a for a, b in zip(found or latest, latest, strict=True)]
        return self.take([Check(c.name, c.phase, c.passed, calls, c.detail) for c in found], began)

    def chained(self) -> bool:
        """The period and the floors; then what these calls, back to back, left, and a call on that."""
        began = time.perf_counter()
        if self.repeats:
            self.fill(4)
            self.bench.spent("checked_s", began)
        self.outcome.series.append(chained(self.bench, self.call.run, "call"))
        self.outcome.series += chain_floors(self.bench, [("call", self.call.run)])
        began = time.perf_counter()
        passed = not self.repeats or self.take(self.left("after-chain", 4, "chain "), began)
        return passed and self.check("after-chain", 1)

    def graph(self) -> bool:
        """Calls captured and replayed; what a replay left is checked. Where a call's output is the next one's
        input (`repeats`), that is the replay of a single call."""
        turns = self.case.sampling.chain_block
        try:
            single = None if self.repeats else graphs.capture(self.bench, self.call.run, 1)[0]
            replay, _ = graphs.capture(self.bench, self.call.run, turns)
        except graphs.GraphRefused as error:
            self.outcome.warnings.append(str(error))
            return True
        self.outcome.series.append(graphs.graph_period(self.bench, replay, turns, "call"))
        began = time.perf_counter()
        self.fill(5)
        (single or replay)()
        return self.take(self.left("after-chain", 5, "graph: "), began)

    def fill(self, input_set: int) -> None:
        oracle.prepare_collective(self.call, self.op, self.ranks.rank, self.ranks.size, input_set)
        self.device.synchronize()

    def left(self, phase: str, input_set: int, of: str = "") -> list[Check]:
        """What the calls since `fill` left, once they are done."""
        self.device.synchronize()
        where = self.ranks.rank, self.ranks.size
        found = oracle.check_left(self.call, self.op, *where, input_set, phase)
        return [Check(of + c.name, c.phase, c.passed, detail=c.detail) for c in found]

    def take(self, found: list[Check], began: float) -> bool:
        """Keep the checks; whether all passed on every rank."""
        self.outcome.checks += found
        self.bench.spent("checked_s", began)
        return all(self.ranks.all_gather(all(c.passed for c in found)))
