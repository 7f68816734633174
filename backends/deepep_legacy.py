"""DeepEP's first interface, `deep_ep.Buffer`, as DeepEP main still carries it, on one NVLink node.

The exchanges, their variants and windows: _deepep_buffer.py.

Casts, from the kernels: intranode.cu `combine` adds the bf16 rows of a token's ranks in float32 and casts
once; internode_ll.cu `combine` does so over the picks, each times its weight.

Lifetimes. One normal and one low-latency buffer a process, made at the first case that needs them and made
anew only when a case needs more bytes. Low-latency memory is NVSHMEM's, which initialises once a process at
best: it is sized for LARGEST_LL tokens from the start. Nothing the harness may poison belongs to the library:
results are new tensors, the buffers hold protocol state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..runtime.types import Case, Moe
from . import _deepep, _deepep_buffer
from ._deepep_buffer import Cached, LowLatency, Made, Normal, ll_capacity
from ._moe_only import MoeOnly
from .base import Context, Facts, Recipe, Source

if TYPE_CHECKING:
    from ..runtime.problem import MoeProblem

PIN = "dd758caf4518"
VERSION = "2.1.0"
EXTENSION = "deep_ep._C"
RANKS = (2, 4, 8)  # intranode kernels are instantiated for these
LL_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
LL_TOPK = 11
LARGEST_LL = 1024

_HINT = "`cx prepare --backend deepep_legacy` builds DeepEP main"

FACTS = Facts(
    name="deepep_legacy",
    title="DeepEP Buffer (V1 interface)",
    source=Source(
        "git",
        "https://github.com/deepseek-ai/DeepEP",
        PIN,
        "newest main with both interfaces; the V1 kernels of 1.2.1 with wider top-k and hidden sizes",
    ),
    recipe=Recipe(same_as="deepep"),
    devices=("cuda",),
    env={
        # A send queue must hold two rows more than twice the tokens; it costs nothing over NVLink.
        "NVSHMEM_QP_DEPTH": str(4 * LARGEST_LL),
        "NVSHMEM_DISABLE_NVLS": "1",
    },
    variants=_deepep_buffer.VARIANTS,
    knobs=("num_sms",),
    validated=("cuda",),
)


class Backend(MoeOnly):
    facts = FACTS

    def limit(self, case: Case, shape: Moe) -> str | None:
        if (reason := _deepep.one_node(case)) is not None:
            return reason
        if case.ranks not in RANKS:
            return f"deepep_legacy's kernels exist for 2, 4 and 8 ranks, not for {case.ranks}"
        of_mode = _ll_limits if case.variant == "ll" else _normal_limits
        return of_mode(case, shape)

    def setup(self, context: Context) -> None:
        self.context = context
        self.package = _deepep.load("ElasticBuffer", EXTENSION, _HINT, VERSION, PIN)
        self.default_sms: int = self.package.Buffer.num_sms
        self.normal = self.ll = Made()

    def moe(self, case: Case, problem: MoeProblem) -> Normal | Cached | LowLatency:
        if case.variant == "ll":
            return LowLatency(self._ll_buffer(problem), problem)
        sms = int(dict(case.knobs).get("num_sms", self.default_sms))
        self.package.Buffer.set_num_sms(sms)
        kind = Cached if case.variant == "cached" else Normal
        return kind(self._normal_buffer(problem), problem, {"num_sms": self.package.Buffer.num_sms})

    def versions(self) -> Mapping[str, str]:
        return _deepep.versions(self.package, EXTENSION)

    def close(self) -> None:
        for made in (self.normal, self.ll):
            if made.buffer is not None:
                made.buffer.destroy()
        self.normal = self.ll = Made()

    def _normal_buffer(self, problem: MoeProblem) -> Any:
        cls, ranks = self.package.Buffer, problem.size
        configs = (cls.get_dispatch_config(ranks), cls.get_combine_config(ranks))
        size = max(c.get_nvl_buffer_size_hint(2 * problem.shape.hidden, ranks) for c in configs)
        if self.normal.size < size:
            if self.normal.buffer is not None:
                self.normal.buffer.destroy()
            self.normal = Made(size, cls(self.context.group, num_nvl_bytes=size, explicitly_destroy=True))
        return self.normal.buffer

    def _ll_buffer(self, problem: MoeProblem) -> Any:
        cls, shape = self.package.Buffer, problem.shape
        size = cls.get_low_latency_rdma_size_hint(LARGEST_LL, shape.hidden, problem.size, shape.experts)
        if self.ll.size < size:
            if self.ll.buffer is not None:
                self.ll.buffer.destroy()
            buffer = cls(
                self.context.group,
                num_rdma_bytes=size,
                low_latency_mode=True,
                num_qps_per_rank=problem.local_experts,
                explicitly_destroy=True,
            )
            self.ll = Made(size, buffer, shape.experts)
        elif self.ll.experts != shape.experts:
            # The flags of another number of experts lie elsewhere in the same memory.
            self.ll.buffer.clean_low_latency_buffer(ll_capacity(shape.tokens), shape.hidden, shape.experts)
            self.ll = self.ll._replace(experts=shape.experts)
        return self.ll.buffer


def _normal_limits(case: Case, shape: Moe) -> str | None:
    if shape.hidden * (1 if shape.dtype == "fp8" else 2) % 32:
        return f"deepep_legacy moves rows in two halves of 16 bytes: hidden {shape.hidden} does not divide"
    return _deepep.kernel_limits("deepep_legacy", case, shape)


def _ll_limits(case: Case, shape: Moe) -> str | None:
    reason = _deepep.ll_kernel_limits("deepep_legacy", case, shape, LL_HIDDEN, LL_TOPK)
    if reason is not None:
        return reason
    if shape.tokens > LARGEST_LL:
        return f"deepep_legacy ll has slots for {LARGEST_LL} tokens a rank, not {shape.tokens}"
    if shape.dtype == "fp8" and shape.hidden % 512:
        return f"deepep_legacy ll quantises in blocks of 512 columns: hidden {shape.hidden} does not divide"
    return None
