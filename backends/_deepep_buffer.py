"""The exchanges over DeepEP's first interface, a `Buffer`: DeepEP's own (deepep_legacy) and UCCL's (uccl_ep).

What is inside the timed windows
  normal  (normal)       dispatch: quantisation where fp8 is asked, `get_dispatch_layout`, exchange of the
                         counts with a host wait, rows with their ids and weights through channel queues.
                         combine: rows back, float32 sum over ranks, one cast.
  cached  (cached)       dispatch: quantisation, rows; the handle of an earlier call. combine: as above.
  ll      (low-latency)  dispatch: quantisation in the kernel, one row per pick into fixed slots, copy into a
                         packed tensor. combine: rows back, weighted float32 sum over picks, one cast.

Zero-copy combine is not used: its buffer is the dispatch send buffer of the same parity, which the next
dispatch overwrites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .base import Received, Variant

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem

_COMBINE = "rows back through channel queues, float32 sum over ranks, one cast to bf16"

VARIANTS = (
    Variant(
        "normal",
        "normal",
        ("bf16", "fp8"),
        {
            "dispatch": "quantise (fp8), layout, counts exchange, host wait, rows with ids and weights",
            "combine": _COMBINE,
        },
    ),
    Variant(
        "cached",
        "cached",
        ("bf16", "fp8"),
        {"dispatch": "quantise (fp8), rows; layout and counts known", "combine": _COMBINE},
        graph_safe=True,
    ),
    Variant(
        "ll",
        "low-latency",
        ("bf16", "fp8"),
        {
            "dispatch": "quantise (fp8, in the kernel), a row per pick into fixed slots, packing",
            "combine": "rows back, weighted float32 sum over picks, one cast to bf16",
        },
        layout="token-expert",
        combine="weighted-sum",
        graph_safe=True,
    ),
)


def ll_capacity(tokens: int) -> int:
    """The receive slots per source rank: a multiple of 4, as the scales' layout wants R * slots to be."""
    return max(4, -(-tokens // 4) * 4)


class Made(NamedTuple):
    """A library buffer, its bytes, and (low-latency) the number of experts its flags are laid out for."""

    size: int = 0
    buffer: Any = None
    experts: int = 0


class State(NamedTuple):
    """rows [N, H] bf16, or (fp8, scales [N, H/128]); topk_idx, topk_weights [N, K] local ids and weights."""

    rows: Any
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    counts: Sequence[int]
    handle: tuple[Any, ...]


class _Normal:
    wire: Mapping[str, int] = {}

    def __init__(self, buffer: Any, problem: MoeProblem, realised: Mapping[str, int]):
        self.buffer, self.problem, self.realised = buffer, problem, realised
        self.fp8 = problem.shape.dtype == "fp8"

    def input(self) -> Any:
        x = self.problem.x
        return self.problem.quantise(x) if self.fp8 else x

    def uncached(self) -> State:
        problem = self.problem
        x = self.input()
        per_rank, _, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            problem.topk_idx, problem.shape.experts
        )
        rows, topk_idx, topk_weights, counts, handle, _ = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=problem.topk_idx,
            topk_weights=problem.topk_weights,
        )
        return State(rows, topk_idx, topk_weights, counts, handle)

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self.buffer.combine(staged, state.handle)[0]

    def received(self, state: State) -> Received:
        rows, scales = state.rows if self.fp8 else (state.rows, None)
        return Received(rows, state.topk_idx, scales, state.topk_weights, state.counts)

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def outputs(self) -> Sequence[torch.Tensor]:
        return ()

    def close(self) -> None:
        return None


class Normal(_Normal):
    """Routing known only as expert ids."""

    def dispatch(self) -> State:
        return self.uncached()


class Cached(_Normal):
    """With the handle of one uncached call at opening. Rows come in the order of that call: by source rank,
    then token, so that its ids and weights are those of every later call."""

    def __init__(self, buffer: Any, problem: MoeProblem, realised: Mapping[str, int]):
        super().__init__(buffer, problem, realised)
        self.known = self.uncached()

    def dispatch(self) -> State:
        return self.known._replace(rows=self.buffer.dispatch(self.input(), handle=self.known.handle)[0])


class LLState(NamedTuple):
    """rows [L, R*M, H] bf16, or (fp8, scales [L, R*M, H/128]), of expert e the first counts[e] are valid."""

    rows: Any
    counts: torch.Tensor
    handle: tuple[Any, ...]


class LowLatency:
    wire: Mapping[str, int] = {}

    def __init__(self, buffer: Any, problem: MoeProblem):
        self.buffer, self.problem = buffer, problem
        self.fp8 = problem.shape.dtype == "fp8"
        self.slots = ll_capacity(problem.capacity)
        self.realised: Mapping[str, int] = {"num_max_dispatch_tokens_per_rank": self.slots}

    def dispatch(self) -> LLState:
        problem = self.problem
        rows, counts, handle, _, _ = self.buffer.low_latency_dispatch(
            problem.x, problem.topk_idx, self.slots, problem.shape.experts, use_fp8=self.fp8
        )
        return LLState(rows, counts, handle)

    def combine(self, state: LLState, staged: torch.Tensor) -> torch.Tensor:
        problem = self.problem
        return self.buffer.low_latency_combine(staged, problem.topk_idx, problem.topk_weights, state.handle)[
            0
        ]

    def received(self, state: LLState) -> Received:
        expert, slot = self._valid(state)
        rows, scales = state.rows if self.fp8 else (state.rows, None)
        return Received(
            rows[expert, slot] if not self.fp8 else _fp8_rows(rows, expert, slot),
            expert[:, None],
            None if scales is None else scales[expert, slot],
            counts=state.counts.tolist(),
            sources=self._sources(state)[expert, slot],
        )

    def stage(self, state: LLState, rows: torch.Tensor) -> torch.Tensor:
        import torch

        problem = self.problem
        shape = (problem.local_experts, problem.size * self.slots, problem.shape.hidden)
        staged = rows.new_full(shape, torch.nan)  # rows of no token: who reads them will be seen
        staged[self._valid(state)] = rows
        return staged

    def outputs(self) -> Sequence[torch.Tensor]:
        return ()

    def close(self) -> None:
        return None

    def _valid(self, state: LLState) -> tuple[torch.Tensor, torch.Tensor]:
        """(expert [N], slot [N]) of the valid rows, experts ascending."""
        import torch

        slot = torch.arange(self.problem.size * self.slots, device=state.counts.device)
        expert, slot = (slot < state.counts[:, None]).nonzero().unbind(1)
        return expert, slot

    def _sources(self, state: LLState) -> torch.Tensor:
        """[L, R*M] int64 global token ids. The handle holds each row's token index at its source [L, R*M],
        and for each expert and source rank where that rank's rows begin (high word) and how many (low)."""
        import torch

        tokens, ranges = state.handle[0].long(), state.handle[1]
        begin, count = ranges >> 32, ranges & 0xFFFFFFFF
        slot = torch.arange(tokens.shape[1], device=tokens.device)
        for rank in range(self.problem.size):
            first = begin[:, rank, None]
            mine = (slot >= first) & (slot < first + count[:, rank, None])
            tokens = torch.where(mine, tokens + rank * self.problem.capacity, tokens)
        return tokens


def _fp8_rows(rows: torch.Tensor, expert: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """rows[expert, slot] through bytes: torch indexes 8-bit floats on few devices."""
    import torch

    return rows.view(torch.uint8)[expert, slot].view(rows.dtype)
