"""NCCL EP, `nccl.ep` of nccl4py: expert parallelism on NCCL's device API, within one NVLink domain.

Facts that shape the adapter, read in the sources of libnccl_ep 0.1.0 (NCCL 2.30.7)
  low latency      One kernel each way, fixed capacity, no host synchronisation. The handle remembers where
                   the expert ids lie; every dispatch reads them again. Calls use two halves of one buffer in
                   turns, so dispatch and combine alternate, and a graph holds whole pairs.
  expert-major     rows are fanned out to experts on arrival; combine sends every pick's row back, and the
                   source weighs and sums in float32 with one cast.
  rank-major       one row per token and rank with its local ids and weights; the caller weighs, combine sums
                   over ranks in float32 with one cast.
  high throughput  flat layout, one row per token and rank. `update` exchanges the routing as bit maps,
                   dispatch moves rows into staging buffers and copies them out; outside of graphs it waits on
                   the host for the number of rows, in a graph it copies the worst case. combine copies the
                   rows in, sums over ranks in float32 with one cast.
  Kernels of the high-throughput mode are compiled at their first use (nvcc, tens of seconds).
  A capacity is rounded up to a multiple of 4: rows of metadata are moved in 16-byte pieces.

torch loads its own NCCL first: the newer one has to stand before it on the module path, and only one may be
mapped. Torn down in the order handle, group, communicator, by all ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.types import Case, Moe
from . import base
from ._moe_only import MoeOnly
from .base import Context, Facts, MissingLibrary, Recipe, Source, Variant

if TYPE_CHECKING:
    from ..runtime.problem import MoeProblem

PIN = "0.3.1"
OLDEST_NCCL = (2, 30)
MAPS = "/proc/self/maps"
LL_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
LL_PICKS = 9
LL_RANKS = 32
HT_TOKENS = 8192  # MAX_SUPPORTED_TOKENS_PER_RANK, a constant of the build
EXPERT_MAJOR_BYTES = 128 * 10**9

_ROWS_IN = "pick slots from the expert ids, send each row once per rank, wait"
_HT_ROWS = (
    "weights, rows into staging, wait of the host for their number, copy to the caller, ids and weights"
)
_HT_COMBINE = "copy of the expert output into staging, wait, fetch, float32 sum over ranks, one cast to bf16"

FACTS = Facts(
    name="nccl_ep",
    title="NCCL EP (nccl4py)",
    source=Source(
        "package",
        "nccl4py",
        PIN,
        "the only release line with nccl.ep: 0.4 to 0.6 came without it; it needs NCCL 2.30",
    ),
    devices=("cuda",),
    variants=(
        Variant(
            "expert-major",
            "low-latency",
            ("bf16",),
            {
                "dispatch": f"{_ROWS_IN}, fan out to experts, counts",
                "combine": "send every pick's row, wait, weighted float32 sum, one cast to bf16",
            },
            layout="token-expert",
            combine="weighted-sum",
            graph_safe=True,
        ),
        Variant(
            "rank-major",
            "low-latency",
            ("bf16",),
            {
                "dispatch": f"{_ROWS_IN}, copy out with ids and weights, counts",
                "combine": "send the rows, wait, float32 sum over ranks, one cast to bf16",
            },
            graph_safe=True,
        ),
        Variant(
            "high-throughput",
            "normal",
            ("bf16",),
            {"dispatch": f"exchange of routing bit maps, layout, {_HT_ROWS}", "combine": _HT_COMBINE},
            graph_safe=True,
        ),
        Variant(
            "high-throughput",
            "cached",
            ("bf16",),
            {"dispatch": f"{_HT_ROWS}; layout known", "combine": _HT_COMBINE},
            graph_safe=True,
        ),
    ),
    recipe=Recipe(
        packages=(
            *(f"nccl4py=={PIN}", "nvidia-nccl-cu13==2.30.7", "packaging==26.3"),
            *("cuda-core==1.2.2", "cuda-bindings==13.0.3", "cuda-pathfinder==1.9.0"),
            "backports.strenum==1.3.1; python_version < '3.11'",
        ),
        needs=("nvcc",),  # high throughput compiles its kernels at run time
        imports=("numpy",),
        prepend={"LD_LIBRARY_PATH": ("site/nvidia/nccl/lib",)},
        sets={
            "CUDA_HOME": "{cuda}",
            "NCCL_HOME": "{folder}/site/nvidia/nccl",
            "NCCL_EP_HOME": "{folder}/site/nccl/ep",
            "NCCL_EP_JIT_SOURCE_DIR": "{folder}/site/nccl/ep/include/nccl_ep",
            "NCCL_EP_JIT_BUILD_INCLUDE_DIR": "{folder}/site/nvidia/nccl/include",
            "NCCL_EP_JIT_CACHE_DIR": "{cache}",
        },
        modules=("nccl.core", "nccl.ep"),
        versions={"nccl4py": PIN},
        nccl="2.30.7",
    ),
    validated=("cuda",),
)


class Backend(MoeOnly):
    facts = FACTS

    def limit(self, case: Case, shape: Moe) -> str | None:
        if case.nodes > 1:
            return "across nodes NCCL EP needs GIN: this adapter drives one NVLink domain"
        of_mode = _low_latency_limit if case.mode == "low-latency" else _high_throughput_limit
        return of_mode(case, shape)

    def setup(self, context: Context) -> None:
        """Raises MissingLibrary without nccl.ep, with another release, or with the wrong NCCL mapped."""
        self.context, self.nccl = context, _import()
        core, ranks = self.nccl.core, context.ranks
        unique = ranks.from_zero(bytes(core.get_unique_id()) if ranks.rank == 0 else None)
        unique_id = core.UniqueId.from_bytes(unique)
        self.comm = core.Communicator.init(nranks=ranks.size, rank=ranks.rank, unique_id=unique_id)

    def moe(self, case: Case, problem: MoeProblem) -> base.Exchange:
        from ._nccl_ep_exchange import ExpertMajor, HighThroughput, RankMajor

        if case.mode != "low-latency":
            return HighThroughput(self, problem, cached=case.mode == "cached")
        return (RankMajor if case.variant == "rank-major" else ExpertMajor)(self, problem)

    def versions(self) -> Mapping[str, str]:
        found = self.nccl.get_version()
        return {
            "nccl4py": str(found.nccl4py),
            "nccl": str(found.nccl.version),
            "nccl_ep": str(found.nccl_ep.version),
            "extension": Path(str(found.nccl_ep.path)).name,
        }

    def close(self) -> None:
        self.comm.destroy()


def _import() -> Any:
    how = f"`cx prepare --backend nccl_ep` installs nccl4py=={PIN} and NCCL 2.30.7 before torch's own"
    try:
        import nccl  # pyright: ignore[reportMissingImports]
        import nccl.core  # pyright: ignore[reportMissingImports]
        import nccl.ep  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        raise MissingLibrary(f"nccl.ep cannot be imported ({error}): {how}") from error
    found = nccl.get_version()
    if str(found.nccl4py) != PIN:
        raise MissingLibrary(f"this is nccl4py {found.nccl4py}, the adapter was written for {PIN}: {how}")
    if found.nccl is None or found.nccl_ep is None:
        raise MissingLibrary(f"libnccl.so or libnccl_ep.so cannot be loaded: {how}")
    version = tuple(int(part) for part in str(found.nccl.version).split(".")[:2])
    if version < OLDEST_NCCL:
        raise MissingLibrary(f"NCCL {found.nccl.version} is loaded, libnccl_ep needs 2.30: {how}")
    from ..runtime.loaded import parse_maps

    copies = [m.path for m in parse_maps(Path(MAPS).read_text()) if m.name == "nccl"]
    if len(copies) > 1:
        raise MissingLibrary(f"{len(copies)} copies of NCCL are mapped, {' and '.join(copies)}: {how}")
    return nccl


def _low_latency_limit(case: Case, shape: Moe) -> str | None:
    if shape.hidden not in LL_HIDDEN:
        return (
            f"its low-latency kernels exist for hidden {', '.join(map(str, LL_HIDDEN))}, not {shape.hidden}"
        )
    if shape.topk > LL_PICKS:
        return f"its low-latency kernels take at most {LL_PICKS} experts per token, not {shape.topk}"
    if case.ranks > LL_RANKS:
        return f"its low-latency kernels count for at most {LL_RANKS} ranks, not {case.ranks}"
    # both halves of the library's buffer, rows received, expert output staged by a check and by the chain
    need = 5 * shape.experts * shape.tokens * shape.hidden * 2
    if case.variant == "expert-major" and need > EXPERT_MAJOR_BYTES:
        return f"expert-major buffers for {shape.tokens} tokens a rank need {need / 1e9:.0f} GB"
    return None


def _high_throughput_limit(case: Case, shape: Moe) -> str | None:
    if shape.tokens > HT_TOKENS:
        return f"its high-throughput kernels are built for {HT_TOKENS} tokens a rank, not {shape.tokens}"
    if shape.hidden % 8:
        return f"hidden {shape.hidden} is no multiple of 8: rows go in 16-byte words"
    if shape.experts % 4:
        return f"high throughput needs a multiple of 4 experts in a node, not {shape.experts}"
    if shape.routing.spread == "one-empty":
        return "its high-throughput dispatch launches nothing, and fails, on a rank without tokens"
    return None
