"""The mechanism without a scheduler: the ranks of a group are processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from . import environment
from .environment import RankEnvironment
from .errors import InfraError

TERM_S = 2.0


class LocalGroup:
    """`size` rank processes, each leader of its own process group: whatever a rank starts ends with it.

    Output of rank k goes to rank<k>.log in `folder`.
    """

    def __init__(self, cases: Path, out: Path, size: int, env: Mapping[str, str]):
        folder = cases.parent
        port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(size):
            where = RankEnvironment(rank, size, rank, size, "127.0.0.1", port, "cx run")
            child = environment.child_environment(env, where)
            with (folder / f"rank{rank}.log").open("wb") as log:
                try:
                    process = start_worker(cases, out, child, log)
                except OSError as error:
                    self.kill()
                    raise InfraError(f"cannot start rank {rank}: {error.strerror}") from error
            self.processes.append(process)

    def poll(self) -> dict[int, int | None]:
        return {rank: process.poll() for rank, process in enumerate(self.processes)}

    def dump_stacks(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """SIGTERM to every process group of ours, SIGKILL to what is left, and wait."""
        for sig, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, 10.0)):
            for process in self.processes:
                # also where the rank itself is gone: what it started may not be
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, sig)
            until = time.monotonic() + wait_s
            while time.monotonic() < until and any(p.poll() is None for p in self.processes):
                time.sleep(0.02)
        for process in self.processes:
            process.poll()


def start_worker(cases: Path, out: Path, env: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    """One worker, leader of its own process group, which ends with us. Raises OSError."""
    return subprocess.Popen(
        worker_command("--cases", str(cases), "--out", str(out), "--parent", str(os.getpid())),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def free_port() -> int:
    """A port that was free a moment ago. A worker that finds it taken says so and gets another."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def worker_command(*arguments: str, command: str = "worker") -> list[str]:
    """argv of `collectivex worker ...` (or `command`) in this interpreter, from an installed package or a
    bare checkout."""
    import collectivex

    root = str(Path(collectivex.__file__).resolve().parent.parent)
    program = "from collectivex.runtime.cli import main; sys.exit(main())"
    program = f"import sys; sys.path.insert(0, {root!r}); {program}"
    return [sys.executable, "-u", "-c", program, command, *arguments]
