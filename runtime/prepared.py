"""Libraries that `cx prepare` installed, each in a folder of its own: where they lie, and the environment
that their ranks need.

<libraries>/<backend>/environment.json, with <libraries> from $CX_LIBRARIES or the cache folder. What was
built inside an image lies one folder deeper, one for each image and architecture (`of_image`):
    {"prepend": {"PYTHONPATH": ["/..."], "LD_LIBRARY_PATH": ["/..."]}, "set": {"CUDA_HOME": "/..."},
     "pin": ..., "commit": ..., "versions": {...}, "arch": ..., "check": {"state": ..., "said": ...}, ...}
Of these only the first two are needed. Each backend's ranks get its own entries and nobody else's, so that
two libraries that need different NCCLs do not meet. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import environment
from .errors import UserError

FILE = "environment.json"
PASSED, UNTRIED = "passed", "untried"


def folder(backend: str, libraries: Path | None = None) -> Path:
    """Where this backend's library is, or would be."""
    return (libraries or environment.libraries_dir()) / backend


def of_image(image: str, cpu: str, arch: str | None) -> Path:
    """The folder of the libraries that were built inside an image: what is compiled there fits its Python and
    torch, and the pool's GPUs, nothing else.

    image    with its digest (a reference, or the file that was imported); another file counts by its name
    """
    digest = re.search(r"[0-9a-f]{64}", image)
    name = digest[0][:16] if digest else re.sub(r"[^\w.-]", "_", Path(image).stem.removesuffix(f".{cpu}"))
    return environment.libraries_dir() / ".".join(filter(None, (name, cpu, arch)))


def variables(backend: str, libraries: Path | None = None) -> dict[str, str]:
    """Environment variables for the ranks of `backend`, in the form of environment.child_environment; none
    where nothing was prepared.

    libraries   not our own folder but that of an image: programs look there too
    Raises UserError for a file that cannot be read.
    """
    found = {} if libraries is None else {"CX_LIBRARIES": str(libraries)}
    path = folder(backend, libraries) / FILE
    if not path.exists():
        return found
    try:
        return {**found, **merged(json.loads(path.read_text()))}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"cannot use {path}: {error}", f"`cx prepare --backend {backend}` makes it anew"
        ) from error


def merged(said: Mapping[str, Any]) -> dict[str, str]:
    """The content of an environment.json as variables: its search paths before those that a rank has."""
    found = {str(name): str(value) for name, value in said.get("set", {}).items()}
    for name, entries in said.get("prepend", {}).items():
        found[name] = os.pathsep.join([*map(str, entries), f"${name}"])
    return found


def read(path: Path) -> dict[str, Any] | None:
    """The environment.json of a library's folder; None without one, or with none that can be read."""
    try:
        said = json.loads((path / FILE).read_text())
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def installed() -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(backend, its folder, what is known of it) of everything that was prepared on this machine."""
    libraries = environment.libraries_dir()
    for path in sorted({*libraries.glob(f"*/{FILE}"), *libraries.glob(f"*/*/{FILE}")}):
        said = read(path.parent)
        hidden = any(part.startswith(".") for part in path.parent.relative_to(libraries).parts)
        if said is not None and not hidden:
            yield path.parent.name, path.parent, said
