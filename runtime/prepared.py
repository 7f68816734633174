"""Libraries that `cx prepare` installed, each in a folder of its own: the environment that its ranks need.

<libraries>/<backend>/environment.json, with <libraries> from $CX_LIBRARIES or the cache folder:
    {"prepend": {"PYTHONPATH": ["/..."], "LD_LIBRARY_PATH": ["/..."]}, "set": {"CUDA_HOME": "/..."}}
Each backend's ranks get its own entries and nobody else's, so that two libraries that need different NCCLs do
not meet. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import environment
from .errors import UserError

FILE = "environment.json"


def folder(backend: str) -> Path:
    """Where this backend's library is, or would be."""
    return environment.libraries_dir() / backend


def variables(backend: str) -> dict[str, str]:
    """Environment variables for the ranks of `backend`; empty where nothing was prepared.

    Raises UserError for a file that cannot be read.
    """
    path = folder(backend) / FILE
    if not path.exists():
        return {}
    try:
        found = merged(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"cannot use {path}: {error}", f"`cx prepare --backend {backend}` makes it anew"
        ) from error
    return found


def merged(said: Mapping[str, Any]) -> dict[str, str]:
    """The content of an environment.json as variables: its search paths before the inherited ones."""
    found = {str(name): str(value) for name, value in said.get("set", {}).items()}
    for name, entries in said.get("prepend", {}).items():
        found[name] = os.pathsep.join([*map(str, entries), *environment.path_list(name)])
    return found
