"""A process on a pseudo-terminal: then it writes line by line, and what it had said before it hung or crashed
is there. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import Ended, Start
from . import environment
from .errors import InfraError
from .supervise import GRACE_S

TERM_S = 1.0  # less than a runner itself is given: see processes.LocalGroup.kill
POLL_S = 0.2


@dataclass(frozen=True)
class Follow:
    """Who looks on while a process runs.

    progress   of base.Program
    heard      called with the pieces of work done so far, the seconds until more must have been heard of, and
               all that was printed
    stop       asked now and then: whether to wait no longer
    """

    progress: Callable[[str], int]
    heard: Callable[[int, float, str], None] = lambda pieces, limit_s, text: None
    stop: Callable[[], bool] = lambda: False


class Process:
    """A process in a session of its own, which ends with the block it is for, or with us. What it writes goes
    to `log` as it comes, and to our own output, where a supervisor looks."""

    def __init__(self, start: Start, environ: Mapping[str, str], log: Path):
        self.log = log
        self.began = time.monotonic()
        try:
            self.terminal, theirs = pty.openpty()
        except OSError as error:
            raise InfraError(f"no pseudo-terminal for {start.argv[0]}: {error.strerror}") from error
        _plain(theirs)
        try:
            self.process = subprocess.Popen(
                start.argv,
                env=dict(environ),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                preexec_fn=environment.die_with_parent,
            )
        except OSError as error:
            os.close(self.terminal)
            raise InfraError(f"cannot start {Path(start.argv[0]).name}: {error.strerror}") from error
        finally:
            os.close(theirs)

    def wait(self, follow: Follow, deadline_s: float, setup_s: float) -> tuple[Ended, float]:
        """How it ended, and the seconds until its first piece of work was done. It is late, and goes on, when
        the next piece does not come within the deadline of a case."""
        text, pieces, since, first, late = "", 0, self.began, None, None
        limit = max(deadline_s, setup_s)
        follow.heard(pieces, limit, text)
        with self.log.open("wb") as log:
            while late is None:
                alive = self.process.poll() is None
                data = self.read()
                for file in (log, sys.stdout.buffer):
                    file.write(data)
                    file.flush()
                text += data.decode(errors="replace")
                now = time.monotonic()
                if data and (done := follow.progress(text)) > pieces:
                    pieces, since, limit = done, now, deadline_s
                    first = first or now
                    follow.heard(pieces, limit, text)
                if not data and (not alive or follow.stop()):
                    break
                if alive and now - since > limit + GRACE_S:
                    which = "further" if pieces else "first"
                    late = f"no {which} line of results within the deadline of {limit:g} s"
        code = self.process.poll()
        ended = Ended(-signal.SIGTERM if code is None else code, text, None, late)
        return ended, (first or time.monotonic()) - self.began

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *unused: object) -> None:
        self.end()

    def read(self) -> bytes:
        """What it printed meanwhile; empty after POLL_S without anything, and after its end."""
        ready, _, _ = select.select([self.terminal], [], [], POLL_S)
        if not ready:
            return b""
        try:
            return os.read(self.terminal, 1 << 16)
        except OSError:  # EIO: nobody holds the other end any more
            time.sleep(0.01)
            return b""

    def end(self) -> None:
        """SIGTERM to its process group, SIGKILL to what is left of it, and wait."""
        for sig, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, sig)
            until = time.monotonic() + wait_s
            while time.monotonic() < until and self.process.poll() is None:
                time.sleep(0.02)
        os.close(self.terminal)


def _plain(terminal: int) -> None:
    """Newlines as they are written."""
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
