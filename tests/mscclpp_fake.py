"""mscclpp.ep as its sources at 3d02152b describe it: real rows between threads, real sums and casts, and an
error wherever the contract is broken."""

from __future__ import annotations

import weakref
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple

import torch
from ep_fake import Place, Rule, dataclass_of, must, recorded, shuffled

from collectivex.runtime import fp8

RECORD = recorded("mscclpp_ep-3d02152b")
ENUMS = {name: Enum(name, values) for name, values in RECORD["enums"].items()}
MoEMode, DispatchLayout = ENUMS["MoEMode"], ENUMS["DispatchLayout"]
CombineMode, DispatchDataType = ENUMS["CombineMode"], ENUMS["DispatchDataType"]
HIDDEN = (4096, 4352, 6656, 7168, 8192, 8704, 9216)

QuantConfig = dataclass_of(RECORD, "QuantConfig")
DispatchOutput = dataclass_of(RECORD, "DispatchOutput")
DispatchLayoutInfo = dataclass_of(RECORD, "DispatchLayoutInfo")
DispatchHandle = dataclass_of(RECORD, "DispatchHandle")
MoECommunicatorConfig = dataclass_of(
    RECORD,
    "MoECommunicatorConfig",
    num_experts=0,
    hidden_size=0,
    topk=0,
    max_tokens_per_rank=0,
    mode=MoEMode.LATENCY,
    combine_mode=CombineMode.RANK_LOCAL_REDUCE,
    enable_overlap=False,
    expert_alignment=1,
)


