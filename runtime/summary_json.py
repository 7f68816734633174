"""The JSON form of a summary.

Its `schema` is "collectivex.summary.v1" (times in microseconds, bandwidths in GB/s, 1 GB = 1e9 bytes):

    contract, percentile            of this CollectiveX; what `us` is: p50, p90, p95, p99, mean or max
    gate            exit_code, because, requested, counts {status: cells}, problems
    executions      path, name, suite, sku, contract, created_at, complete, requested
    tables          group {family, name, shape, dtype, routing, seed, mode, ranks, nodes, topology_class,
                    regime, contract}, component, headline, formula, lines
      lines         at (bytes or tokens per rank), comparison_key, entries
        entries     label, backend, variant, sku, execution, knobs, case_id, cells, status, reason, runs,
                    measured_runs, us, us_reason, interval [low, high], interval_reason, inference, p99_us,
                    p99_reason, mean_us, max_us, over_ranks {min, spread}, GBps {formula: value}, bandwidth
                    {formula: {per_rank, aggregate}}, share, limit {name, GBps, kind, source}, contract_only,
                    settled, standing, ratio
    not_ok          status, reason, cells
    warnings        text, cells
    problems        path, reason

A time or interval that the samples cannot give is null, and its reason says why: a percentile above the
median needs as many samples as its interval does. over_ranks has the minimum over ranks and the spread (the
maximum minus it), at the percentile of `us`. GBps is at `us` and as the formula's source quotes it, a rank's
mean or the total; bandwidth has both, per_rank (the mean over ranks) and aggregate, each at_us, at_mean and
at_max: over `us`, and over the mean and the maximum of a run's iterations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .bandwidth import shared_out
from .tables import Entry, Table
from .types import CONTRACT

if TYPE_CHECKING:
    from .summary import Summary

SUMMARY_SCHEMA = "collectivex.summary.v1"


def to_json(summary: Summary) -> dict[str, Any]:
    """The whole document; see the docstring of this module."""
    verdict = summary.verdict
    return {
        "schema": SUMMARY_SCHEMA,
        "contract": CONTRACT,
        "percentile": summary.percentile,
        "gate": {
            "exit_code": verdict.exit_code,
            "because": verdict.because,
            "requested": verdict.requested,
            "counts": verdict.counts,
            "problems": verdict.problems,
        },
        "executions": [execution._asdict() for execution in summary.executions],
        "tables": [_table_json(table) for table in summary.tables],
        "not_ok": [
            {"status": str(note.status), "reason": note.text, "cells": list(note.cells)}
            for note in summary.not_ok
        ],
        "warnings": [{"text": note.text, "cells": list(note.cells)} for note in summary.warnings],
        "problems": [problem._asdict() for problem in summary.problems],
    }


def _table_json(table: Table) -> dict[str, Any]:
    of_table = [
        {
            "at": line.at,
            "comparison_key": line.key,
            "entries": [_entry_json(entry, table.group.ranks) for entry in line.entries],
        }
        for line in table.lines
    ]
    return {
        "group": table.group._asdict(),
        "component": table.component,
        "headline": table.headline,
        "formula": table.formula,
        "lines": of_table,
    }


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """A document as text, an item of its lists a line: `indent` would be a slow encoder for many numbers."""

    def encoded(value: Any) -> str:
        return json.dumps(value, allow_nan=False)

    for opening, (name, value) in zip(["{", *[","] * len(document)], document.items(), strict=False):
        items = ",\n".join(map(encoded, value)) if isinstance(value, list) else None
        text = encoded(value) if items is None else f"[\n{items}\n]"
        yield f"{opening}{encoded(name)}: {text}"
    yield "}"


def _bandwidth(entry: Entry, ranks: int) -> Mapping[str, Any] | None:
    """formula -> per rank and in all -> GB/s over the time shown, the mean and the maximum."""
    if entry.us_GBps is None:
        return None
    over = {"at_us": entry.us, "at_mean": entry.mean_us, "at_max": entry.max_us}
    return {
        name: {
            whose: {at: rate / us if us else None for at, us in over.items()}
            for whose, rate in shared_out(name, quoted, ranks).items()
        }
        for name, quoted in entry.us_GBps.items()
    }


def _entry_json(entry: Entry, ranks: int) -> Mapping[str, Any]:
    way = entry.way
    return {
        "label": entry.label,
        "backend": way.backend,
        "variant": way.variant,
        "sku": way.sku,
        "execution": way.execution,
        "knobs": dict(way.knobs),
        "case_id": entry.case_id,
        "cells": list(entry.cells),
        "status": str(entry.status),
        "reason": entry.reason,
        "runs": entry.runs,
        "measured_runs": entry.measured_runs,
        "us": entry.us,
        "us_reason": entry.us_reason,
        "interval": entry.interval,
        "interval_reason": entry.interval_reason,
        "inference": entry.inference,
        "p99_us": entry.p99_us,
        "p99_reason": entry.p99_reason,
        "mean_us": entry.mean_us,
        "max_us": entry.max_us,
        "over_ranks": entry.over_ranks,
        "GBps": entry.GBps,
        "bandwidth": _bandwidth(entry, ranks),
        "share": entry.share,
        "limit": entry.limit._asdict() if entry.limit else None,
        "contract_only": entry.contract_only,
        "settled": entry.settled,
        "standing": entry.standing,
        "ratio": entry.ratio,
    }
