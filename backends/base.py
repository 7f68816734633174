"""The contract of a backend. Read this before writing one; CONTRIBUTING.md walks through it.

A backend file defines a class called `Backend` that satisfies `Library` (an in-process library) or `Program`
(an external benchmark). It imports without torch and without the library: vendor imports happen in `setup`.
It never sees the harness's clock: it offers operations, the harness decides what is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..runtime.types import Case, Collective, Moe

if TYPE_CHECKING:
    import torch

    from ..runtime.device import Device
    from ..runtime.problem import MoeProblem
    from ..runtime.ranks import Ranks


@dataclass(frozen=True)
class Source:
    """Where the library comes from. `pin` is a version or commit, `why` the reason for exactly that one."""

    kind: Literal["bundled", "package", "git", "image"]
    name: str
    pin: str
    why: str


@dataclass(frozen=True)
class Variant:
    """One way this library does one mode. Plain data; the defaults are the common case.

    window   component -> what its timed window contains, one sentence. Collectives have one component, the
             operation ("call"); MoE has "dispatch" and "combine".
    ops      collectives only: the operations offered
    layout   MoE: what is received: "token-rank" (one row per token and destination rank, with its local
             experts) or "token-expert" (one row per token and local expert)
    combine  MoE: what an identity round trip returns for row x of token t (w: weights, valid picks only):
             "rank-sum" x * number of distinct ranks, "expert-sum" x * number of experts, "weighted-sum"
             x * sum(w). For the first two the harness multiplies by w in the expert step, outside the window.
    casts    MoE: where combine rounds to bf16: "final" (float32 sums, one cast), "rank-partials" (each rank's
             partial sum is cast, then summed in float32 and cast) or "node-partials" (the same by node)
    paired   dispatch and combine can only be called in turns; they are timed by marks inside the pair
    graph_safe  may be captured in a CUDA/HIP graph
    """

    name: str
    mode: str
    dtypes: tuple[str, ...]
    window: Mapping[str, str]
    family: str = "moe"
    ops: tuple[str, ...] = ()
    layout: Literal["token-rank", "token-expert"] = "token-rank"
    combine: Literal["rank-sum", "expert-sum", "weighted-sum"] = "rank-sum"
    casts: Literal["final", "rank-partials", "node-partials"] = "final"
    paired: bool = False
    graph_safe: bool = False


@dataclass(frozen=True)
class Facts:
    """What a backend declares about itself.

    devices        "cpu", "cuda", "hip": where it runs
    env            set in the rank processes before anything is imported
    index_dtype    of the expert ids it takes
    knobs          settings a case may request; anything else is refused
    validated      where this code has run and passed: "hardware", or "contract-only" (never yet on its
                   hardware: shown wherever the backend is shown)
    hidden         True: left out of lists and default selections (the fake)
    """

    name: str
    title: str
    source: Source
    variants: tuple[Variant, ...]
    devices: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    index_dtype: Literal["int64", "int32"] = "int64"
    knobs: tuple[str, ...] = ()
    validated: Literal["hardware", "contract-only"] = "contract-only"
    hidden: bool = False

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(v.family for v in self.variants))

    def variant(self, case: Case) -> Variant | None:
        """The variant that a case names, or None."""
        for v in self.variants:
            if (v.family, v.mode, v.name) == (case.family, case.mode, case.variant):
                return v
        return None


@dataclass(frozen=True)
class Context:
    """What a library gets at set-up. `ranks` is the control plane (rank, size, local_rank, nodes, barrier,
    gather); `group` the torch process group (gloo on CPU, NCCL or RCCL on GPUs) or None for the fake."""

    ranks: Ranks
    device: Device
    group: Any = None


@dataclass
class Received:
    """What dispatch delivered to this rank, for the oracle: N valid rows, in the library's own order.

    rows       [N, H] bf16, or float8 when scales are given
    scales     [N, H/128] float32, or None
    experts    [N, K'] int64 local expert ids, -1 where there is none (K' = 1 for "token-expert")
    weights    [N, K'] float32, or None when the library does not transport them
    counts     rows per local expert as the library reports them, or None
    sources    [N] int64 global token ids (source rank * T + token) as the library reports them, or None
    """

    rows: torch.Tensor
    experts: torch.Tensor
    scales: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    counts: Sequence[int] | None = None
    sources: torch.Tensor | None = None


class CollectiveCall(Protocol):
    """One collective, ready to run. The backend allocates, the harness fills `input` and reads `output`
    (overlapping memory when in place). Element counts: `runtime.bandwidth.collective_counts`."""

    input: torch.Tensor
    output: torch.Tensor
    realised: Mapping[str, int | float | str]

    def run(self) -> None: ...

    def close(self) -> None: ...


class Exchange(Protocol):
    """One MoE exchange, ready to run over `problem.x` (the harness rewrites its content between calls).

    realised   the knobs as the library applied them
    wire       bytes this rank really puts on the wire per call, padding and metadata included, by component,
               where the backend knows them
    """

    realised: Mapping[str, int | float | str]
    wire: Mapping[str, int]

    def dispatch(self) -> Any:
        """Send the rows. Returns the state that the other calls take. Timed."""
        ...

    def combine(self, state: Any, staged: Any) -> torch.Tensor:
        """Bring the staged rows back and reduce them: [T, H] bf16. Timed."""
        ...

    def received(self, state: Any) -> Received:
        """What arrived. Never timed; may synchronise and copy."""
        ...

    def stage(self, state: Any, rows: torch.Tensor) -> Any:
        """Put expert output ([N, H] bf16, in the order of `received`) where combine wants it. Never timed."""
        ...

    def outputs(self) -> Sequence[torch.Tensor]:
        """Buffers the library re-uses for its results; the harness poisons them before each checked call."""
        ...

    def close(self) -> None: ...


class Library(Protocol):
    """A library driven in process, by one rank per device."""

    facts: Facts

    def why_not(self, case: Case) -> str | None:
        """One sentence why this case cannot run, or None. Answered on a laptop, without the library."""
        ...

    def setup(self, context: Context) -> None:
        """Import the library and make its communicator. Raises MissingLibrary when it cannot."""
        ...

    def collective(self, case: Case, shape: Collective) -> CollectiveCall: ...

    def moe(self, case: Case, problem: MoeProblem) -> Exchange: ...

    def versions(self) -> Mapping[str, str]:
        """Versions as the loaded library itself reports them, after set-up."""
        ...

    def close(self) -> None: ...


class Program(Protocol):
    """An external benchmark that is started and parsed, not linked."""

    facts: Facts

    def why_not(self, case: Case) -> str | None: ...

    def argv(self, case: Case, output: str) -> list[str]: ...

    def parse(self, case: Case, returncode: int, stdout: str, output: str | None) -> Any: ...


class MissingLibrary(Exception):
    """The library is not there, or not the one that was pinned. The message says what to do."""


def why_not(facts: Facts, case: Case) -> str | None:
    """The reasons that follow from the declared facts alone; a backend adds its own limits after these."""
    if case.family not in facts.families:
        return f"{facts.name} has no {case.family} operations"
    variant = facts.variant(case)
    if variant is None:
        have = sorted({f"{v.mode}/{v.name}" for v in facts.variants if v.family == case.family})
        return f"{facts.name} has no {case.mode}/{case.variant}; it has {', '.join(have)}"
    if case.shape.dtype not in variant.dtypes:
        return f"{facts.name} {variant.name} has no {case.shape.dtype}; it has {', '.join(variant.dtypes)}"
    if isinstance(case.shape, Collective) and case.shape.op not in variant.ops:
        return f"{facts.name} has no {case.mode} {case.shape.op}"
    if isinstance(case.shape, Moe) and case.shape.experts % case.ranks:
        return f"{case.shape.experts} experts cannot be divided over {case.ranks} ranks"
    for name, _ in case.knobs:
        if name not in facts.knobs:
            return f"{facts.name} has no knob {name!r}; it has {', '.join(facts.knobs) or 'none'}"
    return None
