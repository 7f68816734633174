"""One collective case on one rank: check, measure, check."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from . import graphs
from .bandwidth import collective_bytes
from .document import Outcome
from .measure import Component, chain_floors, chained, fresh, warm_up
from .oracle import check_collective
from .types import Case, Check, Collective

if TYPE_CHECKING:
    from .session import Session


def measure_collective(session: Session, case: Case, shape: Collective) -> Outcome:
    """Checks, series and bytes of one collective. Every rank of the group calls it for the same case."""
    bench, ranks, device = session.bench(case), session.ranks, session.device
    outcome = Outcome(seconds=bench.seconds, bytes=collective_bytes(shape, ranks.size))
    variant = session.backend.facts.variant(case)
    assert variant is not None
    began = time.perf_counter()
    bench.beat("open", 0)
    call = session.backend.collective(case, shape)
    bench.spent("prepare_s", began)
    try:
        outcome.realised = dict(call.realised)

        def check(phase: str, input_set: int, calls: int = 1) -> bool:
            began = time.perf_counter()
            bench.beat(f"check {phase}", 0)
            found = check_collective(call, shape.op, ranks.rank, ranks.size, input_set, device, phase)
            for again in range(1, calls):
                bench.beat(f"check {phase}", again)
                repeat = check_collective(
                    call, shape.op, ranks.rank, ranks.size, input_set + again, device, phase
                )
                found = [old if not old.passed else new for old, new in zip(found, repeat, strict=True)]
            outcome.checks += [Check(c.name, c.phase, c.passed, calls, c.detail) for c in found]
            bench.spent("checked_s", began)
            return all(ranks.all_gather(all(c.passed for c in found)))

        began = time.perf_counter()
        call.run()
        device.synchronize()
        outcome.first_call_us = (time.perf_counter() - began) * 1e6
        bench.seconds["first_call_s"] = time.perf_counter() - began
        if not check("before", 0):
            return outcome
        settled = warm_up(bench, call.run, "warm-up")
        if not settled:
            outcome.warnings.append(
                "warm-up did not settle: late calls differ from early ones by more than 2 %"
            )
        component = Component("call", lambda _: call.run())
        if "fresh" in case.regimes:
            outcome.series += fresh(bench, [component])
        if "chained" in case.regimes:
            outcome.series.append(chained(bench, call.run, "call"))
            outcome.series += chain_floors(bench, [("call", call.run)])
            if not check("after-chain", 1):
                return outcome
        if "kernel" in case.regimes:
            series, warnings = graphs.kernel_times(bench, [component])
            outcome.series += series
            outcome.warnings += warnings
        if "graph" in case.regimes:
            try:
                replay, _ = graphs.capture(bench, call.run, case.sampling.chain_block)
                outcome.series.append(graphs.graph_period(bench, replay, case.sampling.chain_block, "call"))
            except graphs.GraphRefused as error:
                outcome.warnings.append(str(error))
        check("after", 2)
        if case.sampling.checked_calls > 1:
            check("repeated", 3, case.sampling.checked_calls)
    finally:
        call.close()
    return outcome