class Sent(NamedTuple):
    """What one rank gave to a dispatch."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Slot(NamedTuple):
    """Where a pick lies: row of the output it was put in, and whose it is."""

    row: int
    source: int
    token: int
    pick: int
    weight: float


class World:
    """One job. `available` is what the ranks find out about their CUDA-IPC domain."""

    def __init__(self) -> None:
        self.place = Place()
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.available = True

    def modules(self, commit: str = "g3d02152b") -> dict[str, ModuleType]:
        top, ep, cpp = (ModuleType(n) for n in ("mscclpp", "mscclpp.ep", "mscclpp.mscclpp_ep_cpp"))
        top.__version__, top.version = f"0.9.0+ep.{commit[1:]}", {"git_commit": commit}
        top.CommGroup, top.ep, top.mscclpp_ep_cpp = CommGroup, ep, cpp
        cpp.__file__ = "/somewhere/mscclpp/mscclpp_ep_cpp.abi3.so"
        world = self

        class Communicator(MoECommunicator):
            job = world

        ep.MoECommunicator, ep.QuantConfig = Communicator, QuantConfig
        for name, values in ENUMS.items():
            setattr(ep, name, values)
        return {"mscclpp": top, "mscclpp.ep": ep, "mscclpp.mscclpp_ep_cpp": cpp}


class CommGroup:
    def __init__(
        self,
        mpi_comm: Any = None,
        torch_group: Any = None,
        interfaceIpPortTrio: str = "",
        rank: int | None = None,
        size: int | None = None,
    ):
        must(torch_group is not None, "the fake only bootstraps through torch")
        self.my_rank, self.nranks = torch_group.rank(), torch_group.size()
        self.carried = 0


class MoECommunicator:
    job: World

    def __init__(self, config: Any = None, **kwargs: Any):
        self.config = config or MoECommunicatorConfig(**kwargs)
        c = self.config
        must(isinstance(c.comm, CommGroup), "comm is a CommGroup")
        c.comm.carried += 1
        must(c.comm.carried == 1, "a CommGroup keeps mappings of the communicator it carried")
        must(isinstance(c.mode, MoEMode) and isinstance(c.combine_mode, CombineMode), "modes are enums")
        must(min(c.num_experts, c.hidden_size, c.topk, c.max_tokens_per_rank) > 0, "sizes are positive")
        self.rank, self.size = c.comm.my_rank, c.comm.nranks
        must(c.num_experts % self.size == 0, "experts divide over ranks")
        self.local = c.num_experts // self.size
        self.latency = c.mode == MoEMode.LATENCY
        self.layout = c.output_layout or (
            DispatchLayout.EXPERT_MAJOR if self.latency else DispatchLayout.TOKEN_MAJOR
        )
        self.blocks = c.num_blocks or (130 if self.latency else 20)
        if self.latency:
            must(self.size + 2 <= self.blocks <= 130, "num_blocks is R + 2 to 130")
            must(c.hidden_size in HIDDEN and c.topk <= 9, "the kernels have such a hidden size and top-k")
            must(self.layout != DispatchLayout.TOKEN_MAJOR, "no token-major in latency mode")
            must(c.quant is None or self.layout == DispatchLayout.EXPERT_MAJOR, "rank-major is bf16 only")
        else:
            must(c.quant is None, "throughput has no quantisation")
            must(self.size in (2, 4, 8, 16), "throughput kernels exist for 2, 4, 8, 16 ranks")
        self.initialized, self.open, self.calls = False, False, 0
        self.job.alive.add(self)

    @property
    def num_blocks(self) -> int:
        return self.blocks

    def is_available(self) -> bool:
        return self.job.available

    def initialize(self) -> None:
        c, rows = self.config, self.size * self.config.max_tokens_per_rank
        must(len(set(self.meet("initialize"))) == 1, "initialize is collective")
        kind = torch.bfloat16 if c.quant is None else torch.float8_e4m3fn
        if self.layout == DispatchLayout.EXPERT_MAJOR:
            self.buffer = torch.zeros(self.local, rows, c.hidden_size).to(kind)
            scales = torch.zeros(self.local, c.hidden_size // 128, rows)
            self.scales = None if c.quant is None else scales.transpose(1, 2)
        else:
            self.buffer = torch.zeros(rows, c.hidden_size, dtype=kind)
        self.back = torch.zeros(rows, c.topk, c.hidden_size, dtype=torch.bfloat16)
        self.initialized = True

    def get_dispatch_output_buffer(self) -> torch.Tensor:
        must(self.latency and self.initialized, "only latency mode has such a buffer, once initialised")
        return self.buffer

    def dispatch(
        self,
        input: Any,
        topk_ids: Any,
        weights: Any = None,
        quant: Any = None,
        *,
        output_buffer: Any = None,
        stream: Any = None,
        previous_handle: Any = None,
        runtime_max_tokens_per_rank: int | None = None,
    ) -> tuple[Any, Any]:
        c = self.config
        must(self.initialized, "initialised before the first call, or it would be timed")
        must(not (self.latency and self.open), "latency dispatch and combine go in turns")
        must(quant is None and output_buffer is None, "nothing here asks for these")
        must(input.dtype == torch.bfloat16 and input.is_contiguous(), "input is contiguous bf16")
        must(tuple(input.shape[1:]) == (c.hidden_size,), "input has the configured hidden size")
        must(len(input) <= c.max_tokens_per_rank, "no more tokens than the capacity")
        must(topk_ids.dtype == torch.int64 and topk_ids.is_contiguous(), "ids are contiguous int64")
        must(tuple(topk_ids.shape) == (len(input), c.topk), "ids are [T, K]")
        must(weights is not None and weights.dtype == torch.float32, "weights are float32")
        must(weights.is_contiguous() and weights.shape == topk_ids.shape, "weights are contiguous [T, K]")
        self.calls, self.open = self.calls + 1, True
        sent = [Sent(*s) for s in self.meet((input.clone(), topk_ids.clone(), weights.clone()))]
        self.tokens = len(input)
        if not self.latency:
            return self.pooled(
                sent, (topk_ids.data_ptr(), topk_ids._version, weights.data_ptr()), previous_handle
            )
        must(previous_handle is None, "latency mode knows no previous handle")
        if self.layout == DispatchLayout.RANK_MAJOR:
            return self.by_rank(sent)
        return self.fanned_out(sent)

    def combine(
        self, expert_output: Any, handle: Any, *, out: Any = None, stream: Any = None
    ) -> torch.Tensor:
        must(self.open or not self.latency, "combine follows a dispatch")
        must(expert_output.dtype == torch.bfloat16 and expert_output.is_contiguous(), "rows: contiguous bf16")
        # The host's handle is any of this communicator's; the kernels use what the last dispatch left.
        must(handle.output_info is self, "the handle is of this communicator")
        if self.layout == DispatchLayout.RANK_MAJOR:
            direct = self.config.combine_mode == CombineMode.DIRECT_SEND
            buffer = self.back if direct else self.buffer
            must(expert_output.data_ptr() == buffer.data_ptr(), "rows lie in the library's buffer")
        self.open = False
        kept = expert_output.clone()
        sums = self.meet(self.partials(kept))
        total = torch.stack([s[self.rank] for s in sums]).sum(0)[: self.tokens].to(torch.bfloat16)
        if out is None:
            return total
        must(self.latency, "throughput copies once more with out=")
        must(out.shape == total.shape and out.dtype == torch.bfloat16, "out is [T, H] bf16")
        return out.copy_(total)

    # ------------------------------------------------------------------------------------- layouts

    def fanned_out(self, sent: list[Sent]) -> tuple[Any, Any]:
        c, first = self.config, self.rank * self.local
        self.slots, counts = [], []
        for local in range(self.local):
            at = local * self.buffer.shape[1]
            start = at
            for source, s in enumerate(sent):
                hits = (s.ids == first + local).nonzero().tolist()
                for token, pick in shuffled(hits, self.calls):
                    self.slots.append(Slot(at, source, token, pick, float(s.weights[token, pick])))
                    at += 1
            counts.append(at - start)
        rows = self.buffer.view(-1, c.hidden_size)
        for slot in self.slots:
            row = sent[slot.source].x[slot.token]
            if c.quant is None:
                rows[slot.row] = row
            else:
                q, scale = fp8.quantise(row[None], fp8.E4M3FN)
                rows.view(torch.uint8)[slot.row] = q.view(torch.uint8)[0]
                local, at = divmod(slot.row, self.buffer.shape[1])
                self.scales[local, at] = scale[0]
        quant = None if c.quant is None else QuantConfig(c.quant.format, self.scales)
        info = DispatchLayoutInfo(self.layout, torch.tensor(counts, dtype=torch.int32))
        return DispatchOutput(self.buffer, quant, info), DispatchHandle(self)

    def by_rank(self, sent: list[Sent]) -> tuple[Any, Any]:
        c = self.config
        cap = c.max_tokens_per_rank
        self.ids = torch.full((self.size * cap, c.topk), c.num_experts, dtype=torch.int32)
        self.gates = torch.zeros(self.size * cap, c.topk)
        self.slots, counts = [], []
        for source, s in enumerate(sent):
            mine = s.ids // self.local == self.rank
            tokens = shuffled(mine.any(1).nonzero()[:, 0].tolist(), self.calls)
            counts.append(len(tokens))
            for at, token in enumerate(tokens, source * cap):
                self.buffer[at] = s.x[token]
                self.ids[at] = torch.where(mine[token], s.ids[token], c.num_experts).to(torch.int32)
                self.gates[at] = torch.where(mine[token], s.weights[token], 0.0)
                self.slots += [
                    Slot(at, source, token, pick, 1.0) for pick in mine[token].nonzero()[:, 0].tolist()
                ]
        info = DispatchLayoutInfo(self.layout, num_tokens_per_rank=torch.tensor(counts, dtype=torch.int32))
        back = self.back if c.combine_mode == CombineMode.DIRECT_SEND else self.buffer
        return DispatchOutput(self.buffer, None, info, self.ids, self.gates, back), DispatchHandle(self)

    def pooled(self, sent: list[Sent], key: Any, previous: Any) -> tuple[Any, Any]:
        c, rows, ids, gates = self.config, [], [], []
        must(all(len(s.x) for s in sent), "a rank without tokens cannot combine")
        self.slots = []
        for source, s in enumerate(sent):
            mine = s.ids // self.local == self.rank
            for token in mine.any(1).nonzero()[:, 0].tolist():
                self.slots.append(Slot(len(rows), source, token, 0, 1.0))
                rows.append(s.x[token])
                ids.append(torch.where(mine[token], s.ids[token] - self.rank * self.local, -1))
                gates.append(torch.where(mine[token], s.weights[token], 0.0))
        view = self.buffer[: len(rows)]
        if rows:
            view.copy_(torch.stack(rows))
        cache = None if previous is None else previous._dispatch_cache
        if cache is not None and cache["key"] == key:
            ids, gates, counts = cache["metadata"]
        else:
            ids = torch.stack(ids) if ids else torch.zeros(0, c.topk, dtype=torch.int64)
            gates = torch.stack(gates) if gates else torch.zeros(0, c.topk)
            counts = torch.bincount(ids[ids >= 0], minlength=self.local).tolist()
            cache = {"key": key, "metadata": (ids, gates, counts)}
        info = DispatchLayoutInfo(self.layout, counts)
        return DispatchOutput(view, None, info, ids, gates), DispatchHandle(self, None, cache)

    def partials(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, M, H] float32: what this rank contributes to every token of every source."""
        c = self.config
        direct = c.combine_mode == CombineMode.DIRECT_SEND
        if self.layout == DispatchLayout.EXPERT_MAJOR:
            must(rows.shape == self.buffer.shape, "expert output keeps the dispatch layout")
            flat = rows.view(-1, c.hidden_size)
        elif self.layout == DispatchLayout.RANK_MAJOR:
            must(
                rows.shape == (self.back if direct else self.buffer).shape, "rank-major keeps its own layout"
            )
            flat = rows.view(-1, c.hidden_size)
        else:
            must(len(rows) == len({s.row for s in self.slots}), "as many rows as came")
            self.buffer[: len(rows)] = rows  # the pool holds them now
            flat = rows
        out = torch.zeros(self.size * c.max_tokens_per_rank, c.hidden_size)
        by_pick = self.layout == DispatchLayout.RANK_MAJOR and direct
        by_row = self.layout == DispatchLayout.RANK_MAJOR and not direct
        slots = list({s.row: s for s in self.slots}.values()) if by_row else self.slots
        if slots:
            at = [s.row * c.topk + s.pick if by_pick else s.row for s in slots]
            to = [s.source * c.max_tokens_per_rank + s.token for s in slots]
            weights = torch.tensor([s.weight for s in slots])
            out.index_add_(0, torch.tensor(to), flat[at].float() * weights[:, None])
        if self.layout == DispatchLayout.EXPERT_MAJOR and not direct:
            out = out.to(torch.bfloat16).float()
        return out.view(self.size, c.max_tokens_per_rank, c.hidden_size)

    def meet(self, value: Any) -> list[Any]:
        ranks = self.job.place.ranks
        if ranks.rank != self.rank:
            raise Rule("a communicator is used by its own rank")
        return ranks.all_gather(value)
