"""What a rank is doing, where its supervisor can see it, and where its stacks go when it hangs.

Files of one rank in the worker's log folder: rank<k>.beat.json (phase), rank<k>.stack (stacks of every
thread, written by faulthandler at the deadline, without needing the interpreter), rank<k>.error.json (how it
failed).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

READS = 3  # of a file that may be half written: what is written next is whole


class Heartbeat:
    """This rank's pulse. `beat` is cheap enough for every trial, and never inside a timed window.

    It overwrites the file in place, padded to one length. A new file put in its place would be written to the
    disk at once (ext4's auto_da_alloc): 30 times as long, and while the chain that follows is measured.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank{rank}.beat.json"
        self._width = 1000
        self._stack = (folder / f"rank{rank}.stack").open("w")
        faulthandler.enable(self._stack)
        faulthandler.register(signal.SIGUSR1, self._stack, all_threads=True)
        self.cell: str | None = None
        self.phase, self.iteration = "start", 0
        self.beat("start", 0)

    def begin(self, cell: str, deadline_s: float) -> None:
        """A cell starts. If it is not over by the deadline every thread's stack is written down."""
        self.cell = cell
        faulthandler.dump_traceback_later(deadline_s, file=self._stack)
        self.beat("setup", 0)

    def end(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.cell = None
        self.beat("between cells", 0)

    def beat(self, phase: str, iteration: int, limit_s: float | None = None) -> None:
        """`limit_s`: the next beat must come within this time, instead of the cell within its deadline."""
        self.phase, self.iteration = phase, iteration
        value = {"rank": self.rank, "cell": self.cell, "phase": phase, "iteration": iteration}
        value |= {"limit_s": limit_s} if limit_s is not None else {}
        text = json.dumps(value)
        self._width = max(self._width, len(text))
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, text.ljust(self._width).encode(), 0)
        finally:
            os.close(file)  # and so, over a network, the others' to read

    def error(self, kind: str, error: BaseException) -> None:
        """Leave behind how this rank failed, for the record of the cell."""
        value = {
            "rank": self.rank,
            "cell": self.cell,
            "phase": self.phase,
            "iteration": self.iteration,
            "kind": kind,
            "type": type(error).__name__,
            "message": str(error)[:4000],
            "traceback": "".join(traceback.format_exception(error))[-8000:],
        }
        (self.folder / f"rank{self.rank}.error.json").write_text(json.dumps(value))


def read(path: Path) -> dict[str, Any] | None:
    """A heartbeat or error file, or None while it is not there."""
    for _ in range(READS):
        try:
            return json.loads(path.read_text())
        except OSError:
            return None
        except ValueError:
            time.sleep(0.001)
    return None
