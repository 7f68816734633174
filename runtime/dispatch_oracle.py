"""The checks of what dispatch delivered to one rank."""

from __future__ import annotations

import torch

from ..backends.base import Received, Variant
from .experts import values
from .fp8 import BLOCK
from .problem import MoeProblem, chunks
from .types import Check


def check_dispatch(
    received: Received, problem: MoeProblem, variant: Variant, input_set: int, phase: str = "before"
) -> list[Check]:
    """What arrived: payload bit-exact, exactly the right tokens and expert ids; weights, counts and sources
    where the library reports them."""
    names = ["payload", "sources", "experts"]
    names += ["weights"] if received.weights is not None else []
    names += ["counts"] if received.counts is not None else []
    names += ["reported sources"] if received.sources is not None else []
    form = malformed(received, problem, variant)
    if form is not None:
        return [Check(name, phase, False, detail=form) for name in names]
    arrived = _Arrived(received, problem, variant, input_set)
    details = {
        "payload": arrived.payload,
        "sources": arrived.tokens,
        "experts": arrived.experts,
        "weights": arrived.weights,
        "counts": arrived.counts,
        "reported sources": arrived.reported_sources,
    }
    found = [(name, details[name]()) for name in names]
    return [Check(name, phase, detail is None, detail=detail) for name, detail in found]


