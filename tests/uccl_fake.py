"""A stand-in for UCCL-EP on threads: rows really move, and what v0.1.1 asserts or aborts on raises here.

Arguments are bound to the recorded signatures. Rows of one expert come in another order of source ranks in
every call; slots without a row are NaN.
"""

from __future__ import annotations

import ast
import json
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from collectivex.runtime import fp8

RECORD = Path(__file__).parent / "fixtures" / "signatures" / "uccl-73ee4f12.json"
SIGNATURES = {
    method: [(name, d is None, None if d is None else ast.literal_eval(d)) for name, _, d in parameters]
    for method, parameters in json.loads(RECORD.read_text())["classes"]["Buffer"].items()
}


class Refused(Exception):
    """An assertion or abort of the extension."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Refused(what)


def bound(method: str, args: tuple[Any, ...], given: dict[str, Any]) -> SimpleNamespace:
    """The arguments by name. Raises TypeError for what the recorded method does not take or lacks."""
    parameters = SIGNATURES[method]
    named = {**dict(zip((name for name, _, _ in parameters), args, strict=False)), **given}
    unknown = set(named) - {name for name, _, _ in parameters}
    missing = {name for name, required, _ in parameters if required} - set(named)
    if unknown or missing or len(args) > len(parameters):
        raise TypeError(f"{method}: unknown {sorted(unknown)}, missing {sorted(missing)}")
    return SimpleNamespace(**{**{name: default for name, _, default in parameters}, **named})


class Group:
    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Config:
    """`get_nvl_buffer_size_hint` as config.hpp has it, without the metadata of RDMA ranks."""

    def __init__(self, num_sms: int, nvl_chunk: int, nvl_buffer: int):
        self.num_sms, self.nvl_chunk, self.nvl_buffer = num_sms, nvl_chunk, nvl_buffer

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        queues = self.num_sms // 2 * num_ranks
        per_slot = hidden_bytes + 128 * 8 + 128 * 4 + 128 * 4
        return -(-(queues * 5 * 4 + queues * self.nvl_buffer * per_slot) // 128) * 128


class World:
    """What the ranks of one job share. `faults` names what to do wrong."""

    def __init__(self, ranks: int, version: str = "0.1.1", faults: tuple[str, ...] = (), nics: bool = False):
        self.ranks, self.version, self.faults, self.nics = ranks, version, faults, nics
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.board: list[Any] = [None] * ranks
        self.registered: set[tuple[int, bool]] = set()
        self.log: list[str] = []

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.board[rank] = value
        self.barrier.wait()
        out = list(self.board)
        self.barrier.wait()
        return out

    def modules(self, wrapper: str = "uccl_deepep") -> dict[str, ModuleType | None]:
        uccl, extension, package = (ModuleType(name) for name in ("uccl", "uccl.ep", wrapper))
        vars(uccl).update(__version__=self.version, ep=extension)
        extension.__file__ = "uccl/ep.abi3.so"
        vars(extension).update(
            can_register_rdma_gpu_buffer=lambda device_index, num_bytes: self.nics,
            get_rdma_buffer=lambda size, device: (torch.zeros(1), size > 0 and not self.nics),
        )
        self.extension: Any = extension
        vars(package).update(Buffer=buffer_class(self))
        absent = {name: None for name in ("uccl_deepep", "deep_ep") if name != wrapper}
        return {"uccl": uccl, "uccl.ep": extension, wrapper: package, **absent}


class _PerProcess(type):
    """The class attribute `num_sms` of each rank: as many processes as there are threads here."""

    chosen = threading.local()

    @property
    def num_sms(cls) -> int:
        return getattr(cls.chosen, "sms", 20)


def buffer_class(world: World) -> type:
    """The class `Buffer` of one job."""

    class Buffer(_Buffer, metaclass=_PerProcess):
        def __init__(self, group: Any, is_intranode: Any = None, **given: Any):
            super().__init__(world, bound("__init__", (group,), {"is_intranode": is_intranode, **given}))

        @staticmethod
        def set_num_sms(new_num_sms: int) -> None:
            require(new_num_sms % 2 == 0, "The SM count must be even")
            _PerProcess.chosen.sms = new_num_sms

        @staticmethod
        def get_dispatch_config(num_ranks: int) -> Config:
            return Config(Buffer.num_sms, {2: 24, 4: 6, 8: 6}[num_ranks], 256)

        @staticmethod
        def get_combine_config(num_ranks: int) -> Config:
            return Config(Buffer.num_sms, {2: 10, 4: 9, 8: 4}[num_ranks], 256)

        @staticmethod
        def get_low_latency_rdma_size_hint(*args: Any, **given: Any) -> int:
            a = bound("get_low_latency_rdma_size_hint", args, given)
            return ll_bytes(a.num_max_dispatch_tokens_per_rank, a.hidden, a.num_experts)

    return Buffer


def ll_bytes(tokens: int, hidden: int, experts: int) -> int:
    """Two send, two receive and two flag buffers (LowLatencyLayout of ep_config.hpp)."""
    send, receive = experts * tokens * 2 * hidden, experts * tokens * (16 + 2 * hidden)
    return 2 * send + 2 * receive + 2 * (-(-4 * experts // 128) * 128) + 128


class _Buffer:
    def __init__(self, world: World, a: SimpleNamespace):
        self.world, self.rank, self.size = world, a.group.rank(), a.group.size()
        self.mode = (self.rank, a.low_latency_mode)
        require(self.mode not in world.registered, "overwriting existing proxies: abort")
        require(a.num_nvl_bytes % 128 == 0 and a.num_rdma_bytes % 128 == 0, "buffers are multiples of 128")
        require(a.num_nvl_bytes < 1 << 31 or a.num_rdma_bytes == 0, "NVLink bytes fit an int")
        memory, on_host = world.extension.get_rdma_buffer(a.num_rdma_bytes, 0)
        require(not on_host, "host memory has no IPC handle: rows would wait for a proxy for ever")
        self.ours = len(memory) == max(1, a.num_rdma_bytes)
        world.registered.add(self.mode)
        self.a, self.alive, self.outstanding, self.calls, self.experts = a, True, 0, 0, 0
        world.log.append(f"new {'ll' if a.low_latency_mode else 'normal'}")
        self.peers = world.gather(self.rank, self)

    def destroy(self) -> None:
        require(self.alive and self.a.explicitly_destroy, "`explicitly_destroy` flag must be set, once")
        self.alive = False
        self.world.barrier.wait()
        self.world.registered = {m for m in self.world.registered if m[0] != self.rank}  # every mode's
        self.world.log.append("destroy")
        self.world.barrier.wait()

    def _begin(self, low_latency: bool) -> None:
        require(self.alive, "the buffer is destroyed")
        require(self.a.low_latency_mode == low_latency, "a buffer of the other mode")

    # ------------------------------------------------------------------------------------------- normal

    def get_dispatch_layout(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        a = bound("get_dispatch_layout", args, given)
        require(a.topk_idx.dtype == torch.int64 and len(a.topk_idx) > 0, "topk_idx_ptr != 0")
        ranks = a.topk_idx // (a.num_experts // self.size)
        in_rank = (ranks[:, :, None] == torch.arange(self.size)).any(1)
        per_expert = torch.bincount(a.topk_idx.flatten(), minlength=a.num_experts)
        return in_rank.sum(0), None, per_expert, in_rank, None

    def dispatch(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        a = bound("dispatch", args, given)
        self._begin(low_latency=False)
        x, scales = a.x if isinstance(a.x, tuple) else (a.x, None)
        self._check_rows(x, scales)
        hint = (
            type(self)
            .get_dispatch_config(self.size)
            .get_nvl_buffer_size_hint(  # pyright: ignore
                2 * x.shape[1], self.size
            )
        )
        require(self.a.num_nvl_bytes >= hint, "the NVLink queues do not fit")
        if a.handle is not None:
            require(a.topk_idx is None and a.topk_weights is None, "with a handle there is no routing")
            handle, routing = a.handle, None
            require(len(handle) == 7 and handle[0] is self and len(handle[5]) == len(x), "a foreign handle")
        else:
            layout = (a.num_tokens_per_rank, a.is_token_in_rank, a.num_tokens_per_expert)
            require(all(t is not None for t in layout), "without a handle the layout is needed")
            require(
                a.topk_idx.dtype == torch.int64 and a.topk_weights.dtype == torch.float32, "routing types"
            )
            handle, routing = None, (a.topk_idx.clone(), a.topk_weights.clone(), len(a.num_tokens_per_expert))
        in_rank = a.is_token_in_rank if handle is None else handle[5]
        every = self.world.gather(
            self.rank, (x.clone(), None if scales is None else scales.clone(), in_rank, routing)
        )
        mine = [of_rank[:, self.rank] for _, _, of_rank, _ in every]
        rows = torch.cat([_bytes(x)[m] for (x, _, _, _), m in zip(every, mine, strict=True)]).view(x.dtype)
        if scales is not None:
            rows = (rows, torch.cat([s[m] for (_, s, _, _), m in zip(every, mine, strict=True)]))
        if handle is not None:
            return rows, None, None, None, None, None
        count = sum(int(m.sum()) for m in mine)
        handle = (self, None, None, count, [of_rank for _, _, of_rank, _ in every], in_rank, None)
        per_rank = every[0][3][2] // self.size
        local = (
            torch.cat([r[0][m] for (_, _, _, r), m in zip(every, mine, strict=True)]) - self.rank * per_rank
        )
        here = (local >= 0) & (local < per_rank)
        weights = torch.cat([r[1][m] for (_, _, _, r), m in zip(every, mine, strict=True)])
        counts = torch.bincount(local[here], minlength=per_rank).tolist()
        return rows, torch.where(here, local, -1), torch.where(here, weights, 0.0), counts, handle, None

    def _check_rows(self, x: torch.Tensor, scales: torch.Tensor | None) -> None:
        require(len(x) > 0, "x_ptr != 0: no rank may be without tokens")
        require(x.is_contiguous() and x.shape[1] * x.element_size() % 16 == 0, "rows are words of 16 bytes")
        if scales is None:
            require(x.dtype == torch.bfloat16, "rows without scales are bf16")
        else:
            require(
                x.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32, "fp8 with float32 scales"
            )
            require(scales.shape == (len(x), x.shape[1] // 128), "a scale for 128 columns")

    def combine(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        a = bound("combine", args, given)
        self._begin(low_latency=False)
        require(a.handle is not None and a.handle[0] is self, "a handle of this buffer")
        require(a.x.dtype == torch.bfloat16 and a.x.is_contiguous(), "contiguous bf16")
        require(len(a.x) == a.handle[3], "as many rows as came")
        every = self.world.gather(self.rank, (a.x, a.handle[4]))
        in_rank = a.handle[5]
        out = torch.zeros(len(in_rank), a.x.shape[1])
        for staged, masks in every:
            rank = next(r for r, (other, _) in enumerate(every) if other is staged)
            first = sum(int(mask[:, rank].sum()) for mask in masks[: self.rank])
            here = in_rank[:, rank]
            out[here] += staged[first : first + int(here.sum())].float()
        self.world.barrier.wait()
        return out.to(torch.bfloat16), None, None

    # ------------------------------------------------------------------------------------- low latency

    def clean_low_latency_buffer(self, *args: Any, **given: Any) -> None:
        a = bound("clean_low_latency_buffer", args, given)
        require(self.outstanding == 0, "cleaned in the middle of a pair")
        self.world.log.append("clean")
        self.experts = a.num_experts

    def low_latency_dispatch(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        a = bound("low_latency_dispatch", args, {"use_fp8": True, **given})
        self._begin(low_latency=True)
        self.outstanding += 1
        require(self.outstanding <= 2, "there are two buffers: no more than two results are held")
        x, slots, experts = a.x, a.num_max_dispatch_tokens_per_rank, a.num_experts
        require(x.dtype == torch.bfloat16 and x.is_contiguous(), "bf16 rows")
        require(len(x) > 0 and len(x) == len(a.topk_idx), "x_ptr != 0: no rank may be without tokens")
        require(len(x) <= slots and self.size * slots % 4 == 0, "TMA: slots are a multiple of 4")
        require(x.shape[1] in (2048, 2560, 4096, 5120, 6144, 7168, 8192), "Unsupported hidden")
        require(a.topk_idx.dtype == torch.int64 and a.topk_idx.shape[1] <= 9, "at most 9 picks, int64")
        require(ll_bytes(slots, x.shape[1], experts) <= self.a.num_rdma_bytes, "the buffers do not fit")
        require(self.experts in (0, experts), "the flags of another number of experts were not cleaned")
        self.experts, self.calls = experts, self.calls + 1
        every = self.world.gather(self.rank, (x.clone(), a.topk_idx.clone()))
        local_experts = experts // self.size
        shape = (local_experts, self.size * slots)
        rows = torch.full((*shape, x.shape[1]), torch.nan, dtype=torch.bfloat16)
        info = torch.full(shape, -7, dtype=torch.int32)
        ranges = torch.zeros(local_experts, self.size, dtype=torch.int64)
        count = torch.zeros(local_experts, dtype=torch.int32)
        for e in range(local_experts):
            for step in range(self.size):
                source = (step + self.calls) % self.size
                x_s, topk_s = every[source]
                tokens = (topk_s == self.rank * local_experts + e).any(1).nonzero()[:, 0]
                begin = int(count[e])
                rows[e, begin : begin + len(tokens)] = x_s[tokens]
                info[e, begin : begin + len(tokens)] = tokens.int()
                ranges[e, source] = (begin << 32) | len(tokens)
                count[e] += len(tokens)
        handle = (info, ranges, slots, x.shape[1], experts)
        if not a.use_fp8:
            return rows, count, handle, None, None
        flat, scales = fp8.reference_quantise(rows.view(-1, x.shape[1]))
        storage = scales.view(*shape, -1).transpose(1, 2).contiguous()
        return (flat.view(rows.shape), storage.transpose(1, 2)), count, handle, None, None

    def low_latency_combine(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        a = bound("low_latency_combine", args, given)
        self._begin(low_latency=True)
        require(self.outstanding > 0, "nothing was dispatched")
        self.outstanding -= 1
        info_here, ranges_here, slots, hidden, experts = a.handle
        require(a.x.shape == (experts // self.size, self.size * slots, hidden), "x has every slot")
        require(a.x.dtype == torch.bfloat16 and a.x.is_contiguous(), "contiguous bf16")
        require(a.topk_weights.dtype == torch.float32 and len(a.topk_idx) > 0, "float32 weights")
        out = torch.zeros(len(a.topk_idx), hidden)
        every = self.world.gather(self.rank, (a.x, info_here, ranges_here))
        for rank, (x, info, ranges) in enumerate(every):
            for e in range(len(x)):
                begin, n = int(ranges[e, self.rank]) >> 32, int(ranges[e, self.rank]) & 0xFFFFFFFF
                tokens = info[e, begin : begin + n].long()
                pick = a.topk_idx[tokens] == rank * len(x) + e
                weights = (a.topk_weights[tokens] * pick).sum(1, keepdim=True)
                if "no-weights" in self.world.faults:
                    weights = torch.ones_like(weights)
                out[tokens] += x[e, begin : begin + n].float() * weights
        self.world.barrier.wait()
        return out.to(torch.bfloat16), None, None


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)
