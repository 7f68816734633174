"""Drives the fake backend with threads for ranks, as a worker would with processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import exchange_job

from collectivex.backends.base import Context, Exchange, Variant
from collectivex.backends.fake import Backend
from collectivex.runtime import oracle
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.problem import MoeProblem
from collectivex.runtime.ranks import ThreadRanks, run_threads
from collectivex.runtime.types import Case, Check, Collective, Moe, Routing


def moe_case(variant: str = "rank-sum", dtype: str = "bf16", ranks: int = 4, **fields: Any) -> Case:
    """A small exchange; `fields` are those of Case, with `spread` of the tokens and `fault` besides."""
    spread, fault = fields.pop("spread", "even"), fields.pop("fault", None)
    shape = fields.pop("shape", Moe("small", 256, 4, 16, 12, dtype, Routing(spread=spread)))
    knobs = (("fault", fault),) if fault else ()
    return Case("fake", variant, shape=shape, ranks=ranks, **{"mode": "normal", "knobs": knobs, **fields})


def collective_case(op: str, dtype: str = "float32", ranks: int = 4, **fields: Any) -> Case:
    """A small collective; `fields` are those of Case, with `size` and `fault` besides."""
    shape = Collective(op, fields.pop("size", 4000), dtype)
    fault = fields.pop("fault", None)
    knobs = (("fault", fault),) if fault else ()
    return Case("fake", "", shape=shape, ranks=ranks, **{"mode": "out-of-place", "knobs": knobs, **fields})


def on_ranks(
    case: Case, work: Callable[[Exchange, MoeProblem, Variant, ManualDevice], Any], backend: type = Backend
) -> list[Any]:
    """`work` on every rank of an opened exchange."""
    return exchange_job.on_ranks(case, backend, work)


def check_moe(case: Case, calls: int = 2) -> list[list[Check]]:
    """The checks of each rank: the whole oracle on `calls` calls with changing inputs, then a chain."""

    def work(exchange: Exchange, problem: MoeProblem, variant: Variant, device: ManualDevice) -> list[Check]:
        checks: list[Check] = []
        for call in range(calls):
            checks += oracle.check_exchange(exchange, problem, variant, call, device)
        state = exchange.dispatch()
        rows = oracle.chain_rows(exchange.received(state), problem, variant)
        staged = exchange.stage(state, rows)
        for _ in range(2):
            out = exchange.combine(exchange.dispatch(), staged)
        return [*checks, oracle.check_chain(out, problem, variant)]

    return on_ranks(case, work)


def check_moe_repeated(case: Case, calls: int) -> list[list[Check]]:
    """The one check of each rank over `calls` calls."""
    return on_ranks(case, lambda e, p, v, d: [oracle.check_repeated(e, p, v, calls, d)])


def check_collective(case: Case, calls: int = 2) -> list[list[Check]]:
    """The checks of each rank over `calls` calls with changing inputs."""
    assert isinstance(case.shape, Collective)
    shape = case.shape

    def one(ranks: ThreadRanks) -> list[Check]:
        fake, device = Backend(), ManualDevice()
        fake.setup(Context(ranks, device))
        call = fake.collective(case, shape)
        checks: list[Check] = []
        for s in range(calls):
            checks += oracle.check_collective(call, shape.op, ranks.rank, ranks.size, s, device)
        return checks

    return run_threads(case.ranks, one)
