"""One NCCL EP group and handle: dispatch and combine as the harness calls them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .base import Context, Received

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem


class Opened(Protocol):
    """What an exchange uses of the backend that set the library up."""

    context: Context
    nccl: Any
    comm: Any


def _stream() -> int:
    """The current stream, asked for in every call: in a capture it is the graph's."""
    import torch

    return torch.cuda.current_stream().cuda_stream


class _Exchange:
    """A group and a handle of its own for one case, on the communicator that all cases share.

    The library's descriptors of tensors keep them alive, and are made once: they never change.
    """

    realised: Mapping[str, int | float | str] = {}
    wire: Mapping[str, int] = {}

    def __init__(
        self, backend: Opened, problem: MoeProblem, algorithm: str, layout: str, layout_info: Any = None
    ):
        import torch

        ep, shape = backend.nccl.ep, problem.shape
        self.context, self.ep, self.problem = backend.context, ep, problem
        self.capacity = _capacity(problem.capacity)
        self.slots = problem.size * self.capacity
        config = ep.GroupConfig(
            algorithm=ep.Algorithm[algorithm],
            num_experts=shape.experts,
            max_dispatch_tokens_per_rank=self.capacity,
            max_recv_tokens_per_rank=self.slots,
            max_token_bytes=2 * shape.hidden,
        )
        self.group = ep.Group.create(backend.comm, config)
        self.topk = ep.Tensor(problem.topk_idx)
        self.handle = self.group.create_handle(
            ep.Layout[layout], self.topk, layout_info=layout_info, stream=_stream()
        )
        self.combined = torch.empty_like(problem.x)
        self.tokens, self.weights = ep.Tensor(problem.x), ep.Tensor(problem.topk_weights)
        self.into = ep.CombineOutputs(tokens=ep.Tensor(self.combined))

    def new(self, *shape: int, dtype: str = "bfloat16") -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.problem.device)

    def combine(self, state: None, staged: Any) -> torch.Tensor:
        self.handle.combine(staged, self.into, stream=_stream())
        return self.combined

    def staged(self, rows: torch.Tensor) -> Any:
        return self.ep.CombineInputs(tokens=self.ep.Tensor(rows))

    def close(self) -> None:
        """Collective. After an error on this rank the others are not here: then nothing is freed."""
        if sys.exc_info()[0] is not None:
            return
        self.context.device.synchronize()
        self.context.ranks.barrier()
        self.handle.destroy()
        self.group.destroy()


def _capacity(tokens: int) -> int:
    return -(-tokens // 4) * 4


class ExpertMajor(_Exchange):
    """Rows [L, R * M, H], for each local expert compact from its first slot on; M is the capacity."""

    def __init__(self, backend: Opened, problem: MoeProblem):
        super().__init__(backend, problem, "LOW_LATENCY", "EXPERT_MAJOR")
        ep, local = self.ep, problem.local_experts
        self.rows = self.new(local, self.slots, problem.shape.hidden)
        self.counts = self.new(local, dtype="int32")
        self.out = ep.DispatchOutputs(tokens=ep.Tensor(self.rows))
        self.inputs = ep.DispatchInputs(tokens=self.tokens)
        self.info = ep.LayoutInfo(expert_counters=ep.Tensor(self.counts))
        self.into = ep.CombineOutputs(tokens=ep.Tensor(self.combined), topk_weights=self.weights)

    def dispatch(self) -> None:
        self.handle.dispatch(self.inputs, self.out, layout_info=self.info, stream=_stream())

    def received(self, state: None) -> Received:
        valid = self._valid()
        return Received(self.rows[valid], valid.nonzero()[:, :1], counts=self.counts.tolist())

    def stage(self, state: None, rows: torch.Tensor) -> Any:
        staged = rows.new_full(self.rows.shape, float("nan"))
        staged[self._valid()] = rows
        return self.staged(staged)

    def outputs(self) -> Sequence[torch.Tensor]:
        return self.rows, self.combined

    def _valid(self) -> torch.Tensor:
        """[L, R * M], or [R, M] where the rows lie by rank: slots that hold a row."""
        import torch

        return torch.arange(self.rows.shape[1], device=self.counts.device) < self.counts[:, None]


class RankMajor(ExpertMajor):
    """Rows [R, M, H], for each source rank compact from its first slot on."""

    def __init__(self, backend: Opened, problem: MoeProblem):
        _Exchange.__init__(self, backend, problem, "LOW_LATENCY", "RANK_MAJOR")
        ep, size, picks = self.ep, problem.size, problem.shape.topk
        self.rows = self.new(size, self.capacity, problem.shape.hidden)
        self.ids = self.new(size, self.capacity, picks, dtype="int32")
        self.gates = self.new(size, self.capacity, picks, dtype="float32")
        self.counts = self.new(size, dtype="int32")
        self.out = ep.DispatchOutputs(
            tokens=ep.Tensor(self.rows), topk_weights=ep.Tensor(self.gates), topk_idx=ep.Tensor(self.ids)
        )
        self.inputs = ep.DispatchInputs(tokens=self.tokens, topk_weights=self.weights)
        self.info = ep.LayoutInfo(src_rank_counters=ep.Tensor(self.counts))

    def received(self, state: None) -> Received:
        """The library sends the weights of all picks, with id -1 for those of other ranks."""
        valid = self._valid()
        return Received(self.rows[valid], self.ids[valid].long(), weights=self.gates[valid])

    def outputs(self) -> Sequence[torch.Tensor]:
        return self.rows, self.combined, self.ids, self.gates


class HighThroughput(_Exchange):
    """Rows [N, H] in a buffer for R * M, one per token and rank."""

    def __init__(self, backend: Opened, problem: MoeProblem, cached: bool):
        ep, picks = backend.nccl.ep, problem.shape.topk
        self.problem, self.cached = problem, cached
        self.counts = self.new(problem.local_experts, dtype="int32")
        self.total = self.new(1, dtype="int32")
        self.info = ep.LayoutInfo(
            expert_counters=ep.Tensor(self.counts), recv_total_counter=ep.Tensor(self.total)
        )
        super().__init__(backend, problem, "HIGH_THROUGHPUT", "FLAT", self.info)
        self.rows = self.new(self.slots, problem.shape.hidden)
        self.ids = self.new(self.slots, picks, dtype="int64")
        self.gates = self.new(self.slots, picks, dtype="float32")
        self.out = ep.DispatchOutputs(
            tokens=ep.Tensor(self.rows), topk_weights=ep.Tensor(self.gates), topk_idx=ep.Tensor(self.ids)
        )
        self.inputs = ep.DispatchInputs(tokens=self.tokens, topk_weights=self.weights)

    def dispatch(self) -> None:
        stream = _stream()
        if not self.cached:
            self.handle.update(self.topk, layout_info=self.info, stream=stream)
        self.handle.dispatch(self.inputs, self.out, stream=stream)

    def received(self, state: None) -> Received:
        count = int(self.total.item())
        if count > self.slots:
            raise RuntimeError(f"the library says that {count} rows came, into room for {self.slots}")
        rows, ids, gates = self.rows[:count], self.ids[:count], self.gates[:count]
        return Received(rows, ids, weights=gates, counts=self.counts.tolist())

    def stage(self, state: None, rows: torch.Tensor) -> Any:
        return self.staged(rows.contiguous())

    def outputs(self) -> Sequence[torch.Tensor]:
        return self.rows, self.combined, self.ids, self.gates
