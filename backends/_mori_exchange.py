"""One MoRI operator: dispatch and combine as the harness calls them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..runtime import environment
from ..runtime.errors import UserError
from ..runtime.types import Moe
from .base import Context, MissingLibrary, Received

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem

COMBINE_BYTES = 2  # of a bf16 element, the widest that travels
HEAP_DEFAULTS = {"static_heap": 4 << 30, "vmm_heap": 16 << 30}  # v1.1.0 to v1.2.2
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Kernel:
    """A kernel type of MoRI by name, how it is launched, and where combine takes its rows from."""

    name: str
    block_num: int
    rdma_block_num: int
    warps: int
    registered: bool = False

    def asked(self, knobs: Mapping[str, int | float | str]) -> Kernel:
        return replace(self, **{name: int(value) for name, value in knobs.items()})

    @property
    def launch(self) -> dict[str, int]:
        return {
            "block_num": self.block_num,
            "rdma_block_num": self.rdma_block_num,
            "warp_per_block": self.warps,
        }

    @property
    def split(self) -> bool:
        """Whether send and receive are calls of their own."""
        return self.name == "AsyncLL"


@dataclass
class State:
    """What dispatch returned, all views of the library's buffers with room for R * T rows.

    rows [R*T, H]; weights [R*T, K] float32; scales [R*T, H/128] float32 or None; experts [R*T, K] int32
    global ids; total [1] int32, how many rows came: zero again once combine ran
    """

    rows: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor | None
    experts: torch.Tensor
    total: torch.Tensor
    combined: bool = False


class Exchange:
    wire: Mapping[str, int] = {}

    def __init__(self, mori: Any, context: Context, problem: MoeProblem, kernel: Kernel):
        self.problem, self.kernel, self.device = problem, kernel, context.device
        self.fp8 = problem.shape.dtype == "fp8"
        self.indices = problem.topk_idx32.contiguous()  # int64 would be misread, not refused
        self.weights = problem.topk_weights.contiguous()
        self.launch = kernel.launch
        if kernel.split:
            del self.launch["rdma_block_num"]
        self.rows_came = 0
        self.views: tuple[torch.Tensor, ...] = ()
        self.combined_view: tuple[torch.Tensor, ...] = ()
        settings = environment.communication_settings("")
        check_heap(problem.shape, context.ranks.size, context.ranks.ranks_per_node, kernel.name, settings)
        self.op: Any = mori.ops.EpDispatchCombineOp(config(mori.ops, context, problem, kernel))
        # A peer may write into our buffers as soon as it has its own: nobody starts before all have theirs.
        self.device.synchronize()
        context.ranks.barrier()
        self.registered: torch.Tensor | None = None
        if kernel.registered:
            self.registered = self.op.get_registered_combine_input_buffer(
                dtype=problem.x.dtype, hidden_dim=problem.shape.hidden
            )
        self.realised = self.what_is_launched()
        if kernel.split:
            self.realised["sdma"] = settings.get("MORI_ENABLE_SDMA", "0")

    def what_is_launched(self) -> dict[str, int | float | str]:
        """Kernel and launch as the library says it will apply them; where the two directions differ, both."""
        launches = [self.op.get_launch_config(is_dispatch=d, **self.kernel.launch) for d in (True, False)]
        pairs = zip(("block_num", "rdma_block_num", "warps"), *launches, strict=True)
        realised = {name: there if there == back else f"{there}/{back}" for name, there, back in pairs}
        return {
            **realised,
            "kernel": str(self.op.config.kernel_type.name),
            "combine_input": "external" if self.op.config.use_external_inp_buf else "registered",
            "launch_mode": str(self.op.launch_config_mode),
        }

    def dispatch(self) -> State:
        problem, launch = self.problem, self.launch
        rows, scales = problem.quantise(problem.x) if self.fp8 else (problem.x, None)
        sent = {"input": rows, "weights": self.weights, "scales": scales, "indices": self.indices}
        if self.kernel.split:
            out = self.op.dispatch_send(**sent, **launch)
            self.op.dispatch_recv(**launch)
        else:
            out = self.op.dispatch(**sent, **launch)
        self.views = tuple(t for t in out[:4] if t is not None)
        return State(*out)

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        launch = self.launch
        back = {"input": staged, "weights": None, "indices": self.indices}
        if self.kernel.split:
            out, _ = self.op.combine_send(**back, **launch)
            self.op.combine_recv(**launch)
        else:
            out, _ = self.op.combine(**back, **launch)
        state.combined = True
        self.combined_view = (out,)
        return out[: self.problem.tokens]

    def received(self, state: State) -> Received:
        import torch

        # A replayed graph has combined already; its routing is that of the call before.
        if not state.combined:
            self.rows_came = int(state.total.item())
            self.check_launch()
        n, problem = self.rows_came, self.problem
        local = state.experts[:n].long() - problem.first_local_expert
        mine = (local >= 0) & (local < problem.local_experts)
        return Received(
            state.rows[:n],
            torch.where(mine, local, -1),
            None if state.scales is None else state.scales[:n],
            torch.where(mine, state.weights[:n], 0.0),
        )

    def check_launch(self) -> None:
        """Raises RuntimeError where the last call was not launched as `realised` says."""
        wanted = tuple(self.realised[name] for name in ("block_num", "rdma_block_num", "warps"))
        for call in ("dispatch", "combine"):
            launched = vars(self.op).get(f"_cached_{call}_launch")
            if call == "combine" and launched is None:
                return  # none yet
            if launched is None or tuple(launched) != wanted:
                raise RuntimeError(f"mori launched {call} with {launched}, it had promised {wanted}")

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        if self.registered is None:
            return rows
        self.registered[: len(rows)].copy_(rows)
        return self.registered

    def outputs(self) -> Sequence[torch.Tensor]:
        return (*self.views, *self.combined_view)

    def close(self) -> None:
        """The operator goes before the heap it lives in."""
        self.device.synchronize()
        self.views = self.combined_view = ()
        self.registered = self.op = None


def config(ops: Any, context: Context, problem: MoeProblem, kernel: Kernel) -> Any:
    """By keyword only: v1.1.0 put a new field before `use_external_inp_buf`."""
    shape, ranks = problem.shape, context.ranks
    if not hasattr(ops.EpDispatchCombineKernelType, kernel.name):
        raise MissingLibrary(f"this MoRI has no {kernel.name}; it came with v1.2.0")
    fp8 = shape.dtype == "fp8"
    return ops.EpDispatchCombineConfig(
        data_type=problem.format.dtype if fp8 else problem.x.dtype,
        rank=ranks.rank,
        world_size=ranks.size,
        hidden_dim=shape.hidden,
        scale_dim=shape.hidden // 128 if fp8 else 0,
        scale_type_size=4,
        max_token_type_size=COMBINE_BYTES,
        max_num_inp_token_per_rank=problem.capacity,
        num_experts_per_rank=problem.local_experts,
        num_experts_per_token=shape.topk,
        warp_num_per_block=kernel.warps,
        block_num=kernel.block_num,
        rdma_block_num=kernel.rdma_block_num,
        use_external_inp_buf=not kernel.registered,
        kernel_type=getattr(ops.EpDispatchCombineKernelType, kernel.name),
        gpu_per_node=ranks.ranks_per_node,
        quant_type="none",
    )


def heap_bytes(shape: Moe, ranks: int, ranks_per_node: int, kernel: str) -> int:
    """Symmetric heap that one operator takes on each rank (InitializeShmemBuf and InitializeOrderMapBuf in
    src/ops/dispatch_combine/dispatch_combine.cpp of v1.2.2, without the few bytes of flags)."""
    tokens, nodes = shape.tokens, ranks // ranks_per_node
    received = ranks * tokens
    row = shape.hidden * COMBINE_BYTES
    scales = shape.hidden // 128 * 4 if shape.dtype == "fp8" else 0
    ids = 4 * shape.topk
    xfer = row + 2 * ids + 4 + scales  # a row as it travels: values, ids, weights, its source, scales
    if kernel.startswith("IntraNode"):
        buffers = received * xfer
    elif kernel == "AsyncLL":
        buffers = 3 * received * xfer
    else:
        buffers = received * xfer + (3 * nodes + 1) * tokens * xfer
    sources = received * (shape.experts // ranks) * 4
    return buffers + (received + tokens) * row + received * (5 * ids + 2 * scales) + sources


def check_heap(shape: Moe, ranks: int, ranks_per_node: int, kernel: str, settings: Mapping[str, str]) -> None:
    """Raises UserError where the heap is too small: MoRI itself would abort the process."""
    need = heap_bytes(shape, ranks, ranks_per_node, kernel)
    mode = settings.get("MORI_SHMEM_MODE", "static_heap").lower()
    if mode == "isolation":
        return  # every buffer is an allocation of its own
    size = settings.get("MORI_SHMEM_HEAP_SIZE")
    have = HEAP_DEFAULTS.get(mode, HEAP_DEFAULTS["static_heap"]) if size is None else size_of(size)
    if need > have:
        problem = (
            f"mori {kernel} needs {need / 2**30:.2f} GiB of symmetric heap, it has {have / 2**30:.2f} GiB"
        )
        raise UserError(problem, "set MORI_SHMEM_HEAP_SIZE in the SKU's env, as far as its NIC can register")


def size_of(text: str) -> int:
    """ "2G" -> 2 GiB, as MoRI reads it. Raises UserError for anything else than digits and K, M or G."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise UserError(f"MORI_SHMEM_HEAP_SIZE is {text!r}", "write it like 2G or 512M")
    return int(match[1]) * _UNITS[match[2]]
