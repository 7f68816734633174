"""What a result says of itself, worked out again: ids, keys, counts, and statistics from the raw samples.
docs/methodology.md, section 4, names what cannot be.

Every function yields sentences about what does not agree. The documents are schema-valid already.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import consistency, domains, recount, schemas
from .consistency import LARGEST_SIDECAR, REDUCTIONS
from .environment import private
from .limits import beats_limit, may_reduce_in_network
from .redact import Private, Redactor
from .stats import (
    MINIMUM_RUNS,
    RESOLUTION_US,
    late_over_early,
    reduce_ranks,
    rounded,
    summarise,
    unsettled_us,
)
from .types import Case, Status, case_from_json, comparison_key

# Samples are stored to the nanosecond, statistics may be made of what was measured: a sample is off by half
# of it, and so are the median over ranks, the centre, and the rounded result of a deviation from it.
TOLERANCE_US = 0.004
VOTE_US = 0.01  # two medians and two deviations of rounded samples, see stats.unsettled_us

Document = Mapping[str, Any]


def result(document: Document, folder: Path) -> Iterator[str]:
    """Everything about one result that can be worked out from it and from its sidecar under `folder`."""
    case = case_from_json(document["case"])
    yield from _identity(document, case)
    yield from _placement(document, case)
    yield from _measurements(document, case)
    yield from consistency.verdicts(document)
    yield from _bytes(document, case)
    yield from recount.problems(document, case)
    yield from _limits(document)
    yield from _privacy(document)
    if document["samples"] is not None:
        yield from _samples(document, case, folder)
    elif document["measurements"]:
        yield "samples: none, and still there are measurements"


def _identity(document: Document, case: Case) -> Iterator[str]:
    identity, design = document["identity"], document["design"]
    expected = {"case_id": case.id, "cell_id": f"{case.id}.r{identity['run']}"}
    for name, value in expected.items():
        if identity[name] != value:
            yield f"identity.{name}: its case gives {value}, not {identity[name]}"
    if identity["run"] >= design["runs"]:
        yield f"identity.run: run {identity['run']} of {design['runs']} (counted from 0)"
    inference = "runs" if design["runs"] >= MINIMUM_RUNS else "none"
    if design["inference"] != inference:
        yield f"design.inference: {design['runs']} runs give {inference}, not {design['inference']}"


def _placement(document: Document, case: Case) -> Iterator[str]:
    """One domain per rank, and the ranks of a node in one."""
    told = domains.of_result(document)
    per_node = case.ranks // case.nodes
    if len(told) != case.ranks:
        yield f"placement.domains: {len(told)} entries for {case.ranks} ranks"
    elif max(told) >= case.ranks:
        yield f"placement.domains: number {max(told)} of {case.ranks} ranks (counted from 0)"
    elif any(len(set(told[first : first + per_node])) > 1 for first in range(0, case.ranks, per_node)):
        yield f"placement.domains: a node of {per_node} ranks lies in several"


def _measurements(document: Document, case: Case) -> Iterator[str]:
    topology, contract = document["identity"]["topology_class"], document["contract"]
    seen = set()
    for i, entry in enumerate(document["measurements"]):
        at, series = f"measurements[{i}]", (entry["component"], entry["regime"])
        if series in seen:
            yield f"{at}: {series[1]} {series[0]} is there twice"
        seen.add(series)
        if entry["regime"] not in case.regimes:
            yield f"{at}.regime: {entry['regime']} was not asked for"
        key = comparison_key(case, entry["regime"], topology, contract)
        if entry["comparison_key"] != key:
            yield f"{at}.comparison_key: its case gives {key}, not {entry['comparison_key']}"
        yield from (f"{at}{problem}" for problem in _sampling(entry, case))
        yield from (f"{at}{problem}" for problem in consistency.order(entry))


def _sampling(entry: Document, case: Case) -> Iterator[str]:
    """What a table quotes, and whether all trials were made: as measure.py and graphs.py do it."""
    regime, floor = entry["regime"], entry["component"].endswith("_floor")
    headline = "max"
    if regime in ("chained", "graph"):
        headline = "min" if floor else "median"
    if entry["headline"] != headline:
        yield f".headline: {regime} {entry['component']} quotes {headline}, not {entry['headline']}"
    drifts = ["settle_drift"] if headline == "median" else []
    if sorted(entry["health"]) != drifts:
        yield f".health: {', '.join(entry['health']) or 'nothing'}, not {', '.join(drifts) or 'nothing'}"
    most = 1 if regime == "kernel" else case.sampling.trials
    trials = max(1, most // 4) if floor else most
    whole = entry["trials"] == trials or regime == "loop"  # older programs make one cycle, whatever is asked
    if (entry["stop_reason"] == "complete") != whole:
        yield f".stop_reason: {entry['stop_reason']}, after {entry['trials']} of {trials} trials"


def _bytes(document: Document, case: Case) -> Iterator[str]:
    """What leaves the ranks must arrive: rows and selections are conserved in every tier."""
    block = document["bytes"]
    if block is None:
        return
    if block["family"] != case.family:
        yield f"bytes.family: {block['family']} in a case of {case.family}"
        return
    if case.family != "moe":
        return
    ranks = block["ranks"]
    if len(ranks) != case.ranks:
        yield f"bytes.ranks: {len(ranks)} entries for {case.ranks} ranks"
    away = sum(rank["rows_sent"]["scale_out"] + rank["node_rows_sent"]["other"] for rank in ranks)
    if away and len(set(domains.of_result(document))) == 1:
        yield f"bytes.ranks: {away} rows to other scale-up domains, where there is one"
    for what in ("rows", "selections"):
        for tier in ("self", "scale_up", "scale_out"):
            sent = sum(rank[f"{what}_sent"][tier] for rank in ranks)
            received = sum(rank[f"{what}_received"][tier] for rank in ranks)
            if sent != received:
                yield f"bytes.ranks: {sent} {what} sent and {received} received over {tier}"


def _limits(document: Document) -> Iterator[str]:
    """A number that beats a limit which the result itself states is not ok, and one that does not is."""
    block = document["bytes"]
    if (
        not document["measurements"]
        or block is None
        or block["family"] != document["case"]["shape"]["family"]
    ):
        return
    settings = (document["provenance"] or {}).get("environment", {})
    try:
        beaten = beats_limit(document, may_reduce_in_network(settings))
    except (ValueError, ArithmeticError):  # bytes that are not of the case: said already
        return
    if (beaten is not None) != (document["status"] == Status.IMPLAUSIBLE.value):
        yield f"status: {document['status']}, though {beaten or 'no limit is beaten'}"


def _privacy(document: Document) -> Iterator[str]:
    here = private()
    yield from private_strings(document, Redactor(Private(here.hosts, (), here.homes)))


def private_strings(value: Any, redactor: Redactor, key: str = "") -> Iterator[str]:
    """Where a JSON value holds what looks like a host, an address, a home folder or a secret. Version numbers
    of four parts read like addresses and are let pass under their own keys."""
    if isinstance(value, str) and redactor.touches(value) and not _is_version(key):
        yield f"{key}: holds something private: {redactor.text(value)[:120]!r}"
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from private_strings(inner, redactor, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from private_strings(inner, redactor, f"{key}[{i}]")


def _is_version(key: str) -> bool:
    return "version" in key or key.rpartition(".")[2] in ("driver", "cuda", "rocm", "torch", "pin")


def _samples(document: Document, case: Case, folder: Path) -> Iterator[str]:
    """The sidecar: its hash, its series, and the statistics that follow from it."""
    reference = document["samples"]
    if reference["file"] != f"samples/{reference['sha256']}.json.gz":
        yield f"samples.file: {reference['file']} is not named by {reference['sha256']}"
        return
    sidecar, problem = unpack(folder / reference["file"], reference["sha256"])
    if sidecar is None:
        yield f"{reference['file']}: {problem}"
        return
    if sidecar["cell_id"] != document["identity"]["cell_id"]:
        yield f"{reference['file']}: holds the samples of {sidecar['cell_id']}"
        return
    series = {(s["component"], s["regime"]): s for s in sidecar["series"]}
    for i, entry in enumerate(document["measurements"]):
        found = series.pop((entry["component"], entry["regime"]), None)
        if found is None:
            yield f"measurements[{i}]: the sidecar has no {entry['regime']} {entry['component']}"
            continue
        yield from (f"measurements[{i}]{problem}" for problem in _statistics(entry, found, case))
    if document["measurements"]:
        yield from (f"{reference['file']}: {r} {c} is in no measurement" for c, r in series)


def unpack(path: Path, sha256: str) -> tuple[Document | None, str]:
    """A valid sidecar, or None and why not."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    if hashlib.sha256(data).hexdigest() != sha256:
        return None, "was changed: its content has another sha256"
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            text = file.read(LARGEST_SIDECAR + 1)
    except (OSError, EOFError, zlib.error) as error:
        return None, f"is not gzip, or truncated: {error}"
    if len(text) > LARGEST_SIDECAR:
        return None, f"is larger than {LARGEST_SIDECAR >> 20} MiB unpacked"
    try:
        sidecar = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"is not JSON: {error}"
    for key, what in schemas.problems("samples", sidecar):
        return None, f"{key}: {what}"
    return sidecar, ""


