"""DeepEP V2, `deep_ep.ElasticBuffer`, on one NVLink node (no RDMA, no hybrid mode).

Receive layouts
  plain   one row per token and destination rank, with the token's local experts; the expert step sums them
  expand  one row per token and local expert, grouped by expert (alignment 1)

What is inside the timed windows
  normal       dispatch: quantisation where fp8 is asked, layout in the kernel, a host wait for the counts,
               rows with ids and weights into the peers' buffers, a copy kernel into new tensors.
               combine: (expand) sum over the rank's experts, rows back, a kernel that sums over ranks.
  cached       dispatch: the same with the handle of an earlier call: no counts, no host wait.
  low-latency  `do_cpu_sync=False`: layout and counts are inside as in normal, nothing waits for the host, the
               received tensors have worst-case size (capacity * ranks rows, expand: times local picks).

Casts, from combine.cuh and combine_reduce_epilogue.cuh. plain: the bf16 rows of a token's ranks are added in
float32 and cast once (two rows by one bf16 addition: the same value). expand, with the library's default
`allow_multiple_reduction=True`: each rank's experts are added so and cast, then the ranks: partial sums.

Lifetimes. A buffer per (capacity, hidden, top-k), kept until the backend closes. Kernels are compiled at run
time for the capacity too, so there is one for all numbers of tokens. Nothing may be poisoned: results are new
tensors, the buffer holds protocol state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..runtime.types import Case, Moe
from . import _deepep
from ._moe_only import MoeOnly
from .base import Context, Facts, Received, Source, Variant

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem

PIN = "dd758caf4518"
VERSION = "2.1.0"
EXTENSION = "deep_ep._C"
# GB/s of all NVLinks of a GPU as `nvidia-smi nvlink -s` adds them up, times the library's 0.9, by compute
# capability: NVLink 4 has 18 links of 26.562. For machines that hide their links, where the library would
# assume 0 and run on 4 SMs.
NVLINK_GBS = {9: 430.3}

_HINT = "`cx prepare --backend deepep` builds DeepEP main beside NCCL 2.30"
_LAYOUTS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "expand": {"layout": "token-expert", "combine": "expert-sum", "casts": "rank-partials"},
}
_DISPATCH = {
    "normal": "quantise (fp8), layout, counts exchange, host wait, rows with ids and weights, copy out",
    "cached": "quantise (fp8), rows with ids, copy out; layout and counts known",
    "low-latency": "quantise (fp8), layout, counts exchange, rows with ids and weights, copy; no host wait",
}
_COMBINE = {
    "plain": "rows back, float32 sum over ranks, one cast to bf16",
    "expand": "sum over local experts, one cast, rows back, float32 sum over ranks, one cast to bf16",
}

FACTS = Facts(
    name="deepep",
    title="DeepEP V2 ElasticBuffer",
    source=Source(
        "git",
        "https://github.com/deepseek-ai/DeepEP",
        PIN,
        "newest main (2.1.0); needs NCCL 2.30.4 or newer, the same at build and run time",
    ),
    recipe=_deepep.RECIPE,
    devices=("cuda",),
    env={"EP_DISABLE_GIN": "1"},  # without a NIC its NCCL context asserts otherwise; NVLink needs no GIN
    variants=tuple(
        Variant(
            name,
            mode,
            ("bf16", "fp8"),
            {"dispatch": dispatch, "combine": _COMBINE[name]},
            graph_safe=mode != "normal",
            **layout,
        )
        for mode, dispatch in _DISPATCH.items()
        for name, layout in _LAYOUTS.items()
    ),
    knobs=("num_sms",),
    validated=("cuda",),
)


class Backend(MoeOnly):
    facts = FACTS

    def limit(self, case: Case, shape: Moe) -> str | None:
        if (reason := _deepep.one_node(case)) is not None:
            return reason
        if shape.hidden % 256:
            return f"deepep combines 256 columns at a time: hidden {shape.hidden} does not divide"
        if shape.topk > 32:
            return f"deepep takes at most 32 experts a token, not {shape.topk}"
        if shape.experts > 2048 or shape.experts // case.ranks > 256:
            return f"deepep has counters for at most 2048 experts, 256 a rank, not {shape.experts}"
        sms = dict(case.knobs).get("num_sms", 4)
        if not isinstance(sms, int) or sms < 1:
            return f"num_sms must be a positive number, not {sms}"
        return None

    def setup(self, context: Context) -> None:
        self.context = context
        self.package = _deepep.load("ElasticBuffer", EXTENSION, _HINT, VERSION, PIN)
        self.buffers: dict[tuple[int, int, int], Any] = {}

    def moe(self, case: Case, problem: MoeProblem) -> _Exchange:
        buffer = self._buffer(problem)
        realised = {"num_max_tokens_per_rank": buffer.num_max_tokens_per_rank, **self._sms(case, buffer)}
        if case.mode == "cached":
            return Cached(buffer, problem, case.variant == "expand", realised)
        return _Exchange(buffer, problem, case.variant == "expand", realised, case.mode == "normal")

    def versions(self) -> Mapping[str, str]:
        return _deepep.versions(self.package, EXTENSION)

    def close(self) -> None:
        for buffer in self.buffers.values():
            buffer.destroy()
        self.buffers = {}

    def _buffer(self, problem: MoeProblem) -> Any:
        shape = problem.shape
        most = _deepep.capacity(shape.tokens)
        key = (most, shape.hidden, shape.topk)
        if key not in self.buffers:
            # Sized for bf16, in which fp8 rows with their scales fit.
            self.buffers[key] = self.package.ElasticBuffer(
                self.context.group,
                num_max_tokens_per_rank=most,
                hidden=shape.hidden,
                num_topk=shape.topk,
                allow_hybrid_mode=False,
                explicitly_destroy=True,
            )
        return self.buffers[key]

    def _sms(self, case: Case, buffer: Any) -> Mapping[str, int | float | str]:
        """num_sms as asked, else by the library's rule, with what the rule was told of the links."""
        assert isinstance(case.shape, Moe)
        asked = dict(case.knobs).get("num_sms")
        if asked is not None:
            return {"num_sms": asked}
        shape = case.shape
        found = self.package.utils.envs.get_nvlink_gbs()
        assumed = 0.0 if found else NVLINK_GBS.get(self._capability(), 0.0)
        sms = buffer.get_theoretical_num_sms(shape.experts, shape.topk, nvlink_gbs=assumed)
        return {"num_sms": sms, **({"assumed_nvlink_gbs": assumed} if assumed else {})}

    def _capability(self) -> int:
        if self.context.device.kind == "cpu":
            return 0
        import torch

        return torch.cuda.get_device_capability(self.context.device.torch_device)[0]


