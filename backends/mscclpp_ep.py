"""MSCCL++ EP, `mscclpp.ep.MoECommunicator` of the branch feature/ep, within one CUDA-IPC domain.

Facts that shape the adapter, read in the kernels of 3d02152b
  LATENCY     One kernel each way, fixed capacity, no host synchronisation. A token goes once to each
              rank, and is fanned out to experts on arrival. fp8 is quantised inside dispatch.
              dispatch and combine go in turns: a second dispatch could overwrite rows still being fanned out.
              A call is numbered on the host, and the number is frozen in a graph: with one turn in a graph a
              replay takes the flags of the replay before for its own; with two or more it does not.
  expert-major         combine weighs and sums a rank's picks in float32, casts that partial sum to bf16 and
                       sends it; the source adds the partial sums in float32 and casts again.
  expert-major-direct  combine sends the expert outputs as they are; the source weighs and sums in float32.
  rank-major           with RANK_LOCAL_REDUCE combine takes its rows where dispatch put the tokens: a chain
                       gives back what came.
  rank-major-direct    combine fetches a row for every pick from a buffer of its own. What dispatch delivers
                       is one row per token and rank; `received` repeats it for each of its local experts.
  THROUGHPUT  one row per token and rank in a receive pool; combine copies the staged rows into that pool,
              sums in float32 and casts once. So what came can be looked at before combine only: no check of a
              replayed graph is possible, although cached routing can be captured.
  throughput-in-place  the experts write into the pool: no copy, and a chain gives back what came.
  The destructor of a communicator is collective: `close` drops all views of its memory on all ranks at once.
  A bootstrap is used for one communicator only: see _mscclpp_exchange._Exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..runtime.types import Case, Moe
from . import base
from ._moe_only import MoeOnly
from .base import Context, Facts, MissingLibrary, Recipe, Source, Variant

if TYPE_CHECKING:
    from ..runtime.problem import MoeProblem

PIN = "3d02152bce741e0fc06ca79b15b6ec1e726b7912"
LATENCY_HIDDEN = (4096, 4352, 6656, 7168, 8192, 8704, 9216)  # of both kernels; dispatch alone has 2048 too
LATENCY_PICKS = 9  # CombineMaxNTopk; dispatch would take 32
LATENCY_BLOCKS = 130
CONTROL_BLOCKS = 2
POOL_ROWS, POOL_ROW_BYTES = 65536, 16384
POOL_RANKS = (2, 4, 8, 16)
COUNTING_THREADS = 128  # one for each local expert
EXPERT_MAJOR_BYTES = 128 * 10**9

_FAN_OUT = "pick slots, quantise (fp8), send each row once per rank, wait, fan out to experts, counts"
_BY_RANK = "write each row once per rank with its ids and weights, wait, counts"
_LOCAL = "weigh and sum each rank's picks, one cast to bf16, send, wait, float32 sum over ranks, one cast"
_DIRECT = "send every pick's row, wait, weighted float32 sum, one cast"
_THROUGHPUT = {
    "normal": "layout, exchange of counts, wait of the host for them, host all-gather, rows",
    "cached": "publish the known prefix, rows; layout and metadata known",
}
_IN_POOL = "wait, fetch, float32 sum over ranks, one cast; weights too"
_POOL = "copy of the staged rows into the pool, wait, fetch, float32 sum over ranks, one cast; weights too"


def _latency(name: str, there: str, back: str, dtypes: tuple[str, ...], **model: Any) -> Variant:
    window = {"dispatch": there, "combine": back}
    return Variant(name, "low-latency", dtypes, window, **{"graph_safe": True, **model})


def _throughput(name: str, mode: str, back: str, **model: Any) -> Variant:
    return Variant(name, mode, ("bf16",), {"dispatch": _THROUGHPUT[mode], "combine": back}, **model)


FACTS = Facts(
    name="mscclpp_ep",
    title="MSCCL++ EP (MoECommunicator)",
    source=Source(
        "git",
        "https://github.com/microsoft/mscclpp",
        PIN,
        "the newest commit of feature/ep, which replaces the DeepEP-shaped mscclpp.ext.ep of PR 796",
    ),
    # On one node, where this is driven, it needs neither verbs nor GDRCopy.
    recipe=Recipe(
        git="https://github.com/microsoft/mscclpp",
        packages=(
            *("blake3==1.0.11", "pybind11==3.1.0", "sortedcontainers==2.4.0"),
            *("cupy-cuda{cuda_major}x==14.2.0", "cuda-pathfinder==1.9.0"),
        ),
        isolated=True,
        needs=("git", "nvcc"),
        headers=("cuda_runtime.h", "nvml.h", "numa.h"),
        libraries=("cuda", "nvidia-ml", "numa"),
        imports=("numpy",),
        build={
            "CMAKE_ARGS": "-DMSCCLPP_BYPASS_GPU_CHECK=ON -DMSCCLPP_USE_CUDA=ON -DMSCCLPP_GPU_ARCHS={sm} "
            "-DMSCCLPP_USE_IB=OFF -DMSCCLPP_USE_GDRCOPY=OFF -DMSCCLPP_BUILD_EXT_NCCL=OFF"
        },
        sets={"CUDA_HOME": "{cuda}"},
        modules=("mscclpp", "mscclpp.ep", "mscclpp.mscclpp_ep_cpp"),
        versions={"mscclpp": f"g{PIN[:7]}"},
    ),
    devices=("cuda",),
    variants=(
        _latency(
            "expert-major",
            _FAN_OUT,
            _LOCAL,
            ("bf16", "fp8"),
            layout="token-expert",
            combine="weighted-sum",
            casts="rank-partials",
        ),
        _latency(
            "expert-major-direct",
            _FAN_OUT,
            _DIRECT,
            ("bf16", "fp8"),
            layout="token-expert",
            combine="weighted-sum",
        ),
        _latency(
            "rank-major",
            _BY_RANK,
            "wait, fetch each rank's row, float32 sum, one cast",
            ("bf16",),
            in_place=True,
        ),
        _latency(
            "rank-major-direct",
            _BY_RANK,
            "wait, fetch every pick's row, float32 sum, one cast",
            ("bf16",),
            layout="token-expert",
            combine="expert-sum",
        ),
        _throughput("throughput", "normal", _POOL),
        _throughput("throughput", "cached", _POOL),
        _throughput("throughput-in-place", "normal", _IN_POOL, in_place=True),
        _throughput("throughput-in-place", "cached", _IN_POOL, in_place=True, graph_safe=True),
    ),
    env={"MSCCLPP_FORCE_DISABLE_NVLS": "1"},
    knobs=("num_blocks",),
    validated=("cuda",),
)


class Backend(MoeOnly):
    facts = FACTS

    def limit(self, case: Case, shape: Moe) -> str | None:
        if case.nodes > 1:
            return "mscclpp_ep needs all ranks in one CUDA-IPC domain"
        of_mode = _latency_limit if case.mode == "low-latency" else _throughput_limit
        return of_mode(case, shape)

    def setup(self, context: Context) -> None:
        """Raises MissingLibrary without mscclpp.ep, with the older line, or with another commit."""
        self.context, self.mscclpp = context, _import()
        self.ep = self.mscclpp.ep

    def moe(self, case: Case, problem: MoeProblem) -> base.Exchange:
        from . import _mscclpp_exchange as exchanges

        kinds = {
            "expert-major": exchanges.ExpertMajor,
            "expert-major-direct": exchanges.ExpertMajor,
            "rank-major": exchanges.RankMajor,
            "rank-major-direct": exchanges.RankMajorDirect,
            "throughput": exchanges.Throughput,
            "throughput-in-place": exchanges.ThroughputInPlace,
        }
        return kinds[case.variant](self, case, problem)

    def versions(self) -> Mapping[str, str]:
        extension = self.mscclpp.mscclpp_ep_cpp.__file__.rsplit("/", 1)[-1]
        commit = str(self.mscclpp.version["git_commit"])
        return {"mscclpp": str(self.mscclpp.__version__), "commit": commit, "extension": extension}

    def close(self) -> None:
        """Nothing is left: every exchange has freed what it made."""


def _import() -> Any:
    how = f"`cx prepare --backend mscclpp_ep` builds {PIN[:8]} of branch feature/ep"
    try:
        import mscclpp  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingLibrary(f"mscclpp cannot be imported ({error}): {how}") from error
    try:
        import mscclpp.ep  # pyright: ignore[reportMissingImports]
        import mscclpp.mscclpp_ep_cpp  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        try:
            import mscclpp.ext.ep  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise MissingLibrary(f"mscclpp.ep cannot be imported ({error}): {how}") from error
        old = "this mscclpp has the older mscclpp.ext.ep.Buffer, another interface that is not driven here"
        raise MissingLibrary(f"{old}: {how}") from error
    found = f"{mscclpp.__version__} {mscclpp.version['git_commit']}"
    if PIN[:8] not in found:
        raise MissingLibrary(f"this is mscclpp {found}, the adapter was written for {PIN[:8]}: {how}")
    return mscclpp


def _latency_limit(case: Case, shape: Moe) -> str | None:
    if shape.hidden not in LATENCY_HIDDEN:
        return (
            f"its latency kernels exist for hidden {', '.join(map(str, LATENCY_HIDDEN))}, not {shape.hidden}"
        )
    if shape.topk > LATENCY_PICKS:
        return f"its latency combine takes at most {LATENCY_PICKS} experts per token, not {shape.topk}"
    blocks = dict(case.knobs).get("num_blocks", LATENCY_BLOCKS)
    fewest = case.ranks + CONTROL_BLOCKS
    if not (isinstance(blocks, int) and fewest <= blocks <= LATENCY_BLOCKS):
        return f"num_blocks {blocks!r} is not between {fewest} and {LATENCY_BLOCKS}"
    # receive, combine and output buffer of the library, expert output staged by a check and by the chain
    need = 5 * shape.experts * shape.tokens * shape.hidden * 2
    if case.variant.startswith("expert-major") and need > EXPERT_MAJOR_BYTES:
        return f"expert-major buffers for {shape.tokens} tokens a rank need {need / 1e9:.0f} GB"
    return None


def _throughput_limit(case: Case, shape: Moe) -> str | None:
    if case.ranks not in POOL_RANKS:
        return f"its throughput kernels exist for {', '.join(map(str, POOL_RANKS))} ranks, not {case.ranks}"
    if 2 * shape.hidden > POOL_ROW_BYTES or shape.hidden % 8:
        return f"a pool row is a multiple of 16 bytes up to {POOL_ROW_BYTES}: not hidden {shape.hidden}"
    if shape.tokens * case.ranks > POOL_ROWS:
        return f"{case.ranks} ranks with {shape.tokens} tokens may send more than the pool's {POOL_ROWS} rows"
    if shape.topk > 32 or shape.experts // case.ranks > COUNTING_THREADS:
        return f"throughput takes at most 32 experts per token and {COUNTING_THREADS} experts per rank"
    if shape.routing.spread == "one-empty":
        return "its throughput combine refuses a rank without tokens"
    blocks = dict(case.knobs).get("num_blocks", 1)
    if not (isinstance(blocks, int) and blocks > 0):
        return f"num_blocks {blocks!r} is not a positive number"
    return None
