"""FlashInfer's one-sided MoE all-to-all over NVLink peer memory: TensorRT-LLM's throughput kernels.

Facts that shape the adapter, from the sources of 0.7.2
  - dispatch writes each row, and with it every payload of its token, once into the memory of every rank that
    owns one of its experts: [R, M] slots, in no fixed order. Slots without a row get the expert id -1; the
    ids that come with a row are those of all its picks, global.
  - combine reads the rows back and adds one per rank in float32, cast once (before 0.6.16 the sums were kept
    in bf16, in pairs: refused). It multiplies by no weight.
  - dispatch and combine only go in turns. No host synchronisation in either.
  - A library that does not quantise: fp8 rows and their float32 scales travel as two payloads.
  - Workspaces are plain peer memory without multicast and live as long as the process, one per capacity:
    cases share a large one (SLOTS), and each call says how many slots it uses.

Variants
  one-sided            MoeAlltoAll, the older entry point; expert output anywhere, combine copies it
  one-sided-zero-copy  the same; the expert step has written its output into the workspace
  moe-ep               NVLinkOneSidedAlltoAll of flashinfer.moe_ep, the entry point from 0.7.1 on; copies
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..runtime.types import Case, Moe
from ._moe_only import MoeOnly
from .base import Context, Facts, MissingLibrary, Received, Recipe, Source, Variant

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem

_HINT = "`cx prepare --backend flashinfer_ep` installs it"
NEWEST = (0, 7)  # minor version: what comes later nobody has read or tried
OLDEST = (0, 6, 16)  # from here on float32 sums, and file descriptors that need no privilege to pass on
TOPK = (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22)  # SWITCH_TOP_K of the kernels
RANKS = 64  # kMaxRanks
SLOTS = 32768  # ranks * tokens of a workspace, at least: 0.9 GiB a rank for DeepSeek-V3
NO_EXPERT = -1

_DISPATCH = (
    "quantise (fp8), rows with their scales, ids and weights into the memory of their ranks, wait for all, "
    "mark the empty slots; no host sync"
)
_SUM = "rows read from all ranks, float32 sum over ranks, one cast to bf16"
_COPY = f"copy of the expert output into the workspace, {_SUM}"


def _variant(name: str, combine: str) -> Variant:
    window = {"dispatch": _DISPATCH, "combine": combine}
    return Variant(name, "low-latency", ("bf16", "fp8"), window, paired=True, graph_safe=True)


FACTS = Facts(
    name="flashinfer_ep",
    title="FlashInfer one-sided all-to-all",
    source=Source(
        "package",
        "flashinfer-python",
        "0.7.2",
        "has both entry points; from 0.6.16 on combine adds in float32 and shares memory without privileges",
    ),
    devices=("cuda",),
    variants=(
        _variant("one-sided", _COPY),
        _variant("one-sided-zero-copy", _SUM),
        _variant("moe-ep", _COPY),
    ),
    index_dtype="int32",
    # Of what the package asks for, what the modules below import: the rest is gigabytes for other kernels.
    # Those of the exchange are compiled at first use.
    recipe=Recipe(
        packages=(
            *("flashinfer-python==0.7.2", "apache-tvm-ffi==0.1.15.post2", "nvidia-ml-py==13.615.71"),
            *("packaging==26.3", "tqdm==4.70.1", "requests==2.34.2", "urllib3==2.8.0", "idna==3.20"),
            *("certifi==2026.10.18", "charset-normalizer==3.5.2"),
        ),
        imports=("numpy",),
        needs=("nvcc", "ninja"),
        sets={
            "CUDA_HOME": "{cuda}",
            "NVCC_CCBIN": "{cxx}",
            "FLASHINFER_WORKSPACE_BASE": "{cache}",
            "FLASHINFER_DISABLE_VERSION_CHECK": "1",
        },
        modules=("flashinfer.comm", "flashinfer.comm.mnnvl", "flashinfer.moe_ep"),
        versions={"flashinfer-python": "0.7.2"},
    ),
    validated=("cuda",),
)


class Backend(MoeOnly):
    facts = FACTS

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], Any] = {}

    def limit(self, case: Case, shape: Moe) -> str | None:
        if case.ranks > RANKS:
            return f"flashinfer_ep works with up to {RANKS} ranks; {case.ranks} were asked for"
        if shape.topk not in TOPK:
            return f"flashinfer_ep has no kernel for top-{shape.topk}; it has {', '.join(map(str, TOPK))}"
        return None

    def setup(self, context: Context) -> None:
        try:
            import flashinfer  # pyright: ignore[reportMissingImports]
            import flashinfer.comm  # pyright: ignore[reportMissingImports]
            import flashinfer.comm.mnnvl  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingLibrary(_missing("flashinfer", error)) from error
        _refuse(str(flashinfer.__version__))
        self.context, self.flashinfer = context, flashinfer

    def moe(self, case: Case, problem: MoeProblem) -> Exchange:
        shape = problem.shape
        newer = case.variant == "moe-ep"
        capacity = max(SLOTS // self.context.ranks.size, 1 << (problem.capacity - 1).bit_length())
        key = (newer, shape.hidden, shape.topk, shape.experts, capacity)
        if key not in self.made:
            self.made[key] = self._newer(shape, capacity) if newer else self._older(shape, capacity)
        kinds = {"one-sided": OneSided, "one-sided-zero-copy": ZeroCopy, "moe-ep": MoeEp}
        return kinds[case.variant](self.made[key], problem)

    def _older(self, shape: Moe, capacity: int) -> Any:
        ranks, comm = self.context.ranks, self.flashinfer.comm
        mapping = comm.Mapping(
            world_size=ranks.size,
            rank=ranks.rank,
            gpus_per_node=ranks.ranks_per_node,
            tp_size=ranks.size,  # experts are spread over what it calls the tensor-parallel ranks
            moe_ep_size=ranks.size,
        )
        exchange_of_handles = comm.mnnvl.TorchDistBackend(group=self.context.group)
        return comm.MoeAlltoAll(
            mapping=mapping,
            max_num_tokens=capacity,
            top_k=shape.topk,
            num_experts=shape.experts,
            hidden_size=shape.hidden,
            mnnvl_config=comm.mnnvl.MnnvlConfig(comm_backend=exchange_of_handles),
        )

    def _newer(self, shape: Moe, capacity: int) -> Any:
        """Raises RuntimeError on all ranks where NVML shows one of them no NVLink that is up."""
        moe_ep = _moe_ep()
        ranks = self.context.ranks
        bootstrap = moe_ep.BootstrapConfig(
            world_size=ranks.size, rank=ranks.rank, process_group=self.context.group
        )
        params = moe_ep.MoEEpCommParams(
            num_experts=shape.experts,
            top_k=shape.topk,
            max_tokens_per_rank=capacity,
            hidden_size=shape.hidden,
            invalid_expert_id=NO_EXPERT,
        )
        return moe_ep.NVLinkOneSidedAlltoAll(bootstrap=bootstrap, params=params)

    def versions(self) -> Mapping[str, str]:
        commit = str(self.flashinfer.__git_version__)
        return {"flashinfer": str(self.flashinfer.__version__), "flashinfer commit": commit}

    def close(self) -> None:
        """The workspaces stay with the library until the process ends; no peer may still read them then."""
        self.context.device.synchronize()
        self.context.ranks.barrier()
        self.made.clear()


def _refuse(version: str) -> None:
    """Raises MissingLibrary for a version that the adapter does not fit."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    number = tuple(map(int, found.groups())) if found else ()
    if number < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        why = f"is older than {oldest}, from which on combine adds in float32"
    elif number[:2] > NEWEST:
        why = f"is newer than {'.'.join(map(str, NEWEST))}, the last that the adapter was written for"
    else:
        return
    raise MissingLibrary(f"flashinfer {version} {why}; {FACTS.source.pin} is pinned. {_HINT}")


