"""Other people's programs: argument lists only, no terminal to ask anything on, and always a time limit."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import InfraError

NOT_FOUND, TIMED_OUT = 127, 124


@dataclass(frozen=True)
class Done:
    """How a command ended. `code` is 127 when there is no such program, or it cannot be started, and 124 when
    its time ran out."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def said(self) -> str:
        """Its last words, for an error message."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return " / ".join(lines[-3:])[-600:] or f"exit code {self.code}"


class Run(Protocol):
    """What starts a command and waits for it; tests pass one that answers from recorded text."""

    def __call__(
        self, argv: Sequence[str], timeout_s: float = 60.0, env: Mapping[str, str] | None = None
    ) -> Done: ...


def run(argv: Sequence[str], timeout_s: float = 60.0, env: Mapping[str, str] | None = None) -> Done:
    """Run to the end. stdin is empty and there is no controlling terminal: a password prompt fails at once
    instead of waiting for ever."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        return Done(NOT_FOUND, err=f"{argv[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Done(TIMED_OUT, err=f"{argv[0]} did not end within {timeout_s:g} s")
    return Done(done.returncode, done.stdout, done.stderr)


def must(what: str, done: Done, hint: str | None = None) -> str:
    """The output of a command that had to succeed. Raises InfraError with its last words."""
    if done.code:
        raise InfraError(f"{what} failed: {done.said}", hint)
    return done.out


def shown(argv: Sequence[str]) -> str:
    """One command as a person could paste it."""
    return shlex.join(argv)
