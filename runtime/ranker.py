"""Between the launcher and a rank: `rank` runs where srun or a container starts us and starts the worker.

It keeps what the host half needs to know and a launcher does not tell: the exit code of each rank
(rank<k>.exit), its output (rank<k>.log), and whether the placement is the planned one. It also sets the
environment of the case, whatever the image says, because schedulers lose characters of it on the way.
Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from . import environment
from .environment import RankEnvironment
from .errors import CollectiveXError, UserError
from .processes import worker_command
from .types import CASES_SCHEMA

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def command(args: argparse.Namespace) -> int:
    """Start the ranks of this process (one, or with --local all of a node) and wait for them. The exit code
    is 0 whenever the exit files are written: how a rank ended stands there, and must not make a launcher kill
    its peers before they have said what they saw."""
    path = Path(args.cases)
    cases = json.loads(path.read_text())
    if cases.get("schema") != CASES_SCHEMA:
        raise UserError(f"{path} is not a cases document")
    start = cases["start"]
    if args.local:
        size = args.local
        wheres = [RankEnvironment(r, size, r, size, "127.0.0.1", start["port"], "local") for r in range(size)]
    else:
        wheres = [environment.step_rank(start["address"], start["port"])]
    ranks = [Rank(path, Path(args.out), cases, where) for where in wheres]
    for number in FORWARDED:
        signal.signal(number, lambda received, _frame: [rank.forward(received) for rank in ranks])
    if args.local:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    for rank in ranks:
        rank.wait()
    return 0


def end_with_stdin() -> None:
    """A container outlives the client that started it, but its stdin does not: then it is to end."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


class Rank:
    """One worker process and the files that tell about it."""

    def __init__(self, path: Path, out: Path, cases: dict[str, Any], where: RankEnvironment):
        self.where, self.folder = where, path.parent
        self.process: subprocess.Popen[bytes] | None = None
        self.code: int | None = None
        try:
            check_placement(cases["start"], where)
            child = environment.child_environment(cases["start"]["env"], where)
            with (self.folder / f"rank{where.rank}.log").open("wb") as log:
                argv = worker_command("--cases", str(path), "--out", str(out))
                self.process = subprocess.Popen(
                    argv,
                    env=child,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except (CollectiveXError, OSError) as error:
            complain(self.folder, where.rank, "infra", error)
            self.code = 3

    def forward(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self) -> None:
        if self.process is not None:
            self.code = self.process.wait()
        path = self.folder / f"rank{self.where.rank}.exit"
        path.with_suffix(".tmp").write_text(str(self.code))
        path.with_suffix(".tmp").rename(path)


def complain(folder: Path, rank: int, kind: str, error: BaseException, phase: str = "start") -> None:
    """rank<k>.error.json on behalf of a rank that cannot write it itself; see heartbeat.Heartbeat.error."""
    value = {"rank": rank, "cell": None, "phase": phase, "iteration": 0, "kind": kind}
    value |= {"type": type(error).__name__, "message": str(error)[:4000], "traceback": str(error)[:4000]}
    (folder / f"rank{rank}.error.json").write_text(json.dumps(value))


def check_placement(start: dict[str, Any], where: RankEnvironment) -> None:
    """Raises UserError when ranks are not placed as planned."""
    planned = (start["ranks"], start["ranks_per_node"])
    if (where.world_size, where.ranks_per_node) != planned:
        found = f"{where.world_size} ranks, {where.ranks_per_node} per node"
        raise UserError(f"planned {planned[0]} ranks, {planned[1]} per node; started were {found}")
