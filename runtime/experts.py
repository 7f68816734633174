"""The stand-in for the experts, and what an exchange must return: formulas only, exact in float32.

Expert e maps a row x to f_e(x)_j = a_e * x_j + b_e * u_j, with small integers a_e, b_e, u_j and (a_e,
b_e) unique to it. With weights m/16 every float32 term and partial sum is a multiple of 1/16 below 2**24
sixteenths (`largest_sum`), so sums are exact in any order and only the declared casts to bf16 round:

    combine        staged row (harness, bf16)                   combined (library)
    rank-sum       z = sum of w f_e(x) over the rank's experts   sum of z over the token's ranks
    expert-sum     z = w f_e(x)                                  sum of z over the token's picks
    weighted-sum   y = f_e(x)                                    sum of w y over the token's picks

Sums are in float32, the combined row is cast once; with casts "rank-partials" each rank's part is cast first,
with "node-partials" each node's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..backends.base import Received, Variant
from .fp8 import dequantise
from .problem import MoeProblem, chunks, mix
from .types import Moe

MODELS = (("token-rank", "rank-sum"), ("token-expert", "expert-sum"), ("token-expert", "weighted-sum"))


def check_model(variant: Variant) -> None:
    """Raises ValueError for a declaration that no formula here describes."""
    if (variant.layout, variant.combine) not in MODELS:
        raise ValueError(f"no oracle for layout {variant.layout!r} with combine {variant.combine!r}")


def coefficients(experts: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a_e, b_e) as float32 for global expert ids of any shape, out of `total`: a_e in +-1..4."""
    a = (experts % 4 + 1) * (1 - 2 * (experts // 4 % 2))
    b = experts // 8 - total // 16
    return a.to(torch.float32), b.to(torch.float32)


def column(hidden: int, device: torch.device) -> torch.Tensor:
    """u: [hidden] float32, integers +-1..7."""
    key = mix(torch.arange(hidden, device=device) + 0xC01)
    return ((key % 7 + 1) * (1 - (key >> 3 & 1) * 2)).to(torch.float32)


def largest_sum(shape: Moe, amplitude: int) -> int:
    """Bound, in sixteenths, of every float32 value between a received row and its combined row: K picks of
    weight below 1, |f| <= 4 A + 7 max|b|, and two casts that each round up by at most 2**-8."""
    largest = 4 * amplitude + 7 * (shape.experts // 16 + 1)
    return int(16 * shape.topk * largest * (1 + 2**-8) ** 2) + 1


def values(received: Received, rows: slice) -> torch.Tensor:
    """[n, H] float32, a new tensor: the received values, scales applied."""
    if received.scales is None:
        return received.rows[rows].to(torch.float32)
    return dequantise(received.rows[rows], received.scales[rows])


def expert_step(
    received: Received, problem: MoeProblem, variant: Variant, sums: torch.Tensor | None = None
) -> torch.Tensor:
    """[N, H] bf16: what the harness stages for combine, from what was received, in its order.

    Expert ids outside this rank's contribute nothing. Weights are the received ones where the library
    transports them, else those of the token that the row's signs name.
    sums   [N] float32, if given: filled with the sum of each received row (exact for true rows)
    """
    check_model(variant)
    count, hidden = received.rows.shape
    local = received.experts
    valid = (local >= 0) & (local < problem.local_experts)
    if variant.combine == "weighted-sum":
        weights = valid.to(torch.float32)  # the library multiplies
    elif received.weights is not None:
        weights = torch.where(valid, received.weights, 0.0)
    else:
        head = _head(received)
        weights = problem.weights_of(
            problem.decode(head, problem.input_set)[0], torch.where(valid, local, -1)
        )
    a, b = coefficients(
        local.clamp(0, problem.local_experts - 1) + problem.first_local_expert, problem.shape.experts
    )
    p, q = (weights * a).sum(1), (weights * b).sum(1)
    u = column(hidden, problem.device)
    out = torch.empty(count, hidden, dtype=torch.bfloat16, device=problem.device)
    for rows in chunks(count, hidden):
        x = values(received, rows)
        if sums is not None:
            sums[rows] = x.sum(1)
        out[rows] = x.mul_(p[rows, None]).addcmul_(q[rows, None], u)
    return out


def expected_combined(problem: MoeProblem, variant: Variant, input_set: int) -> torch.Tensor:
    """[T_r, H] bf16: what combine must return for this rank's tokens, from the routing and the formulas."""
    plan = _Plan(problem, variant)
    experts = problem.all_experts[problem.own]
    a, b = coefficients(experts, problem.shape.experts)
    if variant.combine == "weighted-sum":
        p, q = a, b
    else:
        weights = problem.all_weights[problem.own]
        p, q = weights * a, weights * b
    if variant.combine == "rank-sum":
        p, q = (plan.same * p[:, None, :]).sum(2), (plan.same * q[:, None, :]).sum(2)
    u = column(problem.shape.hidden, problem.device)
    ids = problem.own_ids()
    out = torch.empty_like(problem.x)
    for rows in chunks(problem.tokens, problem.shape.hidden * plan.kept):
        x = problem.payload(ids[rows], input_set)

        def term(k: int, rows: slice = rows, x: torch.Tensor = x) -> torch.Tensor:
            staged = (x * p[rows, k, None]).addcmul_(q[rows, k, None], u)
            return staged.to(torch.bfloat16).to(torch.float32)

        out[rows] = plan.combine(rows, term)
    return out


def chain_rows(received: Received, problem: MoeProblem, variant: Variant) -> torch.Tensor:
    """[N, H] bf16 rows to stage once for a whole chain: all the same, coded by rank and column, so that the
    combined output does not depend on the order in which a later dispatch delivers. Where combine works in
    place, the rows that came."""
    check_model(variant)
    if variant.in_place:
        return received.rows
    row = _chain_row(problem.rank, problem.shape.hidden, problem.device).to(torch.bfloat16)
    return row.expand(received.rows.shape[0], -1).contiguous()


def expected_chain(problem: MoeProblem, variant: Variant) -> torch.Tensor:
    """[T_r, H] bf16: what combine returns when every rank has staged its `chain_rows`; in place, when every
    rank gives back what it got of the present inputs."""
    plan = _Plan(problem, variant)
    hidden = problem.shape.hidden
    if variant.in_place:
        return _given_back(problem, plan)
    table = torch.stack([_chain_row(rank, hidden, problem.device) for rank in range(problem.size)])
    out = torch.empty_like(problem.x)
    for rows in chunks(problem.tokens, hidden * plan.kept):
        out[rows] = plan.combine(rows, lambda k, rows=rows: table[plan.ranks[rows, k].clamp(min=0)])
    return out


def _given_back(problem: MoeProblem, plan: _Plan) -> torch.Tensor:
    ids, out = problem.own_ids(), torch.empty_like(problem.x)
    for rows in chunks(problem.tokens, problem.shape.hidden * plan.kept):
        x = problem.payload(ids[rows], problem.input_set)
        out[rows] = plan.combine(rows, lambda k, x=x: x)
    return out


class _Plan:
    """How the picks of this rank's tokens are summed.

    ranks   [T_r, K] rank of each pick, -1 for none
    same    [T_r, K, K] whether two picks are on the same rank
    first   [T_r, K] whether no earlier pick is on that rank: these stand for their rank
    factor  [T_r, K] float32 what the library multiplies a pick's term by
    """

    def __init__(self, problem: MoeProblem, variant: Variant):
        check_model(variant)
        experts = problem.all_experts[problem.own]
        valid = experts >= 0
        self.ranks = torch.where(valid, experts // problem.local_experts, -1)
        self.same = (self.ranks[:, :, None] == self.ranks[:, None, :]) & valid[:, None, :] & valid[:, :, None]
        self.first = valid & ~self.same.tril(-1).any(2)
        if variant.combine == "rank-sum":
            self.factor = self.first.to(torch.float32)
        elif variant.combine == "expert-sum":
            self.factor = valid.to(torch.float32)
        else:
            self.factor = problem.all_weights[problem.own]
        self.picks = problem.shape.topk
        # In rank-sum a term is a rank's cast partial already: both casts are the same.
        self.partials = variant.casts == "rank-partials" and variant.combine != "rank-sum"
        self.together, self.leads = self.same, self.first  # the picks of one partial, and who stands for it
        if variant.casts == "node-partials":
            self.partials = True
            nodes = torch.where(valid, self.ranks // problem.ranks_per_node, -1)
            self.together = nodes[:, :, None] == nodes[:, None, :]
            self.together &= valid[:, None, :] & valid[:, :, None]
            self.leads = valid & ~self.together.tril(-1).any(2)
        self.kept = self.picks if self.partials else 1  # terms held at a time

    def combine(self, rows: slice, term: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """[n, H] bf16 from term(k), [n, H] float32: what is staged for pick k of those tokens."""
        terms = (term(k) * self.factor[rows, k, None] for k in range(self.picks))
        total = next(terms)
        if not self.partials:
            for t in terms:
                total += t
            return total.to(torch.bfloat16)
        every = [total, *terms]
        total = torch.zeros_like(total)
        for k in range(self.picks):
            partial = torch.zeros_like(total)
            for other in range(k, self.picks):
                partial.addcmul_(every[other], self.together[rows, k, other, None].to(torch.float32))
            total.addcmul_(
                partial.to(torch.bfloat16).to(torch.float32), self.leads[rows, k, None].to(torch.float32)
            )
        return total.to(torch.bfloat16)


def _head(received: Received) -> torch.Tensor:
    """[N, 32] the columns that carry the code; scales are positive and change no sign."""
    return received.rows[:, :32].to(torch.float32)


def _chain_row(rank: int, hidden: int, device: torch.device) -> torch.Tensor:
    """[hidden] float32, integers +-1..63."""
    key = mix(torch.arange(hidden, device=device) + mix(rank + 0xBEE))
    return ((key % 63 + 1) * (1 - (key >> 7 & 1) * 2)).to(torch.float32)
