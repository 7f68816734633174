"""MoRI-EP: AMD's expert-parallel exchange over XGMI, SDMA and RDMA.

Never yet run on its hardware by this harness: driven by what the sources of its tags say, tested against a
fake that keeps their rules (tests/mori_fake.py). Every row is labelled contract-only.

Facts that shape the adapter, from the sources of v1.2.2
  - Every receive buffer holds ranks * tokens rows; the first `total_recv` are valid, in no fixed order. No
    host synchronisation in any kernel: the normal mode too may be captured.
  - combine sets `total_recv` to zero and takes the caller's own routing, not the received one.
  - Sums are kept in float32; the V1 kernels round once more per node, where rows leave it.
  - IntraNodeLL looks at the first 8 picks of a token only, and at most 8 ranks.
  - The heap is one memory region, so the NIC may limit it: a pool says so with MORI_SHMEM_HEAP_SIZE.
  - AsyncLL is split in two phases; a plain dispatch would do half of it. It moves rows with the SDMA engines
    where the pool sets MORI_ENABLE_SDMA=1, else with compute units.

What is inside the timed windows
  dispatch  quantisation (fp8), the whole exchange: no layout call, no host synchronisation, no counts to the
            host
  combine   external: the copy of the rows into the registered buffer, the way back, the sum.
            registered: the rows were written there by the expert step; the way back and the sum
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..runtime.types import Case, Moe
from . import _mori_versions as versions
from ._moe_only import MoeOnly
from .base import Context, Facts, MissingLibrary, Recipe, Source, Variant

if TYPE_CHECKING:
    from ..runtime.problem import MoeProblem
    from ._mori_exchange import Exchange, Kernel

GPUS_PER_NODE = 8  # MAX_GPUS_PER_NODE of the kernels
WAVEFRONT = 64  # the kernels give each pick of a token a lane of one wavefront
LL_PICKS = 8

_DISPATCH = "quantise (fp8), send every row to its ranks, wait for the rows of all ranks; no host sync"
_COMBINE = "the way back, float32 sum over ranks, one cast to bf16"
_EXTERNAL = f"copy of the expert output into the registered buffer, {_COMBINE}"
_BY_NODE = (
    "copy of the expert output, float32 sum and cast within each node, RDMA, float32 sum over nodes, cast"
)


def _variant(name: str, mode: str, combine: str, casts: Any = "final") -> Variant:
    window = {"dispatch": _DISPATCH, "combine": combine}
    return Variant(name, mode, ("bf16", "fp8"), window, casts=casts, graph_safe=True)


FACTS = Facts(
    name="mori",
    title="MoRI-EP (AMD)",
    source=Source(
        "git",
        "https://github.com/ROCm/mori",
        "v1.2.2",
        "the newest tag; IntraNodeLL came with v1.2.0, and tags before v1.1.1 do not tell what they launched",
    ),
    devices=("hip",),
    variants=(
        _variant("intranode", "normal", _EXTERNAL),
        _variant("intranode-registered", "normal", _COMBINE),
        _variant("internode-v1", "normal", _BY_NODE, "node-partials"),
        _variant("intranode-ll", "low-latency", _EXTERNAL),
        _variant("intranode-ll-registered", "low-latency", _COMBINE),
        _variant("async-ll", "low-latency", f"both phases: {_EXTERNAL}"),
        _variant("internode-v1-ll", "low-latency", _BY_NODE, "node-partials"),
    ),
    # MANUAL: with AUTO, what a call asks for is ignored without a word.
    env={"MORI_EP_LAUNCH_CONFIG_MODE": "MANUAL"},
    index_dtype="int32",
    knobs=("block_num", "rdma_block_num", "warps"),
    recipe=Recipe(
        git="https://github.com/ROCm/mori",
        submodules=("3rdparty/msgpack-c", "3rdparty/spdlog"),
        isolated=True,
        needs=("git", "cmake", "hipcc"),
        build={"MORI_GPU_ARCHS": "{arch}"},
        modules=("mori", "mori.ops"),
    ),
    validated=(),
)


def _kernels() -> Mapping[str, Kernel]:
    """Variant -> kernel type by name (its number changes between tags) and launch: blocks, blocks for RDMA,
    wavefronts a block, as engines (intranode) and MoRI's own tests (the others) launch them."""
    from ._mori_exchange import Kernel

    return {
        "intranode": Kernel("IntraNode", 80, 0, 16),
        "intranode-registered": Kernel("IntraNode", 80, 0, 16, registered=True),
        "internode-v1": Kernel("InterNodeV1", 96, 64, 8),
        "intranode-ll": Kernel("IntraNodeLL", 80, 0, 16),
        "intranode-ll-registered": Kernel("IntraNodeLL", 80, 0, 16, registered=True),
        "async-ll": Kernel("AsyncLL", 64, 0, 8),
        "internode-v1-ll": Kernel("InterNodeV1LL", 256, 128, 8),
    }


