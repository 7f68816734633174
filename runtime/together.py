"""An external program over several nodes: one runner for each GPU, whose processes are one MPI program.

Standard library only.
"""

from __future__ import annotations

import math
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import MissingLibrary
from . import environment
from .program import Runner, missing
from .redact import Private, keyed_hash
from .scrub import also_hide
from .supervise import GRACE_S, exit_text
from .terminal import Follow
from .types import Cell

HOSTS_S = 10.0  # for files of other nodes to be seen here
LOOK_S = 0.2


class ProgramFailed(Exception):
    """The process of a rank other than 0 ended badly, while that of rank 0 went on."""


@dataclass
class Together(Runner):
    """One of these runners. Rank 0 reads and judges what its process prints, the others keep it company.

    A step of srun can be one MPI program only, so a runner does the first group and ends; the supervisor
    starts a step for the rest. A process that ends without MPI_Finalize takes the whole step with it, runners
    too (PMIx and srun do that), so records are written before a process that hangs is ended.
    """

    led_at: float | None = None

    def environ(self) -> dict[str, str]:
        """With what the launcher says of ranks: MPI reads it."""
        return self.allowed(environment.inherited())

    def begin(self) -> tuple[list[Cell], Path]:
        """The first group, and a folder of this rank's own: without MPI all would write into one file."""
        group = [self.cells[case] for case in self.program.groups(list(self.cells))[0]]
        folder = self.heart.folder / f"process{self.heart.rank}"
        folder.mkdir()
        self.host_file(self.heart.rank).write_text(socket.gethostname())
        return group, folder

    def lead(self, ranks: int) -> int:
        """As rank 0. The exit code."""
        group, folder = self.begin()
        self.heart.cell, environ = group[0].id, self.environ()
        try:
            (start,) = self.starts(group, folder, environ)
        except MissingLibrary as error:
            self.mark.touch()
            self.write(group, missing(group, error))
            return 0
        with self.process(start, environ, folder) as process:
            run, answers = self.one(start, environ, process)
            if run.ended.timed_out is None:
                self.mark.touch()
            self.learn_hosts(ranks)
            self.write(group, {case: (answer, run) for case, answer in answers.items()})
            self.mark.touch()
        self.heart.end()
        return 0

    def follow(self) -> int:
        """As any other rank. The exit code. Raises MissingLibrary where only this node lacks the program."""
        group, folder = self.begin()
        environ = self.environ()
        try:
            (start,) = self.starts(group, folder, environ)
        except MissingLibrary:
            if self.led(GRACE_S):
                return 0
            raise
        with self.process(start, environ, folder) as process:
            self.heart.beat(start.name, 0)
            ended, _ = process.wait(Follow(lambda text: 0, stop=self.left_behind), math.inf, math.inf)
        if start.output is not None:
            Path(start.output).unlink(missing_ok=True)
        if ended.returncode == 0 or self.led(GRACE_S):
            return 0
        how = f"{Path(start.argv[0]).name} {exit_text(ended.returncode)}"
        said = " / ".join(ended.stdout.strip().splitlines()[-3:])
        self.heart.error("case", ProgramFailed(f"{how}: {said}" if said else how))
        return 1

    @property
    def mark(self) -> Path:
        """There once rank 0's process has ended, or was late and that is written down."""
        return self.heart.folder / "rank0.ended"

    def led(self, seconds: float) -> bool:
        """Whether rank 0 is done within this time: then its word counts."""
        until = time.monotonic() + seconds
        while not self.mark.exists() and time.monotonic() < until:
            time.sleep(LOOK_S)
        return self.mark.exists()

    def left_behind(self) -> bool:
        """Whether this process still runs well after that of rank 0."""
        if self.led_at is None and self.mark.exists():
            self.led_at = time.monotonic()
        return self.led_at is not None and time.monotonic() - self.led_at > GRACE_S

    def host_file(self, rank: int) -> Path:
        return self.heart.folder / f"rank{rank}.host"

    def learn_hosts(self, ranks: int) -> None:
        """Where the others are: as hashes in the records, and their names in no text of them."""
        files = [self.host_file(rank) for rank in range(ranks)]
        until = time.monotonic() + HOSTS_S
        while not all(file.exists() for file in files) and time.monotonic() < until:
            time.sleep(LOOK_S)
        names = [file.read_text() for file in files if file.exists()]
        also_hide(Private(hosts=tuple(dict.fromkeys(names))))
        if len(names) == ranks:
            self.site.hosts = [keyed_hash(self.site.key, "host", name) for name in names]
