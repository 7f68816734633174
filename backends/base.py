"""The contract of a backend. Read this before writing one; CONTRIBUTING.md walks through it.

A backend file defines a class called `Backend` that satisfies `Library` (an in-process library) or `Program`
(an external benchmark). It imports without torch and without the library: vendor imports happen in `setup`.
It never sees the harness's clock: it offers operations, the harness decides what is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from ..runtime.bandwidth import ALIGN
from ..runtime.types import Case, Check, Collective, Moe, Series, Status

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
class Recipe:
    """How `cx prepare` installs the library into a folder of its own, from its upstream pin. In texts
    `{folder}` stands for that folder, the other names in braces are those of `runtime.toolchain.Here.names`.

    same_as    the backend whose installation is this one's too; nothing else is said then
    packages   exact pip requirements ("name==version"), installed without their dependencies
    git        repository to build, at the commit `Source.pin`
    commit     what the pin must be where it is a tag, which can move
    submodules of the repository that the build needs
    subfolder  of the repository, where its Python project is
    isolated   pip builds in an environment of its own: for a build that needs no torch
    steps      commands in the repository, instead of pip
    keep       folder of the library -> pattern of what `steps` made in the repository
    links      symbolic link in the library's folder -> what it names; made before the build
    needs      programs that the build, or the library itself, calls
    headers    that the build includes; `libraries` that it links; `imports`, modules that it imports
    build      environment of the build
    prepend    search path -> entries, relative to the library's folder, for the ranks
    sets       environment of the ranks
    modules    what must import afterwards, each from the library's folder
    versions   installed Python distribution -> what its version must contain
    nccl       the version of NCCL that the library is for: its own, and the only one in the process
    programs   files of the library that must start and answer -h
    """

    same_as: str | None = None
    packages: tuple[str, ...] = ()
    git: str | None = None
    commit: str | None = None
    submodules: tuple[str, ...] = ()
    subfolder: str = "."
    isolated: bool = False
    steps: tuple[tuple[str, ...], ...] = ()
    keep: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)
    prepend: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sets: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    nccl: str | None = None
    programs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One way this library does one mode. Plain data; the defaults are the common case.

    window   component -> what its timed window contains, one sentence. Collectives have one component, the
             operation ("call"); MoE has "dispatch" and "combine".
    ops      collectives only: the operations offered. Variants of one mode may share a name if their
             operations differ: what else is said then holds for theirs
    layout   MoE: what is received: "token-rank" (one row per token and destination rank, with its local
             experts) or "token-expert" (one row per token and local expert)
    combine  MoE: what an identity round trip returns for row x of token t (w: weights, valid picks only):
             "rank-sum" x * number of distinct ranks, "expert-sum" x * number of experts, "weighted-sum"
             x * sum(w). For the first two the harness multiplies by w in the expert step, outside the window.
    casts    MoE: where combine rounds to bf16: "final" (float32 sums, one cast), "rank-partials" (each rank's
             partial sum is cast, then summed in float32 and cast) or "node-partials" (the same by node)
    in_place  combine takes its rows where dispatch puts them: rows staged once do not outlive the next
             dispatch, so a chain combines what was dispatched, as if the experts had changed nothing
    paired   dispatch and combine can only be called in turns; they are timed by marks inside the pair
    graph_safe  may be captured in a CUDA/HIP graph
    validated   the devices on which this variant has run, if those are not its backend's
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
    in_place: bool = False
    paired: bool = False
    graph_safe: bool = False
    validated: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Facts:
    """What a backend declares about itself.

    devices        "cpu", "cuda", "hip": where it runs
    env            set in the rank processes before anything is imported
    index_dtype    of the expert ids it takes
    knobs          settings a case may request; anything else is refused
    recipe         how `cx prepare` installs the library, None where there is nothing to install
    regimes        external programs only: what they measure, instead of the regimes a suite asks for
    validated      those of its devices on which this code has run and passed; on the others it is
                   "contract-only" (never yet on such hardware: shown wherever the backend is shown)
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
    recipe: Recipe | None = None
    regimes: tuple[str, ...] = ()
    validated: tuple[str, ...] = ()
    hidden: bool = False

    @cached_property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(v.family for v in self.variants))

    def proven(self, device: str, variant: Variant | None = None) -> Literal["hardware", "contract-only"]:
        """Whether this, or one variant of it, has run and passed on such a device."""
        ran_on = self.validated
        if variant is not None and variant.validated is not None:
            ran_on = variant.validated
        return "hardware" if device in ran_on else "contract-only"

    def variant(self, case: Case) -> Variant | None:
        """The variant that a case names, or None. Of several of that name, which differ by operation, the one
        with the case's operation, else the first."""
        asked = case.family, case.mode, case.variant
        same = [v for v in self.variants if (v.family, v.mode, v.name) == asked]
        for v in same:
            if isinstance(case.shape, Collective) and case.shape.op in v.ops:
                return v
        return same[0] if same else None


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


