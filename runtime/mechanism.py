"""What starts the ranks of a group, and the mechanism that needs nothing: processes of this machine.

The others are in started.py and starting.py.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..backends.base import Program
from . import registry
from .processes import LocalGroup
from .supervise import GRACE_S, Group, Watch
from .types import Case
from .writing import write_json


@dataclass(frozen=True)
class Work:
    """One group to be started: `document` becomes the cases file at `path`.

    ranks     processes to start; see `processes`
    env       set in every rank
    seconds   what the watchdog allows it at most; a launcher's own limit comes after it
    launched  whether the SKU's `start` counts: a runner of programs needs no torchrun or mpirun
    """

    path: Path
    document: dict[str, Any]
    out: Path
    ranks: int
    nodes: int
    env: Mapping[str, str]
    seconds: float
    launched: bool = True

    @property
    def name(self) -> str:
        """Unique in our job: of the group's folder, which is new for every attempt."""
        execution = self.document["place"]["execution"].rpartition("-")[2]
        return f"cx-{execution}-{self.path.parent.name}"

    @property
    def files(self) -> tuple[str, ...]:
        """The arguments of the command `rank` that say what to do and where to write."""
        return ("--cases", str(self.path.resolve()), "--out", str(self.out.resolve()))

    def write(self, address: str) -> None:
        """The cases file, with what ranker.py needs to start ranks on other machines or in a container."""
        start = {
            "ranks": self.ranks,
            "ranks_per_node": self.ranks // self.nodes,
            "address": address,
            "port": port(f"{self.name}/{time.time_ns()}"),
            "env": dict(self.env),
        }
        write_json(self.path, {**self.document, "start": start})


class Mechanism(Protocol):
    """How one execution starts its groups. `image`: as provenance carries it. `libraries`: where the prepared
    libraries of its ranks are; None: in our own folder."""

    image: Mapping[str, str | None] | None
    libraries: Path | None

    def group(self, work: Work) -> Group:
        """Start one group. Raises InfraError when it cannot be started at all."""
        ...

    def check(self, when: str, folder: Path, ranks_per_node: int) -> None:
        """Health of every node, reports into `folder`. Raises health.Unhealthy."""
        ...


class Processes:
    """No scheduler, no container: what `cx run` uses by itself."""

    image: Mapping[str, str | None] | None = None
    libraries: Path | None = None

    def group(self, work: Work) -> Group:
        write_json(work.path, work.document)
        return LocalGroup(work.path, work.out, work.ranks, work.env)

    def check(self, when: str, folder: Path, ranks_per_node: int) -> None:
        """A person at the machine sees it; the clocks before and after are in every result."""


def processes(case: Case) -> int:
    """How many processes a group of such cases has: one for each rank. An external program on one node is
    driven by one; on several it is an MPI program, again of one for each rank."""
    alone = case.nodes == 1 and isinstance(registry.load(case.backend), Program)
    return 1 if alone else case.ranks


def allowed_s(cases: Sequence[Case]) -> float:
    """The most that a group over these cases may take: its watchdog comes before that. A program may take its
    time for the first line of each of its processes."""
    program = isinstance(registry.load(cases[0].backend), Program)
    first = Watch.setup_s if program else 0.0
    return Watch.setup_s + sum(first + case.deadline_s + GRACE_S for case in cases)


def port(seed: str) -> int:
    """A rendezvous port on another machine, where none can be tried out: a worker that finds it taken says
    so, and the group is started again with another one."""
    return 20000 + zlib.crc32(seed.encode()) % 10000


def local_ranks(files: Sequence[str], ranks: int, start: str) -> list[str]:
    """Arguments of the command that starts all ranks of this machine, see ranker.py."""
    more = [] if start == "ranker" else ["--launcher", start]
    return ["rank", *files, "--local", str(ranks), *more]
