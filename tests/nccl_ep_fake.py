"""nccl.ep as the sources of libnccl_ep 0.1.0 describe it: real rows between threads, real sums and casts, and
an error wherever an assertion of the library, or a race, would end the real call."""

from __future__ import annotations

from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from ep_fake import Place, dataclass_of, must, recorded, shuffled

RECORD = recorded("nccl_ep-0.3.1")
ENUMS = {
    "Algorithm": IntEnum("Algorithm", RECORD["fields"]["Algorithm"], start=0),
    "Layout": IntEnum("Layout", RECORD["fields"]["Layout"], start=0),
}
Algorithm, Layout = ENUMS["Algorithm"], ENUMS["Layout"]
HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
STREAM = 7  # the current stream of these threads

GroupConfig = dataclass_of(
    RECORD,
    "GroupConfig",
    algorithm=Algorithm.LOW_LATENCY,
    num_experts=0,
    max_dispatch_tokens_per_rank=0,
    max_recv_tokens_per_rank=0,
    max_token_bytes=0,
)
LayoutInfo = dataclass_of(RECORD, "LayoutInfo")
DispatchInputs = dataclass_of(RECORD, "DispatchInputs")
DispatchOutputs = dataclass_of(RECORD, "DispatchOutputs")
CombineInputs = dataclass_of(RECORD, "CombineInputs")
CombineOutputs = dataclass_of(RECORD, "CombineOutputs")


class World:
    """One job. `log` is what was destroyed, in order, by rank."""

    def __init__(self) -> None:
        self.place = Place()
        self.log: list[tuple[int, str]] = []

    def modules(
        self, nccl4py: str = "0.3.1", nccl: str = "2.30.7", ep: str | None = "0.1.0"
    ) -> dict[str, ModuleType]:
        top, core, bindings = (ModuleType(n) for n in ("nccl", "nccl.core", "nccl.ep"))
        loaded = {"cuda_variant": "13.3"}
        top.get_version = lambda: SimpleNamespace(
            nccl4py=nccl4py,
            nccl=SimpleNamespace(version=nccl, path="/somewhere/libnccl.so.2", **loaded),
            nccl_ep=ep and SimpleNamespace(version=ep, path="/somewhere/libnccl_ep.so", **loaded),
        )
        top.core, top.ep = core, bindings
        world = self

        class Connected(Communicator):
            job = world

        core.get_unique_id, core.UniqueId, core.Communicator = get_unique_id, UniqueId, Connected
        for part in (Group, Tensor, GroupConfig, LayoutInfo, DispatchInputs, DispatchOutputs):
            setattr(bindings, part.__name__, part)
        bindings.CombineInputs, bindings.CombineOutputs = CombineInputs, CombineOutputs
        bindings.Algorithm, bindings.Layout = Algorithm, Layout
        return {"nccl": top, "nccl.core": core, "nccl.ep": bindings}


def get_unique_id(empty: bool = False) -> UniqueId:
    return UniqueId(bytes(128) if empty else bytes(range(128)))


class UniqueId:
    def __init__(self, _internal: bytes):
        self.value = _internal

    def __bytes__(self) -> bytes:
        return self.value

    @staticmethod
    def from_bytes(b: bytes) -> UniqueId:
        return UniqueId(b)


class Communicator:
    job: World

    def __init__(self, ptr: int = 0):
        self.live = True

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: Any, config: Any = None) -> Communicator:
        comm = cls()
        comm.size, comm.rank = nranks, rank
        ids = comm.meet(bytes(unique_id))
        must(len(set(ids)) == 1 and len(ids) == nranks, "all ranks come with the id of rank 0")
        return comm

    def meet(self, value: Any) -> list[Any]:
        must(self.live, "the communicator lives")
        must(self.job.place.ranks.rank == self.rank, "a communicator is used by its own rank")
        return self.job.place.ranks.all_gather(value)

    def destroy(self) -> None:
        self.meet("destroy")
        self.live = False
        self.job.log.append((self.rank, "communicator"))


class Tensor:
    def __init__(
        self,
        buffer: Any,
        *,
        dtype: Any = None,
        shape: Any = None,
        window: Any = None,
        window_offset: int | None = None,
    ):
        must(isinstance(buffer, torch.Tensor), "the fake resolves torch tensors only")
        must(buffer.is_contiguous(), "only pointer and sizes are taken: rows must be contiguous")
        self.buffer = buffer


