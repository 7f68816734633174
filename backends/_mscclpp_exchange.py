"""One MSCCL++ communicator: dispatch and combine as the harness calls them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..runtime.errors import InfraError
from ..runtime.types import Case
from .base import Context, Received

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem


class Opened(Protocol):
    """What an exchange uses of the backend that set the library up."""

    context: Context
    mscclpp: Any
    ep: Any


class State(NamedTuple):
    """What the library returned: a DispatchOutput and a DispatchHandle."""

    out: Any
    handle: Any


# What a case that failed on this rank has left: freeing it would wait for all ranks.
_abandoned: list[Any] = []


class _Exchange:
    """A communicator of its own for one case, on a bootstrap of its own.

    A bootstrap that carries a second communicator still maps the first one's semaphores: it keeps the last
    thing received for each (rank, tag), Communicator::Impl::lastRecvItems_. The peers have freed that memory
    and export the same addresses again, so one open in some 25 ended in "resource already mapped" or in a
    segmentation fault (seen on 4 and 2 H200).
    """

    wire: Mapping[str, int] = {}

    def __init__(self, backend: Opened, case: Case, problem: MoeProblem, **config: Any):
        shape = problem.shape
        self.context, self.ep, self.problem = backend.context, backend.ep, problem
        self.group: Any = backend.mscclpp.CommGroup(torch_group=self.context.group)
        self.comm: Any = backend.ep.MoECommunicator(
            comm=self.group,
            num_experts=shape.experts,
            hidden_size=shape.hidden,
            topk=shape.topk,
            max_tokens_per_rank=problem.capacity,
            num_blocks=dict(case.knobs).get("num_blocks"),
            **config,
        )
        if not self.comm.is_available():
            raise InfraError("MSCCL++ EP does not see all ranks in one CUDA-IPC domain")
        self.comm.initialize()
        self.realised: Mapping[str, int | float | str] = {"num_blocks": self.comm.num_blocks}
        self.last: State | None = None

    def close(self) -> None:
        """Drops what refers to the library's memory, on all ranks together. After an error on this rank the
        others are not here: then nothing is freed, and the process ends soon."""
        if sys.exc_info()[0] is not None:
            _abandoned.append(self.__dict__.copy())
            return
        self.context.device.synchronize()
        self.context.ranks.barrier()
        for names in (("comm", "last", "buffer", "first", "current"), ("group",)):  # the bootstrap goes last
            for name in names:
                self.__dict__.pop(name, None)
            gc.collect()
            self.context.ranks.barrier()


class _Latency(_Exchange):
    def __init__(self, backend: Opened, case: Case, problem: MoeProblem, layout: Any):
        import torch

        ep = backend.ep
        direct = case.variant.endswith("-direct")
        fp8 = case.shape.dtype == "fp8"
        super().__init__(
            backend,
            case,
            problem,
            mode=ep.MoEMode.LATENCY,
            output_layout=layout,
            combine_mode=ep.CombineMode.DIRECT_SEND if direct else ep.CombineMode.RANK_LOCAL_REDUCE,
            quant=ep.QuantConfig(format=ep.DispatchDataType.FP8_E4M3) if fp8 else None,
        )
        self.buffer: Any = self.comm.get_dispatch_output_buffer()
        self.combined = torch.empty_like(problem.x)

    def dispatch(self) -> State:
        problem = self.problem
        self.last = State(*self.comm.dispatch(problem.x, problem.topk_idx, problem.topk_weights))
        return self.last

    def outputs(self) -> Sequence[torch.Tensor]:
        quant = None if self.last is None else self.last.out.quant
        return [self.buffer, self.combined, *([] if quant is None else [quant.block_scales])]


class ExpertMajor(_Latency):
    """Rows [L, R * T, H], for each local expert compact from its first slot on."""

    def __init__(self, backend: Opened, case: Case, problem: MoeProblem):
        super().__init__(backend, case, problem, backend.ep.DispatchLayout.EXPERT_MAJOR)

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self.comm.combine(staged, state.handle, out=self.combined)

    def received(self, state: State) -> Received:
        import torch

        valid, tokens = self._valid(state), state.out.tokens
        if state.out.quant is None:
            rows, scales = tokens[valid], None
        else:
            rows = tokens.view(torch.uint8)[valid].view(tokens.dtype)  # not every torch can index fp8
            scales = state.out.quant.block_scales[valid]
        counts = state.out.layout.num_tokens_per_expert.tolist()
        return Received(rows, valid.nonzero()[:, :1], scales, None, counts)

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        staged = rows.new_full(state.out.tokens.shape, float("nan"))
        staged[self._valid(state)] = rows
        return staged

    def _valid(self, state: State) -> torch.Tensor:
        """[L, R * T] bool: slots that hold a row."""
        import torch

        counts = state.out.layout.num_tokens_per_expert
        return torch.arange(state.out.tokens.shape[1], device=counts.device) < counts[:, None]


class RankMajor(_Latency):
    """Rows [R * T, H], for each source rank compact from its first slot on. combine takes them from where
    dispatch put them: `stage` writes over the tokens, and without it combine gives them back."""

    def __init__(self, backend: Opened, case: Case, problem: MoeProblem):
        super().__init__(backend, case, problem, backend.ep.DispatchLayout.RANK_MAJOR)

    def combine(self, state: State, staged: None) -> torch.Tensor:
        return self.comm.combine(state.out.combine_input_buffer, state.handle, out=self.combined)

    def received(self, state: State) -> Received:
        import torch

        filled, problem = self._filled(state), self.problem
        ids, weights = state.out.topk_ids[filled].long(), state.out.weights[filled]
        here = ids != problem.shape.experts
        local = torch.where(here, ids - problem.first_local_expert, -1)
        return Received(state.out.tokens[filled], local, None, torch.where(here, weights, 0.0))

    def stage(self, state: State, rows: torch.Tensor) -> None:
        state.out.combine_input_buffer[self._filled(state)] = rows

    def _filled(self, state: State) -> torch.Tensor:
        """[R * T] bool: slots that hold a row."""
        import torch

        counts = state.out.layout.num_tokens_per_rank
        slots = torch.arange(self.problem.capacity, device=counts.device)
        return (slots < counts[:, None]).view(-1)


class RankMajorDirect(RankMajor):
    """The same rows, and combine rows [R * T, K, H] in another buffer of the library, which dispatch leaves
    alone."""

    def __init__(self, backend: Opened, case: Case, problem: MoeProblem):
        super().__init__(backend, case, problem)
        self.current: Any = None  # what the library's combine buffer holds

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        buffer = state.out.combine_input_buffer
        if self.current is not staged:  # another staging came between: once, in the first call after it
            buffer.copy_(staged)
            self.current = staged
        return self.comm.combine(buffer, state.handle, out=self.combined)

    def received(self, state: State) -> Received:
        slot, pick = self._picks(state).nonzero().unbind(1)
        local = state.out.topk_ids[slot, pick].long() - self.problem.first_local_expert
        weights = state.out.weights[slot, pick]
        return Received(state.out.tokens[slot], local[:, None], None, weights[:, None])

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        """Picks of other ranks are never fetched. They get the first row all the same: a later dispatch may
        put its tokens in another order, and then rows that are all alike must lie in every place."""
        import torch

        picks = self._picks(state)
        index = torch.zeros(picks.shape, dtype=torch.int64, device=rows.device)
        index[picks] = torch.arange(len(rows), device=rows.device)
        buffer = state.out.combine_input_buffer
        staged = rows[index] if len(rows) else buffer.new_zeros(buffer.shape)
        buffer.copy_(staged)
        self.current = staged
        return staged

    def _picks(self, state: State) -> torch.Tensor:
        """[R * T, K] bool: expert ids that came and are this rank's."""
        return self._filled(state)[:, None] & (state.out.topk_ids != self.problem.shape.experts)


