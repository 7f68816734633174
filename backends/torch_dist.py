"""Plain torch.distributed: gloo on CPU, NCCL on NVIDIA, RCCL on AMD. The portable yardstick.

Collectives are the library calls themselves; root is rank 0. gather fills, and scatter reads, views of one
buffer of the root, made before: over NCCL the window has one group of sends and receives, and the root's copy
of its own share; gloo goes through a flat buffer of its own. all_to_all_v is `all_to_all_single` with split
sizes that the host knows (bandwidth.all_to_all_v_bytes).

The MoE exchange is the one an engine would write with `all_to_all_single`, as fast as plain torch allows:
rows are sent once per (token, destination rank) whatever the number of that rank's experts, picked and
reduced by one gather kernel each, with at most one host synchronisation.

What is inside the timed windows
  full    (normal)       dispatch: layout from the expert ids, exchange of the counts, one host
                         synchronisation for the split sizes, fp8 quantisation where asked, packing, exchange
                         of the rows and of their expert ids and weights. combine: exchange back, float32 sum.
  cached  (cached)       dispatch: quantisation, packing, exchange of the rows. combine: as above.
  padded  (low-latency)  dispatch: layout, quantisation, packing into `tokens` slots a destination, one
                         exchange of equal splits with rows, ids and weights together. combine: as above.
                         No host synchronisation; may be captured in a graph.
Neither window contains the expert computation or the staging of its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..runtime.bandwidth import all_to_all_v_bytes, collective_counts, row_bytes
from ..runtime.types import COLLECTIVE_OPS, Case, Collective
from . import base
from .base import Context, Facts, Received, Source, Variant

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem

_COLLECTIVE_DTYPES = ("float32", "float16", "bfloat16")
_UNEVEN = ("gather", "scatter", "all_to_all_v")
_COMBINE = "exchange of the rows back, float32 sum over ranks, one cast to bf16"

FACTS = Facts(
    name="torch_dist",
    title="torch.distributed (gloo, NCCL, RCCL)",
    source=Source(
        "bundled", "torch", "the torch of the environment", "measures what an engine gets by default"
    ),
    devices=("cpu", "cuda", "hip"),
    variants=(
        Variant(
            "",
            "out-of-place",
            _COLLECTIVE_DTYPES,
            {"call": "the call; all_reduce and reduce include the local copy that makes them out of place"},
            family="collective",
            ops=tuple(op for op in COLLECTIVE_OPS if op not in _UNEVEN),
            graph_safe=True,
        ),
        Variant(
            "",
            "out-of-place",
            _COLLECTIVE_DTYPES,
            {"call": "the call on views and with split sizes made before; the root copies its own share"},
            family="collective",
            ops=_UNEVEN,
            graph_safe=True,
        ),
        Variant(
            "",
            "in-place",
            _COLLECTIVE_DTYPES,
            {"call": "the call on one buffer"},
            family="collective",
            ops=("all_reduce",),
            graph_safe=True,
        ),
        Variant(
            "full",
            "normal",
            ("bf16", "fp8"),
            {
                "dispatch": "layout, counts exchange, host sync, quantise (fp8), pack, exchange of the rows",
                "combine": _COMBINE,
            },
        ),
        Variant(
            "cached",
            "cached",
            ("bf16", "fp8"),
            {"dispatch": "quantise (fp8), pack, exchange rows; layout and counts known", "combine": _COMBINE},
            graph_safe=True,
        ),
        Variant(
            "padded",
            "low-latency",
            ("bf16", "fp8"),
            {
                "dispatch": "layout, quantise (fp8), pack into fixed slots, one equal-split exchange",
                "combine": _COMBINE,
            },
            graph_safe=True,
        ),
    ),
    validated=("cpu", "cuda"),
)


class Backend:
    facts = FACTS

    def why_not(self, case: Case) -> str | None:
        return base.why_not(self.facts, case)

    def setup(self, context: Context) -> None:
        self.context = context

    def collective(self, case: Case, shape: Collective) -> Call:
        return Call(self.context, shape, in_place=case.mode == "in-place")

    def moe(self, case: Case, problem: MoeProblem) -> _Exchange:
        kinds = {"full": Full, "cached": Cached, "padded": Padded}
        return kinds[case.variant](self.context, problem)

    def versions(self) -> Mapping[str, str]:
        """torch's own. Which NCCL it has loaded is among the provenance's libraries; torch.cuda.nccl tells
        the one that it was compiled with."""
        import torch

        return {"torch": str(torch.__version__)}

    def close(self) -> None:
        return None


class Call:
    """One collective over preallocated tensors; `run` is one call on the current stream."""

    realised: Mapping[str, int | float | str] = {}

    def __init__(self, context: Context, shape: Collective, in_place: bool):
        import torch
        import torch.distributed as dist

        ranks, self.group = context.ranks, context.group
        self.rank, self.size = ranks.rank, ranks.size
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[shape.dtype]
        sent, received, _ = collective_counts(shape.op, shape.bytes, shape.dtype, ranks.size)
        self.input = torch.zeros(sent, dtype=dtype, device=context.device.torch_device)
        self.output = self.input if in_place else self.input.new_zeros(received)
        if shape.op in ("gather", "scatter"):
            whole = self.output if shape.op == "gather" else self.input
            self.shares = list(whole.chunk(self.size)) if self.rank == 0 else None
        if shape.op == "all_to_all_v":
            self.sends, self.receives = (
                [part // dtype.itemsize for part in parts]
                for parts in all_to_all_v_bytes(shape.bytes, self.rank, self.size)
            )
        # torch 2.13 renamed both; the old names there warn, and cost a wrapper more
        renamed = hasattr(dist, "reduce_scatter_single")
        self.reduce_scatter = dist.reduce_scatter_single if renamed else dist.reduce_scatter_tensor
        renamed = hasattr(dist, "all_gather_single")
        self.all_gather = dist.all_gather_single if renamed else dist.all_gather_into_tensor
        self.run: Callable[[], None] = getattr(self, f"_{shape.op}{'_in_place' if in_place else ''}")

    def _all_reduce_in_place(self) -> None:
        import torch.distributed as dist

        dist.all_reduce(self.input, group=self.group)

    def _all_reduce(self) -> None:
        import torch.distributed as dist

        self.output.copy_(self.input)
        dist.all_reduce(self.output, group=self.group)

    def _all_gather(self) -> None:
        self.all_gather(self.output, self.input, group=self.group)

    def _reduce_scatter(self) -> None:
        self.reduce_scatter(self.output, self.input, group=self.group)

    def _all_to_all(self) -> None:
        import torch.distributed as dist

        dist.all_to_all_single(self.output, self.input, group=self.group)

    def _broadcast(self) -> None:
        import torch.distributed as dist

        dist.broadcast(self.input if self.rank == 0 else self.output, src=0, group=self.group)

    def _reduce(self) -> None:
        import torch.distributed as dist

        self.output.copy_(self.input)
        dist.reduce(self.output, dst=0, group=self.group)

    def _sendrecv(self) -> None:
        import torch.distributed as dist

        if self.size == 1:
            self.output.copy_(self.input)
            return
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        ops = [
            dist.P2POp(dist.isend, self.input, after, group=self.group),
            dist.P2POp(dist.irecv, self.output, before, group=self.group),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def _gather(self) -> None:
        import torch.distributed as dist

        dist.gather(self.input, self.shares, dst=0, group=self.group)

    def _scatter(self) -> None:
        import torch.distributed as dist

        dist.scatter(self.output, self.shares, src=0, group=self.group)

    def _all_to_all_v(self) -> None:
        import torch.distributed as dist

        dist.all_to_all_single(self.output, self.input, self.receives, self.sends, group=self.group)

    def close(self) -> None:
        return None


class Layout(NamedTuple):
    """Where this rank's rows go and which came.

    order     [sent] token index of each sent row, destination ranks ascending
    slots     [R, T] position in `order` of (rank, token), or `sent` where the token does not go there
    sends, receives   rows per rank
    """

    order: torch.Tensor
    slots: torch.Tensor
    sends: list[int]
    receives: list[int]


class _Exchange:
    """What the three variants share: rows as they travel, the way back, and the float32 sum over ranks.

    Buffers and index columns are made once: each torch call costs the host several microseconds, and a caller
    who writes this exchange for speed would not pay for them again in every layer.
    """

    realised: Mapping[str, int | float | str] = {}

    def __init__(self, context: Context, problem: MoeProblem):
        import torch

        self.group, self.rank, self.size = context.group, context.ranks.rank, context.ranks.size
        self.problem, self.shape = problem, problem.shape
        self.experts_per_rank = problem.local_experts
        self.tokens, self.capacity = problem.tokens, problem.capacity
        self.fp8 = self.shape.dtype == "fp8"
        hidden, topk = self.shape.hidden, self.shape.topk
        self.row_bytes = row_bytes(self.shape, "dispatch")
        device = problem.device
        self.token_ids = torch.arange(self.tokens, device=device).repeat(self.size)
        self.mask = torch.zeros(self.size, self.tokens, dtype=torch.int32, device=device)
        # A row: values, scales, expert ids, weights. One row more than tokens: the empty slot, with ids -1.
        self.rows = torch.zeros(self.tokens + 1, self.row_bytes + 8 * topk, dtype=torch.uint8, device=device)
        self.rows[self.tokens, self.row_bytes :] = 0xFF
        rows = self.rows[: self.tokens]
        value_bytes = hidden if self.fp8 else 2 * hidden
        self.values = rows[:, :value_bytes].view(problem.format.dtype if self.fp8 else torch.bfloat16)
        self.scales = rows[:, value_bytes : self.row_bytes].view(torch.float32)
        self.ids = rows[:, self.row_bytes : self.row_bytes + 4 * topk].view(torch.int32)
        self.weights = rows[:, self.row_bytes + 4 * topk :].view(torch.float32)
        self.wire: Mapping[str, int] = {}

    def fill_values(self) -> None:
        """This call's values into the rows, quantised where the dtype is fp8."""
        if not self.fp8:
            self.values.copy_(self.problem.x)
            return
        values, scales = self.problem.quantise(self.problem.x)
        self.values.copy_(values)
        self.scales.copy_(scales)

    def fill_metadata(self) -> None:
        self.ids.copy_(self.problem.topk_idx)
        self.weights.copy_(self.problem.topk_weights)

    def mark_ranks(self) -> torch.Tensor:
        """[R, T] int32: 1 where a token has an expert on a rank."""
        ranks = (self.problem.topk_idx // self.experts_per_rank).t()
        return self.mask.zero_().scatter_(0, ranks, 1)

    def layout(self) -> Layout:
        """From expert ids to split sizes: one exchange of counts and one host synchronisation."""
        import torch
        import torch.distributed as dist

        mask = self.mark_ranks()
        counts = torch.empty(2, self.size, dtype=torch.int64, device=mask.device)
        torch.sum(mask, 1, out=counts[0])
        dist.all_to_all_single(counts[1], counts[0], group=self.group)
        flat = mask.view(-1)
        position = flat.cumsum(0).sub_(1)
        sends, receives = counts.tolist()
        total = sum(sends)
        slots = torch.where(flat.bool(), position, total)
        order = slots.new_zeros(total + 1).scatter_(0, slots, self.token_ids)
        return Layout(order[:total], slots.view(self.size, -1), sends, receives)

    def exchange(self, rows: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Send `rows[order]` and return what came, source ranks ascending."""
        import torch.distributed as dist

        packed = rows.index_select(0, layout.order)
        received = rows.new_empty(sum(layout.receives), rows.shape[1])
        dist.all_to_all_single(received, packed, layout.receives, layout.sends, group=self.group)
        return received

    def sum_back(self, back: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[T, H] bf16: for each token the float32 sum of its rows in `back`, rounded once, in one kernel.

        back    [N + 1, H]; slots [R, T] rows of it, N where a rank returns nothing for a token
        """
        import torch.nn.functional as F

        if back.is_cuda:
            from ._torch_dist_kernel import gather_sum

            return gather_sum(back, slots)
        return F.embedding_bag(slots.t(), back, mode="sum", padding_idx=back.shape[0] - 1)

    def as_received(self, rows: torch.Tensor, metadata: torch.Tensor) -> Received:
        """The oracle's view of received rows [N, bytes] and metadata [N, 8K bytes]: expert ids made local."""
        import torch

        ids, weights = metadata.view(torch.int32).chunk(2, dim=1)
        local = ids.long() - self.rank * self.experts_per_rank
        mine = (local >= 0) & (local < self.experts_per_rank)
        hidden = self.shape.hidden
        values, scales = rows[:, : hidden if self.fp8 else 2 * hidden].contiguous(), None
        if self.fp8:
            scales = rows[:, hidden : self.row_bytes].contiguous().view(torch.float32)
        counts = torch.bincount(local[mine], minlength=self.experts_per_rank).tolist()
        return Received(
            values.view(self.problem.format.dtype if self.fp8 else torch.bfloat16),
            torch.where(mine, local, -1),
            scales,
            torch.where(mine, weights.contiguous().view(torch.float32), 0.0),
            counts,
        )

    def stage(self, state: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def outputs(self) -> Sequence[torch.Tensor]:
        return ()  # every call returns new tensors

    def close(self) -> None:
        return None


class State(NamedTuple):
    """received [N, bytes] rows as they came; metadata [N, 8K] int32 ids and float32 weights, as bytes."""

    layout: Layout
    received: torch.Tensor
    metadata: torch.Tensor


class Full(_Exchange):
    """Routing known only as expert ids."""

    def dispatch(self) -> State:
        layout = self.layout()
        self.fill_values()
        self.fill_metadata()
        received = self.exchange(self.rows, layout)
        return State(layout, received, received[:, self.row_bytes :])

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        layout = state.layout
        back = staged.new_empty(sum(layout.sends) + 1, staged.shape[1])
        dist.all_to_all_single(back[:-1], staged, layout.sends, layout.receives, group=self.group)
        return self.sum_back(back, layout.slots)

    def received(self, state: State) -> Received:
        return self.as_received(state.received, state.metadata.contiguous())


class Cached(Full):
    """The routing of the call before: its layout and metadata are kept, only rows travel."""

    def __init__(self, context: Context, problem: MoeProblem):
        super().__init__(context, problem)
        self.fill_metadata()
        self.known = self.layout()
        self.known_metadata = self.exchange(self.rows[:, self.row_bytes :].contiguous(), self.known)

    def dispatch(self) -> State:
        import torch

        rows = self.problem.x.view(torch.uint8)
        if self.fp8:
            values, scales = self.problem.quantise(self.problem.x)
            rows = torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], dim=1)
        return State(self.known, self.exchange(rows, self.known), self.known_metadata)


class Padded(_Exchange):
    """Fixed capacity: `tokens` slots for every (source, destination) pair, empty ones marked by id -1."""

    def __init__(self, context: Context, problem: MoeProblem):
        import torch

        super().__init__(context, problem)
        self.empty = self.size * self.capacity  # the slot that stands for "not sent"
        device = problem.device
        self.first_slots = torch.arange(self.size, device=device)[:, None] * self.capacity - 1
        self.order = torch.empty(self.empty + 1, dtype=torch.int64, device=device)
        row = self.rows.shape[1]
        self.packed = torch.empty(self.empty, row, dtype=torch.uint8, device=device)
        self.wire = {"dispatch": self.empty * row, "combine": self.empty * self.shape.hidden * 2}

    def dispatch(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch
        import torch.distributed as dist

        mask = self.mark_ranks()
        position = mask.cumsum(1).add_(self.first_slots)
        slots = torch.where(mask.bool(), position, self.empty)
        self.order.fill_(self.tokens).scatter_(0, slots.view(-1), self.token_ids)
        self.fill_values()
        self.fill_metadata()
        torch.index_select(self.rows, 0, self.order[:-1], out=self.packed)
        received = torch.empty_like(self.packed)
        dist.all_to_all_single(received, self.packed, group=self.group)
        return received, slots

    def combine(self, state: tuple[torch.Tensor, torch.Tensor], staged: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        back = staged.new_empty(self.empty + 1, staged.shape[1])
        dist.all_to_all_single(back[:-1], staged, group=self.group)
        return self.sum_back(back, state[1])

    def received(self, state: tuple[torch.Tensor, torch.Tensor]) -> Received:
        valid = self._valid(state[0])
        rows = state[0][valid]
        return self.as_received(rows, rows[:, self.row_bytes :].contiguous())

    def stage(self, state: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        staged = rows.new_zeros(self.empty, rows.shape[1])
        return staged.index_copy_(0, self._valid(state[0]), rows)

    def _valid(self, received: torch.Tensor) -> torch.Tensor:
        """Slots that hold a row: those whose first expert id is not -1."""
        import torch

        first = received[:, self.row_bytes : self.row_bytes + 4].contiguous().view(torch.int32)[:, 0]
        return (first >= 0).nonzero()[:, 0]
