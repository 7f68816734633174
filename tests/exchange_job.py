"""Exchanges driven as the harness drives them, with threads for ranks and a fake in the library's place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from collectivex.backends.base import Context
from collectivex.runtime import oracle, routing
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.problem import MoeProblem
from collectivex.runtime.ranks import ThreadRanks, run_threads
from collectivex.runtime.types import Case, Check, Moe


def on_ranks(
    cases: Case | Sequence[Case],
    backend: Callable[[], Any],
    work: Callable[..., Any],
    group: Callable[[ThreadRanks], Any] = lambda ranks: None,
) -> list[Any]:
    """`work(exchange, problem, variant, device)` on every rank, then teardown in the harness's order. Several
    cases run one after the other in the same processes, and the lists that they give are joined.

    group   what the library is given for the process group; called on each rank before set-up
    """
    in_turn = [cases] if isinstance(cases, Case) else cases

    def one(ranks: ThreadRanks) -> Any:
        ranks.ranks_per_node = in_turn[0].ranks // in_turn[0].nodes
        library, device, found = backend(), ManualDevice(), []
        library.setup(Context(ranks, device, group(ranks)))
        for case in in_turn:
            assert isinstance(case.shape, Moe)
            problem = MoeProblem.build(case.shape, ranks, routing.build(case.shape, case.ranks), device)
            exchange = library.moe(case, problem)
            try:
                found.append(work(exchange, problem, library.facts.variant(case), device))
            finally:
                exchange.close()
        library.close()
        return found[0] if isinstance(cases, Case) else [result for of_case in found for result in of_case]

    return run_threads(in_turn[0].ranks, one)


def whole(
    exchange: Any, problem: MoeProblem, variant: Any, device: Any, staged_once: bool = True
) -> list[Check]:
    """The steps of `run_moe.Run` in their order, and their checks: of a call, a chain, a call after it, what
    a replayed graph leaves (where the library may be captured), and many calls.

    staged_once   the chain goes on after a check with the rows that were staged before it: for libraries that
                  do not stage in registered memory, where a check would write over them
    """

    def stage() -> Any:
        state = exchange.dispatch()
        staged = exchange.stage(state, oracle.chain_rows(exchange.received(state), problem, variant))
        exchange.combine(state, staged)
        return staged

    def chain() -> tuple[Any, Check]:
        """The state of the last of two pairs, and the check of its output."""
        for _ in range(2):
            state = exchange.dispatch()
            out = exchange.combine(state, staged)
        return state, oracle.check_chain(out, problem, variant)

    stage()
    checks = oracle.check_exchange(exchange, problem, variant, 1, device)
    staged = stage()
    checks.append(chain()[1])
    checks += oracle.check_exchange(exchange, problem, variant, 3, device)
    if staged_once:
        checks.append(chain()[1])
    if variant.graph_safe:
        staged = stage()
        problem.barrier()
        problem.fill(4)
        problem.barrier()
        state, found = chain()
        checks += [found, *oracle.check_dispatch(exchange.received(state), problem, variant, 4)]
    return [*checks, oracle.check_repeated(exchange, problem, variant, 4, device)]


def failed(of_ranks: list[list[Check]]) -> list[str]:
    """Every failed check of every rank, with its evidence."""
    return [
        f"rank {rank}: {check.name}: {check.detail}"
        for rank, checks in enumerate(of_ranks)
        for check in checks
        if not check.passed
    ]


class Steps:
    """What each rank did, in its order: "synchronize" of its device, "barrier" of its ranks, and what `watch`
    is told to note. For the rule that nothing is freed or cleared that a peer may still read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch, self.of = monkeypatch, dict[int, list[str]]()
        self.watch(ManualDevice, "synchronize")
        self.watch(ThreadRanks, "barrier")

    def watch(self, owner: type, name: str) -> None:
        """Note every call of a method before it is made."""
        method = getattr(owner, name)

        def noted(this: Any, *given: Any, **named: Any) -> Any:
            self.of.setdefault(threading.get_ident(), []).append(name)
            return method(this, *given, **named)

        self.monkeypatch.setattr(owner, name, noted)

    def around(self, name: str, before: int = 2, after: int = 0) -> list[list[str]]:
        """The steps before and behind each call of that name, on all ranks."""
        return [
            steps[max(0, at - before) : at] + steps[at + 1 : at + 1 + after]
            for steps in self.of.values()
            for at, step in enumerate(steps)
            if step == name
        ]
