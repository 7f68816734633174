"""What is happening, on stderr: one line kept up to date on a terminal, plain lines elsewhere.

A reader that goes away (`cx run ... 2>&1 | head`) ends the lines, not the run.
"""

from __future__ import annotations

import contextlib
import sys
import time


class Progress:
    """Counts cells as they end. `event` takes a status (or "start") and a cell id."""

    def __init__(self, total: int):
        self.total, self.ended = total, 0
        self.began = time.monotonic()
        self.live = sys.stderr.isatty()
        self._last = 0.0

    def shard(self, backend: str, run: int, cells: int) -> None:
        self._line(f"{backend} run {run}: {cells} cells")

    def event(self, what: str, cell_id: str) -> None:
        elapsed = time.monotonic() - self.began
        if what != "start":
            self.ended += 1
        text = f"[{elapsed:6.1f} s] {self.ended}/{self.total} {what} {cell_id}"
        if self.live and what in ("start", "ok"):
            self._write("\r\033[K" + text[:150])
        elif what != "start":
            self._line(text)

    def _line(self, text: str) -> None:
        self._write(("\r\033[K" if self.live else "") + text + "\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(text)
            sys.stderr.flush()
