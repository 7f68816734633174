"""For clusters whose compute nodes do not see the checkout: copy it to a folder that they see, copy the
results back, and count them. A result that is missing from the copy is a failure, not a shorter table.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path

from .errors import InfraError
from .provenance import CODE, checkout
from .yamlfile import ROOT

_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


class Stage:
    """A private folder under the site's `stage_folder` with the code and an output folder."""

    def __init__(self, parent: Path):
        self.folder = parent / f"collectivex-{os.getuid()}-{secrets.token_hex(6)}"
        self.root, self.out = self.folder / "code", self.folder / "out"

    def fill(self, out: Path) -> None:
        """Copy the code, and what `out` already holds (to be resumed). Raises InfraError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True)
            for name in CODE:
                shutil.copytree(ROOT / name, self.root / name, ignore=_IGNORED)
            found = checkout(ROOT)
            if found["git_commit"]:
                dirty = " dirty" if found["git_dirty"] else ""
                (self.root / "REVISION").write_text(f"{found['git_commit']}{dirty}\n")
            if out.is_dir():
                shutil.copytree(out, self.out, dirs_exist_ok=True)
        except OSError as error:
            raise InfraError(
                f"staging failed: {error.strerror}", "see stage_folder in the site file"
            ) from error

    def bring_back(self, out: Path) -> int:
        """Copy everything to `out` and prove it: every cell that the manifest says is written must be there
        with the bytes it has here. Returns the number of cells. Raises InfraError, and keeps the stage."""
        try:
            out.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.out, out, dirs_exist_ok=True)
        except (OSError, shutil.Error) as error:
            raise InfraError(f"copying results back failed; they are in {self.out}: {error}") from error
        cells = json.loads((self.out / "manifest.json").read_text())["cells"]
        files = [entry["file"] for entry in cells if entry["file"]]
        missing = [
            name for name in files if _sha(out / name) is None or _sha(out / name) != _sha(self.out / name)
        ]
        if missing:
            first = f"{len(missing)} of {len(files)} results did not come back, {missing[0]} for one"
            raise InfraError(f"{first}; they are in {self.out}")
        return len(files)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _sha(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