def _statistics(entry: Document, series: Document, case: Case) -> Iterator[str]:
    """Published statistics against those of the raw samples."""
    for name in ("trials", "per_sample"):
        if entry[name] != series[name]:
            yield f".{name}: {entry[name]}, the sidecar says {series[name]}"
    per_rank = series["per_rank_us"]
    # A program that measures in a loop of its own has reduced over ranks already: one row, of the slowest.
    if len(per_rank) != (1 if series["regime"] == "loop" else case.ranks):
        yield f": the sidecar has {len(per_rank)} ranks of {case.ranks}"
        return
    try:
        reduced = reduce_ranks(per_rank)
    except ValueError as error:
        yield f": {error}"
        return
    for name in REDUCTIONS:
        stats = summarise(reduced[name])
        fresh = _comparable(stats)
        for key, value in _comparable(entry[name]).items():
            if not _same(value, fresh.get(key)):
                yield f".{name}.{key}: {value} published, the samples give {fresh.get(key)}"
        yield from (f".{name}{problem}" for problem in _scatter(entry[name], stats, name))
    yield from _settling(entry, per_rank)


def _scatter(published: Document, fresh: Document, reduction: str) -> Iterator[str]:
    """The coefficient of variation as far as the last digit of the samples leaves it; the outliers where it
    leaves them: a maximum or minimum of rounded samples is that of the samples, rounded."""
    mean, told, found = fresh["mean"], published["cv"], fresh["cv"]
    if told is None or found is None:
        unlike = told is not found
    else:
        unlike = abs(told - found) > 1e-6 + (1 + found) * TOLERANCE_US / max(mean, TOLERANCE_US)
    if unlike and mean > TOLERANCE_US:
        yield f".cv: {told} published, the samples give {found}"
    if reduction in ("max", "min") and published["outliers"] != fresh["outliers"]:
        yield f".outliers: {published['outliers']} published, the samples give {fresh['outliers']}"


