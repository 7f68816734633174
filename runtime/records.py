"""One result document as the readers keep it: a small `Record` with a `Row` for each measurement.

A document is believed only after it was found valid, of a known version, and in agreement with itself.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from . import bandwidth, consistency, domains, schemas
from .types import CONTRACT, PROGRAM_REGIMES, Case, Shape, Status, case_from_json, comparison_key

PERCENTILES = ("p50", "p90", "p95", "p99")
STATISTICS = (*PERCENTILES, "mean", "max")  # over the iterations of a run
LARGEST_FILE = 64 << 20  # bytes; a result has some 20 KB, raw samples live in their sidecars

Interval = tuple[float, float]
Times = tuple[float | None, ...]  # in the order of STATISTICS


class Row(NamedTuple):
    """One component in one regime of one cell: its headline reduction, in microseconds.

    times       in the order of STATISTICS. A percentile above the median whose interval the sample could not
                give is None: of so few samples it would be about their maximum, whatever it is called
    intervals   in the order of PERCENTILES; one that the sample could not give is None
    nulls       percentile -> why it has no interval
    least, spread   the minimum over ranks and the maximum minus it, as `times`; None where there is one clock
                for all ranks
    us_GBps     formula name -> GB/s at one microsecond: divide by a time in microseconds
    """

    component: str
    regime: str
    key: str
    headline: str
    n: int
    times: Times
    intervals: tuple[Interval | None, ...]
    nulls: Mapping[str, str]
    least: Times
    spread: Times
    settled: bool
    stop_reason: str
    outliers: int
    largest_outlier: float | None
    us_GBps: Mapping[str, float]


class Limit(NamedTuple):
    name: str
    GBps: float
    kind: str
    source: str


class Record(NamedTuple):
    """One requested cell. `case` is None when it left no usable file: only the id is known then."""

    execution: int  # index in Reading.executions
    path: str
    cell_id: str
    case_id: str
    run: int
    status: Status
    reason: str | None
    case: Case | None = None
    contract: str = CONTRACT
    topology_class: str = ""
    domains: int = 1  # scale-up domains that its ranks lie in
    rows: tuple[Row, ...] = ()
    limits: tuple[Limit, ...] = ()
    contract_only: bool = False
    first_call_us: float | None = None
    warnings: tuple[str, ...] = ()
    failure: Mapping[str, Any] | None = None
    teardown: str | None = None

    @property
    def backend(self) -> str:
        return self.case.backend if self.case else ""


class Unusable(Exception):
    """Why a document cannot be used; becomes a Problem."""


class Broken(Unusable):
    """It is one of ours, as far as one can tell, and was cut off or spoilt."""


def load(path: Path, name: str, schema: str) -> dict[str, Any]:
    """One document, valid and of a version this code knows."""
    try:
        if not path.is_file():
            raise Unusable("is not a regular file")
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_FILE:
        raise Unusable(f"is larger than {LARGEST_FILE >> 20} MiB: not a {name}")
    try:
        document = json.loads(data, parse_constant=_no_constant)
    except RecursionError as error:
        raise Unusable(f"is nested too deeply: not a {name}") from error
    except ValueError as error:  # not JSON or not UTF-8
        raise Broken(f"is not JSON, or truncated: {error}") from error
    said = document.get("schema") if isinstance(document, dict) else None
    if said != schema:
        kind, _, version = schema.rpartition(".v")
        if isinstance(said, str) and re.fullmatch(re.escape(kind) + r"\.v\d+", said):
            raise Unusable(f"was written by a newer CollectiveX ({said}; this one reads version {version})")
        raise Unusable(f"is not a CollectiveX {name} (its schema is {said!r})")
    if _version(str(document.get("contract"))) > _version(CONTRACT):
        raise Unusable(
            f"was written by a newer CollectiveX (contract {document['contract']}; this one is {CONTRACT})"
        )
    if not schemas.validator(name).is_valid(document):
        key, what = next(schemas.problems(name, document))
        raise Broken(
            f"does not follow the schema: {key}: {what}" if key else f"does not follow the schema: {what}"
        )
    return document


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _version(contract: str) -> tuple[int, ...]:
    """`2026.11-1` -> (2026, 11, 1); anything else sorts first."""
    match = re.fullmatch(r"(\d+)\.(\d+)-(\d+)", contract)
    return tuple(map(int, match.groups())) if match else ()


def record(
    document: Mapping[str, Any], execution: int, execution_name: str, path: str, cell_id: str
) -> Record:
    """The small record of a valid result document.

    Raises Unusable when it is not the record of `cell_id` in this execution, or when what it says of itself
    (ids, comparison keys, bytes) does not follow from its case.
    """
    identity = document["identity"]
    if identity["cell_id"] != cell_id:
        raise Unusable(f"holds a record of {identity['cell_id']}, not of {cell_id}")
    if identity["execution"] != execution_name:
        raise Unusable(f"belongs to execution {identity['execution']}, not to {execution_name}")
    case = case_from_json(document["case"])
    case_id = _id_of(case)
    if (case_id, f"{case_id}.r{identity['run']}") != (identity["case_id"], identity["cell_id"]):
        raise Unusable(f"was changed: its case is {case_id}, its identity says {identity['cell_id']}")
    try:
        rows = tuple(_row(document, case, measurement) for measurement in document["measurements"])
        limits = tuple(Limit(**{**limit, "GBps": float(limit["GBps"])}) for limit in document["limits"] or ())
        shape = document["case"]["shape"]
        float(shape["tokens"] if "tokens" in shape else shape["bytes"])  # the ladder of tables and axes
        first_call_us = None if document["first_call_us"] is None else float(document["first_call_us"])
    except OverflowError as error:  # JSON's numbers have no end, ours do
        raise Unusable("has a number that is too large") from error
    return Record(
        execution=execution,
        path=path,
        cell_id=identity["cell_id"],
        case_id=identity["case_id"],
        run=identity["run"],
        status=Status(document["status"]),
        reason=document["reason"],
        case=case,
        contract=document["contract"],
        topology_class=identity["topology_class"],
        domains=len(set(domains.of_result(document))),
        rows=rows,
        limits=limits,
        contract_only=document["backend"]["validated"] == "contract-only",
        first_call_us=first_call_us,
        warnings=tuple(document["warnings"]),
        failure=document["failure"],
        teardown=document["teardown"],
    )


def believe(document: Mapping[str, Any], manifest: Mapping[str, str], folder: str) -> None:
    """Raises Unusable when a record contradicts itself, its manifest, or the file of its samples.

    manifest   its consistency.MANIFEST_FACTS
    """
    problem = next(consistency.contradictions(document, manifest, folder), None)
    if problem is not None:
        raise Unusable(problem)


def _row(document: Mapping[str, Any], case: Case, measurement: Mapping[str, Any]) -> Row:
    regime, component = measurement["regime"], measurement["component"]
    topology, contract = document["identity"]["topology_class"], document["contract"]
    key = key_of(case.shape, case.mode, case.ranks, case.nodes, regime, topology, contract)
    if measurement["comparison_key"] != key:
        raise Unusable(
            f"was changed: the comparison key of {regime} {component} does not follow from its case"
        )
    stats = measurement[measurement["headline"]]
    intervals = tuple(_interval(stats["intervals"][name]) for name in PERCENTILES)
    bounds = [bound for interval in intervals if interval is not None for bound in interval]
    if min(*(float(stats[name]) for name in STATISTICS), *bounds) < 0:
        raise Unusable(f"has a negative time in {regime} {component}")
    one_clock = regime in PROGRAM_REGIMES
    largest = stats["outliers"]["largest"]
    return Row(
        component=component,
        regime=regime,
        key=measurement["comparison_key"],
        headline=measurement["headline"],
        n=stats["n"],
        times=_times(stats),
        intervals=intervals,
        nulls=_nulls(stats),
        least=_UNTOLD if one_clock else _times(measurement["min"]),
        spread=_UNTOLD if one_clock else _times(measurement["spread"]),
        settled=measurement["settled"],
        stop_reason=measurement["stop_reason"],
        outliers=stats["outliers"]["count"],
        largest_outlier=None if largest is None else float(largest),
        us_GBps=_us_GBps(document, case, component),
    )


_UNTOLD: Times = (None,) * len(STATISTICS)


def _times(stats: Mapping[str, Any]) -> Times:
    """See `Row.times`."""
    nulls = _nulls(stats)
    return tuple(None if name in nulls and name != "p50" else float(stats[name]) for name in STATISTICS)


def _nulls(stats: Mapping[str, Any]) -> dict[str, str]:
    stated = ((name, stats["intervals"][name].get("null")) for name in PERCENTILES)
    return {name: sys.intern(reason) for name, reason in stated if reason is not None}


def _interval(stated: Mapping[str, Any]) -> Interval | None:
    return (float(stated["low"]), float(stated["high"])) if "low" in stated else None


_counted: dict[tuple[Any, ...], tuple[Any, dict[str, float]]] = {}


def _us_GBps(document: Mapping[str, Any], case: Case, component: str) -> dict[str, float]:
    """Every formula that tells something of this component. Cells of one shape mostly have the same bytes,
    so the last answer is kept by shape and used again when the bytes are equal."""
    block = document["bytes"]
    if block is None:
        return {}
    at = (case.shape, case.ranks, case.nodes, component)
    if at in _counted and _counted[at][0] == block:
        return _counted[at][1]
    ranks = [len(block[name]) for name in ("ranks", "wire") if block.get(name) is not None]
    if block["family"] != case.family or any(n != case.ranks for n in ranks):
        raise Unusable(f"has bytes that are not of its case ({case.family}, {case.ranks} ranks)")
    rates = {}
    for formula in bandwidth.FORMULAS.values():
        if formula.family == case.family:
            try:
                rate = bandwidth.gbps(formula.name, document, component, 1.0)
            except ValueError as error:
                raise Unusable(f"has no {formula.name}: {error}") from error
            if rate is not None:
                rates[formula.name] = rate
    if len(_counted) >= 4096:
        _counted.clear()
    _counted[at] = (block, rates)
    return rates


@lru_cache(maxsize=4096)
def _id_of(case: Case) -> str:
    return case.id


@lru_cache(maxsize=4096)
def key_of(
    shape: Shape,
    mode: str,
    ranks: int,
    nodes: int,
    regime: str,
    topology_class: str,
    contract: str = CONTRACT,
) -> str:
    """`types.comparison_key`, remembered: most cells of a suite share theirs with others."""
    return comparison_key(Case("", "", mode, shape, ranks, nodes), regime, topology_class, contract)
