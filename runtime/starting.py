"""Ranks that torchrun or mpirun starts on this machine: the mechanism `process` of a SKU that says so."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import environment
from .containers import Container
from .mechanism import Processes, Work, local_ranks
from .started import KILL_S, StartedGroup
from .supervise import Group
from .yamlfile import ROOT


class LauncherGroup(StartedGroup):
    """All ranks of this machine behind torchrun or mpirun, no container. Ends with its stdin like one."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], work: Work):
        super().__init__(argv, env, work, subprocess.PIPE)

    def dump_stacks(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Politely, then by the chain of parents: whatever our child started ends with it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if not self._wait(KILL_S):
            self.process.kill()
            self.process.wait()


class LauncherProcesses(Processes):
    """Groups are processes of this machine that torchrun or mpirun starts."""

    def __init__(self, start: str, root: Path = ROOT):
        self.start, self.container, self.root = start, Container("none", None, "cpu", sys.executable), root

    def argv(self, files: Sequence[str], ranks: int) -> list[str]:
        return self.container.entry(self.root, *local_ranks(files, ranks, self.start))

    def group(self, work: Work) -> Group:
        if not work.launched:
            return super().group(work)
        work.write("127.0.0.1")
        return LauncherGroup(self.argv(work.files, work.ranks), environment.inherited(), work)