def _settling(entry: Document, per_rank: Sequence[Sequence[float]]) -> Iterator[str]:
    """Settled by most ranks, as measure.Trials votes, where rounding leaves the vote; the drift of rank 0."""
    if entry["regime"] == "kernel":  # a profiler's windows are drained ones, nothing can pile up
        least = most = len(per_rank)
    else:
        beyond = [unsettled_us(samples) for samples in per_rank]
        least, most = sum(us <= -VOTE_US for us in beyond), sum(us <= VOTE_US for us in beyond)
    if entry["settled"] and 2 * most <= len(per_rank) or not entry["settled"] and 2 * least > len(per_rank):
        yield f".settled: {entry['settled']} published, {most} of {len(per_rank)} ranks are"
    drift = entry["health"].get("settle_drift")
    if drift is not None:
        found = late_over_early(per_rank[0])
        allowed = RESOLUTION_US + (1 + abs(found)) * TOLERANCE_US / max(min(per_rank[0]), RESOLUTION_US)
        if abs(drift - found) > allowed:
            yield f".health.settle_drift: {drift} published, the samples give {rounded(found)}"


def _comparable(stats: Document) -> dict[str, Any]:
    """Statistics as flat numbers; an interval is its two ends, or null."""
    flat = {name: stats[name] for name in ("n", "min", "p50", "p90", "p95", "p99", "max", "mean", "mad")}
    for name, interval in stats["intervals"].items():
        flat[f"intervals.{name}.low"] = interval.get("low")
        flat[f"intervals.{name}.high"] = interval.get("high")
    return flat


def _same(published: float | None, computed: float | None) -> bool:
    if published is None or computed is None:
        return published is computed
    return math.isclose(published, computed, rel_tol=1e-9, abs_tol=TOLERANCE_US)