class Group:
    def __init__(self, ptr: Any):
        self.comm, self.config = ptr
        self.live = True

    @classmethod
    def create(cls, comm: Any, config: Any) -> Group:
        c = config
        must(isinstance(c.algorithm, Algorithm), "the algorithm is an enum")
        must(c.num_experts % comm.size == 0 and c.max_token_bytes > 0, "experts divide, tokens have bytes")
        must(c.max_dispatch_tokens_per_rank > 0, "the capacity is required")
        same = (c.num_experts, c.max_dispatch_tokens_per_rank, c.max_recv_tokens_per_rank, c.max_token_bytes)
        must(len(set(comm.meet(same))) == 1, "all ranks create the same group")
        if c.algorithm == Algorithm.HIGH_THROUGHPUT:
            must(c.max_dispatch_tokens_per_rank <= 8192, "at most 8192 tokens a rank")
            must(c.max_recv_tokens_per_rank >= c.max_dispatch_tokens_per_rank, "room for what comes")
        return cls((comm, config))

    def create_handle(
        self, layout: Any, topk_idx: Any, *, layout_info: Any = None, config: Any = None, stream: Any
    ) -> Handle:
        must(self.live, "the group lives")
        return Handle((self, layout, topk_idx, layout_info, stream))

    def destroy(self) -> None:
        self.comm.meet("destroy group")
        self.live = False
        self.comm.job.log.append((self.comm.rank, "group"))


