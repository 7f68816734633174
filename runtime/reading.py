"""Finding and reading results: execution folders (manifest.json, cells/*.json) below any number of folders.

One bad file never stops the others: whatever is truncated, foreign, tampered with, of a newer version or in
the wrong place becomes a `Problem`. Which cells were requested is asked of the manifests, never of the files
that happen to be there; a requested cell without a readable file is a `Record` that says so.
Of each document only a small `Record` is kept, so that memory grows with the number of cells, not of bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .consistency import MANIFEST_FACTS
from .errors import UserError
from .records import Broken, Record, Unusable, believe, load, record
from .types import MANIFEST_SCHEMA, RESULT_SCHEMA, Status

POOL_FROM = 800  # files; below it, starting processes costs more than it gains
CHUNK = 200  # files that one process reads at a time


class Problem(NamedTuple):
    """A file that cannot be used, or a contradiction between files."""

    path: str
    reason: str


class Execution(NamedTuple):
    """One manifest."""

    path: str
    name: str
    suite: str
    sku: str
    contract: str
    created_at: str
    complete: bool
    requested: int


@dataclass
class Reading:
    """Everything read: exactly one record for each requested cell, in the order of the manifests.

    provenance   (index of the execution, backend) -> the provenance block of its first measured cell
    """

    executions: list[Execution] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    provenance: dict[tuple[int, str], Mapping[str, Any]] = field(default_factory=dict)


class Job(NamedTuple):
    """A file to read. `cell_id` is what the manifest expects in it, None for a file it does not list.

    manifest   what it says of the whole execution (consistency.MANIFEST_FACTS); folder: where it lies
    """

    execution: int
    manifest: Mapping[str, str]
    folder: str
    path: str
    cell_id: str | None
    stands: str


def read(folders: Sequence[str | Path], processes: int | None = None) -> Reading:
    """Read every execution below `folders`. Raises UserError when one of them is not a folder.

    processes   that read at the same time; the default is one per available core, up to 8
    """
    reading = Reading()
    paths, reading.problems = find_executions([Path(folder) for folder in folders])
    jobs: list[Job] = []
    expected: list[tuple[int, str, str, str | None]] = []  # execution, cell id, state, path
    for path in paths:
        try:
            manifest = load(path / "manifest.json", "manifest", MANIFEST_SCHEMA)
        except Unusable as error:
            reading.problems += without_manifest(path, error)
            continue
        if problem := _copy(path, manifest, reading.executions):
            reading.problems.append(problem)
            continue
        cells, some_jobs = _jobs(path, len(reading.executions), manifest, reading.problems)
        jobs += some_jobs
        expected += cells
        names = ("suite", "sku", "contract", "created_at", "complete")
        facts = {name: manifest[name] for name in names}
        reading.executions.append(Execution(str(path), manifest["execution"], requested=len(cells), **facts))

    found: dict[tuple[int, str], Record] = {}
    reasons: dict[str, str] = {}
    requested = {(execution, cell_id) for execution, cell_id, _, _ in expected}
    for chunk in _chunks(jobs, processes):
        found.update(((one.execution, one.cell_id), one) for one in chunk.records)
        reasons.update((problem.path, problem.reason) for problem in chunk.problems)
        reading.problems += chunk.problems
        reading.provenance = {**chunk.provenance, **reading.provenance}
        for execution, cell_id, path in chunk.strays:
            second = (execution, cell_id) in requested
            reason = f"is a second record of {cell_id}" if second else f"is not in the manifest ({cell_id})"
            reading.problems.append(Problem(path, reason))
    for execution, cell_id, state, path in expected:
        one = found.get((execution, cell_id))
        reading.records.append(
            one or _missing(reading.executions[execution], execution, cell_id, state, path, reasons)
        )
    return reading


def find_executions(folders: Sequence[Path]) -> tuple[list[Path], list[Problem]]:
    """Folders that hold a manifest.json, sorted, each once; and cells/ folders without one beside them."""
    found: dict[Path, Path] = {}
    problems: list[Problem] = []
    for folder in folders:
        if not folder.exists():
            raise UserError(f"no folder {folder}", "give a folder that `cx run --out` wrote, or one above it")
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder", f"give the folder it lies in: {folder.parent}")
        if folder.resolve().name == "cells" and (folder / ".." / "manifest.json").is_file():
            raise UserError(f"{folder} is inside an execution folder", f"give {folder.resolve().parent}")

        def unreadable(error: OSError) -> None:
            problems.append(Problem(str(error.filename), f"cannot be read: {error.strerror}"))

        for here, subfolders, files in os.walk(folder, onerror=unreadable):
            path = Path(here)
            if "manifest.json" in files:
                found.setdefault(path.resolve(), path)
                subfolders.clear()
                continue
            if "cells" in subfolders:
                subfolders.remove("cells")
                problems.extend(without_manifest(path, None))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return sorted(found.values()), problems


def without_manifest(folder: Path, why: Unusable | None) -> list[Problem]:
    """The records of an execution whose manifest cannot be used, each by name, after the manifest itself;
    None: it is gone. Nobody knows what else was requested, so none of them is counted."""
    orphans = sorted((folder / "cells").glob("*.json"))
    if why is not None:
        problems = [Problem(str(folder / "manifest.json"), str(why))]
    elif orphans:
        problems = [Problem(str(folder / "cells"), "no manifest.json beside it says what was requested")]
    else:
        return []
    if orphans and (why is None or isinstance(why, Broken)):
        hint = "the command that made the folder, with --resume, makes it anew from the plan and the records"
        problems = [Problem(path, f"{reason}; {hint}") for path, reason in problems]
    return problems + [
        Problem(str(path), "is an orphan: no manifest tells that it was asked for") for path in orphans
    ]


def _copy(folder: Path, manifest: Mapping[str, Any], executions: Iterable[Execution]) -> Problem | None:
    for other in executions:
        if other.name == manifest["execution"]:
            said = f"execution {other.name} was already read from {other.path}; this copy is left out"
            return Problem(str(folder / "manifest.json"), said)
    return None


def _jobs(
    folder: Path, index: int, manifest: Mapping[str, Any], problems: list[Problem]
) -> tuple[list[tuple[int, str, str, str | None]], list[Job]]:
    """What a manifest expects, and every file there is: expected or not."""
    present = _cell_files(folder / "cells", problems)
    expected: dict[str, tuple[int, str, str, str | None]] = {}
    jobs, facts = [], {name: manifest[name] for name in MANIFEST_FACTS}
    for cell in manifest["cells"]:
        cell_id, name = cell["cell_id"], cell["file"] or f"cells/{cell['cell_id']}.json"
        if cell_id in expected:
            problems.append(Problem(str(folder / "manifest.json"), f"lists {cell_id} twice"))
            continue
        path = present.pop(name, None)
        expected[cell_id] = (index, cell_id, cell["status"], path)
        if path is not None:
            jobs.append(Job(index, facts, str(folder), path, cell_id, cell["status"]))
    jobs += [Job(index, facts, str(folder), path, None, "") for path in present.values()]
    return list(expected.values()), jobs


def _cell_files(folder: Path, problems: list[Problem]) -> dict[str, str]:
    """`cells/<name>.json` -> path. Hidden names are temporaries of the writer, left by a crash."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(Problem(str(folder), f"cannot be read: {error.strerror}"))
        return {}
    wanted = (name for name in names if name.endswith(".json") and not name.startswith("."))
    return {f"cells/{name}": os.path.join(folder, name) for name in wanted}


