"""What is asked (`Case`), how it ended (`Status`), and the identity both halves agree on.

Standard library only: the host half plans with these types, the rank half measures with them, and the
two talk through their JSON form (cases in, results out).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Any, ClassVar, Literal

# The measurement contract. It changes whenever a number could move; schema/HISTORY.md says why it did.
CONTRACT = "2026.11-4"
RESULT_SCHEMA = "collectivex.result.v1"
CASES_SCHEMA = "collectivex.cases.v1"
MANIFEST_SCHEMA = "collectivex.manifest.v1"

FAMILIES = ("collective", "moe")
COLLECTIVE_OPS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "sendrecv",
    "gather",
    "scatter",
    "all_to_all_v",
)
PROGRAM_OPS = ("hypercube",)  # patterns of external programs, which check them: no oracle of ours
PROGRAM_REGIMES = ("loop",)  # what external programs time themselves; no suite asks for these
REGIMES = ("fresh", "chained", "graph", "kernel", *PROGRAM_REGIMES)
# For collectives the mode is the placement of the output. For MoE it is the contract of the exchange:
#   normal       routing known only as expert ids: layout, counts and payload are inside the window
#   cached       the same routing as the call before: layout and counts are known
#   low-latency  fixed-capacity receive, no host synchronisation, capturable in a graph
MODES: Mapping[str, tuple[str, ...]] = {
    "collective": ("out-of-place", "in-place"),
    "moe": ("normal", "cached", "low-latency"),
}
DTYPES: Mapping[str, tuple[str, ...]] = {
    "collective": ("float32", "float16", "bfloat16"),
    "moe": ("bf16", "fp8"),
}
CODE_COLUMNS = 32  # of a row carry the oracle's code: 20 bits of token id, 12 of checksum
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bf16": 2, "fp8": 1}

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")

Reduction = Literal["max", "median", "min"]


class Status(str, Enum):
    """How a requested cell ended. Everything but OK carries a reason a person can act on."""

    OK = "ok"
    INCORRECT = "incorrect"  # ran, wrong answer: no latency is published
    IMPLAUSIBLE = "implausible"  # beats a physical limit without a stated reason: withheld from ranking
    FAILED = "failed"
    TIMEOUT = "timeout"
    INFRA = "infra"  # scheduler, image, node, GPU health
    UNSUPPORTED = "unsupported"
    NOT_RUN = "not-run"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Routing:
    """Which experts each token picks, and how many tokens each rank has.

    kind     "uniform", or "zipf": expert popularity proportional to 1 / position**skew
    spread   tokens per rank: "even" (all have T), "linear" (rank r has ceil(T*(r+1)/R)),
             "one-empty" (the last rank has none, the others T)
    """

    kind: str = "uniform"
    skew: float = 0.0
    seed: int = 1
    spread: str = "even"

    KINDS: ClassVar = ("uniform", "zipf")
    SPREADS: ClassVar = ("even", "linear", "one-empty")

    @property
    def label(self) -> str:
        name = self.kind if self.kind == "uniform" else f"{self.kind}{self.skew:g}"
        return name if self.spread == "even" else f"{name}-{self.spread}"


@dataclass(frozen=True)
class Collective:
    """One collective at one size. `bytes` is the nccl-tests size column S (see bandwidth.py)."""

    op: str
    bytes: int
    dtype: str
    family: ClassVar[str] = "collective"

    @property
    def label(self) -> str:
        return f"{self.op}-{self.bytes}B-{self.dtype}"


@dataclass(frozen=True)
class Moe:
    """One expert-parallel exchange: every rank sends up to `tokens` rows of `hidden` bf16 or fp8 values,
    each to the ranks that own its `topk` of `experts` experts, and gets the combined rows back.
    """

    workload: str
    hidden: int
    topk: int
    experts: int
    tokens: int
    dtype: str = "bf16"
    routing: Routing = Routing()
    family: ClassVar[str] = "moe"

    @property
    def label(self) -> str:
        return f"{self.workload}-t{self.tokens}-{self.dtype}-{self.routing.label}"


Shape = Collective | Moe


@dataclass(frozen=True)
class Sampling:
    """How much is measured. Counts are per case and rank; seconds bound slow machines, not fast ones."""

    warmup_iterations: int = 10
    warmup_s: float = 0.2
    trials: int = 8
    iterations: int = 64  # fresh: timed calls per component and trial
    chain_blocks: int = 24  # chained, graph: blocks per trial, beside three that are dropped
    chain_block: int = 8  # back-to-back turns per block, at least: one sample is a block's mean
    kernel_iterations: int = 32
    checked_calls: int = 1  # oracle-checked invocations after timing
    budget_s: float = 20.0  # measuring stops at the next trial boundary after this


@dataclass(frozen=True)
class Case:
    """One cell of the matrix before it is repeated over runs.

    variant   the backend's own name for how it does it ("padded", "expand"); not in the comparison key
    knobs     requested library settings, name -> value; the result says what was realised
    """

    backend: str
    variant: str
    mode: str
    shape: Shape
    ranks: int
    nodes: int = 1
    regimes: tuple[str, ...] = ("fresh", "chained")
    sampling: Sampling = field(default_factory=Sampling)
    deadline_s: float = 120.0
    knobs: tuple[tuple[str, int | float | str], ...] = ()

    @property
    def family(self) -> str:
        return self.shape.family

    @property
    def id(self) -> str:
        """Readable and unique: a slug, then eight hex digits over every field that makes it this case."""
        return _case_id(self)

    def with_deadline(self, seconds: float) -> Case:
        return replace(self, deadline_s=seconds)


@lru_cache(maxsize=1 << 16)  # pools of the same size ask for the same cases
def _case_id(case: Case) -> str:
    facts = case_to_json(case)
    del facts["deadline_s"]
    slug = f"{case.shape.label}-{case.mode}-n{case.nodes}r{case.ranks}-{case.backend}"
    if case.variant:
        slug += f"-{case.variant}"
    return f"{_UNSAFE.sub('-', slug)}-{digest(facts)[:8]}"


@dataclass(frozen=True)
class Cell:
    """One case in one run (a fresh set of processes). Every requested cell ends as exactly one record."""

    case: Case
    run: int = 0

    @property
    def id(self) -> str:
        return f"{self.case.id}.r{self.run}"


def digest(value: Any) -> str:
    """sha256 (hex) of the canonical JSON form of `value`."""
    return hashlib.sha256(_CANONICAL.encode(value).encode()).hexdigest()


def comparison_key(case: Case, regime: str, topology_class: str, contract: str = CONTRACT) -> str:
    """16 hex digits; equal means: these two numbers measure the same thing and may share a column.

    Over declared facts only: contract, shape, dtype, routing, mode, regime, ranks, nodes, topology class.
    Never over a measured value; never over backend, variant, knobs or sampling. `contract` is an older one
    where an older result is checked.
    """
    return digest(
        {
            "contract": contract,
            "family": case.family,
            "shape": _shape_to_json(case.shape, family=False),
            "mode": case.mode,
            "ranks": case.ranks,
            "nodes": case.nodes,
            "regime": regime,
            "topology_class": topology_class,
        }
    )[:16]


def _shape_to_json(shape: Shape, family: bool = True) -> dict[str, Any]:
    """As dataclasses.asdict, without its deep copies: a plan makes tens of thousands of these."""
    data: dict[str, Any] = {"family": shape.family} if family else {}
    data.update(vars(shape))
    if isinstance(shape, Moe):
        data["routing"] = dict(vars(shape.routing))
    return data


def case_to_json(case: Case) -> dict[str, Any]:
    """The JSON form, as it stands in cases documents and results."""
    shape = _shape_to_json(case.shape)
    return {
        "backend": case.backend,
        "variant": case.variant,
        "mode": case.mode,
        "shape": shape,
        "ranks": case.ranks,
        "nodes": case.nodes,
        "regimes": list(case.regimes),
        "sampling": dict(vars(case.sampling)),
        "deadline_s": case.deadline_s,
        "knobs": dict(case.knobs),
    }


def case_from_json(data: Mapping[str, Any]) -> Case:
    """The inverse of `case_to_json`. Raises KeyError or TypeError on a document of another shape."""
    shape = dict(data["shape"])
    family = shape.pop("family")
    if family == "collective":
        parsed: Shape = Collective(**shape)
    elif family == "moe":
        parsed = Moe(**{**shape, "routing": Routing(**shape["routing"])})
    else:
        raise KeyError(f"unknown family {family!r}")
    return Case(
        backend=data["backend"],
        variant=data["variant"],
        mode=data["mode"],
        shape=parsed,
        ranks=data["ranks"],
        nodes=data["nodes"],
        regimes=tuple(data["regimes"]),
        sampling=Sampling(**data["sampling"]),
        deadline_s=data["deadline_s"],
        knobs=tuple(sorted(data["knobs"].items())),
    )


@dataclass(frozen=True)
class Check:
    """One correctness check. `detail` names the evidence when it failed (which row, what was found)."""

    name: str
    phase: str  # "before" | "after" | "after-chain" | "repeated"
    passed: bool
    calls: int = 1
    detail: str | None = None


@dataclass(frozen=True)
class Series:
    """Raw samples of one component in one regime on this rank, in microseconds, in order.

    headline   the cross-rank reduction that a table quotes: "max" (what a layer waits for), "median" (the
               period of a chain), "min" (the skew-free floor)
    per_sample calls or pairs that one sample averages over (the chain block), 1 for single calls
    """

    component: str
    regime: str
    headline: Reduction
    samples_us: list[float]
    per_sample: int = 1
    trials: int = 1
    settled: bool = True
    stop_reason: str = "complete"
    health: Mapping[str, float] = field(default_factory=dict)
