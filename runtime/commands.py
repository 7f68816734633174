"""Other people's programs: argument lists only, no terminal to ask anything on, and always a time limit."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .errors import InfraError

NOT_FOUND, TIMED_OUT = 127, 124
END_S = 2.0  # for what is asked to end, and for what was killed


@dataclass(frozen=True)
class Done:
    """How a command ended. `code` is 127 when there is no such program, or it cannot be started, and 124 when
    its time ran out: then `err` ends in that, after what had been said."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def said(self) -> str:
        """Its last words, for an error message."""
        words = f"{self.out}\n{self.err}" if self.code == TIMED_OUT else self.err.strip() or self.out
        lines = [line for line in words.splitlines() if line.strip()]
        return " / ".join(lines[-3:])[-600:] or f"exit code {self.code}"


class Run(Protocol):
    """What starts a command and waits for it; tests pass one that answers from recorded text."""

    def __call__(
        self, argv: Sequence[str], timeout_s: float = 60.0, env: Mapping[str, str] | None = None
    ) -> Done: ...


def run(
    argv: Sequence[str],
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Done:
    """Run to the end. stdin is empty and there is no controlling terminal: a password prompt fails at once
    instead of waiting for ever. When the time runs out, or we are interrupted, all that the command has
    started ends with it."""
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        return Done(NOT_FOUND, err=f"{error.filename or argv[0]}: {error.strerror}")
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        out, err = _end(process)
        lines = [*err.splitlines(), f"{argv[0]} did not end within {timeout_s:g} s"]
        return Done(TIMED_OUT, out, "\n".join(lines))
    except BaseException:
        _end(process)
        raise
    return Done(process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End the whole group, first politely: srun ends its step, scripts tidy up. Returns what was said.
    What has left the group, or hangs in the kernel, is not waited for."""
    said: tuple[str | bytes | None, str | bytes | None] = None, None
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            said = process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired as late:
            said = late.stdout, late.stderr
    process.poll()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    return _text(said[0]), _text(said[1])


def _text(said: str | bytes | None) -> str:
    """What a command had said when its time ran out: bytes where it still holds the pipe."""
    return said.decode(errors="replace") if isinstance(said, bytes) else said or ""


def must(what: str, done: Done, hint: str | None = None) -> str:
    """The output of a command that had to succeed. Raises InfraError with its last words."""
    if done.code:
        raise InfraError(f"{what} failed: {done.said}", hint)
    return done.out


def shown(argv: Sequence[str]) -> str:
    """One command as a person could paste it."""
    return shlex.join(argv)
