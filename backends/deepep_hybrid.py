"""DeepEP's hybrid-ep branch, `deep_ep.HybridEPBuffer`, on one NVLink node. Its package is called deep_ep too:
it never shares a process with DeepEP main.

Receive layouts
  plain    one row per token and destination rank, with a bool map of the token's local experts
  permute  one row per token and local expert, grouped by expert, made by a permute kernel after the exchange

What is inside the timed windows
  normal       dispatch: quantisation where fp8 is asked, the bool routing map [T, E] and its all-gather
               (NCCL), scan, host wait for the counts, rows with their weights (as [T, E] probabilities), copy
               or permute into new tensors. combine: copy or unpermute into the peers' view, sum over ranks.
  cached       dispatch: quantisation, rows, copy or permute; map, scan and counts of an earlier call.
  low-latency  permute only, `non_blocking=True`: as normal without the host wait, worst-case row count.

Casts, from hybrid_ep_backend.cuh (`combine`) and permute.cu (`unpermute_kernel`): the bf16 rows of a token's
ranks are added in float32 and cast once; unpermute before it adds a rank's experts in float32 and casts: so
permute has partial sums by rank.

Limits. The routing map is all-gathered at its own size, so every rank must have the same number of tokens, at
least one; the last chunk of 64 tokens is loaded by TMA, which wants (T mod 64) * ranks to divide by 4.

Lifetimes. A buffer per (capacity, hidden, local experts, dtype, SMs), kept until the backend closes; it has
no destroy. Kernels are compiled at run time, by every process for itself, for the capacity too: one class.
Nothing may be poisoned: results are copies, the buffers hold protocol state.
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

PIN = "94a9f8f6b146"
VERSION = "1.2.1"
EXTENSION = "hybrid_ep_cpp"
CHUNK = 64  # tokens per dispatch chunk, the library's default

_HINT = "`cx prepare --backend deepep_hybrid` builds DeepEP's hybrid-ep branch"
_PERMUTE: dict[str, Any] = {
    "layout": "token-expert",
    "combine": "expert-sum",
    "casts": "rank-partials",
}
_SUM = "float32 sum over ranks, one cast to bf16"
_UNPERMUTE = f"float32 sum over local experts and cast, {_SUM}"

FACTS = Facts(
    name="deepep_hybrid",
    title="DeepEP hybrid-ep HybridEPBuffer",
    source=Source(
        "git",
        "https://github.com/deepseek-ai/DeepEP",
        PIN,
        "head of the branch hybrid-ep; it has no releases",
    ),
    recipe=_deepep.HYBRID,
    devices=("cuda",),
    variants=(
        Variant(
            "plain",
            "normal",
            ("bf16", "fp8"),
            {
                "dispatch": "quantise (fp8), routing map and all-gather, scan, host wait, rows, copy out",
                "combine": f"copy in, {_SUM}",
            },
        ),
        Variant(
            "plain",
            "cached",
            ("bf16", "fp8"),
            {"dispatch": "quantise (fp8), rows, copy out", "combine": f"copy in, {_SUM}"},
            graph_safe=True,
        ),
        Variant(
            "permute",
            "normal",
            ("bf16", "fp8"),
            {
                "dispatch": "quantise (fp8), routing map and all-gather, scan, host wait, rows, permute",
                "combine": _UNPERMUTE,
            },
            **_PERMUTE,
        ),
        Variant(
            "permute",
            "cached",
            ("bf16", "fp8"),
            {"dispatch": "quantise (fp8), rows, permute", "combine": _UNPERMUTE},
            graph_safe=True,
            **_PERMUTE,
        ),
        Variant(
            "permute",
            "low-latency",
            ("bf16", "fp8"),
            {
                "dispatch": "quantise (fp8), routing map and all-gather, scan, rows, permute; no host wait",
                "combine": _UNPERMUTE,
            },
            graph_safe=True,
            **_PERMUTE,
        ),
    ),
    knobs=("num_sms_dispatch_api", "num_sms_combine_api"),
    validated=("cuda",),
)


class Backend(MoeOnly):
    facts = FACTS

    def limit(self, case: Case, shape: Moe) -> str | None:
        return _deepep.one_node(case) or _kernel_limit(case, shape)

    def setup(self, context: Context) -> None:
        self.context = context
        self.package = _deepep.load("HybridEPBuffer", EXTENSION, _HINT, VERSION, PIN)
        self.buffers: dict[Any, Any] = {}

    def moe(self, case: Case, problem: MoeProblem) -> Plain | Permute:
        buffer = self._buffer(case, problem)
        if case.variant == "plain":
            return (CachedPlain if case.mode == "cached" else Plain)(buffer, problem)
        if case.mode == "cached":
            return CachedPermute(buffer, problem)
        return Permute(buffer, problem, wait=case.mode == "normal")

    def versions(self) -> Mapping[str, str]:
        return _deepep.versions(self.package, EXTENSION)

    def close(self) -> None:
        self.buffers.clear()  # the last references: their destructors free what peers have mapped

    def _buffer(self, case: Case, problem: MoeProblem) -> Any:
        shape, knobs = problem.shape, dict(case.knobs)
        most, fp8 = _deepep.capacity(shape.tokens), shape.dtype == "fp8"
        key = (most, shape.hidden, problem.local_experts, fp8, case.knobs)
        if key not in self.buffers:
            self.buffers[key] = self.package.HybridEPBuffer(
                self.context.group,
                hidden_dim=shape.hidden,
                max_num_of_tokens_per_rank=most,
                num_local_experts=problem.local_experts,
                use_fp8=fp8,
                num_sms_dispatch_api=knobs.get("num_sms_dispatch_api"),
                num_sms_combine_api=knobs.get("num_sms_combine_api"),
            )
        return self.buffers[key]


def _kernel_limit(case: Case, shape: Moe) -> str | None:
    divisor = 512 if shape.dtype == "fp8" else 16
    if shape.hidden % divisor:
        return (
            f"deepep_hybrid {shape.dtype} needs a hidden size that divides by {divisor}, not {shape.hidden}"
        )
    if shape.experts % 4:
        return f"deepep_hybrid needs a number of experts that divides by 4, not {shape.experts}"
    if shape.routing.spread != "even":
        return f"deepep_hybrid needs equal tokens on every rank, not {shape.routing.spread}"
    if shape.tokens < 1:
        return "deepep_hybrid needs a token on every rank"
    if shape.tokens % CHUNK * case.ranks % 4:
        return (
            f"deepep_hybrid loads the last {shape.tokens % CHUNK} of {shape.tokens} tokens for {case.ranks} "
            "ranks at once, which must divide by 4"
        )
    return None


class State(NamedTuple):
    """rows    [n, H] bf16, or fp8 as uint8 bits
    probs   plain: [n, E], permute: [n] float32
    scales  [n, H/128] float32 with fp8
    """

    rows: torch.Tensor
    probs: torch.Tensor
    scales: torch.Tensor | None
    handle: tuple[Any, ...]


class _Exchange:
    wire: Mapping[str, int] = {}

    def __init__(self, buffer: Any, problem: MoeProblem):
        self.buffer: Any = buffer
        self.problem = problem
        self.fp8 = problem.shape.dtype == "fp8"
        applied = buffer.configurer.buffer_config
        self.realised: Mapping[str, int | float | str] = {
            "num_sms_dispatch_api": applied.num_of_blocks_dispatch_api,
            "num_sms_combine_api": applied.num_of_blocks_combine_api,
            "max_num_of_tokens_per_rank": applied.max_num_of_tokens_per_rank,
        }

    def input(self) -> dict[str, Any]:
        """`hidden`, which the library wants as bits where it is fp8, and `scaling_factor`."""
        import torch

        if not self.fp8:
            return {"hidden": self.problem.x}
        values, scales = self.problem.quantise(self.problem.x)
        return {"hidden": values.view(torch.uint8), "scaling_factor": scales}

    def routing(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "topk_idx": problem.topk_idx,
            "topk_weights": problem.topk_weights,
            "num_of_experts": problem.shape.experts,
        }

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) == len(state.rows) else _deepep.padded(rows, len(state.rows))

    def rows(self, state: State) -> torch.Tensor:
        return state.rows.view(self.problem.format.dtype) if self.fp8 else state.rows

    def outputs(self) -> Sequence[torch.Tensor]:
        return ()

    def close(self) -> None:
        self.buffer = None  # it goes with its last reference


class Plain(_Exchange):
    def dispatch(self) -> State:
        return State(*self.buffer.dispatch(**self.input(), **self.routing()))

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self.buffer.combine(staged, handle=state.handle)[0]

    def received(self, state: State) -> Received:
        """The local experts from the bool map [rows of all ranks, L] in the handle, the weights from this
        rank's columns of the probabilities."""
        import torch

        problem = self.problem
        local = state.handle[4][: len(state.rows)]
        picks = min(problem.shape.topk, problem.local_experts)
        chosen, experts = local.to(torch.int32).sort(dim=1, descending=True, stable=True)
        chosen, experts = chosen[:, :picks] > 0, experts[:, :picks]
        probs = state.probs[:, problem.first_local_expert :][:, : problem.local_experts]
        return Received(
            self.rows(state),
            torch.where(chosen, experts, -1),
            state.scales,
            torch.where(chosen, probs.gather(1, experts), 0.0),
            local.sum(0).tolist(),
        )