class State(NamedTuple):
    """rows bf16 [n, H], or (fp8, scales [n, H/128]); of the n rows the handle says which are valid.

    topk_idx   plain: [n, K] local ids, else None
    weights    plain: [n, K], expand: [n]
    """

    rows: Any
    topk_idx: torch.Tensor | None
    weights: torch.Tensor
    handle: Any


class _Exchange:
    """Routing known only as expert ids.

    wait   whether dispatch waits for the counts, so that the received tensors have their exact size
    """

    wire: Mapping[str, int] = {}

    def __init__(
        self,
        buffer: Any,
        problem: MoeProblem,
        expand: bool,
        realised: dict[str, int | float | str],
        wait: bool = True,
    ):
        self.buffer, self.problem, self.expand, self.wait = buffer, problem, expand, wait
        self.realised: dict[str, int | float | str] = realised
        self.sms = realised["num_sms"]
        self.fp8 = problem.shape.dtype == "fp8"

    def input(self) -> Any:
        x = self.problem.x
        return self.problem.quantise(x) if self.fp8 else x

    def dispatch(self) -> State:
        problem = self.problem
        rows, topk_idx, weights, handle, _ = self.buffer.dispatch(
            self.input(),
            topk_idx=problem.topk_idx,
            topk_weights=problem.topk_weights,
            num_experts=problem.shape.experts,
            expert_alignment=1,
            num_sms=self.sms,
            do_cpu_sync=self.wait,
            do_expand=self.expand,
        )
        return State(rows, topk_idx, weights, handle)

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self.buffer.combine(staged, state.handle, num_sms=self.sms)[0]

    def received(self, state: State) -> Received:
        self.realised["num_sms"] = state.handle.num_sms  # what dispatch used
        counts = self._counts(state)
        rows, scales = state.rows if self.fp8 else (state.rows, None)
        if self.expand:
            experts = _deepep.by_expert(counts, self.problem.device)
            weights, sources = state.weights[:, None], self._expanded_sources(state, sum(counts))
        else:
            assert state.topk_idx is not None
            count = self._received(state)
            experts, weights = state.topk_idx[:count], state.weights
            sources = self._global_ids(state.handle.recv_src_metadata[:count, 0])
        n = len(experts)
        return Received(
            rows[:n], experts, None if scales is None else scales[:n], weights[:n], counts, sources
        )

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        received = state.rows[0] if self.fp8 else state.rows
        return rows if len(rows) == len(received) else _deepep.padded(rows, len(received))

    def outputs(self) -> Sequence[torch.Tensor]:
        return ()

    def close(self) -> None:
        return None

    def _received(self, state: State) -> int:
        """Rows of plain layout that are valid: the last of the inclusive sums over source ranks."""
        return int(state.handle.psum_num_recv_tokens_per_scaleup_rank[-1])

    def _counts(self, state: State) -> list[int]:
        """Rows per local expert, from inclusive sums (alignment 1)."""
        sums = state.handle.psum_num_recv_tokens_per_expert.tolist()
        return [after - before for before, after in zip([0, *sums], sums, strict=False)]

    def _global_ids(self, sources: torch.Tensor) -> torch.Tensor:
        """The library numbers tokens rank * capacity + index; we by the case's tokens."""
        most = self.buffer.num_max_tokens_per_rank
        sources = sources.long()
        return sources // most * self.problem.capacity + sources % most

    def _expanded_sources(self, state: State, total: int) -> torch.Tensor:
        """[total] global ids: metadata has a line per token: its source, ..., the slots of its rows or -1."""
        metadata = state.handle.recv_src_metadata[: self._received(state)].long()
        slots = metadata[:, 2:]
        ids = self._global_ids(metadata[:, :1]).expand_as(slots)
        out = ids.new_full((total,), -1)
        out[slots[slots >= 0]] = ids[slots >= 0]
        return out


class Cached(_Exchange):
    """With the handle of one uncached call at opening, which fixes the place of every row; so its weights,
    which a cached call is not given, are those of every later call."""

    def __init__(self, buffer: Any, problem: MoeProblem, expand: bool, realised: dict[str, Any]):
        super().__init__(buffer, problem, expand, realised)
        self.known = super().dispatch()

    def dispatch(self) -> State:
        rows, topk_idx, _, handle, _ = self.buffer.dispatch(
            self.input(), num_sms=self.sms, handle=self.known.handle, do_expand=self.expand
        )
        return State(rows, topk_idx, self.known.weights, handle)
