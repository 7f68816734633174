"""A stateful stand-in for MoRI that moves rows between the threads of one process and keeps its rules.

It has the signatures of a recorded tag (tests/fixtures/signatures). Whatever the real library would answer
with silent corruption, a dead process or half an exchange is a `Broken` here, with the rule that was broken.
"""

from __future__ import annotations

import inspect
import json
import os
import threading
import time
import types
from pathlib import Path
from typing import Any

import torch

RECORDS = Path(__file__).parent / "fixtures" / "signatures"
BF16 = torch.bfloat16


class Broken(AssertionError):
    """A rule of the library was not kept."""


def record(tag: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"mori-{tag}.json").read_text())


def with_signature(function: Any, parameters: list[list[Any]], method: bool) -> Any:
    """`function` behind a recorded signature: what is passed must fit it, by keyword alone."""
    kinds = {"any": inspect.Parameter.POSITIONAL_OR_KEYWORD, "keyword": inspect.Parameter.KEYWORD_ONLY}
    made = [inspect.Parameter("self", kinds["any"])] if method else []
    for name, kind, default in parameters:
        value: Any = inspect.Parameter.empty
        if default is not None:
            value = object() if default == "expression" else eval(default, {})
        made.append(inspect.Parameter(name, kinds[kind], default=value))
    signature = inspect.Signature(made)

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > method:
            raise Broken(f"{function.__name__} was called with positional arguments")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise Broken(f"{function.__name__}: {error}") from error
        bound.apply_defaults()
        given = dict(bound.arguments)
        return function(given.pop("self"), **given) if method else function(**given)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


class World:
    """What the ranks of one job share."""

    def __init__(self, size: int, tag: str):
        self.size, self.record = size, record(tag)
        self.barrier = threading.Barrier(size, timeout=20)
        self.lock = threading.Lock()
        self.groups: set[str] = set()
        self.started: set[int] = set()  # threads whose heap is there
        self.alive: dict[int, int] = {}  # operators per thread
        self.shared: dict[int, Shared] = {}
        self.made = [0] * size
        self.finalized = 0

    def modules(self) -> dict[str, types.ModuleType]:
        """`mori`, `mori.ops` and `mori.shmem`, for sys.modules."""
        mori, ops, shmem = (types.ModuleType(n) for n in ("mori", "mori.ops", "mori.shmem"))
        mori.ops, mori.shmem = ops, shmem  # type: ignore[attr-defined]
        if self.record["tag"] >= "v1.2.0":  # before it, mori has no version to tell
            mori.__version__ = self.record["tag"][1:]  # type: ignore[attr-defined]
        known = {n: types.SimpleNamespace(name=n) for n in self.record["kernel_types"]}
        ops.EpDispatchCombineKernelType = types.SimpleNamespace(**known)  # type: ignore[attr-defined]
        config = with_signature(_config, self.record["config"], method=False)
        ops.EpDispatchCombineConfig = config  # type: ignore[attr-defined]
        ops.EpDispatchCombineOp = self.operator()  # type: ignore[attr-defined]
        for name, function in (
            ("shmem_torch_process_group_init", self.start),
            ("shmem_finalize", self.finalize),
        ):
            setattr(shmem, name, with_signature(function, self.record["shmem"][name], method=False))
        return {"mori": mori, "mori.ops": ops, "mori.shmem": shmem}

    def operator(self) -> type:
        world = self

        class EpDispatchCombineOp(Operator):
            def __init__(self, config: Any):
                super().__init__(world, config)

        for name, parameters in self.record["op"].items():
            function = with_signature(getattr(Operator, name), parameters, method=True)
            setattr(EpDispatchCombineOp, name, function)
        return EpDispatchCombineOp

    def start(self, group_name: str) -> int:
        if group_name not in self.groups:
            raise Broken(f"no process group is registered as {group_name!r}")
        self.started.add(threading.get_ident())
        return 0

    def finalize(self) -> int:
        if self.alive.get(threading.get_ident()):
            raise Broken("the heap went while an operator lived in it: CheckStatusValid aborts the process")
        with self.lock:
            self.finalized += 1
        return 0


def _config(**fields: Any) -> Any:
    return types.SimpleNamespace(**fields)


class Shared:
    """One operator over all ranks: what each rank has sent."""

    def __init__(self, size: int):
        self.ready = [False] * size
        self.sent: list[Any] = [None] * size
        self.staged: list[Any] = [None] * size


