"""What --resume finds in the folder of an execution: which cells are really done, and what an end in the
middle left behind. Records are the truth; nothing is deleted, what is in the way goes to logs/superseded.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .consistency import MANIFEST_FACTS
from .errors import UserError
from .records import Unusable, believe, load, record
from .types import MANIFEST_SCHEMA, RESULT_SCHEMA, Status
from .writing import set_aside

_HINT = "choose another --out"


def manifest(path: Path, wanted: Collection[str]) -> dict[str, Any]:
    """The manifest that is there, or where it is broken or gone what the records beside it say of it: the
    MANIFEST_FACTS, "created_at", "cells" (id -> status or None) and "broken" (how it is, or None).

    Raises UserError when the file is of something else, or when the records do not say enough.
    """
    try:
        data = json.loads(path.read_text())
        if isinstance(data, dict) and data.get("schema", MANIFEST_SCHEMA) != MANIFEST_SCHEMA:
            raise UserError(f"{path} is not a manifest that can be resumed: {data['schema']!r}", _HINT)
        cells = {
            entry["cell_id"]: None if entry["status"] == "pending" else Status(entry["status"])
            for entry in data["cells"]
        }
        facts = {name: str(data[name]) for name in (*MANIFEST_FACTS, "created_at")}
        return {**facts, "cells": cells, "broken": None}
    except FileNotFoundError:
        why = "is gone"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", _HINT) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"is broken ({type(error).__name__}: {error})"
    return _from_records(path, why, wanted)


def _from_records(path: Path, why: str, wanted: Collection[str]) -> dict[str, Any]:
    """Raises UserError where no record can be read, or one is of another plan."""
    told: Counter[tuple[str, ...]] = Counter()
    created = []
    for file, document in _documents(path.parent):
        identity = document["identity"]
        if identity["cell_id"] not in wanted:
            raise UserError(f"{path} {why}, and {file.name} beside it is of another plan", _HINT)
        told[(*(identity[name] for name in MANIFEST_FACTS[:-1]), document["contract"])] += 1
        created.append(identity["created_at"])
    if not told:
        raise UserError(f"{path} {why}, and no record beside it says what was measured", _HINT)
    ((facts, _),) = told.most_common(1)
    named = dict(zip(MANIFEST_FACTS, facts, strict=True))
    return {**named, "created_at": min(created), "cells": dict.fromkeys(wanted), "broken": why}


def settle(out: Path, facts: Mapping[str, str], cells: Collection[str]) -> dict[str, Status | None]:
    """How each cell really stands, by its record: None where there is none that can be believed. Records that
    cannot, and samples and temporary files that no record names, are set aside."""
    statuses: dict[str, Status | None] = dict.fromkeys(cells)
    for cell_id in cells:
        path = out / "cells" / f"{cell_id}.json"
        if not path.is_symlink() and not path.exists():
            continue
        try:
            document = load(path, "result", RESULT_SCHEMA)
            record(document, 0, facts["execution"], str(path), cell_id)
            believe(document, facts, str(out))
        except Unusable as error:
            print(f"warning: {path} {error}; its cell runs again", file=sys.stderr)
            set_aside(out, path)
            continue
        statuses[cell_id] = Status(document["status"])
    clear(out)
    return statuses


def clear(out: Path) -> None:
    """Set aside what a crash or a full disk left between two files: samples that no record names, and
    temporary files of the writer."""
    named = {document["samples"]["file"] for _, document in _documents(out) if document["samples"]}
    for path in sorted((out / "samples").glob("*.json.gz")):
        if f"samples/{path.name}" not in named:
            set_aside(out, path)
    for folder in (out, out / "cells", out / "samples"):
        for path in sorted(folder.glob(".*.tmp")):
            set_aside(out, path)


def _documents(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every record that can be read."""
    for path in sorted((out / "cells").glob("*.json")):
        try:
            yield path, load(path, "result", RESULT_SCHEMA)
        except Unusable:
            continue
