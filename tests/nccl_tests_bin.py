"""A folder of fake nccl-tests binaries for a PATH; see nccl_tests_fake.py."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FAKE = Path(__file__).resolve().with_name("nccl_tests_fake.py")
PROGRAMS = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "broadcast", "reduce", "sendrecv")
PROGRAMS += ("gather", "scatter", "alltoallv", "hypercube")


def install(folder: Path, suffix: str = "", programs: Iterable[str] = PROGRAMS) -> Path:
    """Write the binaries and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in programs:
        path = folder / f"{name}_perf{suffix}"
        words = shlex.join([sys.executable, "-S", "-E", str(FAKE), f"{name}_perf"])
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        path.chmod(0o755)
    return folder


def environ(folder: Path, version: str = "2.19.6", **plan: Any) -> dict[str, str]:
    """The environment of a run with these binaries: `plan` is fault, at, json, record."""
    said = {"version": version, **plan}
    return {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), "CX_FAKE": json.dumps(said)}