def _moe_ep() -> ModuleType:
    try:
        import flashinfer.moe_ep  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingLibrary(_missing("flashinfer.moe_ep", error)) from error
    return flashinfer.moe_ep


def _missing(module: str, error: ImportError) -> str:
    return f"{module} of flashinfer-python {FACTS.source.pin} cannot be imported ({error}). {_HINT}"


class State(NamedTuple):
    """Views of the workspace with a slot for every (source rank, token): [R, M, ...] or [R*M, ...].

    rows     H bf16, or H bytes that are fp8
    scales   H/128 float32, or None
    experts  K int32 global ids, -1 in empty slots
    weights  K float32
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    experts: torch.Tensor
    weights: torch.Tensor


class Exchange:
    """What the variants share: payloads, the oracle's view of the slots, staged rows."""

    realised: Mapping[str, int | float | str] = {}
    wire: Mapping[str, int] = {}

    def __init__(self, library: Any, problem: MoeProblem):
        self.library, self.problem = library, problem
        self.fp8 = problem.shape.dtype == "fp8"
        self.experts = problem.topk_idx32.contiguous()
        self.weights = problem.topk_weights.contiguous()
        self.state: State | None = None

    def values(self) -> list[torch.Tensor]:
        """The rows of this call as payloads: bf16, or fp8 (as bytes: no binding need know it) and scales."""
        import torch

        if not self.fp8:
            return [self.problem.x]
        values, scales = self.problem.quantise(self.problem.x)
        return [values.view(torch.uint8), scales]

    def dispatch(self) -> State:
        raise NotImplementedError

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def received(self, state: State) -> Received:
        import torch

        filled = self._filled(state)
        rows = _slots(state.rows)[filled]
        local = _slots(state.experts)[filled].long() - self.problem.first_local_expert
        mine = (local >= 0) & (local < self.problem.local_experts)
        return Received(
            rows.view(self.problem.format.dtype) if self.fp8 else rows,
            torch.where(mine, local, -1),
            None if state.scales is None else _slots(state.scales)[filled],
            torch.where(mine, _slots(state.weights)[filled], 0.0),
        )

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        """[R, M, H] bf16: memory of our own, so that it outlives later calls."""
        filled = self._filled(state)
        staged = rows.new_zeros(len(filled), rows.shape[1])
        staged[filled] = rows
        return staged.view(-1, self.problem.capacity, rows.shape[1])

    def outputs(self) -> Sequence[torch.Tensor]:
        """The receive slots, once a call has shown where they are. Counters and flags lie elsewhere."""
        if self.state is None:
            return ()
        rows = self.state.rows.view(self.problem.format.dtype) if self.fp8 else self.state.rows
        return [view for view in self.state._replace(rows=rows) if view is not None]

    def close(self) -> None:
        self.state = None

    @staticmethod
    def _filled(state: State) -> torch.Tensor:
        """[R*M] bool. Only what the library marked is empty: a slot it forgot to mark must be seen."""
        return (_slots(state.experts) != NO_EXPERT).any(1)


