"""Stand-ins for the three DeepEP interfaces: they move rows between threads and enforce the libraries' rules.

Rules come from the host checks of the C++ sources and the order of calls that the kernels rely on. A broken
rule raises `Broken`, as the library would assert or hang. Sums follow the kernels: float32, then the casts.
"""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import exchange_job
import torch

from collectivex.runtime import fp8
from collectivex.runtime.ranks import ThreadRanks
from collectivex.runtime.types import Case


class Broken(Exception):
    """The adapter broke a rule of the library."""


def need(condition: Any, rule: str) -> None:
    if not condition:
        raise Broken(rule)


class Group:
    """A process group over threads. `exchange` is what the fakes' kernels move data with."""

    def __init__(self, ranks: ThreadRanks):
        self._ranks = ranks

    def rank(self) -> int:
        return self._ranks.rank

    def size(self) -> int:
        return self._ranks.size

    def exchange(self, value: Any) -> list[Any]:
        return self._ranks.all_gather(value)

    def columns(self, outgoing: list[Any]) -> list[Any]:
        """What every rank has for this one: `outgoing` by destination."""
        return [of_rank[self.rank()] for of_rank in self.exchange(outgoing)]


def cast_sum(rows: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Float32 sum of rows, cast once."""
    total = torch.zeros_like(like, dtype=torch.float32)
    for row in rows:
        total += row.to(torch.float32)
    return total.to(torch.bfloat16)


def check_input(x: Any, topk_idx: Any, topk_weights: Any = None) -> None:
    values, scales = x if isinstance(x, tuple) else (x, None)
    need(values.is_contiguous() and values.dim() == 2, "x must be contiguous [T, H]")
    if scales is None:
        need(values.dtype == torch.bfloat16, "x must be bf16, or e4m3 with scales")
    else:
        need(
            values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32, "x must be (e4m3, float32)"
        )
        need(scales.shape == (len(values), values.shape[1] // 128), "scales must be [T, H/128]")
    if topk_idx is not None:
        need(topk_idx.dtype == torch.int64 and topk_idx.is_contiguous(), "topk_idx must be contiguous int64")
        need(len(topk_idx) == len(values), "topk_idx must have a row per token")
    if topk_weights is not None:
        need(topk_weights.dtype == torch.float32, "topk_weights must be float32")


def take(x: Any, index: torch.Tensor) -> Any:
    if isinstance(x, tuple):
        return x[0].view(torch.uint8)[index].view(x[0].dtype), x[1][index]
    return x[index]


def join(parts: list[Any]) -> Any:
    if isinstance(parts[0], tuple):
        values = torch.cat([p[0].view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn)
        return values, torch.cat([p[1] for p in parts])
    return torch.cat(parts)


def stretch(x: Any, count: int) -> Any:
    """Rows up to `count`, the new ones holding nothing true."""
    if isinstance(x, tuple):
        bits = torch.full((count, x[0].shape[1]), 0x7F, dtype=torch.uint8)
        bits[: len(x[0])] = x[0].view(torch.uint8)
        return bits.view(torch.float8_e4m3fn), stretch(x[1], count)
    out = x.new_full((count, *x.shape[1:]), torch.nan if x.is_floating_point() else -7)
    out[: len(x)] = x
    return out


class Destroyable:
    alive = 0  # buffers not destroyed, over all threads
    lock = threading.Lock()

    def born(self, explicitly_destroy: bool) -> None:
        need(
            explicitly_destroy, "a destructor that releases resources may hang: ask for explicit destruction"
        )
        self.destroyed = False
        with Destroyable.lock:
            Destroyable.alive += 1

    def destroy(self) -> None:
        need(not self.destroyed, "destroyed twice")
        self.destroyed = True
        with Destroyable.lock:
            Destroyable.alive -= 1


class Config:
    def __init__(self, num_sms: int):
        self.num_sms = num_sms

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return self.num_sms // 2 * num_ranks * 256 * (hidden_bytes + 2048)


class Buffer(Destroyable):
    """V1. Normal: handle reuse, one order of rows. Low-latency: packed rows, two results at a time."""

    num_sms = 20

    def __init__(
        self,
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=False,
        enable_shrink=False,
        comm=None,
    ) -> None:
        self.born(explicitly_destroy)
        need(not num_rdma_bytes or low_latency_mode, "on one node RDMA memory is for low-latency mode")
        need(group.size() in (2, 4, 8), "kernels exist for 2, 4 and 8 ranks")
        self.group, self.nvl, self.rdma = group, num_nvl_bytes, num_rdma_bytes
        self.ll, self.qps, self.flags, self.outstanding, self.calls = (
            low_latency_mode,
            num_qps_per_rank,
            None,
            [],
            0,
        )

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        need(new_num_sms % 2 == 0, "the SM count must be even")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms)

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts
    ) -> int:
        return (
            4 * num_experts * num_max_dispatch_tokens_per_rank * (2 * hidden + hidden // 32) + 8 * num_experts
        )

    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        need(topk_idx.dtype == torch.int64 and topk_idx.is_contiguous(), "topk_idx must be contiguous int64")
        ranks = self.group.size()
        in_rank = torch.zeros(len(topk_idx), ranks, dtype=torch.bool)
        in_rank.scatter_(1, topk_idx // (num_experts // ranks), True)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        need(not self.destroyed and self.nvl, "no NVLink memory")
        need(
            Config(Buffer.num_sms).get_nvl_buffer_size_hint(1, self.group.size()) <= self.nvl,
            "buffer too small",
        )
        check_input(x, topk_idx, topk_weights)
        if handle is not None:
            need(topk_idx is None and topk_weights is None, "a handle and topk_idx exclude each other")
            in_rank = handle[4]
        else:
            need(is_token_in_rank is not None and num_tokens_per_rank is not None, "the layout is missing")
            need((topk_idx is None) == (topk_weights is None), "ids and weights go together")
            need(num_tokens_per_expert.dtype == torch.int32, "counts are int32")
            in_rank = is_token_in_rank
        need(
            in_rank.shape == (len(x[0] if isinstance(x, tuple) else x), self.group.size()),
            "layout of other tokens",
        )
        out = []
        for rank in range(self.group.size()):
            index = in_rank[:, rank].nonzero()[:, 0]
            meta = (topk_idx[index], topk_weights[index]) if topk_idx is not None else None
            out.append((take(x, index), index, meta))
        came = self.group.columns(out)
        rows, src = join([c[0] for c in came]), torch.cat([c[1] for c in came]).int()
        if handle is not None:
            need(torch.equal(src, handle[3]), "the handle is of another routing")
            return rows, None, None, None, None, None
        experts, weights = torch.cat([c[2][0] for c in came]), torch.cat([c[2][1] for c in came])
        each = len(num_tokens_per_expert) // self.group.size()
        local = experts - each * self.group.rank()
        here = (local >= 0) & (local < each)
        counts = torch.bincount(local[here], minlength=each).tolist()
        sent = torch.tensor([[len(c[1]) for c in came]])
        handle = (sent, None, None, src, in_rank, torch.zeros(in_rank.shape, dtype=torch.int32))
        return rows, torch.where(here, local, -1), torch.where(here, weights, 0.0), counts, handle, None

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        need(not self.destroyed, "destroyed")
        need(x.dtype == torch.bfloat16 and x.is_contiguous(), "combine takes contiguous bf16")
        need(len(x) == len(handle[3]), "as many rows as were received")
        sizes = handle[0][0].tolist()
        back = self.group.columns(list(zip(x.split(sizes), handle[3].split(sizes), strict=True)))
        like = torch.zeros(len(handle[4]), x.shape[1])
        for rows, index in back:
            like[index.long()] += rows.float()
        return like.to(torch.bfloat16), None, None

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank, hidden, num_experts) -> None:
        need(self.ll, "not a low-latency buffer")
        self.flags = num_experts
        self.group.exchange(None)

    def low_latency_dispatch(
        self,
        x,
        topk_idx,
        num_max_dispatch_tokens_per_rank,
        num_experts,
        cumulative_local_expert_recv_stats=None,
        dispatch_wait_recv_cost_stats=None,
        use_fp8=True,
        round_scale=False,
        use_ue8m0=False,
        async_finish=False,
        return_recv_hook=False,
    ):
        ranks, slots = self.group.size(), num_max_dispatch_tokens_per_rank
        each = num_experts // ranks
        need(self.ll and not self.destroyed, "low_latency_mode must be set")
        need(x.dtype == torch.bfloat16 and x.is_contiguous(), "low-latency dispatch takes bf16")
        check_input(x, topk_idx)
        need(len(x) <= slots and ranks * slots % 4 == 0, "slots: at least T, and R * slots divides by 4")
        need(x.shape[1] in (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192), "unsupported hidden")
        need(not use_fp8 or x.shape[1] % 512 == 0, "fp8 needs hidden % 512 == 0")
        need(topk_idx.shape[1] <= 11, "top-k above 11")
        need(self.qps == each, "as many queue pairs as local experts")
        size = self.get_low_latency_rdma_size_hint(slots, x.shape[1], ranks, num_experts)
        need(size <= self.rdma, "the buffer is too small")
        need(self.flags in (None, num_experts), "dirty flags: clean the buffer for another number of experts")
        need(len(self.outstanding) < 2, "more than two results outstanding")
        self.flags = num_experts
        self.calls += 1
        came = self.group.exchange((x.clone(), topk_idx.clone()))
        rows = torch.full((each, ranks * slots, x.shape[1]), torch.nan, dtype=torch.bfloat16)
        info = torch.full((each, ranks * slots), -9, dtype=torch.int32)
        counts = torch.zeros(each, dtype=torch.int32)
        spans = torch.zeros(each, ranks, dtype=torch.int64)
        for expert in range(each):
            for turn in range(ranks):  # atomics: ranks come in any order
                rank = (turn + self.calls + expert) % ranks
                sent, ids = came[rank]
                tokens = (ids == self.group.rank() * each + expert).any(1).nonzero()[:, 0].flip(0)
                begin = int(counts[expert])
                rows[expert, begin : begin + len(tokens)] = sent[tokens]
                info[expert, begin : begin + len(tokens)] = tokens.int()
                spans[expert, rank] = (begin << 32) | len(tokens)
                counts[expert] += len(tokens)
        handle = (info, spans, slots, x.shape[1], num_experts)
        self.outstanding.append(id(spans))
        if not use_fp8:
            return rows, counts, handle, None, None
        q, scales = fp8.reference_quantise(rows.view(-1, x.shape[1]))
        scales = scales.view(each, ranks * slots, -1).transpose(1, 2).contiguous().transpose(1, 2)
        return (q.view(rows.shape), scales), counts, handle, None, None

    def low_latency_combine(
        self,
        x,
        topk_idx,
        topk_weights,
        handle,
        use_logfmt=False,
        zero_copy=False,
        async_finish=False,
        return_recv_hook=False,
        out=None,
        combine_wait_recv_cost_stats=None,
    ):
        info, spans, slots, hidden, num_experts = handle
        ranks = self.group.size()
        each = num_experts // ranks
        need(id(spans) in self.outstanding, "the handle is of no outstanding dispatch")
        need(x.shape == (each, ranks * slots, hidden) and x.is_contiguous(), "x must be [L, R * slots, H]")
        need(x.dtype == torch.bfloat16 and topk_weights.dtype == torch.float32, "bf16 rows, float32 weights")
        self.outstanding.remove(id(spans))
        came = self.group.exchange((x, info, spans))
        total = torch.zeros(len(topk_idx), hidden)
        for token in range(len(topk_idx)):
            for expert, weight in zip(topk_idx[token].tolist(), topk_weights[token].tolist(), strict=True):
                rows, sources, begins = (part[expert % each] for part in came[expert // each])
                begin, count = (
                    int(begins[self.group.rank()]) >> 32,
                    int(begins[self.group.rank()]) & 0xFFFFFFFF,
                )
                slot = begin + (sources[begin : begin + count] == token).nonzero()[0, 0]
                total[token] += weight * rows[slot].float()
        self.group.exchange(None)
        return total.to(torch.bfloat16), None, None


class ElasticBuffer(Destroyable):
    """V2: handles that are reused, worst-case tensors without the host wait, slots of expanded rows."""

    def __init__(
        self,
        group,
        num_bytes=None,
        num_cpu_bytes=0,
        num_max_tokens_per_rank=0,
        hidden=0,
        num_topk=0,
        use_fp8_dispatch=False,
        deterministic=False,
        allow_hybrid_mode=True,
        allow_multiple_reduction=True,
        prefer_overlap_with_compute=True,
        sl_idx=3,
        num_allocated_qps=0,
        num_cpu_timeout_secs=300,
        num_gpu_timeout_secs=100,
        explicitly_destroy=False,
    ) -> None:
        self.born(explicitly_destroy)
        need(not allow_hybrid_mode, "hybrid mode asks for GIN, which a machine without NICs has not")
        need(num_max_tokens_per_rank > 0 and hidden > 0, "sizes are missing")
        self.group, self.num_max_tokens_per_rank, self.hidden = group, num_max_tokens_per_rank, hidden
        self.sms: list[tuple[str, int]] = []
        self.topk, self.reduce_twice, self.fp8, self.calls = (
            num_topk,
            allow_multiple_reduction,
            use_fp8_dispatch,
            0,
        )

    def get_theoretical_num_sms(
        self,
        num_experts,
        num_topk,
        num_scaleout_topk=0,
        rdma_gbs=0,
        nvlink_gbs=0,
        sm_read_gbs=200,
        sm_write_gbs=50,
    ) -> int:
        need(num_experts is not None, "get_expected_topk divides by the number of experts")
        return 16 if nvlink_gbs else 4

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        cumulative_local_expert_recv_stats=None,
        num_experts=None,
        num_max_tokens_per_rank=None,
        expert_alignment=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
        handle=None,
        do_handle_copy=True,
        do_cpu_sync=None,
        do_expand=False,
        do_zero_padding=False,
        use_tma_aligned_col_major_sf=False,
    ):
        need(not self.destroyed and num_sms > 0, "num_sms=0 with a handle raises in the library")
        self.sms.append(("dispatch", num_sms))
        need(
            expert_alignment == 1 or (handle is not None and expert_alignment is None),
            "the fake pads no expert's rows",
        )
        need(not async_with_compute_stream, "the caller's stream must wait: nobody does for an event")
        check_input(x, topk_idx, topk_weights)
        values = x[0] if isinstance(x, tuple) else x
        need(
            len(values) <= self.num_max_tokens_per_rank and values.shape[1] == self.hidden,
            "beyond the buffer",
        )
        cached = handle is not None
        if cached:
            need(topk_idx is None and not do_cpu_sync, "a handle excludes topk_idx and the host wait")
            need(handle.do_expand == do_expand, "the handle is of the other layout")
            topk_idx, num_experts = handle.topk_idx, handle.num_experts
        wait = not cached and do_cpu_sync is not False
        rank, ranks, most = self.group.rank(), self.group.size(), self.num_max_tokens_per_rank
        each = num_experts // ranks
        if not cached:
            self.calls += 1
        # Slots by atomics: any order, but that of the handle where there is one.
        order = handle.order if cached else torch.arange(len(values)).roll(self.calls)
        out = []
        for to in range(ranks):
            index = order[(topk_idx[order] // each == to).any(1)]
            weights = topk_weights[index] if topk_weights is not None else None
            out.append((take(x, index), topk_idx[index], weights, index + rank * most))
        came = self.group.columns(out)
        rows, ids = join([c[0] for c in came]), torch.cat([c[1] for c in came])
        weights = torch.cat([c[2] for c in came]) if topk_weights is not None else None
        sources = torch.cat([c[3] for c in came])
        local = ids - each * rank
        local = torch.where((local >= 0) & (local < each), local, -1)
        n = len(local)
        count = n if wait or (cached and handle.exact) else most * ranks
        if cached:
            need(
                torch.equal(sources.int(), handle.recv_src_metadata[:n, 0]),
                "the handle is of another routing",
            )
        else:
            handle = self._handle(
                local, sources, came, count, num_experts, do_expand, topk_idx, order, num_sms
            )
            handle.exact = wait
        if not do_expand:
            weights = None if weights is None else stretch(weights, count)
            return stretch(rows, count), stretch(local, count), weights, handle, None
        slots = handle.recv_src_metadata[:n, 2:].long()
        token, pick = (slots >= 0).nonzero().unbind(1)
        place = torch.empty(len(token), dtype=torch.int64)
        place[slots[token, pick]] = torch.arange(len(token))
        count = len(token) if handle.exact else most * ranks * min(ids.shape[1], each)
        weights = None if weights is None else stretch(weights[token, pick][place], count)
        return stretch(take(rows, token[place]), count), None, weights, handle, None

    def _handle(
        self, local, sources, came, count, num_experts, do_expand, topk_idx, order, num_sms
    ) -> SimpleNamespace:
        n, each = len(local), num_experts // self.group.size()
        metadata = torch.full((count, local.shape[1] + 2), -5, dtype=torch.int32)
        metadata[:n, 0] = sources.int()
        counts = torch.bincount(local[local >= 0], minlength=each)
        if do_expand:
            metadata[:n, 2:] = -1
            next_slot = counts.cumsum(0) - counts
            for row in reversed(range(n)):
                for pick in range(local.shape[1]):
                    if (expert := int(local[row, pick])) >= 0:
                        metadata[row, 2 + pick] = next_slot[expert]
                        next_slot[expert] += 1
        return SimpleNamespace(
            do_expand=do_expand,
            num_sms=num_sms,
            num_experts=num_experts,
            topk_idx=topk_idx.clone(),
            order=order,
            recv_src_metadata=metadata,
            psum_num_recv_tokens_per_expert=counts.cumsum(0).int(),
            psum_num_recv_tokens_per_scaleup_rank=torch.tensor([len(c[1]) for c in came]).cumsum(0).int(),
        )

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        num_sms=0,
        num_qps=0,
        previous_event=None,
        previous_event_before_epilogue=None,
        async_with_compute_stream=False,
        allocate_on_comm_stream=False,
    ):
        need(not self.destroyed, "destroyed")
        self.sms.append(("combine", num_sms))
        need(not async_with_compute_stream, "the caller's stream must wait: nobody does for an event")
        need(x.dtype == torch.bfloat16 and x.is_contiguous(), "combine takes contiguous bf16")
        metadata, most = handle.recv_src_metadata, self.num_max_tokens_per_rank
        need(handle.do_expand or len(x) == len(metadata), "plain: as many rows as were received")
        n = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        if handle.do_expand:
            need(self.reduce_twice, "the fake knows one reduction only")
            slots = metadata[:n, 2:].long()
            rows = torch.stack([cast_sum([*x[s[s >= 0]]], x[0]) for s in slots]) if n else x[:0]
        else:
            rows = x[:n]
        sources = metadata[:n, 0].long()
        out = []
        for to in range(self.group.size()):
            mine = sources // most == to
            out.append((rows[mine], sources[mine] % most))
        total = torch.zeros(len(handle.topk_idx), x.shape[1])
        for back, index in self.group.columns(out):
            total[index] += back.float()
        return total.to(torch.bfloat16), None, None


class HybridEPBuffer:
    """hybrid-ep: equal tokens everywhere, one copy of the rows out of the buffer, handles as tuples."""

    def __init__(
        self,
        group,
        hidden_dim,
        max_num_of_tokens_per_rank,
        num_local_experts,
        use_fp8=False,
        num_sms_dispatch_api=None,
        num_sms_combine_api=None,
        num_sms_preprocessing_api=None,
        num_blocks_permute=None,
        num_blocks_unpermute=None,
        load_cached_kernels=False,
        use_shared_buffer=True,
        enable_custom_allgather=False,
        num_of_hybrid_ep_ranks_per_nvlink_domain=None,
        use_mnnvl=None,
    ) -> None:
        need(hidden_dim % (512 if use_fp8 else 16) == 0, "hidden size")
        self.group, self.hidden, self.local, self.fp8 = group, hidden_dim, num_local_experts, use_fp8
        self.most, self.waits = max_num_of_tokens_per_rank, 0
        config = SimpleNamespace(
            num_of_blocks_dispatch_api=num_sms_dispatch_api or 24,
            num_of_blocks_combine_api=num_sms_combine_api or 24,
            max_num_of_tokens_per_rank=max_num_of_tokens_per_rank,
        )
        self.configurer = SimpleNamespace(buffer_config=config)

    def _route(self, hidden, scaling_factor, topk_idx, topk_weights, num_of_experts, known):
        """(rows, local ids [n, K], weights or None, scales or None, source row of each), in scan order."""
        ranks = self.group.size()
        need(hidden.is_contiguous() and hidden.shape[1] == self.hidden, "hidden must be contiguous")
        need(
            hidden.dtype == (torch.uint8 if self.fp8 else torch.bfloat16),
            "bf16, or uint8 for a buffer of fp8",
        )
        need(not self.fp8 or scaling_factor.dtype == torch.float32, "fp8 needs float32 scales")
        need(len(hidden) % 64 * ranks * 4 % 16 == 0 and 0 < len(hidden) <= self.most, "number of tokens")
        routing = topk_idx if known is None else known[2]
        need(num_of_experts in (None, self.local * ranks), "number of experts")
        came = self.group.exchange((hidden, scaling_factor, routing, topk_weights))
        need(len({len(c[0]) for c in came}) == 1, "the all-gather needs equal tokens on every rank")
        ids = torch.cat([c[2] for c in came]) - self.local * self.group.rank()
        ids = torch.where((ids >= 0) & (ids < self.local), ids, -1)
        keep = (ids >= 0).any(1).nonzero()[:, 0]
        scales = torch.cat([c[1] for c in came])[keep] if self.fp8 else None
        weights = torch.cat([c[3] for c in came])[keep] if topk_weights is not None else None
        return torch.cat([c[0] for c in came])[keep], ids[keep], weights, scales, keep

    def dispatch(
        self,
        hidden,
        scaling_factor=None,
        topk_idx=None,
        topk_weights=None,
        num_of_experts=None,
        probs=None,
        routing_map=None,
        num_dispatched_tokens_tensor=None,
        num_dispatched_tokens=None,
        handle=None,
    ):
        need(num_of_experts is not None, "the number of experts should be provided on index-based routing")
        need(handle is not None or topk_idx is not None, "neither handle nor routing")
        if num_dispatched_tokens is None:
            self.waits += 1
        known = handle[0] if handle is not None else None
        rows, ids, weights, scales, keep = self._route(
            hidden, scaling_factor, topk_idx, topk_weights, num_of_experts, known
        )
        dense = None
        first = self.local * self.group.rank()
        if weights is not None:
            dense = torch.full((len(rows), self.local * self.group.size()), 77.0)  # other ranks' are not true
            dense[:, first : first + self.local] = 0
            token, pick = (ids >= 0).nonzero().unbind(1)
            dense[token, first + ids[token, pick]] = weights[token, pick]
        if handle is None:
            local = torch.ones(len(hidden) * self.group.size(), self.local, dtype=torch.bool)
            local[: len(rows)] = False
            token, pick = (ids >= 0).nonzero().unbind(1)
            local[token, ids[token, pick]] = True
            handle = (
                (ids, keep, topk_idx, len(hidden)),
                None,
                None,
                torch.tensor([len(rows)]),
                local,
                0,
                None,
            )
        return rows, dense, scales, handle

    def combine(self, hidden, probs=None, handle=None):
        need(hidden.dtype == torch.bfloat16 and hidden.is_contiguous(), "combine takes contiguous bf16")
        ids, keep, _, tokens = handle[0]
        need(len(hidden) == len(keep), "as many rows as were received")
        return self._back(hidden, keep, tokens), None

    def _back(self, rows, keep, tokens):
        total = torch.zeros(tokens, rows.shape[1])
        out = [
            (rows[keep // tokens == to], keep[keep // tokens == to] % tokens)
            for to in range(self.group.size())
        ]
        for back, index in self.group.columns(out):
            total[index] += back.float()
        return total.to(torch.bfloat16)

    def dispatch_with_permute(
        self,
        *,
        hidden,
        topk_idx=None,
        topk_weights=None,
        num_of_experts_per_rank=None,
        num_of_experts=None,
        use_fp8=None,
        routing_map=None,
        probs=None,
        scaling_factor=None,
        num_permuted_tokens=None,
        pad_multiple=None,
        handle=None,
        non_blocking=False,
        fuse_permute_dispatch=False,
        num_dispatched_tokens=None,
        use_host_meta=None,
    ):
        need(not non_blocking or num_permuted_tokens is not None, "non_blocking needs num_permuted_tokens")
        need(handle is None or num_permuted_tokens is not None, "a handle does not say how many rows")
        if handle is None and not non_blocking:
            self.waits += 1
        known = handle[0] if handle is not None else None
        rows, ids, weights, scales, keep = self._route(
            hidden, scaling_factor, topk_idx, topk_weights, num_of_experts, known
        )
        token, pick = (ids >= 0).nonzero().unbind(1)
        by_expert = ids[token, pick].sort(stable=True).indices
        token, pick = token[by_expert], pick[by_expert]
        count = len(token) if num_permuted_tokens is None else num_permuted_tokens
        need(count >= len(token), "rows overflow")
        pad = 0x7F if self.fp8 else torch.nan
        out = rows.new_full((count, self.hidden), pad)
        out[: len(token)] = rows[token]
        if handle is None:
            counts = torch.bincount(ids[token, pick], minlength=self.local).int()
            route = (ids, keep, topk_idx, len(hidden), token)
            handle = (route, None, None, None, None, None, None, counts, len(hidden), None, None)
        weights = None if weights is None else stretch(weights[token, pick], count)
        return out, weights, None if scales is None else stretch(scales[token], count), None, handle

    def combine_with_unpermute(
        self,
        *,
        hidden,
        probs=None,
        handle=None,
        pad_multiple=None,
        fuse_unpermute_combine=False,
        num_dispatched_tokens=None,
    ):
        need(hidden.dtype == torch.bfloat16 and hidden.is_contiguous(), "combine takes contiguous bf16")
        _, keep, _, tokens, token = handle[0]
        summed = torch.zeros(len(keep), hidden.shape[1])
        summed.index_add_(0, token, hidden[: len(token)].float())
        return self._back(summed.to(torch.bfloat16), keep, tokens), None


def main_package(nvlink_gbs: float = 430.0) -> dict[str, ModuleType]:
    """DeepEP main, for sys.modules. `nvlink_gbs` is what it finds out of the links (0: nothing)."""
    Buffer.num_sms = 20
    package, compiled = ModuleType("deep_ep"), ModuleType("deep_ep._C")
    compiled.__file__ = "_C.so"
    package.__version__ = "2.1.0"
    package.Buffer, package.ElasticBuffer = Buffer, ElasticBuffer
    package.utils = SimpleNamespace(envs=SimpleNamespace(get_nvlink_gbs=lambda: nvlink_gbs))
    return {"deep_ep": package, "deep_ep._C": compiled}


def hybrid_package() -> dict[str, ModuleType]:
    """The branch hybrid-ep, for sys.modules."""
    package, compiled = ModuleType("deep_ep"), ModuleType("hybrid_ep_cpp")
    compiled.__file__ = "hybrid_ep_cpp.so"
    package.HybridEPBuffer = HybridEPBuffer
    return {"deep_ep": package, "hybrid_ep_cpp": compiled}


def signatures(name: str) -> Any:
    """class -> method -> [[parameter, default]], recorded from the sources of that commit."""
    path = Path(__file__).parent / "fixtures" / "signatures" / f"{name}.json"
    return json.loads(path.read_text())


def unlike(cls: type, recorded: dict[str, Any]) -> list[str]:
    """Methods of the fake whose parameters are not those of the library, and which have no counterpart."""
    out = []
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        if not inspect.isfunction(function) or (name.startswith("_") and name != "__init__"):
            continue
        found = inspect.signature(function).parameters.values()
        mine = [[p.name, p.default is not p.empty] for p in found if p.name != "self"]
        theirs = [[parameter, default is not None] for parameter, default in recorded.get(name, [])]
        if mine != theirs and not (name == "get_combine_config" and theirs == [["num_ranks", False]]):
            out.append(name)
    return out


def on_ranks(case: Case, backend: type, work: Callable[..., Any]) -> list[Any]:
    """As exchange_job.on_ranks, of a case that the backend would run."""
    assert backend().why_not(case) is None
    return exchange_job.on_ranks(case, backend, work, Group)
