"""What is happening, on stderr: one line kept up to date on a terminal, plain lines elsewhere."""

from __future__ import annotations

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
            sys.stderr.write("\r\033[K" + text[:150])
            sys.stderr.flush()
        elif what != "start":
            self._line(text)

    def _line(self, text: str) -> None:
        sys.stderr.write(("\r\033[K" if self.live else "") + text + "\n")
        sys.stderr.flush()