class Handle:
    def __init__(self, ptr: Any):
        self.group, self.layout, topk, info, stream = ptr
        self.comm, self.config = self.group.comm, self.group.config
        self.low_latency = self.config.algorithm == Algorithm.LOW_LATENCY
        self.local = self.config.num_experts // self.comm.size
        self.capacity = self.config.max_dispatch_tokens_per_rank
        self.picks, self.calls, self.open, self.live = topk.buffer.shape[1], 0, False, True
        if self.low_latency:
            must(self.layout in (Layout.EXPERT_MAJOR, Layout.RANK_MAJOR), "low latency has two layouts")
            must(self.capacity * self.local % 4 == 0, "capacity times local experts is a multiple of 4")
            must(self.picks <= 9, "at most 9 experts per token")
        else:
            must(self.layout == Layout.FLAT, "the fake knows the flat layout of high throughput")
            must(self.capacity * self.comm.size % 4 == 0, "the map is copied in 16-byte pieces")
        self.comm.meet("create handle")
        self.update(topk, layout_info=info, stream=stream)

    def update(self, topk_idx: Any, *, layout_info: Any = None, stream: Any) -> None:
        ids = topk_idx.buffer
        must(stream == STREAM and self.live and self.group.live, "on the current stream of a living handle")
        must(ids.dtype == torch.int64 and ids.shape[1] == self.picks, "ids are int64 [T, K]")
        must(len(ids) <= self.capacity, "no more tokens than the capacity")
        self.topk = topk_idx
        if self.low_latency:
            must(layout_info is None, "low latency takes no layout info here")
            return
        counts, total = layout_info.expert_counters.buffer, layout_info.recv_total_counter.buffer
        must(counts.dtype == total.dtype == torch.int32, "counters are int32")
        must(len(counts) >= self.local, "a counter for each local expert")
        self.routing = [i.clone() for i in self.comm.meet(ids)]
        every = torch.cat(self.routing)
        mine = (every // self.local == self.comm.rank) & (every >= 0)
        counts.copy_(torch.bincount(every[mine] % self.local, minlength=self.local))
        total.fill_(int(mine.any(1).sum()))

    def dispatch(
        self, inputs: Any, outputs: Any, *, layout_info: Any = None, config: Any = None, stream: Any
    ) -> None:
        x = inputs.tokens.buffer
        must(stream == STREAM and self.live and self.group.live, "on the current stream of a living handle")
        must(not self.open, "dispatch and combine go in turns: they share two buffers")
        must(x.dtype == torch.bfloat16 and len(x) == len(self.topk.buffer), "x is bf16 with the handle's T")
        must(2 * x.shape[1] <= self.config.max_token_bytes, "a row fits max_token_bytes")
        must(inputs.scales is None and outputs.scales is None, "bf16 only")
        self.calls, self.open, self.hidden = self.calls + 1, True, x.shape[1]
        gates = None if inputs.topk_weights is None else inputs.topk_weights.buffer.clone()
        sent = self.comm.meet((x.clone(), self.topk.buffer.clone(), gates))
        if self.layout == Layout.EXPERT_MAJOR:
            must(gates is None and outputs.topk_idx is None, "expert-major takes its weights at combine")
            self.fan_out(sent, outputs.tokens.buffer, layout_info.expert_counters.buffer)
        elif self.layout == Layout.RANK_MAJOR:
            must(layout_info.expert_counters is None, "rank-major counts by source rank")
            self.by_rank(sent, outputs, layout_info.src_rank_counters.buffer)
        else:
            must(layout_info is None, "high throughput told its counts before")
            must(all(len(s[0]) for s in sent), "a rank without tokens launches an empty grid")
            self.flat(sent, outputs)

    def combine(self, inputs: Any, outputs: Any, *, config: Any = None, stream: Any) -> None:
        rows, out = inputs.tokens.buffer, outputs.tokens.buffer
        must(stream == STREAM and self.live and self.group.live, "on the current stream of a living handle")
        must(self.open, "combine follows a dispatch")
        must(rows.dtype == torch.bfloat16, "expert output is bf16")
        must(inputs.topk_weights is None, "forward combine takes no weights with the rows")
        must(out.dtype == torch.bfloat16 and len(out) == len(self.topk.buffer), "out is bf16 [T, H]")
        must(out.shape[1] == rows.shape[-1], "out has the hidden size of the rows")
        expected = {
            Layout.EXPERT_MAJOR: (self.local, self.comm.size * self.capacity),
            Layout.RANK_MAJOR: (self.comm.size, self.capacity),
            Layout.FLAT: (self.count,),
        }
        must(tuple(rows.shape[:-1]) == expected[self.layout], "expert output keeps the dispatch layout")
        self.open = False
        flat = rows.reshape(-1, self.hidden)
        back = [(source, token, pick, flat[at].clone()) for at, source, token, pick in self.slots]
        must(outputs.topk_weights is not None or self.layout != Layout.EXPERT_MAJOR, "weights at combine")
        total = torch.zeros(len(out), self.hidden)
        for arrived in self.comm.meet(back):
            for source, token, pick, row in arrived:
                if source == self.comm.rank:
                    expert_major = self.layout == Layout.EXPERT_MAJOR
                    weight = outputs.topk_weights.buffer[token, pick] if expert_major else 1.0
                    total[token] += weight * row.float()
        out.copy_(total)

    def destroy(self) -> None:
        must(self.group.live and self.comm.live, "handle before group before communicator")
        self.live = False
        self.comm.job.log.append((self.comm.rank, "handle"))

    # ------------------------------------------------------------------------------------- layouts

    def fan_out(self, sent: list[Any], rows: torch.Tensor, counts: torch.Tensor) -> None:
        width = self.comm.size * self.capacity
        must(tuple(rows.shape) == (self.local, width, self.hidden), "output is [L, R * M, H]")
        must(self.hidden in HIDDEN, "the kernels have such a hidden size")
        must(counts.dtype == torch.int32 and len(counts) == self.local, "counters are int32 [L]")
        self.slots, self.count = [], None
        for local in range(self.local):
            hits = [
                (source, *hit)
                for source, (_, ids, _) in enumerate(sent)
                for hit in (ids == self.comm.rank * self.local + local).nonzero().tolist()
            ]
            counts[local] = len(hits)
            for at, (source, token, pick) in enumerate(shuffled(hits, self.calls)):  # slots by atomic add
                rows[local, at] = sent[source][0][token]
                self.slots.append((local * width + at, source, token, pick))

    def by_rank(self, sent: list[Any], outputs: Any, counts: torch.Tensor) -> None:
        rows, ids, gates = (t.buffer for t in (outputs.tokens, outputs.topk_idx, outputs.topk_weights))
        shape = (self.comm.size, self.capacity)
        must(tuple(rows.shape) == (*shape, self.hidden), "output is [R, M, H]")
        must(self.hidden in HIDDEN, "the kernels have such a hidden size")
        must(ids.dtype == torch.int32 and tuple(ids.shape) == (*shape, self.picks), "ids: int32 [R, M, K]")
        must(gates.dtype == torch.float32 and gates.shape == ids.shape, "weights: float32 [R, M, K]")
        must(counts.dtype == torch.int32 and len(counts) == self.comm.size, "counters are int32 [R]")
        self.slots, self.count = [], None
        for source, (x, wanted, weights) in enumerate(sent):
            must(weights is not None, "rank-major takes the weights at dispatch")
            mine = wanted // self.local == self.comm.rank
            tokens = shuffled(mine.any(1).nonzero()[:, 0].tolist(), self.calls)
            counts[source] = len(tokens)
            for at, token in enumerate(tokens):
                rows[source, at], gates[source, at] = x[token], weights[token]  # of other ranks' picks too
                ids[source, at] = torch.where(mine[token], wanted[token] % self.local, -1).to(torch.int32)
                self.slots.append((source * self.capacity + at, source, token, 0))

    def flat(self, sent: list[Any], outputs: Any) -> None:
        rows, ids, gates = (t.buffer for t in (outputs.tokens, outputs.topk_idx, outputs.topk_weights))
        room = self.config.max_recv_tokens_per_rank
        must(len(rows) >= room and len(ids) >= room, "outputs have room for the worst case")
        must(ids.dtype == torch.int64 and gates.shape == ids.shape, "ids are int64 [N, K]")
        ids.fill_(-1)
        gates.zero_()
        self.slots = []
        for source, (x, wanted, weights) in enumerate(sent):
            must(weights is not None, "forward dispatch takes the weights")
            must(torch.equal(wanted, self.routing[source]), "the routing is the one of the last update")
            for token in range(len(x)):
                mine = sorted(
                    (int(e) % self.local, k)
                    for k, e in enumerate(wanted[token])
                    if int(e) // self.local == self.comm.rank
                )
                if not mine:
                    continue
                at = len(self.slots)
                rows[at] = x[token]
                for place, (expert, k) in enumerate(mine):
                    ids[at, place], gates[at, place] = expert, weights[token, k]
                self.slots.append((at, source, token, 0))
        self.count = len(self.slots)
