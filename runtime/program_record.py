"""Records of external programs: what their answers become. Written by the runner (program.py), in the form
that document.py knows. Standard library only.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends.base import Answer, Ended, Program, Start
from . import document, environment, provenance
from .document import Place
from .scrub import scrub
from .types import Cell, Status
from .writing import write_bytes, write_result, write_samples

TAIL = 4000  # characters of a failed process's output that go into its records


@dataclass
class Site:
    """What records need to know of their execution.

    image      of the container that we are in, as provenance carries it
    hosts      of a program over several nodes: the hash of every rank's
    described  of the machine, once for the group
    """

    out: Path
    place: Place
    positions: Mapping[str, int]
    key: str
    image: Mapping[str, str | None] | None = None
    hosts: Sequence[str] = ()
    described: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One process, from its start to its end, with what it left behind. `environ` is what it inherited."""

    start: Start
    ended: Ended
    start_s: float
    environ: Mapping[str, str]
    clocks: dict[str, Any] = field(default_factory=dict)


def keep(program: Program, path: Path) -> None:
    """Programs write their whole environment down: such a file stays only without it."""
    kept = program.keep(path.read_text(errors="replace"))
    if kept is None:
        path.unlink()
    else:
        write_bytes(path, kept.encode())


def write(cell: Cell, answer: Answer, run: Run | None, program: Program, site: Site) -> None:
    """The one record of a cell."""
    if answer.status in (Status.OK, Status.INCORRECT) and run is not None:
        result = result_of(cell, answer, run, program, site)
    else:
        assert answer.reason is not None
        position = site.positions[cell.id]
        reason = scrub(answer.reason)
        result = document.empty(cell, site.place, answer.status, reason, position, program.facts)
        result["failure"] = run and failure(run)
    write_result(site.out, cell.id, result)


def failure(run: Run) -> dict[str, Any]:
    """The evidence: exit code or signal, and the end of what was printed."""
    code = run.ended.returncode
    named = signal.Signals(-code).name if -code in list(signal.Signals) else None
    process = {
        "rank": 0,
        "phase": run.start.name,
        "iteration": None,
        "alive": run.ended.timed_out is not None,
        "stack": None,
        "stderr": scrub(run.ended.stdout[-TAIL:]) or None,
    }
    return {
        "phase": run.start.name,
        "exit_code": code if code >= 0 else None,
        "signal": named,
        "ranks": [process],
    }


def result_of(cell: Cell, answer: Answer, run: Run, program: Program, site: Site) -> dict[str, Any]:
    """The result of a cell whose process ran to its end: measured, or found to be wrong."""
    place, case = site.place, cell.case
    position = site.positions[cell.id]
    result = document.empty(cell, place, answer.status, answer.reason, position, program.facts)
    result["correctness"] = document.correctness(answer.checks)
    result["bytes"] = answer.bytes
    result["timing_split"] = {"start_s": round(run.start_s, 4)}
    result["provenance"] = _provenance(answer, run, program, site)
    result["warnings"] = [scrub(warning) for warning in answer.warnings]
    result["warnings"] += provenance.findings({"clocks": run.clocks})
    result["knobs"] = document.knobs(dict(case.knobs), answer.realised)
    unlike = document.not_applied(result)
    if answer.status is Status.OK and (unlike or not result["correctness"]["passed"]):
        why = f"{unlike[0]}: was not applied as asked" if unlike else "nothing was checked"
        result["status"], result["reason"] = str(Status.INCORRECT), why
    if result["status"] != str(Status.OK):
        return result
    found = [(series, [series.samples_us]) for series in answer.series]
    document.measure(result, case, place, found, result["provenance"]["environment"])
    entries = [document.sidecar_entry(*one) for one in found]
    result["samples"] = write_samples(site.out, cell.id, entries)
    return result


def _provenance(answer: Answer, run: Run, program: Program, site: Site) -> dict[str, Any]:
    """The machine as this process sees it; libraries and settings as the program had them, not we."""
    if not site.described:
        site.described.update(provenance.describe(program.facts, {}, site.key, site.image))
    found = dict(site.described)
    found["backend"] = {**found["backend"], "versions": dict(answer.versions)}
    case = run.start.cases[0]
    found["hosts"] = [found["host"]] * case.ranks if case.nodes == 1 else list(site.hosts)
    found["torch"] = found["cuda"] = found["rocm"] = None
    found["libraries"] = [
        {"name": name, "version": version, "build_version": built, "path": None}
        for name, (version, built) in answer.libraries.items()
    ]
    environ = {**run.environ, **run.start.env}
    found["environment"] = environment.communication_settings(site.key, environ)
    return {**found, "clocks": run.clocks}
