"""What torch is here, printed as JSON by a process of its own: importing a broken torch may well crash.

`python -m collectivex.runtime.torch_probe`; `cx doctor` reads it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from . import environment, loaded, machine
from .redact import Redactor


def probe() -> dict[str, Any]:
    """Version, build, path and devices of torch and the libraries it brings along, or {"error": why not}."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    redactor = Redactor(environment.private())
    distributed = torch.distributed.is_available()
    found = loaded.libraries(redactor, torch)
    path = str(torch.__file__)
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "path": loaded.safe_path(path, redactor),
        "path_kind": path_kind(path),
        "gloo": distributed and torch.distributed.is_gloo_available(),
        "nccl": distributed and torch.distributed.is_nccl_available(),
        "gpus": machine.gpus(torch) if torch.cuda.is_available() else [],
        "libraries": [vars(library) for library in found],
        "findings": loaded.findings(found),
    }


def path_kind(path: str) -> str:
    """Whose torch: a wheel in this environment, the system's (also a vendor container's), or a checkout."""
    if "/dist-packages/" in path:
        return "system or container package"
    return "installed package" if "/site-packages/" in path else "source checkout"


if __name__ == "__main__":
    json.dump(probe(), sys.stdout)
