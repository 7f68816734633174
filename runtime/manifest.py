"""The manifest of an execution: every requested cell and how it stands, on disk at every moment."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import resuming
from .document import now
from .errors import UserError
from .types import CONTRACT, MANIFEST_SCHEMA, Cell, Status
from .writing import set_aside, write_json

SAVE_EVERY_S = 1.0  # a manifest of thousands of cells is not rewritten for each of them
GOOD = {Status.OK, Status.UNSUPPORTED}


@dataclass
class Manifest:
    """Statuses by cell id, in requested order; None is pending. Result files are the truth, this is the list
    of what must be there."""

    path: Path
    execution: str
    created_at: str
    suite: str
    sku: str
    command: list[str]
    cells: dict[str, Status | None]
    _saved: float = field(default=0.0)

    @staticmethod
    def open(
        out: Path, suite: str, sku: str, command: Sequence[str], cells: Sequence[Cell], resume: bool
    ) -> Manifest:
        """A new manifest in `out`, or with `resume` the one that is there, as its records say (resuming.py).

        Raises UserError when the folder holds something else, or another plan.
        """
        path = out / "manifest.json"
        wanted = [cell.id for cell in cells]
        if path.exists() or any((out / "cells").glob("*.json")):
            if not resume:
                raise UserError(
                    f"{out} already holds an execution", "choose another --out, or go on with --resume"
                )
            return _reopen(path, suite, sku, command, wanted)
        if out.is_dir() and any(out.iterdir()):
            raise UserError(
                f"{out} exists and holds files that are not ours", "choose an empty folder with --out"
            )
        if resume:
            raise UserError(f"nothing to resume: {path} does not exist", "leave --resume out to start")
        execution = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
        manifest = Manifest(path, execution, now(), suite, sku, list(command), dict.fromkeys(wanted))
        manifest.save()
        return manifest

    def status(self, cell_id: str) -> Status | None:
        return self.cells[cell_id]

    def is_good(self, cell_id: str) -> bool:
        return self.cells[cell_id] in GOOD

    def set(self, cell_id: str, status: Status) -> None:
        self.cells[cell_id] = status
        if time.monotonic() - self._saved > SAVE_EVERY_S or None not in self.cells.values():
            self.save()

    def save(self) -> None:
        statuses = [
            {
                "cell_id": cell,
                "status": str(status) if status else "pending",
                "file": f"cells/{cell}.json" if status else None,
            }
            for cell, status in self.cells.items()
        ]
        write_json(
            self.path,
            {
                "schema": MANIFEST_SCHEMA,
                "contract": CONTRACT,
                "execution": self.execution,
                "created_at": self.created_at,
                "updated_at": now(),
                "suite": self.suite,
                "sku": self.sku,
                "command": self.command,
                "complete": None not in self.cells.values(),
                "cells": statuses,
            },
        )
        self._saved = time.monotonic()


def _reopen(path: Path, suite: str, sku: str, command: Sequence[str], wanted: Sequence[str]) -> Manifest:
    hint = "choose another --out"
    found = resuming.manifest(path, wanted)
    if found["contract"] != CONTRACT:
        raise UserError(f"{path} was made under contract {found['contract']}, this is {CONTRACT}", hint)
    if (found["suite"], found["sku"], set(found["cells"])) != (suite, sku, set(wanted)):
        raise UserError(f"{path} holds another plan ({found['suite']} on {found['sku']})", hint)
    if found["broken"]:
        print(f"warning: {path} {found['broken']}: made anew from the plan and the records", file=sys.stderr)
        if path.exists():
            set_aside(path.parent, path)
    cells = resuming.settle(path.parent, found, list(found["cells"]))
    manifest = Manifest(path, found["execution"], found["created_at"], suite, sku, list(command), cells)
    manifest.save()
    return manifest
