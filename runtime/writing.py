"""Writing what must not be lost: whole or not at all, at once, whatever happens next.

Standard library only.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import InfraError, UserError

SAMPLES_SCHEMA = "collectivex.samples.v1"


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file atomically: temporary name in the same folder, fsync, rename.

    Raises UserError when the folder cannot be written, InfraError when the disk is full or failing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    except OSError as error:
        raise _explain(error, path) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise _explain(error, path) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are our bug and raise ValueError."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_samples(out: Path, cell_id: str, series: list[dict[str, Any]]) -> dict[str, str]:
    """Write the raw samples of one cell and return its reference: {"file", "sha256"}.

    series    one entry per component and regime with `per_rank_us`: ranks x samples, microseconds
    The file is named by the sha256 of its compressed bytes, which are a function of the content alone.
    """
    document = {"schema": SAMPLES_SCHEMA, "cell_id": cell_id, "series": series}
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    data = gzip.compress(text.encode(), compresslevel=6, mtime=0)
    sha = hashlib.sha256(data).hexdigest()
    name = f"samples/{sha}.json.gz"
    write_bytes(out / name, data)
    return {"file": name, "sha256": sha}


def write_result(out: Path, cell_id: str, result: dict[str, Any]) -> None:
    """Write the record of one cell; where that fails its samples go too, for nothing would name them."""
    try:
        write_json(out / "cells" / f"{cell_id}.json", result)
    except BaseException:
        if result["samples"] is not None:
            (out / result["samples"]["file"]).unlink(missing_ok=True)
        raise


def set_aside(out: Path, path: Path) -> None:
    """Keep a file of the execution in `out`, that another replaces or that nothing names, beside its logs.

    Raises UserError or InfraError as write_bytes does.
    """
    try:
        name = path.name
        if path.suffix == ".json":  # there may be another of this name later
            name = f"{path.stem}.{int(path.lstat().st_mtime)}.json"
        kept = out / "logs" / "superseded" / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        path.rename(kept)
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: Path) -> UserError | InfraError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"cannot write {path}: {error.strerror}", "choose another folder with --out")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return UserError(f"cannot write {path}: {error.strerror}", "choose another folder with --out")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "what was measured before is safe; free some space and run again with --resume"
        return InfraError(f"cannot write {path}: {error.strerror}", hint)
    return InfraError(f"cannot write {path}: {error.strerror}")
