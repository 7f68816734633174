"""Execution folders of which everything is true that can be worked out again, and what changes them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory

from collectivex.runtime import counts, document, routing, stats, validate
from collectivex.runtime.bandwidth import moe_bytes
from collectivex.runtime.types import Case, Moe, Series
from collectivex.runtime.writing import write_samples

Change = Callable[[dict[str, Any]], None]


def result(case: Case, folder: Path, **fields: Any) -> dict[str, Any]:
    """A result whose statistics are those of the samples in its sidecar, and whose counts are its case's."""
    made = factory.result(case, **fields)
    if isinstance(case.shape, Moe) and made["measurements"]:
        table = routing.build(case.shape, case.ranks)
        made["bytes"] = moe_bytes(case.shape, counts.count(table, case.shape, [0] * case.ranks))
        made["routing_proof"] |= {"hash": table.hash, **counts.summary(table, case.shape, case.ranks)}
    random_us, entries, measurements = random.Random(case.id), [], []
    for m in made["measurements"]:
        per_rank = [[round(random_us.uniform(40, 60), 3) for _ in range(64)] for _ in range(case.ranks)]
        series = series_of(m, per_rank)
        topology = made["identity"]["topology_class"]
        measurements.append(document.measurement(case, topology, series, per_rank))
        entries.append(document.sidecar_entry(series, per_rank))
    made["measurements"] = measurements
    if measurements:
        made["samples"] = write_samples(folder, made["identity"]["cell_id"], entries)
    return made


def series_of(m: dict[str, Any], per_rank: list[list[float]]) -> Series:
    """What measure.py makes of these samples, on rank 0."""
    floor = m["component"].endswith("_floor")
    drift = {"settle_drift": stats.late_over_early(per_rank[0])} if m["headline"] == "median" else {}
    return Series(
        m["component"],
        m["regime"],
        m["headline"],
        per_rank[0],
        per_sample=m["per_sample"],
        trials=2 if floor else 8,
        settled=2 * sum(map(stats.settled, per_rank)) > len(per_rank),
        health=drift,
    )


def execution(folder: Path) -> Path:
    """A collective, an exchange, and a cell that cannot run."""
    made = [
        result(factory.collective_case(), folder),
        result(factory.moe_case(), folder),
        result(factory.moe_case(variant="other"), folder, status="unsupported", reason="it cannot"),
    ]
    return factory.execution(folder, made)


def cell(folder: Path, part: str) -> Path:
    """The record whose name contains `part`."""
    (path,) = (p for p in (folder / "cells").iterdir() if part in p.name)
    return path


def rewrite(path: Path, change: Change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def said(folder: Path, published: bool = False) -> list[str]:
    return [f"{Path(p.path).name}: {p.reason}" for p in validate.execution(folder, published)]
