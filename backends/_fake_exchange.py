"""The exchange of the fake: all ranks simulated from the routing table and the oracle's formulas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ._fake_plan import Plan
from ._fake_rows import BREAKS, Arrived, bits, encode
from .base import Received, Variant

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem
    from ..runtime.ranks import Ranks


@dataclass
class State:
    """One dispatch: its number, its input set and the one before it, and once asked for, what arrived."""

    call: int
    input_set: int
    input_set_before: int
    arrived: Arrived | None = None


class Exchange:
    """One exchange of one rank. `ranks` tells only whether all have staged a chain; no row is moved."""

    wire: Mapping[str, int] = {}

    def __init__(self, plan: Plan, ranks: Ranks, problem: MoeProblem, variant: Variant):
        self.plan, self.problem, self.variant = plan, problem, variant
        self.realised = plan.realised
        self.ranks = ranks
        self.problems = [
            problem if r == problem.rank else replace(problem, rank=r) for r in range(problem.size)
        ]
        self.out = problem.x.new_zeros(problem.x.shape)
        self.calls = 0
        self.sets = (-1, -1)  # the input sets of the last dispatches: another one, then this one
        self.before: torch.Tensor | None = None
        self.honest: dict[tuple[int, int], Arrived] = {}
        self.partials: dict[tuple[bool, int, int], torch.Tensor] = {}

    def dispatch(self) -> State:
        if self.sets[1] != self.problem.input_set:
            self.sets = self.sets[1], self.problem.input_set
        state = State(self.calls, self.problem.input_set, self.sets[0])
        self.calls += 1
        self.plan.enter(state.call)
        self.plan.spend("dispatch")
        if self.plan.strikes("input-modified", state.call):
            self.problem.x[:1, 40:41] *= -1
        if self.plan.strikes("routing-modified", state.call):
            self.problem.topk_weights[:1, :1] += 0.5
        return state

    def received(self, state: State) -> Received:
        if state.arrived is None:
            state.arrived = self._arrive(self.problem, state)
        return state.arrived.received()

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        """The combined rows [T_r, H] that follow from our `rows` and from what the others stage."""
        import torch

        from ..runtime.experts import chain_rows

        chain = len(rows) > 0 and torch.equal(
            rows, chain_rows(self.received(state), self.problem, self.variant)
        )
        return self._combined(state, rows, any(self.ranks.all_gather(chain)))

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        self.plan.spend("combine")
        out, call, end = staged, state.call, len(staged)
        strikes = self.plan.strikes
        if strikes("stale-output", call):
            out, end = (staged, 0) if self.before is None else (self.before, end)
        if strikes("partial-write", call):
            end -= 1
        self.out[: max(end, 0)] = out[: max(end, 0)]
        if strikes("zeroed-output", call):
            self.out.zero_()
        if strikes("nan", call):
            self.out[:1, 7] = float("nan")
        if strikes("output-bit-flip", call):
            bits(self.out)[:1, -1] ^= 1
        if strikes("reordered-output", call):
            self.out[:2] = self.out[:2].flip(0)
        if strikes("corruption-1-in-70", call) or strikes("late-corruption", call):
            self.out[-1:] = self.out[-1:].roll(1, 1)  # the norm of the row stays right
        self.before = staged
        return self.out

    def outputs(self) -> Sequence[torch.Tensor]:
        return (self.out,)

    def close(self) -> None:
        return None

    def _arrive(self, problem: MoeProblem, state: State) -> Arrived:
        """What the rank of `problem` receives in this call: honest rows in another order each time, then
        the fault."""
        import torch

        stale = self.plan.strikes("stale-dispatch", state.call)
        key = problem.rank, state.input_set_before if stale else state.input_set
        if key not in self.honest:
            if len(self.honest) >= 16 * problem.size:
                self.honest.clear()
            self.honest[key] = self._deliver(problem, key[1])
        rows = len(self.honest[key].ids)
        order = (torch.arange(rows) + state.call) % max(rows, 1)
        arrived = self.honest[key].take(order)
        for name, break_it in BREAKS.items():
            if rows and self.plan.strikes(name, state.call):
                break_it(arrived)
        return arrived

    def _deliver(self, problem: MoeProblem, input_set: int) -> Arrived:
        """All that this rank should receive. As with real libraries, low-latency modes report no sources and
        a weighted-sum transports no weights."""
        import torch

        wanted = problem.arrivals(self.variant.layout)
        rows, scales = encode(problem, wanted.ids, input_set)
        weighted = self.variant.combine == "weighted-sum"
        picks = wanted.experts[wanted.experts >= 0]
        return Arrived(
            problem=problem,
            input_set=input_set,
            dtype=rows.dtype,
            ids=wanted.ids,
            factors=wanted.weights[:, 0].clone() if weighted else torch.ones(len(wanted.ids)),
            bits=bits(rows),
            scales=scales,
            experts=wanted.experts,
            weights=None if weighted else wanted.weights,
            counts=torch.bincount(picks, minlength=problem.local_experts).tolist(),
            sources=None if self.variant.mode == "low-latency" else wanted.ids.clone(),
        )

    def _combined(self, state: State, rows: torch.Tensor, chain: bool) -> torch.Tensor:
        """[T_r, H] bf16: `rows` are what this rank has staged; the other ranks are simulated."""
        import torch

        strikes = self.plan.strikes
        total = torch.zeros(self.problem.x.shape)
        for problem in self.problems:
            if strikes("missing-rank", state.call) and problem.rank == problem.size - 1:
                continue
            total += self._partial(problem, state, rows, chain)
            if strikes("bf16-accumulation", state.call):
                total = total.to(torch.bfloat16).to(torch.float32)
        return total.to(torch.bfloat16)

    def _partial(self, problem: MoeProblem, state: State, rows: torch.Tensor, chain: bool) -> torch.Tensor:
        """[T_r, H] float32: what the rank of `problem` contributes to our tokens."""
        import torch

        from ..runtime.experts import chain_rows, expert_step

        key = chain, problem.rank, state.input_set
        other = problem is not self.problem
        if other and key in self.partials:
            return self.partials[key]
        arrived = state.arrived
        if other:
            arrived = self._arrive(problem, state)
            step = chain_rows if chain else expert_step
            rows = step(arrived.received(), problem, self.variant)
        assert arrived is not None
        own = self.problem.own
        mine = ((arrived.ids >= own.start) & (arrived.ids < own.stop)).nonzero()[:, 0]
        if self.plan.strikes("double-contribution", state.call):
            mine = torch.cat([mine, mine[:1]])
        tokens, terms = arrived.ids[mine] - own.start, rows[mine] * arrived.factors[mine, None]
        total = torch.zeros(self.problem.x.shape)
        if self.plan.strikes("bf16-accumulation", state.call):
            for token, term in zip(tokens.tolist(), terms, strict=True):
                total[token] = (total[token] + term).to(torch.bfloat16)
        else:
            total.index_add_(0, tokens, terms)
        if (self.variant.casts == "rank-partials") != self.plan.strikes("undeclared-cast", state.call):
            total = total.to(torch.bfloat16).to(torch.float32)
        if other and self.plan.fault is None:
            if len(self.partials) >= 16 * problem.size:
                self.partials.clear()
            self.partials[key] = total
        return total
