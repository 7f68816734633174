"""The correctness oracle: checks that know nothing of any library and allow no tolerance.

Expected rows and outputs come from formulas (`problem.py`, `experts.py`); received rows are known by
their own content. All float32 arithmetic is exact by construction, so every comparison is for equality. A
failed check's `detail` is its evidence: the first bad row, what was found, how many.

Every rank calls the same checks in the same order; the list that comes back is as long on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backends.base import Exchange, Received, Variant
from .collective_oracle import check_collective, collective_expected, collective_input
from .device import Device
from .dispatch_oracle import check_dispatch, malformed
from .experts import chain_rows, expected_chain, expected_combined, expert_step
from .poison import poison
from .problem import MoeProblem, chunks
from .types import Check

__all__ = [
    "chain_rows",
    "check_chain",
    "check_collective",
    "check_combined",
    "check_dispatch",
    "check_exchange",
    "check_inputs_unchanged",
    "check_repeated",
    "collective_expected",
    "collective_input",
    "expected_chain",
    "expected_combined",
    "expert_step",
    "poison",
]

REPEATED_SETS = (0, 1, 2)  # three: a library with two buffers must not find the right answer in an old one


def check_exchange(
    exchange: Exchange,
    problem: MoeProblem,
    variant: Variant,
    input_set: int,
    device: Device,
    phase: str = "before",
) -> list[Check]:
    """One checked call: fill, poison, dispatch, check, expert step, combine, check. Every rank calls it."""
    _fill_and_poison(exchange, problem, device, input_set)
    state = exchange.dispatch()
    device.synchronize()
    received = exchange.received(state)
    checks = check_dispatch(received, problem, variant, input_set, phase)
    out = exchange.combine(state, exchange.stage(state, _staged(received, problem, variant)))
    device.synchronize()
    checks.append(check_combined(out, problem, variant, input_set, phase))
    checks.append(check_inputs_unchanged(problem, input_set, phase))
    return checks


def check_repeated(
    exchange: Exchange,
    problem: MoeProblem,
    variant: Variant,
    calls: int,
    device: Device,
    phase: str = "repeated",
) -> Check:
    """`calls` checked calls with changing inputs, each compared bitwise with what was computed beforehand.

    Of every call: each received row by its sum, how often each token came, every element of the combined
    output and of the inputs. Nothing is brought to the host before the last call.
    """
    prepared = [_Prepared.make(problem, variant, s) for s in REPEATED_SETS]
    found = torch.zeros(calls, len(_Prepared.EVIDENCE), dtype=torch.int64, device=problem.device)
    for call in range(calls):
        expected = prepared[call % len(prepared)]
        _fill_and_poison(exchange, problem, device, expected.input_set, expected.x)
        state = exchange.dispatch()
        received = exchange.received(state)
        sums = torch.full((received.rows.shape[0],), torch.nan, device=problem.device)
        rows = _staged(received, problem, variant, sums)
        out = exchange.combine(state, exchange.stage(state, rows))
        found[call] = expected.compare(received, sums, out, problem, variant)
    device.synchronize()
    return _repeated_verdict(found.tolist(), phase)


def check_combined(
    out: torch.Tensor, problem: MoeProblem, variant: Variant, input_set: int, phase: str = "before"
) -> Check:
    """The combined rows [T_r, H] after `expert_step` on every rank, equal in every element."""
    detail = _difference(out, expected_combined(problem, variant, input_set), "combined")
    return Check("combined", phase, detail is None, detail=detail)


def check_chain(
    out: torch.Tensor, problem: MoeProblem, variant: Variant, phase: str = "after-chain"
) -> Check:
    """The last output of a chain over pre-staged `chain_rows`, equal in every element."""
    detail = _difference(out, expected_chain(problem, variant), "combined")
    return Check("chain output", phase, detail is None, detail=detail)


def check_inputs_unchanged(problem: MoeProblem, input_set: int, phase: str = "before") -> Check:
    """Rows, expert ids and weights are as the harness gave them."""
    ids = problem.own_ids()
    detail = None
    if not torch.equal(problem.topk_idx, problem.all_experts[problem.own]):
        detail = "the expert ids that the library was given have changed"
    elif not torch.equal(problem.topk_weights, problem.all_weights[problem.own]):
        detail = "the weights that the library was given have changed"
    for rows in chunks(problem.tokens, problem.shape.hidden):
        sent = problem.pattern(ids[rows], input_set).to(torch.bfloat16)
        detail = detail or _difference(problem.x[rows], sent, "input", rows.start)
    return Check("inputs unchanged", phase, detail is None, detail=detail)


def _fill_and_poison(
    exchange: Exchange, problem: MoeProblem, device: Device, input_set: int, saved: torch.Tensor | None = None
) -> None:
    # Between barriers: a one-sided peer may still read our buffers for the call before, or already write them
    # for the next.
    device.synchronize()
    problem.barrier()
    problem.fill(input_set, saved)
    poison(exchange.outputs())
    device.synchronize()
    problem.barrier()


def _staged(
    received: Received, problem: MoeProblem, variant: Variant, sums: torch.Tensor | None = None
) -> torch.Tensor:
    """`expert_step`, or NaN where there is nothing to compute with: the peers still wait for our rows."""
    if malformed(received, problem, variant) is None:
        return expert_step(received, problem, variant, sums)
    shape = (received.rows.shape[0], problem.shape.hidden)
    return torch.full(shape, torch.nan, dtype=torch.bfloat16, device=problem.device)


@dataclass(frozen=True)
class _Prepared:
    """What one input set leads to, kept on the device for `check_repeated`."""

    input_set: int
    x: torch.Tensor
    combined: torch.Tensor
    row_sums: torch.Tensor  # [R*T] float32, NaN for tokens that must not come
    arrivals: torch.Tensor  # [R*T] int64 how often each token must come

    EVIDENCE = ("inputs", "rows", "tokens", "outputs", "first")

    @classmethod
    def make(cls, problem: MoeProblem, variant: Variant, input_set: int) -> _Prepared:
        ids = problem.arrivals(variant.layout).ids
        total = len(problem.all_experts)
        arrivals = torch.zeros(total, dtype=torch.int64, device=problem.device)
        arrivals.index_add_(0, ids, torch.ones_like(ids))
        sums = torch.full((total,), torch.nan, device=problem.device)
        unique = arrivals.nonzero()[:, 0]
        for rows in chunks(len(unique), problem.shape.hidden):
            sums[unique[rows]] = problem.payload(unique[rows], input_set).sum(1)
        problem.fill(input_set)
        return cls(
            input_set, problem.x.clone(), expected_combined(problem, variant, input_set), sums, arrivals
        )

    def compare(
        self,
        received: Received,
        sums: torch.Tensor,
        out: torch.Tensor,
        problem: MoeProblem,
        variant: Variant,
    ) -> torch.Tensor:
        """[5] int64 on the device: input elements changed, received rows wrong, tokens missing or extra,
        output rows wrong, and the first of those."""
        changed = (problem.x != self.x).sum()
        changed = changed + (problem.topk_idx != problem.all_experts[problem.own]).sum()
        changed = changed + (problem.topk_weights != problem.all_weights[problem.own]).sum()
        arrivals = torch.zeros_like(self.arrivals)
        if malformed(received, problem, variant) is None:
            ids, known = problem.decode(received.rows, self.input_set)
            arrivals.index_add_(0, ids, known.to(torch.int64))
            rows = (~known | (sums != self.row_sums[ids])).sum()
        else:
            rows = torch.full_like(changed, max(1, len(received.rows)))
        if out.shape != self.combined.shape or out.dtype != self.combined.dtype:
            wrong = torch.ones(max(1, len(self.combined)), dtype=torch.bool, device=problem.device)
        else:
            wrong = (out != self.combined).any(1)
        first = wrong.to(torch.int32).argmax() if len(wrong) else torch.zeros_like(changed)
        return torch.stack([changed, rows, (arrivals != self.arrivals).sum(), wrong.sum(), first])


def _repeated_verdict(found: Sequence[Sequence[int]], phase: str) -> Check:
    """One check over all calls from what `_Prepared.compare` found in each."""
    bad = [
        call
        for call, (inputs, rows, tokens, outputs, _) in enumerate(found)
        if inputs or rows or tokens or outputs
    ]
    if not bad:
        return Check("repeated calls", phase, True, calls=max(1, len(found)))
    inputs, rows, tokens, outputs, first = found[bad[0]]
    parts = [f"{outputs} combined rows wrong, first: token {first}"] if outputs else []
    parts += [f"{rows} received rows wrong"] if rows else []
    parts += [f"{tokens} tokens missing or not expected"] if tokens else []
    parts += [f"{inputs} input elements changed"] if inputs else []
    detail = f"{len(bad)} of {len(found)} calls wrong; first: call {bad[0]}: {', '.join(parts)}"
    return Check("repeated calls", phase, False, calls=len(found), detail=detail)


def _difference(found: torch.Tensor, expected: torch.Tensor, what: str, start: int = 0) -> str | None:
    """How `found` differs from `expected` [N, H], rows being tokens from `start`; None where it does not."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return (
            f"{what} is {found.dtype} {list(found.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    if torch.equal(found, expected):
        return None
    wrong = (found != expected).any(1).nonzero()[:, 0]
    row = int(wrong[0])
    columns = (found[row] != expected[row]).nonzero()[:, 0]
    at = int(columns[0])
    text = f"{float(found[row, at]):g}, expected {float(expected[row, at]):g}"
    rows = f"{len(wrong)} of {len(found)} {what} rows wrong"
    return f"{rows}, first: token {start + row}, {len(columns)} columns, column {at} is {text}"