class Throughput(_Exchange):
    """Rows [N, H] of a receive pool, one per token and rank."""

    def __init__(self, backend: Opened, case: Case, problem: MoeProblem):
        super().__init__(backend, case, problem, mode=backend.ep.MoEMode.THROUGHPUT)
        self.first: State | None = None
        if case.mode == "cached":
            self.first = self.dispatch()
            self.combine(self.first, self.stage(self.first, self.first.out.tokens.clone()))

    def dispatch(self) -> State:
        problem = self.problem
        known = None if self.first is None else self.first.handle
        out = self.comm.dispatch(problem.x, problem.topk_idx, problem.topk_weights, previous_handle=known)
        self.last = State(*out)
        return self.last

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self.comm.combine(staged, state.handle)  # with out= it would copy once more

    def received(self, state: State) -> Received:
        counts = state.out.layout.num_tokens_per_expert
        if self.first is not None and counts is not self.first.out.layout.num_tokens_per_expert:
            raise RuntimeError("the library did not take the cached routing that it was given")
        # The pool is where combine puts the expert output: what came must be kept now.
        return Received(state.out.tokens.clone(), state.out.topk_ids, None, state.out.weights, list(counts))

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        return rows.contiguous()

    def outputs(self) -> Sequence[torch.Tensor]:
        return [] if self.last is None else [self.last.out.tokens]


class ThroughputInPlace(Throughput):
    """The experts write into the pool itself: what combine gets is the library's own, nothing is copied."""

    def combine(self, state: State, staged: None) -> torch.Tensor:
        return self.comm.combine(state.out.tokens, state.handle)

    def stage(self, state: State, rows: torch.Tensor) -> None:
        state.out.tokens.copy_(rows)
