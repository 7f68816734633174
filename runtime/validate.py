"""`cx validate`: whether result folders can be believed: schema, ids, hashes, statistics, completeness."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import consistency, recheck, recount
from .errors import UserError
from .reading import Problem, find_executions, without_manifest
from .records import Unusable, load
from .scrub import folders as folders_in
from .types import MANIFEST_SCHEMA, RESULT_SCHEMA, case_from_json

# What an execution folder consists of; logs only where they were written.
_PARTS = re.compile(
    r"manifest\.json|report\.html|README\.md|cells/[^/]+\.json|samples/[0-9a-f]{64}\.json\.gz"
    r"|figures/(?:[^/]+/)*[^/]+\.(?:png|svg)"
)
_LOGS = re.compile(r"logs/.+")


def command(args: argparse.Namespace) -> int:
    """Print every problem as `path: problem`. 0: all valid, 1: some are not. UserError: nothing is there."""
    given = [Path(folder) for folder in args.dirs]
    executions, problems = find_executions(given)
    if not executions and not problems:
        hint = "give a folder that `cx run --out` wrote, or one above it"
        raise UserError(f"no results under {', '.join(map(str, given))}", hint)
    results, notes = 0, set[str]()
    for folder in executions:
        results += sum(1 for _ in (folder / "cells").glob("*.json"))
        problems += execution(folder, args.published, notes)
    if args.published:
        problems += [Problem(str(p), "is no part of a result") for p in _outside(given, executions)]
    for problem in problems:
        print(f"{problem.path}: {problem.reason}")
    for note in sorted(notes):
        print(f"note: {note}", file=sys.stderr)
    verdict = f"{len(problems)} problems" if problems else "all valid"
    print(f"{results} results in {len(executions)} executions: {verdict}", file=sys.stderr)
    return 1 if problems else 0


def execution(folder: Path, published: bool = False, notes: set[str] | None = None) -> list[Problem]:
    """Everything wrong with one execution folder: its files, its manifest, and every result in it.

    published    logs, folders of the machine, and cells that are pending, are problems too
    notes        gets what could not be worked out here, in sentences
    """
    problems = [Problem(str(path), what) for path, what in _foreign(folder, published)]
    manifest = None
    try:
        manifest = load(folder / "manifest.json", "manifest", MANIFEST_SCHEMA)
    except Unusable as error:
        problems += without_manifest(folder, error)
    documents: dict[str, Mapping[str, Any]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            document = load(path, "result", RESULT_SCHEMA)
        except Unusable as error:
            problems.append(Problem(str(path), str(error)))
            documents[path.name] = {}
            continue
        documents[path.name] = document
        problems += [Problem(str(path), what) for what in _one(path, document, folder)]
        untold = recount.untold(document, case_from_json(document["case"]))
        if notes is not None and untold is not None:
            notes.add(untold)
        if published:
            named = folders_in(path.read_text())
            problems += [Problem(str(path), f"names a folder of the machine: {name}") for name in named]
    if manifest is not None:
        problems += [Problem(str(folder / "manifest.json"), what) for what in _manifest(manifest, documents)]
    return problems + [Problem(str(path), "belongs to no result") for path in _orphans(folder, documents)]


def _one(path: Path, document: Mapping[str, Any], folder: Path) -> Iterator[str]:
    if path.stem != document["identity"]["cell_id"]:
        yield f"identity.cell_id: is {document['identity']['cell_id']}, not the name of the file"
    yield from recheck.result(document, folder)


def _manifest(manifest: Mapping[str, Any], documents: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Each requested cell has exactly one record, and it is the record of this execution."""
    listed: set[str] = set()
    pending = 0
    runs = 1 + max((_run(cell["cell_id"]) for cell in manifest["cells"]), default=0)
    for cell in manifest["cells"]:
        cell_id = cell["cell_id"]
        name = f"{cell_id}.json"
        if name in listed:
            yield f"lists {cell_id} twice"
            continue
        listed.add(name)
        if cell["status"] == "pending":
            pending += 1
            yield f"{cell_id} is pending: it has no record"
        elif cell["file"] != f"cells/{name}":
            yield f"{cell_id}: its file is called {cell['file']}"
        elif name not in documents:
            yield f"{cell_id} is {cell['status']}, but cells/{name} is missing"
        elif documents[name]:
            yield from _agree(manifest, cell, documents[name])
            said = documents[name]["design"]["runs"]
            if said != runs:
                yield f"{cell_id}: its record says that there are {said} runs, not {runs}"
    if manifest["complete"] != (pending == 0):
        yield f"complete: says {manifest['complete']} with {pending} cells pending"
    for name in documents.keys() - listed:
        yield f"does not list cells/{name}"


def _run(cell_id: str) -> int:
    run = cell_id.rpartition(".r")[2]
    return int(run) if run.isdecimal() else 0


def _agree(
    manifest: Mapping[str, Any], cell: Mapping[str, Any], document: Mapping[str, Any]
) -> Iterator[str]:
    if cell["status"] != document["status"]:
        yield f"{cell['cell_id']}: says {cell['status']}, its record says {document['status']}"
    for said, stated in consistency.membership(document, manifest):
        yield f"{cell['cell_id']}: its record is of {said}, not {stated}"


def _foreign(folder: Path, published: bool) -> Iterator[tuple[Path, str]]:
    """Files that do not belong there. Links are not followed: they lead out of what is published."""
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            yield path, "is a link"
        elif _LOGS.fullmatch(name):
            if published:
                yield path, "logs are not published: they may name hosts and people"
        elif not _PARTS.fullmatch(name):
            yield path, "is no part of an execution folder"


def _orphans(folder: Path, documents: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """Sidecars that no result names; none where a result could not be read, for it may be the one."""
    if not all(documents.values()):
        return []
    named = {d["samples"]["file"] for d in documents.values() if d["samples"]}
    sidecars = sorted((folder / "samples").glob("*.json.gz"))
    return [path for path in sidecars if path.relative_to(folder).as_posix() not in named]


def _outside(folders: list[Path], executions: list[Path]) -> Iterator[Path]:
    """Files beside the executions, other than a README."""
    inside = {execution.resolve() for execution in executions}
    for folder in folders:
        for path in _files(folder):
            if path.name != "README.md" and not inside.intersection(path.resolve().parents):
                yield path


def _files(folder: Path) -> Iterator[Path]:
    for here, subfolders, names in os.walk(folder):
        subfolders.sort()
        links = [name for name in subfolders if (Path(here) / name).is_symlink()]
        yield from (Path(here) / name for name in sorted([*names, *links]))