class Backend(MoeOnly):
    facts = FACTS

    def limit(self, case: Case, shape: Moe) -> str | None:
        """What the kernel of this variant cannot do, in one sentence."""
        name, per_node = case.variant, case.ranks // case.nodes
        if name.startswith("intranode") and case.nodes > 1:
            return f"mori {name} works within one node; {case.nodes} were asked for"
        if name.startswith("internode") and case.nodes < 2:
            return f"mori {name} is for two nodes or more; intranode is the kernel for one"
        if per_node > GPUS_PER_NODE:
            return f"mori has room for {GPUS_PER_NODE} ranks a node; {per_node} were asked for"
        if per_node & (per_node - 1):
            return f"mori needs a power of two of ranks a node; {per_node} were asked for"
        if shape.topk >= WAVEFRONT:
            return f"mori takes fewer than {WAVEFRONT} picks a token; top-k is {shape.topk}"
        if name.startswith("intranode-ll") and shape.topk > LL_PICKS:
            return f"mori IntraNodeLL looks at {LL_PICKS} picks of a token only; top-k is {shape.topk}"
        if shape.tokens < 1:
            return "mori needs room for one token at least"
        return None

    def setup(self, context: Context) -> None:
        """Environment first (`facts.env` and the pool's, set before this process started), then the import,
        then the group under the one name that MoRI's start-up looks for."""
        try:
            import mori  # pyright: ignore[reportMissingImports]
            import mori.ops  # pyright: ignore[reportMissingImports]
            import mori.shmem  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            source = self.facts.source
            how = f"build {source.name} at {source.pin}"
            raise MissingLibrary(f"mori cannot be imported ({error}): {how}") from error
        from torch.distributed.distributed_c10d import _register_process_group

        self.context, self.mori = context, mori
        self.signatures = versions.identify(mori.ops, mori.shmem)
        _register_process_group("default", context.group)  # pyright: ignore[reportArgumentType]
        status = mori.shmem.shmem_torch_process_group_init(group_name="default")
        if status != 0:
            raise RuntimeError(f"shmem_torch_process_group_init returned {status}")

    def moe(self, case: Case, problem: MoeProblem) -> Exchange:
        from ._mori_exchange import Exchange

        kernel = _kernels()[case.variant].asked(dict(case.knobs))
        return Exchange(self.mori, self.context, problem, kernel)

    def versions(self) -> Mapping[str, str]:
        told = vars(self.mori).get("__version__", "unknown")  # tags before v1.2.0 have none
        return {"mori": str(told), "mori signatures": self.signatures}

    def close(self) -> None:
        """After every exchange is closed: MoRI aborts the process when an operator outlives its heap. Peers
        may still read ours, so all wait first. A crash here is recorded apart from the results."""
        self.context.device.synchronize()
        self.context.ranks.barrier()
        self.mori.shmem.shmem_finalize()