class CachedPlain(Plain):
    """With the handle of one uncached call at opening, which fixes the place of every row."""

    def __init__(self, buffer: Any, problem: MoeProblem):
        super().__init__(buffer, problem)
        self.known = super().dispatch()
        self.count = len(self.known.rows)

    def dispatch(self) -> State:
        rows, _, scales, _ = self.buffer.dispatch(
            **self.input(),
            num_of_experts=self.problem.shape.experts,
            handle=self.known.handle,
            num_dispatched_tokens=self.count,  # given, it does not wait for the host copy of this number
        )
        return State(rows, self.known.probs, scales, self.known.handle)


class Permute(_Exchange):
    """wait   whether dispatch waits for the counts, so that the received tensors have their exact size"""

    def __init__(self, buffer: Any, problem: MoeProblem, wait: bool = True):
        super().__init__(buffer, problem)
        self.sizes: dict[str, Any] = {}
        if not wait:
            picks = min(problem.shape.topk, problem.local_experts)
            worst = problem.size * problem.capacity * picks
            self.sizes = {"num_permuted_tokens": worst, "non_blocking": True}

    def dispatch(self) -> State:
        rows, probs, scales, _, handle = self.buffer.dispatch_with_permute(
            **self.input(), **self.routing(), **self.sizes
        )
        return State(rows, probs, scales, handle)

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self.buffer.combine_with_unpermute(hidden=staged, handle=state.handle)[0]

    def received(self, state: State) -> Received:
        counts = state.handle[7].tolist()  # rows per local expert, without padding
        n = sum(counts)
        return Received(
            self.rows(state)[:n],
            _deepep.by_expert(counts, self.problem.device),
            None if state.scales is None else state.scales[:n],
            state.probs[:n, None],
            counts,
        )


class CachedPermute(Permute):
    """As CachedPlain."""

    def __init__(self, buffer: Any, problem: MoeProblem):
        super().__init__(buffer, problem)
        self.known = super().dispatch()
        self.sizes = {"num_permuted_tokens": len(self.known.rows)}

    def dispatch(self) -> State:
        rows, _, scales, _, _ = self.buffer.dispatch_with_permute(
            **self.input(), **self.sizes, handle=self.known.handle
        )
        return State(rows, self.known.probs, scales, self.known.handle)