@dataclass(frozen=True)
class Start:
    """One process of an external program.

    cases      what its output answers, in the order of its measuring
    env        set beside the environment of the pool
    output     a file that the program was asked to write, or None. It is read, and made fit to be kept
    """

    name: str
    cases: tuple[Case, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None


@dataclass(frozen=True)
class Ended:
    """How that process ended. `output` is the text of the file it was asked to write, None without one;
    `timed_out` says which deadline it missed, or None."""

    returncode: int
    stdout: str
    output: str | None = None
    timed_out: str | None = None


@dataclass
class Answer:
    """What one process told about one case. Samples are in the series; a program that reduces over ranks
    itself has one row of them, not one for each rank.

    libraries   name -> (version that ran, version it was compiled with), as the program itself says
    versions    of the program itself
    """

    status: Status = Status.OK
    reason: str | None = None
    checks: list[Check] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    bytes: Mapping[str, Any] | None = None
    realised: Mapping[str, int | float | str] = field(default_factory=dict)
    libraries: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@runtime_checkable
class Program(Protocol):
    """An external benchmark that is started and read, not linked. Its clock is its own: `facts.regimes` name
    what it measures, apart from the regimes of the harness.

    withheld   prefixes of variables that must not reach it: they would change what it measures
    """

    facts: Facts
    withheld: tuple[str, ...]

    def why_not(self, case: Case) -> str | None: ...

    def groups(self, cases: Sequence[Case]) -> list[list[Case]]:
        """The cases that one start can answer together, each case in exactly one group."""
        ...

    def starts(self, cases: Sequence[Case], folder: str, environ: Mapping[str, str]) -> list[Start]:
        """The processes that answer one group: the first is the measurement, further ones add series to it.
        `folder` is theirs; `environ` is what they will inherit. Raises MissingLibrary."""
        ...

    def progress(self, stdout: str) -> int:
        """A number that grows whenever the program finishes another piece of its work, 0 before the first."""
        ...

    def answers(self, start: Start, ended: Ended) -> dict[Case, Answer]:
        """What is known of the cases, at least of one. A case that is left out was not reached, or cannot be
        believed through no fault of its own, and runs again without those that are answered."""
        ...

    def keep(self, output: str) -> str | None:
        """The output file as it may be kept, without what is private; None when it cannot be cleaned."""
        ...


class MissingLibrary(Exception):
    """The library is not there, or not the one that was pinned. The message says what to do."""


def why_not(facts: Facts, case: Case) -> str | None:
    """The reasons that follow from the declared facts alone; a backend adds its own limits after these."""
    shape = case.shape
    if case.family not in facts.families:
        return f"{facts.name} has no {case.family} operations"
    variant = facts.variant(case)
    if variant is None:
        have = sorted({f"{v.mode}/{v.name}" for v in facts.variants if v.family == case.family})
        return f"{facts.name} has no {case.mode}/{case.variant}; it has {', '.join(have)}"
    if shape.dtype not in variant.dtypes:
        return f"{facts.name} {variant.name} has no {shape.dtype}; it has {', '.join(variant.dtypes)}"
    if isinstance(shape, Collective) and shape.op not in variant.ops:
        return f"{facts.name} has no {case.mode} {shape.op}"
    if isinstance(shape, Collective) and shape.op == "all_to_all_v" and shape.bytes < ALIGN * case.ranks:
        return f"all_to_all_v rounds shares down to {ALIGN} bytes: nothing is left of {shape.bytes} bytes"
    if isinstance(shape, Moe) and shape.experts % case.ranks:
        return f"{shape.experts} experts cannot be divided over {case.ranks} ranks"
    for name, _ in case.knobs:
        if name not in facts.knobs:
            return f"{facts.name} has no knob {name!r}; it has {', '.join(facts.knobs) or 'none'}"
    return None