class Operator:
    def __init__(self, world: World, config: Any):
        thread = threading.get_ident()
        if thread not in world.started:
            raise Broken("an operator before shmem was initialised")
        self.world, self.config, self.rank = world, config, config.rank
        if config.gpu_per_node & (config.gpu_per_node - 1) or config.world_size % config.gpu_per_node:
            raise Broken(f"gpu_per_node is {config.gpu_per_node}")
        with world.lock:
            number = world.made[self.rank]
            world.made[self.rank] += 1
            self.shared = world.shared.setdefault(number, Shared(world.size))
            world.alive[thread] = world.alive.get(thread, 0) + 1
        self.thread = thread
        self.launch_config_mode = os.environ.get("MORI_EP_LAUNCH_CONFIG_MODE", "MANUAL")
        room, hidden = world.size * config.max_num_inp_token_per_rank, config.hidden_dim
        picks = config.num_experts_per_token
        self.bytes = torch.full((room, hidden * config.max_token_type_size), 0xFF, dtype=torch.uint8)
        self.out_weights = torch.full((room, picks), torch.nan)
        self.out_scales = torch.full((room, max(config.scale_dim, 1)), torch.nan)
        self.out_ids = torch.full((room, picks), -7, dtype=torch.int32)
        self.total = torch.zeros(1, dtype=torch.int32)
        self.registered = torch.full((room, hidden), torch.nan, dtype=BF16)
        self.combine_out = torch.full((config.max_num_inp_token_per_rank, hidden), torch.nan, dtype=BF16)
        self.sent: Any = None
        self.pending: str | None = None
        # The last rank is slow to allocate: who does not wait for it writes into nothing.
        if self.rank == world.size - 1:
            time.sleep(0.05)
        self.shared.ready[self.rank] = True

    def __del__(self) -> None:
        if hasattr(self, "thread"):
            self.world.alive[self.thread] -= 1

    @property
    def kernel(self) -> str:
        return self.config.kernel_type.name

    def launch(self, *asked: int) -> tuple[int, int, int]:
        if self.launch_config_mode == "AUTO":
            return (128, 0, 16)
        config = self.config
        defaults = (config.block_num, config.rdma_block_num, config.warp_num_per_block)
        return tuple(d if a <= 0 else a for a, d in zip(asked, defaults, strict=True))  # type: ignore[return-value]

    def get_launch_config(
        self, is_dispatch: bool, block_num: int, rdma_block_num: int, warp_per_block: int
    ) -> tuple[int, int, int]:
        asked = (block_num, rdma_block_num, warp_per_block)
        return self.launch(*asked) if self.launch_config_mode == "AUTO" else asked

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden_dim: int) -> torch.Tensor:
        assert (dtype, hidden_dim) == (BF16, self.config.hidden_dim)
        return self.registered.view(self.registered.shape)

    # ------------------------------------------------------------------------------------------- dispatch

    def dispatch(
        self,
        input: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int,
        rdma_block_num: int,
        warp_per_block: int,
        **rest: Any,
    ) -> tuple[Any, ...]:
        if not all(self.shared.ready):
            self.world.barrier.abort()  # the others need not wait for this rank
            raise Broken("a peer has not allocated its buffers yet")
        if indices.dtype != torch.int32 or not indices.is_contiguous():
            raise Broken(f"ids are {indices.dtype}, contiguous {indices.is_contiguous()}: read as garbage")
        if weights.dtype != torch.float32 or not weights.is_contiguous() or not input.is_contiguous():
            raise Broken("weights must be contiguous float32, rows contiguous")
        if len({len(t) for t in (input, weights, indices)}) != 1:
            raise Broken("rows, weights and ids of different lengths")
        if len(input) > self.config.max_num_inp_token_per_rank:
            raise Broken("more tokens than there is room for")
        if self.sent is not None:
            raise Broken("dispatch twice without a combine")
        with_scales = scales is not None and self.config.scale_dim > 0
        if with_scales and scales.element_size() != self.config.scale_type_size:
            raise Broken("scales of another size than declared")
        self._cached_dispatch_launch = self.launch(block_num, rdma_block_num, warp_per_block)
        self.sent = [
            t.clone() if t is not None else None for t in (input, weights, scales if with_scales else None)
        ]
        self.sent.append(indices.clone())
        room = len(self.out_ids)
        wide = input.element_size() * self.config.hidden_dim
        rows = self.bytes.view(-1)[: room * wide].view(room, wide).view(input.dtype)
        self.out = (
            rows,
            self.out_weights,
            self.out_scales if with_scales else None,
            self.out_ids,
            self.total,
        )
        if self.kernel == "AsyncLL":
            self.pending = "dispatch"
        else:
            self.deliver()
        return self.out

    def deliver(self) -> None:
        shared, config = self.shared, self.config
        shared.sent[self.rank] = self.sent
        self.world.barrier.wait()
        first, last = self.rank * config.num_experts_per_rank, (self.rank + 1) * config.num_experts_per_rank
        count = 0
        self.came: list[tuple[int, int]] = []
        picks = 8 if self.kernel == "IntraNodeLL" else config.num_experts_per_token
        for turn in range(self.world.size):  # sources in an order of this rank's own
            source = (self.rank + 1 + turn) % self.world.size
            rows, weights, scales, ids = shared.sent[source]
            seen = ids[:, :picks]
            mine = ((seen >= first) & (seen < last)).any(1).nonzero()[:, 0].flip(0)
            part = slice(count, count + len(mine))
            self.out[0].view(torch.uint8)[part] = rows.view(torch.uint8)[mine]
            self.out_weights[part], self.out_ids[part] = weights[mine], ids[mine]
            if scales is not None:
                self.out_scales[part] = scales[mine]
            self.came += [(source, int(t)) for t in mine]
            count += len(mine)
        self.total.fill_(count)
        self.world.barrier.wait()

    def dispatch_send(
        self,
        input: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int,
        warp_per_block: int,
        **rest: Any,
    ) -> tuple[Any, ...]:
        return Operator.dispatch(self, input, weights, scales, indices, block_num, -1, warp_per_block)

    def dispatch_recv(self, **launch: Any) -> None:
        if self.kernel != "AsyncLL" or self.pending != "dispatch":
            raise Broken("dispatch_recv without dispatch_send of AsyncLL")
        self.pending = None
        self.deliver()

    # -------------------------------------------------------------------------------------------- combine

    def combine(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int,
        rdma_block_num: int,
        warp_per_block: int,
        **rest: Any,
    ) -> tuple[torch.Tensor, None]:
        if self.sent is None or self.pending:
            raise Broken("combine without a finished dispatch")
        if indices.dtype != torch.int32 or not indices.is_contiguous():
            raise Broken("ids of combine are no contiguous int32")
        if not torch.equal(indices, self.sent[3]):
            raise Broken("combine takes the routing that this rank dispatched with, nothing else")
        total = int(self.total)
        if self.config.use_external_inp_buf:
            if input.dtype != BF16 or len(input) < total or not input.is_contiguous():
                raise Broken("combine reads total_recv rows of bf16")
            self.staged = input[:total].clone()
        else:
            if input.data_ptr() != self.registered.data_ptr():
                raise Broken("combine reads the registered buffer, whatever it is given")
            self.staged = self.registered[:total].clone()
        self._cached_combine_launch = self.launch(block_num, rdma_block_num, warp_per_block)
        if self.kernel == "AsyncLL":
            self.pending = "combine"
        else:
            self.reduce()
        return self.combine_out, None

    def reduce(self) -> None:
        per_node = self.config.gpu_per_node
        self.shared.staged[self.rank] = dict(zip(self.came, self.staged, strict=True))
        self.world.barrier.wait()
        for token, ids in enumerate(self.sent[3].tolist()):
            ranks = sorted({e // self.config.num_experts_per_rank for e in ids if e >= 0})
            by_node = self.kernel.startswith("InterNodeV1")
            parts: dict[int, torch.Tensor] = {}
            for rank in ranks:
                node = rank // per_node if by_node else 0
                row = self.shared.staged[rank][self.rank, token].float()
                parts[node] = parts.get(node, torch.zeros_like(row)) + row
            if by_node:
                parts = {node: part.to(BF16).float() for node, part in parts.items()}
            self.combine_out[token] = sum(parts.values(), torch.zeros(self.config.hidden_dim)).to(BF16)
        self.total.zero_()
        self.sent = None
        self.world.barrier.wait()

    def combine_send(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int,
        warp_per_block: int,
    ) -> tuple[torch.Tensor, None]:
        return Operator.combine(self, input, weights, indices, block_num, -1, warp_per_block)

    def combine_recv(self, **launch: Any) -> None:
        if self.kernel != "AsyncLL" or self.pending != "combine":
            raise Broken("combine_recv without combine_send of AsyncLL")
        self.pending = None
        self.reduce()
