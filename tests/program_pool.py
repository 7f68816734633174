"""Pools of machines without GPUs, and suites for launches of an external program there; see cpu_tests/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nccl_tests_bin as fakes

FOLDER = Path(__file__).resolve().parent / "cpu_tests"  # for PYTHONPATH
POOL = """\
schema: collectivex.sku.v1
name: {name}
title: four ranks of a test on each node
vendor: cpu
arch: null
product: test
gpus_per_node: 0
max_nodes: 2
scale_up: null
scale_out: null
limits: []
refuse: []
"""
SUITE = """\
schema: collectivex.suite.v1
name: sweep
description: a small sweep
runs: 1
order: declared
deadline_s: {deadline}
sampling: {{warmup_iterations: 1, warmup_s: 0, trials: 2, iterations: 4}}
groups:
  - family: collective
    backends: [{backend}]
    ops: [all_reduce]
    dtypes: [float32]
    sizes: [1KiB, 4KiB, 16KiB]
    modes: [out-of-place]
    regimes: [{regimes}]
"""


def suite(backend: str, regimes: str = "fresh, chained", deadline: int = 2) -> str:
    """The text of a suite with a cell for 1 KiB, 4 KiB and 16 KiB, which one process measures."""
    return SUITE.format(backend=backend, regimes=regimes, deadline=deadline)


def write_suite(folder: Path, deadline: int = 2) -> str:
    """Path of that suite for the backend of these pools."""
    path = folder / "sweep.yaml"
    path.write_text(suite("cpu_tests", deadline=deadline))
    return str(path)


def write_pool(folder: Path, name: str, **more: object) -> str:
    """Path of a SKU. `more`: keys that the mechanism needs; what the ranks need is in its `env`."""
    path = folder / f"{name}.yaml"
    keys = {"image": None, "env": {"PYTHONPATH": str(FOLDER)}, **more}
    path.write_text(POOL.format(name=name) + "".join(f"{k}: {json.dumps(v)}\n" for k, v in keys.items()))
    return str(path)


def install(libraries: Path, **plan: Any) -> None:
    """Prepared binaries that behave like `plan` says; see nccl_tests_fake.py."""
    binaries = fakes.install(libraries / "nccl_tests" / "bin")
    said = {"set": {"CX_FAKE": fakes.environ(binaries, **plan)["CX_FAKE"]}}
    (libraries / "cpu_tests").mkdir(exist_ok=True)
    (libraries / "cpu_tests" / "environment.json").write_text(json.dumps(said))
