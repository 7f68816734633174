"""Valid result documents and whole execution folders, for the tests of everything that reads results.

Latencies follow a simple model (a start-up cost plus bytes over a bandwidth) with seeded noise, so that the
tables and figures made from them look like real ones. Nothing here is a measurement.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from collectivex.runtime import bandwidth
from collectivex.runtime.types import (
    CONTRACT,
    DTYPE_BYTES,
    MANIFEST_SCHEMA,
    RESULT_SCHEMA,
    Case,
    Cell,
    Collective,
    Moe,
    Routing,
    case_to_json,
    comparison_key,
)

EXECUTION = "20261120-101500-smoke"
TOPOLOGY = "h200-nvlink"
LIMITS = [
    {
        "name": "scale-up",
        "GBps": 450.0,
        "kind": "datasheet",
        "source": "NVIDIA H200 datasheet: NVLink 900 GB/s",
    }
]
COMPONENTS = {
    ("collective", "fresh"): {"call": "max"},
    ("collective", "chained"): {"call": "median"},
    ("moe", "fresh"): {"dispatch": "max", "combine": "max", "roundtrip": "max"},
    ("moe", "chained"): {"roundtrip": "median", "dispatch_floor": "min", "combine_floor": "min"},
}


def collective_case(
    op: str = "all_reduce",
    size: int = 1 << 20,
    dtype: str = "float32",
    backend: str = "torch_dist",
    **fields: Any,
) -> Case:
    """One collective; `fields` are those of `Case`."""
    fields = {"variant": "", "mode": "out-of-place", "ranks": 4, **fields}
    return Case(backend=backend, shape=Collective(op, size, dtype), **fields)


def moe_case(tokens: int = 128, dtype: str = "bf16", routing: Routing | None = None, **fields: Any) -> Case:
    """One DeepSeek-V3-like exchange; `fields` are those of `Case`."""
    fields = {"backend": "torch_dist", "variant": "full", "mode": "normal", "ranks": 4, **fields}
    shape = Moe("deepseek-v3", 7168, 8, 256, tokens, dtype, routing or Routing())
    return Case(shape=shape, **fields)


def stats(center_us: float, n: int = 512, spread: float = 0.02) -> dict[str, Any]:
    """One statistics block round `center_us`; a percentile's interval is null where n is too small."""
    p = {
        name: center_us * (1 + spread * z)
        for name, z in (("p50", 0), ("p90", 1.3), ("p95", 1.7), ("p99", 2.4))
    }
    needs = {"p50": 6, "p90": 36, "p95": 72, "p99": 368}
    intervals: dict[str, Any] = {}
    for name, value in p.items():
        half = value * spread * 2 / math.sqrt(n)
        if n >= needs[name]:
            intervals[name] = {"low": value - half, "high": value + half}
        else:
            intervals[name] = {"null": f"{name} needs {needs[name]} samples, has {n}"}
    return {
        "n": n,
        "min": center_us * (1 - 2 * spread),
        **p,
        "max": center_us * (1 + 4 * spread),
        "mean": center_us * (1 + 0.1 * spread),
        "mad": center_us * spread * 0.67,
        "cv": spread,
        "intervals": intervals,
        "outliers": {"count": 0, "largest": None, "indices": []},
    }


def measurement(
    case: Case,
    component: str,
    regime: str,
    us: float,
    headline: str = "max",
    topology: str = TOPOLOGY,
    n: int = 512,
    contract: str = CONTRACT,
) -> dict[str, Any]:
    """One component in one regime whose headline p50 is `us`."""
    centers = {"max": us, "median": us, "min": us, "spread": us * 0.05}
    if headline == "max":
        centers |= {"median": us * 0.97, "min": us * 0.95}
    elif headline == "min":
        centers |= {"median": us * 1.03, "max": us * 1.05}
    return {
        "component": component,
        "regime": regime,
        "comparison_key": comparison_key(case, regime, topology, contract),
        "unit": "us",
        "headline": headline,
        "per_sample": 1 if headline == "max" else 8,
        "trials": 8,
        **{name: stats(center, n) for name, center in centers.items()},
        "settled": True,
        "stop_reason": "complete",
        "health": {} if regime == "fresh" else {"settle_drift": 0.004},
    }