def _missing(
    execution: Execution, index: int, cell_id: str, state: str, path: str | None, reasons: Mapping[str, str]
) -> Record:
    """The record of a requested cell that left none."""
    if path is not None:
        reason = f"its record cannot be used: {reasons.get(path, 'it is not of this cell')}"
    elif state in ("pending", "not-run"):
        after = "" if execution.complete else "; the execution did not complete"
        reason = f"it left no record{after}"
    else:
        reason = f"its record is missing, although the manifest says {state}"
    case_id, _, run = cell_id.rpartition(".r")
    where = path or os.path.join(execution.path, "cells", f"{cell_id}.json")
    number = int(run) if run.isdecimal() else 0
    return Record(index, where, cell_id, case_id or cell_id, number, Status.NOT_RUN, reason)


@dataclass
class Chunk:
    """What some files said. strays: (execution, cell id, path) of results that no manifest lists."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    provenance: dict[tuple[int, str], Mapping[str, Any]] = field(default_factory=dict)
    strays: list[tuple[int, str, str]] = field(default_factory=list)


def _chunks(jobs: Sequence[Job], processes: int | None) -> Iterator[Chunk]:
    """Read the files, in other processes when there are many. Their order is that of the jobs."""
    chunks = [jobs[at : at + CHUNK] for at in range(0, len(jobs), CHUNK)]
    processes = min(processes or min(cores(), 8), len(chunks))
    if len(jobs) < POOL_FROM or processes < 2:
        yield from map(read_chunk, chunks)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Spawned, not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(read_chunk, chunks)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_chunk(jobs: Sequence[Job]) -> Chunk:
    """Read some files; runs in a process of its own."""
    chunk = Chunk()
    for job in jobs:
        try:
            document = load(Path(job.path), "result", RESULT_SCHEMA)
            if job.cell_id is None:
                chunk.strays.append((job.execution, document["identity"]["cell_id"], job.path))
                continue
            one = record(document, job.execution, job.manifest["execution"], job.path, job.cell_id)
            believe(document, job.manifest, job.folder)
        except Unusable as error:
            chunk.problems.append(Problem(job.path, str(error)))
            continue
        if job.stands not in ("pending", document["status"]):
            reason = f"says {document['status']}, its manifest says {job.stands}"
            chunk.problems.append(Problem(job.path, reason))
        chunk.records.append(one)
        if document["provenance"]:
            chunk.provenance.setdefault((job.execution, one.backend), document["provenance"])
    return chunk
