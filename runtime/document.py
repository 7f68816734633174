"""Result documents: the one place that knows their form (schema/result.v1.json) on the writing side.

Both halves build them: the worker for cells that ran, the supervisor for those that did not. Standard library
only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from . import domains
from .limits import beats_limit, may_reduce_in_network
from .stats import reduce_ranks, rounded, summarise
from .types import CONTRACT, RESULT_SCHEMA, Case, Cell, Check, Series, Status, case_to_json, comparison_key

Measured = tuple[Series, Sequence[Sequence[float]]]  # with the samples of every rank, microseconds


@dataclass(frozen=True)
class Place:
    """Where and under what name a cell runs: everything about it that is not the case itself.

    device             what the pool has: "cpu", "cuda" or "hip"
    nodes_per_domain   how many nodes the pool says share a scale-up domain; None where it says nothing
    domains            for each rank its scale-up domain, once the ranks are up; None: what the pool says
    domains_source     who says so, see domains.placed
    """

    execution: str
    allocation: str
    suite: str
    sku: str
    topology_class: str
    device: str
    runs: int = 1
    order: str = "declared"
    limits: tuple[Mapping[str, Any], ...] = ()
    nodes_per_domain: int | None = None
    domains: tuple[int, ...] | None = None
    domains_source: str | None = None

    @classmethod
    def told(cls, value: Mapping[str, Any]) -> Place:
        """From the cases document."""
        return cls(**{**value, "limits": tuple(value["limits"])})

    def placement(self, case: Case) -> dict[str, Any]:
        """The result's `placement`."""
        if self.domains is not None:
            return {"domains": list(self.domains), "source": self.domains_source}
        told, source = domains.placed(case.ranks, case.nodes, self.nodes_per_domain, [None] * case.ranks)
        return {"domains": told, "source": source}


@dataclass
class Outcome:
    """What a worker found out about one cell. Series are this rank's; everything else is rank 0's."""

    checks: list[Check] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    first_call_us: float | None = None
    bytes: Mapping[str, Any] | None = None
    routing_proof: Mapping[str, Any] | None = None
    realised: Mapping[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def now() -> str:
    """UTC, to the second, as results carry it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def empty(
    cell: Cell, place: Place, status: Status, reason: str | None, position: int = 0, facts: Any = None
) -> dict[str, Any]:
    """A record without measurements: the form every cell starts from, and what one that never ran ends as.

    facts   backends.base.Facts, or None when the backend could not be loaded
    """
    case = cell.case
    return {
        "schema": RESULT_SCHEMA,
        "contract": CONTRACT,
        "identity": {
            "cell_id": cell.id,
            "case_id": case.id,
            "run": cell.run,
            "suite": place.suite,
            "sku": place.sku,
            "topology_class": place.topology_class,
            "execution": place.execution,
            "allocation": place.allocation,
            "created_at": now(),
        },
        "case": case_to_json(case),
        "placement": place.placement(case),
        "status": str(status),
        "reason": reason,
        "measurements": [],
        "correctness": None,
        "first_call_us": None,
        "bytes": None,
        "routing_proof": None,
        "knobs": knobs(dict(case.knobs), {}),
        "backend": _backend(case, facts, place.device),
        "timing_split": {},
        "provenance": None,
        "design": {
            "runs": place.runs,
            "order": place.order,
            "position": position,
            "inference": "runs" if place.runs >= 3 else "none",
        },
        "failure": None,
        "teardown": None,
        "limits": [dict(limit) for limit in place.limits] or None,
        "warnings": [],
        "samples": None,
    }


def _backend(case: Case, facts: Any, device: str) -> dict[str, Any]:
    variant: Any = facts.variant(case) if facts is not None else None
    exchange = variant if variant is not None and variant.family == "moe" else None
    return {
        "layout": exchange.layout if exchange else None,
        "combine": exchange.combine if exchange else None,
        "casts": exchange.casts if exchange else None,
        "paired": variant is not None and variant.paired,
        "graph_safe": variant is not None and variant.graph_safe,
        "validated": facts.proven(device, variant) if facts is not None else "contract-only",
        "window": dict(variant.window) if variant is not None else {},
    }


def measurement(
    case: Case, topology_class: str, series: Series, per_rank: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """One component in one regime, ranks already gathered: reduce across ranks first, then over iterations.

    per_rank   ranks x samples, microseconds
    """
    reduced = reduce_ranks([list(samples) for samples in per_rank])
    return {
        "component": series.component,
        "regime": series.regime,
        "comparison_key": comparison_key(case, series.regime, topology_class),
        "unit": "us",
        "headline": series.headline,
        "per_sample": series.per_sample,
        "trials": series.trials,
        **{name: summarise(reduced[name]) for name in ("max", "median", "min", "spread")},
        "settled": series.settled,
        "stop_reason": series.stop_reason,
        "health": {name: rounded(value) for name, value in series.health.items()},
    }


def sidecar_entry(series: Series, per_rank: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The raw samples of one series as the sidecar carries them, microseconds to the nanosecond."""
    return {
        "component": series.component,
        "regime": series.regime,
        "trials": series.trials,
        "per_sample": series.per_sample,
        "per_rank_us": [[rounded(value) for value in samples] for samples in per_rank],
    }


def knobs(asked: Mapping[str, Any], realised: Mapping[str, Any]) -> dict[str, Any]:
    """What was requested beside what the library used, of everything that either names."""
    names = {**asked, **realised}
    return {name: {"requested": asked.get(name), "realised": realised.get(name)} for name in names}


def not_applied(result: Mapping[str, Any]) -> list[str]:
    """The knobs of a result that were asked for and that the library did not use as asked."""
    return [n for n, k in result["knobs"].items() if k["requested"] not in (None, k["realised"])]


def measure(
    result: dict[str, Any], case: Case, place: Place, found: Sequence[Measured], settings: Mapping[str, str]
) -> None:
    """Put the measurements into a result that has its bytes. One that beats a physical limit is implausible.

    settings   of the communication, as provenance carries them
    """
    result["measurements"] = [measurement(case, place.topology_class, *one) for one in found]
    reason = beats_limit(result, may_reduce_in_network(settings))
    if reason is not None:
        result["status"], result["reason"] = str(Status.IMPLAUSIBLE), reason


def correctness(checks: Sequence[Check]) -> dict[str, Any]:
    """The verdict and every check behind it. No checks at all is not a pass."""
    return {"passed": bool(checks) and all(c.passed for c in checks), "checks": [asdict(c) for c in checks]}