def expected_us(case: Case, component: str, speed: float = 1.0) -> float:
    """The model: a start-up cost plus bytes over a bandwidth, in microseconds."""
    if isinstance(case.shape, Collective):
        factor = 2 * (case.ranks - 1) / case.ranks if case.shape.op == "all_reduce" else 1.0
        return (12.0 + case.shape.bytes * factor / 330e3) / speed
    rows = case.shape.tokens * min(case.shape.topk, case.ranks - 1)
    payload = rows * case.shape.hidden * (DTYPE_BYTES[case.shape.dtype] if "dispatch" in component else 2)
    one = 35.0 + payload / 240e3
    return (2.1 if component == "roundtrip" else 1.0) * one * (0.8 if "floor" in component else 1.0) / speed


def bytes_block(case: Case) -> dict[str, Any]:
    """Byte facts of the right form: every token reaches every rank, with its picks spread evenly."""
    shape = case.shape
    if isinstance(shape, Collective):
        return bandwidth.collective_bytes(shape, case.ranks)
    own, per_node = shape.tokens, case.ranks // case.nodes
    rows = {"self": own, "scale_up": own * (per_node - 1), "scale_out": own * (case.ranks - per_node)}
    picks = {tier: count * shape.topk // case.ranks for tier, count in rows.items()}
    rank = {
        "tokens": own,
        "selections": own * shape.topk,
        "rows_sent": rows,
        "rows_received": rows,
        "selections_sent": picks,
        "selections_received": picks,
        "node_rows_sent": {"own": own, "other": own * (case.nodes - 1)},
    }
    return bandwidth.moe_bytes(shape, [rank] * case.ranks)


def provenance(case: Case) -> dict[str, Any]:
    """Every optional field of the schema, with made-up values."""
    gpu = {"name": "NVIDIA H200", "arch": "sm_90", "memory_bytes": 150754820096, "sms": 132}
    clock = {"sm_mhz": 1980.0, "memory_mhz": 3201.0, "power_w": 210.5, "throttle": "none"}
    lib = {"name": "nccl", "version": "2.28.9", "build_version": "2.28.9", "path": "/usr/lib/libnccl.so.2"}
    return {
        "collectivex": {
            "version": "0.1.0",
            "git_commit": "0123456789abcdef0123456789abcdef01234567",
            "git_dirty": False,
        },
        "python": "3.12.3",
        "torch": "2.11.0+cu130",
        "platform": "Linux-6.8-x86_64",
        "host": "00112233aabb",
        "hosts": ["00112233aabb"],
        "boot": "ddeeff001122",
        "cpu": {"model": "Xeon", "cores": 64},
        "gpus": [gpu] * case.ranks,
        "driver": "580.95.05",
        "cuda": "13.0",
        "rocm": None,
        "libraries": [
            lib,
            {**lib, "name": "cuda runtime", "version": "13.0.96", "path": "/usr/lib/libcudart.so.13"},
        ],
        "backend": {
            "name": case.backend,
            "source": "bundled",
            "pin": "0.1.0",
            "versions": {"torch": "2.11.0"},
        },
        "image": None,
        "environment": {"NCCL_DEBUG": "WARN"},
        "links": {"kind": "NVLink", "per_gpu": 18},
        "clocks": {"before": [clock] * case.ranks, "after": [clock] * case.ranks},
        "scheduler": None,
        "nics": [],
    }


def result(
    case: Case | None = None,
    *,
    run: int = 0,
    runs: int = 1,
    status: str = "ok",
    reason: str | None = None,
    us: float | Mapping[str, float] | None = None,
    speed: float = 1.0,
    execution: str = EXECUTION,
    topology: str = TOPOLOGY,
    n: int = 512,
    contract: str = CONTRACT,
    **overrides: Any,
) -> dict[str, Any]:
    """One valid result document.

    us          the headline p50 of every component, or of each by name; the default follows `expected_us`
    overrides   replace top-level fields; a mapping is merged into the mapping that is there
    """
    case = case or collective_case()
    cell = Cell(case, run)
    measured = status in ("ok", "implausible")
    noise = 1 + random.Random(cell.id).gauss(0, 0.004)
    measurements = []
    for regime in case.regimes if measured else ():
        for component, headline in COMPONENTS[case.family, regime].items():
            value = us[component] if isinstance(us, Mapping) else us
            value = expected_us(case, component, speed) * noise if value is None else value
            measurements.append(measurement(case, component, regime, value, headline, topology, n, contract))
    moe = isinstance(case.shape, Moe)
    sha = hashlib.sha256(cell.id.encode()).hexdigest()
    document = {
        "schema": RESULT_SCHEMA,
        "contract": contract,
        "identity": {
            "cell_id": cell.id,
            "case_id": case.id,
            "run": run,
            "suite": "smoke",
            "sku": "h200x4-nvlink",
            "topology_class": topology,
            "execution": execution,
            "allocation": execution,
            "created_at": "2026-11-20T10:15:00Z",
        },
        "case": case_to_json(case),
        "status": status,
        "reason": reason if reason or status == "ok" else f"{case.backend}: {status}, as the test asked",
        "measurements": measurements,
        "correctness": _correctness(status),
        "first_call_us": 900.0 if measured else None,
        "bytes": bytes_block(case) if measured else None,
        "routing_proof": _routing_proof(case) if moe and measured else None,
        "knobs": {name: {"requested": value, "realised": value} for name, value in case.knobs},
        "backend": {
            "layout": "token-rank" if moe else None,
            "combine": "rank-sum" if moe else None,
            "casts": "final" if moe else None,
            "paired": False,
            "graph_safe": False,
            "validated": "hardware",
            "window": dict.fromkeys(("dispatch", "combine"), "the whole call")
            if moe
            else {"call": "the whole call"},
        },
        "timing_split": {"start_s": 2.1, "setup_s": 0.4, "warmup_s": 0.2, "measured_s": 1.5, "total_s": 4.4},
        "provenance": provenance(case) if measured else None,
        "design": {
            "runs": runs,
            "order": "declared",
            "position": 0,
            "inference": "runs" if runs > 2 else "none",
        },
        "failure": None,
        "teardown": None,
        "limits": LIMITS if measured else None,
        "warnings": [],
        "samples": {"file": f"samples/{sha}.json.gz", "sha256": sha} if measured else None,
    }
    for name, value in overrides.items():
        document[name] = (
            {**document[name], **value} if isinstance(document.get(name), dict) and value else value
        )
    return document


def _correctness(status: str) -> dict[str, Any] | None:
    if status not in ("ok", "implausible", "incorrect"):
        return None
    good = status != "incorrect"
    detail = None if good else "rank 2, row 17: expected 3.5, found 0.0"
    checks = [
        {"name": "payload", "phase": "before", "passed": good, "calls": 1, "detail": detail},
        {"name": "payload", "phase": "after", "passed": True, "calls": 1, "detail": None},
    ]
    return {"passed": good, "checks": checks}


def _routing_proof(case: Case) -> dict[str, Any]:
    facts = hashlib.sha256(repr(case.shape).encode()).hexdigest()
    return {
        "hash": facts,
        "equal_across_ranks": True,
        "mean_distinct_ranks": 3.6,
        "expert_load_max_over_mean": 1.4,
    }


def failure(ranks: int = 4, phase: str = "fresh dispatch") -> dict[str, Any]:
    """What the watchdog writes: where every rank was."""
    stack = 'File "torch_dist.py", line 88 in dispatch\nFile "worker.py", line 12 in main'
    where = [
        {"rank": r, "phase": phase, "iteration": 7, "alive": True, "stack": stack, "stderr": None}
        for r in range(ranks)
    ]
    return {"phase": phase, "exit_code": None, "signal": "SIGKILL", "ranks": where}


def execution(
    folder: Path,
    results: Iterable[Mapping[str, Any]],
    *,
    missing: Sequence[str] = (),
    samples: bool = True,
    **manifest: Any,
) -> Path:
    """Write an execution folder with these results and return it.

    missing   cell ids that the manifest lists and that have no file
    samples   also write a sidecar for each result that names one, unless it is there: of the right length,
              and neither of its name nor of its statistics
    manifest  replaces fields of the manifest
    """
    documents = list(results)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    cells = []
    for document in documents:
        cell_id = document["identity"]["cell_id"]
        name = f"cells/{cell_id}.json"
        (folder / name).write_text(json.dumps(document, indent=1) + "\n")
        cells.append({"cell_id": cell_id, "status": document["status"], "file": name})
        path = folder / document["samples"]["file"] if document["samples"] else None
        if samples and path is not None and not path.exists():
            path.parent.mkdir(exist_ok=True)
            n = sum(m["max"]["n"] for m in document["measurements"])
            path.write_bytes(sidecar(n * document["case"]["ranks"]))
    cells += [{"cell_id": cell_id, "status": "pending", "file": None} for cell_id in missing]
    head = documents[0]["identity"] if documents else {}
    body = {
        "schema": MANIFEST_SCHEMA,
        "contract": documents[0]["contract"] if documents else CONTRACT,
        "execution": head.get("execution", EXECUTION),
        "created_at": "2026-11-20T10:15:00Z",
        "updated_at": "2026-11-20T10:19:00Z",
        "suite": head.get("suite", "smoke"),
        "sku": head.get("sku", "h200x4-nvlink"),
        "command": ["cx", "run", "--suite", "smoke"],
        "complete": not missing,
        "cells": cells,
        **manifest,
    }
    (folder / "manifest.json").write_text(json.dumps(body, indent=1) + "\n")
    return folder


@lru_cache
def sidecar(samples: int) -> bytes:
    """A compressed document with that many samples."""
    series = [{"component": "made up", "regime": "fresh", "per_rank_us": [[40.125] * samples]}]
    text = json.dumps({"schema": "collectivex.samples.v1", "cell_id": "made up", "series": series})
    return gzip.compress(text.encode(), mtime=0)


def suite_results(runs: int = 1, execution: str = EXECUTION) -> list[dict[str, Any]]:
    """A small, varied suite: two backends, a size sweep, an MoE ladder, and one cell of every bad status."""
    documents = []
    for run in range(runs):
        common: dict[str, Any] = {"run": run, "runs": runs, "execution": execution}
        for backend, speed in (("torch_dist", 1.0), ("symm_mem", 1.3)):
            for power in (10, 16, 22, 28):
                documents.append(
                    result(collective_case(size=1 << power, backend=backend), speed=speed, **common)
                )
        for variant, speed in (("full", 0.7), ("dedup", 1.0)):
            for tokens in (1, 128, 512, 1024, 4096):
                case = moe_case(tokens, variant=variant)
                documents.append(result(case, speed=speed, **common))
        unlike = replace(moe_case(128, dtype="fp8"), backend="deepep", variant="expand")
        for status in ("incorrect", "failed", "timeout", "infra", "unsupported", "not-run"):
            case = replace(unlike, variant=f"expand-{status}")
            extra = {"failure": failure()} if status == "timeout" else {}
            documents.append(result(case, status=status, **common, **extra))
    return documents