def malformed(received: Received, problem: MoeProblem, variant: Variant) -> str | None:
    """What is wrong with the form of `received`, or None."""
    rows, hidden = received.rows, problem.shape.hidden
    count = rows.shape[0]
    picks = received.experts.shape[1] if variant.layout == "token-rank" and received.experts.ndim == 2 else 1
    wanted: list[tuple[str, torch.Tensor | None, tuple[int, ...]]] = [
        ("rows", rows, (count, hidden)),
        ("experts", received.experts, (count, picks)),
        ("weights", received.weights, (count, picks)),
        ("sources", received.sources, (count,)),
        ("scales", received.scales, (count, hidden // BLOCK)),
    ]
    for name, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            return f"{name} has shape {list(tensor.shape)}, expected {list(shape)}"
    fp8 = problem.shape.dtype == "fp8"
    if fp8 != (received.scales is not None) or rows.dtype != (
        problem.format.dtype if fp8 else torch.bfloat16
    ):
        return f"rows are {rows.dtype} with{'' if received.scales is not None else 'out'} scales"
    return None


class _Arrived:
    """Received rows beside what should have come. Each method returns its evidence, or None."""

    def __init__(self, received: Received, problem: MoeProblem, variant: Variant, input_set: int):
        self.received, self.problem, self.input_set = received, problem, input_set
        self.wanted = problem.arrivals(variant.layout)
        self.ids, self.known = problem.decode(received.rows, input_set)
        self.total, self.local_experts = len(problem.all_experts), problem.local_experts
        local = received.experts
        self.valid = (local >= 0) & (local < self.local_experts)

    def payload(self) -> str | None:
        """Every row equals the row of the token that its signs name."""
        bad_rows, evidence = 0, None
        for rows in chunks(len(self.ids), self.problem.shape.hidden):
            expected = self.problem.payload(self.ids[rows], self.input_set)
            found = values(self.received, rows)
            wrong = (found != expected).any(1)
            count = int(wrong.sum())
            bad_rows += count
            if count and evidence is None:
                row = int(wrong.nonzero()[0])
                at = int((found[row] != expected[row]).nonzero()[0])
                name = self._token(self.ids[rows][row])
                if not self.known[rows][row]:
                    name = f"no token of input set {self.input_set}"
                evidence = f"first: row {rows.start + row} ({name}), column {at} is {float(found[row, at]):g}"
                evidence += f", expected {float(expected[row, at]):g}" if self.known[rows][row] else ""
        return None if evidence is None else f"{bad_rows} of {len(self.ids)} rows wrong; {evidence}"

    def tokens(self) -> str | None:
        """Exactly the tokens that this rank should get, each as often as it should."""
        expected = torch.bincount(self.wanted.ids, minlength=self.total)
        found = torch.bincount(self.ids[self.known], minlength=self.total)
        unknown = int((~self.known).sum())
        wrong = (found != expected).nonzero()[:, 0]
        if not len(wrong) and not unknown:
            return None
        parts = [f"{len(self.ids)} rows came, {len(self.wanted.ids)} expected"]
        if unknown:
            parts.append(f"{unknown} rows are no token of input set {self.input_set}")
        if len(wrong):
            at = wrong[0]
            times = f"came {int(found[at])} times, expected {int(expected[at])}"
            parts.append(f"{len(wrong)} tokens are off, first: {self._token(at)} {times}")
        return "; ".join(parts)

    def experts(self) -> str | None:
        """Every (token, local expert) pair once, and no expert id of another rank."""
        local = self.received.experts
        strange = ((local != -1) & ~self.valid).nonzero()
        if len(strange):
            row, pick = strange[0].tolist()
            return f"{len(strange)} ids are no local expert, first: row {row} has {int(local[row, pick])}"
        mine = self.valid & self.known[:, None]
        found = self._pairs(self.ids[:, None].expand_as(local)[mine], local[mine])
        valid = self.wanted.experts >= 0
        ids = self.wanted.ids[:, None].expand_as(valid)[valid]
        expected = self._pairs(ids, self.wanted.experts[valid])
        wrong = (found != expected).nonzero()[:, 0]
        if not len(wrong):
            return None
        at = int(wrong[0])
        token, expert = at // self.local_experts, at % self.local_experts
        times = f"came {int(found[at])} times, expected {int(expected[at])}"
        first = f"{self._token(token)} for local expert {expert} {times}"
        return f"{len(wrong)} (token, expert) pairs off, first: {first}"

    def weights(self) -> str | None:
        """The weight of every valid pick."""
        found = self.received.weights
        assert found is not None
        expected = self.problem.weights_of(self.ids, torch.where(self.valid, self.received.experts, -1))
        wrong = ((found != expected) & self.valid & self.known[:, None]).nonzero()
        if not len(wrong):
            return None
        row, pick = wrong[0].tolist()
        text = f"is {float(found[row, pick]):g}, expected {float(expected[row, pick]):g}"
        first = f"row {row} ({self._token(self.ids[row])}), pick {pick} {text}"
        return f"{len(wrong)} weights wrong, first: {first}"

    def counts(self) -> str | None:
        """Rows per local expert, as reported."""
        assert self.received.counts is not None
        picks = self.wanted.experts[self.wanted.experts >= 0]
        expected = torch.bincount(picks, minlength=self.local_experts).tolist()
        found = [int(c) for c in self.received.counts]
        if found == expected:
            return None
        if len(found) != len(expected):
            return f"{len(found)} counts reported for {len(expected)} local experts"
        at = next(i for i, (f, e) in enumerate(zip(found, expected, strict=True)) if f != e)
        return f"local expert {at} is said to have {found[at]} rows, it has {expected[at]}"

    def reported_sources(self) -> str | None:
        """The source that the library reports for each row is the one that the row itself tells."""
        found = self.received.sources
        assert found is not None
        wrong = ((found != self.ids) & self.known).nonzero()[:, 0]
        if not len(wrong):
            return None
        row = int(wrong[0])
        text = f"reported as {self._token(found[row])}, holds {self._token(self.ids[row])}"
        return f"{len(wrong)} sources wrong, first: row {row} is {text}"

    def _pairs(self, ids: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        pairs = self.total * self.local_experts
        return torch.bincount(ids * self.local_experts + local, minlength=pairs)

    def _token(self, global_id: torch.Tensor | int) -> str:
        capacity = max(self.problem.capacity, 1)
        return f"token {int(global_id) % capacity} of rank {int(global_id) // capacity}"
