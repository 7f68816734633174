"""What a rank of the fake receives, and the ways in which dispatch can break it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .base import Received

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem


def bits(rows: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the elements' width."""
    import torch

    return rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[rows.element_size()])


def encode(
    problem: MoeProblem, ids: torch.Tensor, input_set: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of tokens `ids` as they travel: [N, H] bf16 or fp8, and for fp8 the scales."""
    import torch

    from ..runtime.fp8 import reference_quantise

    sent = problem.pattern(ids, input_set)
    if problem.shape.dtype == "fp8":
        return reference_quantise(sent, problem.format)
    return sent.to(torch.bfloat16), None


@dataclass
class Arrived:
    """What one rank received of an input set, open to faults.

    ids      [N] int64 token that combine returns each row to, -1 for nobody
    factors  [N] float32 what combine multiplies each row by
    bits     [N, H] the rows as integers of their width
    """

    problem: MoeProblem
    input_set: int
    dtype: torch.dtype
    ids: torch.Tensor
    factors: torch.Tensor
    bits: torch.Tensor
    scales: torch.Tensor | None
    experts: torch.Tensor
    weights: torch.Tensor | None
    counts: list[int]
    sources: torch.Tensor | None

    def received(self) -> Received:
        rows = self.bits.view(self.dtype)
        return Received(rows, self.experts, self.scales, self.weights, list(self.counts), self.sources)

    def take(self, order: torch.Tensor) -> Arrived:
        """A copy with these rows in this order."""

        def of(part: Any) -> Any:
            return None if part is None else part[order]

        return replace(
            self,
            ids=of(self.ids),
            factors=of(self.factors),
            bits=of(self.bits),
            scales=of(self.scales),
            experts=of(self.experts),
            weights=of(self.weights),
            sources=of(self.sources),
            counts=list(self.counts),
        )


# Faults of dispatch: each breaks what one rank received, which has a row at least.


def _take_rows(arrived: Arrived, rows: list[int]) -> None:
    import torch

    arrived.__dict__.update(arrived.take(torch.tensor(rows, dtype=torch.int64)).__dict__)


def _replace_row(arrived: Arrived, row: int, token: int) -> None:
    """Put another token's row in this place, and leave what is said about it."""
    import torch

    rows, scales = encode(arrived.problem, torch.tensor([token]), arrived.input_set)
    arrived.bits[row] = bits(rows)[0]
    if scales is not None and arrived.scales is not None:
        arrived.scales[row] = scales[0]


def _extra_row(arrived: Arrived) -> None:
    problem, row = arrived.problem, len(arrived.ids)
    _take_rows(arrived, [*range(row), row // 2])
    arrived.ids[row] = -1  # combine returns it to nobody
    expected = set(problem.arrivals("token-rank").ids.tolist())
    sent = (problem.all_experts[:, 0] >= 0).nonzero()[:, 0].tolist()
    foreign = [token for token in sent if token not in expected]
    # Where every token belongs here, a row of a token that there is not.
    _replace_row(arrived, row, foreign[0] if foreign else len(problem.all_experts))


def _swapped_rows(arrived: Arrived) -> None:
    # Rows with the same picks and weights are interchangeable up to their token: take two unlike tokens.
    i = len(arrived.ids) // 2
    unlike = (arrived.ids != arrived.ids[i]).nonzero()[:, 0]
    if len(unlike):
        j = int(unlike[0])
        arrived.bits[[i, j]] = arrived.bits[[j, i]]


def _next_expert(arrived: Arrived, one: bool) -> None:
    local = arrived.problem.local_experts
    shifted = arrived.experts + 1
    if local > 1:  # else the next one is another rank's
        shifted %= local
    broken = arrived.experts >= 0
    if one:
        broken &= broken.flatten().cumsum(0).view_as(broken) == 1
    arrived.experts = shifted.where(broken, arrived.experts)


def _wrong_source(arrived: Arrived) -> None:
    row = len(arrived.ids) // 2
    other = int(arrived.ids[row]) ^ 1
    if arrived.sources is None:
        _replace_row(arrived, row, other)
    else:
        arrived.sources[row] = other


def _pick(arrived: Arrived) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """The weights that count (transported, or combine's own) and where one of them stands."""
    if arrived.weights is None:
        return arrived.factors, (len(arrived.ids) // 2,)
    row = len(arrived.ids) // 2
    return arrived.weights, (row, int((arrived.experts[row] >= 0).nonzero()[0]))


def _weight_missing(arrived: Arrived) -> None:
    weights, at = _pick(arrived)
    weights[at] = 1.0


def _weight_twice(arrived: Arrived) -> None:
    weights, at = _pick(arrived)
    weights[at] = weights[at] ** 2


def _weights_swapped(arrived: Arrived) -> None:
    weights, at = _pick(arrived)
    valid = arrived.experts >= 0
    unlike = ((weights != weights[at]) & (valid if weights.ndim == 2 else valid[:, 0])).nonzero()
    if len(unlike):
        other = tuple(unlike[0].tolist())
        weights[at], weights[other] = weights[other].clone(), weights[at].clone()


def _flip(bit: int) -> Callable[[Arrived], None]:
    def flip(arrived: Arrived) -> None:
        width = 8 * arrived.bits.element_size()
        arrived.bits[len(arrived.ids) // 2, 50] ^= -(1 << (width - 1)) if bit < 0 else 1 << bit

    return flip


def _row(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arrived], None]:
    def broken(arrived: Arrived) -> None:
        i = len(arrived.ids) // 2
        arrived.bits[i] = change(arrived.bits[i])

    return broken


def _halved(row: torch.Tensor) -> torch.Tensor:
    row = row.clone()
    row[len(row) // 2 :] = 0
    return row


def _wrong_scale(arrived: Arrived) -> None:
    assert arrived.scales is not None
    arrived.scales[len(arrived.ids) // 2, -1] *= 2


def _wrong_count(arrived: Arrived) -> None:
    arrived.counts[0] += 1


BREAKS: Mapping[str, Callable[[Arrived], None]] = {
    "dropped-row": lambda a: _take_rows(a, list(range(1, len(a.ids)))),
    "duplicated-row": lambda a: _take_rows(a, [*range(len(a.ids)), 0]),
    "extra-row": _extra_row,
    "swapped-rows": _swapped_rows,
    "wrong-expert": lambda a: _next_expert(a, one=True),
    "expert-offset": lambda a: _next_expert(a, one=False),
    "wrong-source": _wrong_source,
    "wrong-count": _wrong_count,
    "weight-missing": _weight_missing,
    "weight-twice": _weight_twice,
    "weights-swapped": _weights_swapped,
    "truncated-row": _row(_halved),
    "column-shift": _row(lambda row: row.roll(1)),
    "sign-flip": _flip(-1),
    "low-bit-flip": _flip(0),
    "wrong-scale": _wrong_scale,
}
