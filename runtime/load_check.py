"""What a prepared library really is, printed as JSON by a process of its own that loads it as a rank would.

`python -m collectivex.runtime.load_check '{"modules": [...], "versions": [...]}'`; install.py reads it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import loaded


def look(modules: Sequence[str], distributions: Sequence[str]) -> dict[str, Any]:
    """The file of each module or why it cannot be imported, the version of each distribution (None: not
    there), and every NCCL and RCCL that is mapped afterwards, with what it says of itself."""
    files: dict[str, str | None] = {}
    errors: dict[str, str] = {}
    for name in modules:
        try:
            files[name] = importlib.import_module(name).__file__
        except (ImportError, OSError, AssertionError, RuntimeError, AttributeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    maps = Path("/proc/self/maps").read_text(errors="surrogateescape")
    mapped = [m for m in loaded.parse_maps(maps) if m.name in ("nccl", "rccl")]
    return {
        "files": files,
        "errors": errors,
        "versions": {name: _version(name) for name in distributions},
        "ccl": [[m.name, loaded.version_of(m), m.path] for m in mapped],
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    json.dump(look(asked["modules"], asked["versions"]), sys.stdout)
