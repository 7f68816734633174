"""Between the launcher and a rank: `rank` runs where srun or a container starts us and starts the worker.

It keeps what the host half needs to know and a launcher does not tell: the exit code of each rank
(rank<k>.exit), its output (rank<k>.log), and whether the placement is the planned one. It also sets the
environment of the case, whatever the image says, because schedulers lose characters of it on the way.
Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import environment
from .environment import RankEnvironment
from .errors import CollectiveXError, InfraError, UserError
from .processes import start_worker, worker_command
from .types import CASES_SCHEMA

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def command(args: argparse.Namespace) -> int:
    """Start the ranks of this process (one, or with --local all of a node) and wait for them. With --launcher
    that one starts the ranks of the node, and each comes back here without --local. The exit code is 0
    whenever the exit files are written: how a rank ended stands there, and must not make a launcher kill its
    peers before they have said what they saw."""
    path = Path(args.cases)
    cases = json.loads(path.read_text())
    if cases.get("schema") != CASES_SCHEMA:
        raise UserError(f"{path} is not a cases document")
    start = cases["start"]
    if args.local and args.launcher:
        return conduct([Launcher(path, Path(args.out), args.local, args.launcher)], ends_with_stdin=True)
    if args.local:
        size = args.local
        wheres = [RankEnvironment(r, size, r, size, "127.0.0.1", start["port"], "local") for r in range(size)]
    else:
        if args.launcher:
            environment.die_with_parent()
        wheres = [environment.step_rank(start["address"], start["port"], launcher=args.launcher or "slurm")]
    ranks = [Rank(path, Path(args.out), cases, where) for where in wheres]
    pid = path.parent / f"rank{wheres[0].rank}.pid" if args.launcher else None
    return conduct(ranks, bool(args.local), pid)


def conduct(children: Sequence[Rank | Launcher], ends_with_stdin: bool, pid: Path | None = None) -> int:
    """Forward signals to what we started until it has ended; the worst exit code. `pid`: the file that tells
    whom to signal, once we are ready for it."""
    for number in FORWARDED:
        signal.signal(number, lambda received, _frame: [child.forward(received) for child in children])
    if pid is not None:
        pid.write_text(str(os.getpid()))
    if ends_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    return max(child.wait() for child in children)


def end_with_stdin() -> None:
    """A container outlives the client that started it, but its stdin does not: then it is to end."""
    while os.read(0, 4096):  # not through sys.stdin: its lock, held at our own end, aborts the interpreter
        pass
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
                self.process = start_worker(path, out, child, log)
        except (CollectiveXError, OSError) as error:
            complain(self.folder, where.rank, "infra", error)
            self.code = 3

    def forward(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def wait(self) -> int:
        """Returns 0: see `command`."""
        if self.process is not None:
            self.code = self.process.wait()
        path = self.folder / f"rank{self.where.rank}.exit"
        path.with_suffix(".tmp").write_text(str(self.code))
        path.with_suffix(".tmp").rename(path)
        path.with_suffix(".pid").unlink(missing_ok=True)
        return 0


# For mpirun as root, with more ranks than cores, and without binding ranks to cores: our own start does not
# bind either. Open MPI 4, and 5 in its own spelling; MPICH does so by itself.
_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


class Launcher:
    """torchrun or mpirun, which starts this runner once for each rank of this machine."""

    def __init__(self, path: Path, out: Path, ranks: int, start: str):
        self.folder = path.parent
        argv = launcher_argv(start, ranks, worker_command(command="rank"))
        argv += ["--cases", str(path), "--out", str(out), "--launcher", start]
        try:
            self.process = subprocess.Popen(
                argv,
                env={**environment.inherited(), **(_MPI if start == "mpi" else {})},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=environment.die_with_parent,
            )
        except OSError as error:
            raise InfraError(f"cannot start {argv[0]}: {error.strerror}") from error

    def forward(self, number: int) -> None:
        """torchrun forwards no SIGUSR1 (it dies of it), so that one goes to those that it started."""
        if number != signal.SIGUSR1:
            if self.process.poll() is None:
                self.process.send_signal(number)
            return
        for path in self.folder.glob("rank*.pid"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), number)

    def wait(self) -> int:
        return abs(self.process.wait())


def launcher_argv(start: str, ranks: int, program: Sequence[str]) -> list[str]:
    """argv of the launcher before the arguments of `program`, the same Python for all."""
    if start == "mpi":
        return ["mpirun", "-n", str(ranks), *program]
    torchrun = [program[0], "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, "--no-python", *program]


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