def _slots(view: torch.Tensor) -> torch.Tensor:
    """[R*M, columns] of a view [R, M, columns] or [R*M, columns]."""
    return view.view(-1, view.shape[-1])


class OneSided(Exchange):
    def dispatch(self) -> State:
        payloads = [*self.values(), self.experts, self.weights]
        views = self.library.dispatch(
            token_selected_experts=self.experts,
            input_payloads=payloads,
            runtime_max_tokens_per_rank=self.problem.capacity,
            invalid_token_expert_id=NO_EXPERT,
            expert_id_payload_index=len(payloads) - 2,
        )
        self.state = State(views[0], views[1] if self.fp8 else None, views[-2], views[-1])
        return self.state

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self._combine(staged, in_workspace=False)

    def _combine(self, payload: torch.Tensor, in_workspace: bool) -> torch.Tensor:
        return self.library.combine(
            payload=payload,
            runtime_max_tokens_per_rank=self.problem.capacity,
            payload_in_workspace=in_workspace,
        )


class ZeroCopy(OneSided):
    """The region that combine reads lies behind the receive slots: what is staged there stays until other
    rows are, over any number of dispatches. Written only after a dispatch, when no peer reads it any more."""

    region: torch.Tensor
    holds: torch.Tensor | None = None

    def stage(self, state: State, rows: torch.Tensor) -> torch.Tensor:
        staged = super().stage(state, rows)
        self._write(staged)
        return staged

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        if self.holds is not staged:  # the harness staged something else meanwhile: for a check
            self._write(staged)
        return self._combine(self.region, in_workspace=True)

    def _write(self, staged: torch.Tensor) -> None:
        self.region = self.library.get_combine_payload_tensor_in_workspace(
            runtime_max_tokens_per_rank=self.problem.capacity,
            hidden_size=staged.shape[2],
            dtype=staged.dtype,
        )
        self.region.copy_(staged)
        self.holds = staged


class MoeEp(Exchange):
    def dispatch(self) -> State:
        rows, *scales = self.values()
        result = self.library.dispatch(
            hidden_states=rows,
            topk_ids=self.experts,
            topk_weights=self.weights,
            hidden_states_scale=scales[0] if scales else None,
            max_tokens_per_rank=self.problem.capacity,
        )
        self.state = State(
            result.hidden_states, result.hidden_states_scale, result.topk_ids, result.topk_weights
        )
        return self.state

    def combine(self, state: State, staged: torch.Tensor) -> torch.Tensor:
        return self.library.combine(expert_output=staged)
