"""Groups behind one launcher process: an srun, or a container with all ranks of this machine.

What becomes of every rank is read from the files that runtime/ranker.py leaves.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import environment, health, images, slurm
from .commands import Run, must, run, shown
from .containers import Container
from .errors import InfraError
from .health import Wanted
from .heartbeat import read
from .mechanism import Work, local_ranks
from .ranker import complain
from .scrub import scrub
from .supervise import Group

SETTLE_S = 3.0  # for the files of ranks that have ended to be seen here, over a shared file system
KILL_S = 4.0
HEALTH_S = 240.0
MPI_ENDED = re.compile(r"mpi/pm\w+: .*(?:[Ee]rror handler|abort).*")  # what srun's MPI plugins say
KILLED = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)


class StartedGroup:
    """Ranks behind one launcher process whose output goes to launcher.log."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], work: Work, stdin: int):
        self.folder, self.ranks = work.path.parent, work.ranks
        self.codes: dict[int, int | None] = dict.fromkeys(range(work.ranks))
        self.ended_at: float | None = None
        self.asked = False
        self.log = self.folder / "launcher.log"
        with self.log.open("wb") as log:
            log.write(f"+ {shown(argv)}\n".encode())
            log.flush()
            try:
                self.process = subprocess.Popen(
                    argv,
                    env=dict(env),
                    stdin=stdin,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=functools.partial(environment.die_with_parent, signal.SIGTERM),
                )
            except OSError as error:
                raise InfraError(f"cannot start {argv[0]}: {error.strerror}") from error

    def poll(self) -> dict[int, int | None]:
        for rank, code in self.codes.items():
            if code is None:
                self.codes[rank] = self._exit_file(rank)
        if not self.asked and any(code in KILLED for code in self.codes.values()):
            self.asked = True
            self._explain_kill()
        missing = [rank for rank, code in self.codes.items() if code is None]
        if missing and self.process.poll() is not None:
            self.ended_at = self.ended_at or time.monotonic()
            if time.monotonic() - self.ended_at > SETTLE_S:
                self._give_up(missing)
        return dict(self.codes)

    def _exit_file(self, rank: int) -> int | None:
        try:
            return int((self.folder / f"rank{rank}.exit").read_text())
        except (OSError, ValueError):
            return None

    def _explain_kill(self) -> None:
        """Ranks that were killed are not at fault when somebody else has ended them."""
        ended = self.ended_by()
        if ended is None:
            return
        kind, problem = ended
        for rank, code in self.codes.items():
            if code in KILLED and not (self.folder / f"rank{rank}.error.json").exists():
                complain(self.folder, rank, kind, problem, "launch")

    def ended_by(self) -> tuple[str, Exception] | None:
        """Why everything that was started here has ended, where somebody else ended it: the error that this
        is for the ranks, and its kind (see supervise.GroupEnd)."""
        return None

    def _give_up(self, missing: Sequence[int]) -> None:
        """The launcher is gone and these ranks have not said how they ended: that is the machine's doing."""
        kind, problem = self.why_gone()
        for rank in missing:
            if not (self.folder / f"rank{rank}.error.json").exists():
                complain(self.folder, rank, kind, problem, "launch")
            self.codes[rank] = self.process.returncode or 1

    def why_gone(self) -> tuple[str, Exception]:
        """The error that this is for the ranks, and its kind (see supervise.GroupEnd)."""
        words = f"the launcher ended with {self.process.returncode}: {self.last_words()}"
        return "infra", InfraError(scrub(words))

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[1:]
        return " / ".join(line for line in lines[-4:] if line.strip())[-600:] or "it said nothing"

    def _wait(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None


class SlurmGroup(StartedGroup):
    """One srun, one step of our job."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], work: Work, job: str, execute: Run = run):
        self.job, self.name, self.execute = job, work.name, execute
        super().__init__(argv, env, work, subprocess.DEVNULL)

    def dump_stacks(self) -> None:
        self._signal("USR1")

    def kill(self) -> None:
        """End our step, first politely; srun itself last. Where all ranks are gone it ends by itself."""
        if None not in self.codes.values() and self._wait(SETTLE_S):
            return
        for name in ("TERM", "KILL"):
            if self.process.poll() is None and self._signal(name) and self._wait(KILL_S):
                break
        if self.process.poll() is None:
            self.process.terminate()  # no step yet: srun gives its request up
            if not self._wait(KILL_S):
                self.process.kill()
                self.process.wait()
        self._tell_the_vanished()

    def _tell_the_vanished(self) -> None:
        """A rank whose node died says nothing, and its peers only that they lost somebody. When nobody else
        is at fault, it is the machine."""
        errors = [read(self.folder / f"rank{rank}.error.json") for rank in self.codes]
        echoes = [error for error in errors if error is not None and error["kind"] == "peer"]
        if not echoes or len(echoes) < len([error for error in errors if error is not None]):
            return
        for rank in self.codes:
            if self._exit_file(rank) is None and errors[rank] is None:
                gone = InfraError(
                    "this rank is gone without a word: its node, or what started it there, has died"
                )
                complain(self.folder, rank, "infra", gone, "launch")

    def _signal(self, name: str) -> bool:
        step = slurm.step_id(self.job, self.name, self.execute)
        if step is not None:
            slurm.cancel(step, self.execute, signal=name)
        return step is not None

    def ended_by(self) -> tuple[str, Exception] | None:
        """The scheduler, with our job; or srun's MPI plugin."""
        lost = self.lost()
        return self.mpi_ended() if lost is None else ("infra", InfraError(scrub(lost)))

    def mpi_ended(self) -> tuple[str, Exception] | None:
        """As why_gone, where srun says that it has ended the others of an MPI program."""
        said = MPI_ENDED.search(self.log.read_text(errors="replace"))
        if said is None:
            return None
        words = f"a process ended without MPI_Finalize, so srun ended all others: {said[0]}"
        return "peer", RuntimeError(scrub(words))

    def lost(self) -> str | None:
        """The end of our job, None while it is alive."""
        state = slurm.settled_state(self.job, self.execute)
        ended = state in slurm.ENDED or state == slurm.UNKNOWN
        return slurm.AllocationLost(self.job, state).message if ended else None

    def why_gone(self) -> tuple[str, Exception]:
        lost = self.lost()
        if lost is not None:
            return "infra", InfraError(scrub(f"{lost} ({self.last_words()})"))
        if re.search(r"STEP .*TIME LIMIT", self.log.read_text(errors="replace")):
            limit = "the step reached its time limit, which the watchdog comes before"
            return "infra", InfraError(scrub(f"{limit}: {self.last_words()}"))
        return self.mpi_ended() or super().why_gone()


class SlurmMechanism:
    """Groups are steps of one job."""

    def __init__(
        self,
        job: str,
        hosts: Sequence[str],
        container: Container,
        root: Path,
        wanted: Wanted,
        mpi: str = "none",
        image: Mapping[str, str | None] | None = None,
        execute: Run = run,
    ):
        self.job, self.hosts, self.container, self.root = job, list(hosts), container, root
        self.wanted, self.mpi, self.image, self.execute = wanted, mpi, image, execute
        self.libraries = container.libraries
        self.env = slurm.environment(job, len(hosts), environment.inherited())

    def argv(self, name: str, nodes: int, per_node: int, seconds: float, *arguments: str) -> list[str]:
        entry = self.container.entry(self.root, *arguments)
        command = [*self.container.prefix(), *entry]
        minutes = slurm.step_minutes(seconds)
        more = [f"--mpi={self.mpi}", *self.container.srun_options()]
        return slurm.srun(self.job, name, nodes, per_node, minutes, more, command)

    def group(self, work: Work) -> Group:
        self.require_alive()
        work.write(self.hosts[0])
        argv = self.argv(
            work.name,
            work.nodes,
            work.ranks // work.nodes,
            work.seconds,
            *("rank", *work.files),
        )
        return SlurmGroup(argv, self.env, work, self.job, self.execute)

    def check(self, when: str, folder: Path, ranks_per_node: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ("health", "--vendor", self.wanted.vendor, "--out", str(folder.resolve()))
        argv = self.argv(f"cx-health-{folder.name}", len(self.hosts), 1, 120, *arguments)
        done = self.execute(argv, timeout_s=HEALTH_S, env=self.env)
        if done.code:
            if re.search("completing or completed|expired|revoked", done.said):
                wait_for(lambda: slurm.state(self.job, self.execute) not in slurm.ALIVE, KILL_S)
            self.require_alive()
            raise InfraError(
                f"{when} measuring, the nodes could not be asked: {scrub(done.said)}",
                "do they see checkout, output folder and image? docs/launching.md tells of stage_folder",
            )
        wait_for(lambda: len(list(folder.glob("[!.]*.json"))) >= len(self.hosts))
        wanted = Wanted(self.wanted.vendor, ranks_per_node, self.wanted.product)
        health.check(folder, len(self.hosts), wanted, when)

    def require_alive(self) -> None:
        """Raises AllocationLost when our job has ended."""
        state = slurm.settled_state(self.job, self.execute)
        if state in slurm.ENDED or state == slurm.UNKNOWN:
            raise slurm.AllocationLost(self.job, state)


class ContainerGroup(StartedGroup):
    """One container with all ranks of this machine. It ends with its stdin, so also when we are killed."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], work: Work, program: str, execute: Run):
        self.program, self.name, self.execute = program, work.name, execute
        super().__init__(argv, env, work, subprocess.PIPE)

    def dump_stacks(self) -> None:
        self.execute([self.program, "kill", "--signal=USR1", self.name], timeout_s=30)

    def kill(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        if not self._wait(KILL_S):
            self.execute([self.program, "rm", "--force", self.name], timeout_s=60)
            if not self._wait(KILL_S):
                self.process.kill()
                self.process.wait()


class ContainerMechanism:
    """Groups are containers of this machine, by docker or podman. `start`: see sku.Sku."""

    def __init__(
        self,
        container: Container,
        root: Path,
        wanted: Wanted,
        image: Mapping[str, str | None],
        execute: Run = run,
        start: str = "ranker",
    ):
        self.container, self.root, self.wanted, self.start = container, root, wanted, start
        self.image: Mapping[str, str | None] | None = image
        self.libraries = container.libraries
        self.execute = execute
        self.env = environment.inherited()

    def argv(self, name: str, *arguments: str) -> list[str]:
        user = (os.getuid(), os.getgid())
        return [*self.container.prefix(name, user), *self.container.entry(self.root, *arguments)]

    def group(self, work: Work) -> Group:
        work.write("127.0.0.1")
        start = self.start if work.launched else "ranker"
        argv = self.argv(work.name, *local_ranks(work.files, work.ranks, start))
        return ContainerGroup(argv, self.env, work, self.container.kind, self.execute)

    def check(self, when: str, folder: Path, ranks_per_node: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ("health", "--vendor", self.wanted.vendor, "--out", str(folder.resolve()))
        name = f"cx-health-{os.getpid()}"
        try:
            done = self.execute(self.argv(name, *arguments), timeout_s=HEALTH_S, env=self.env)
            must(f"{when} measuring, {self.container.kind}", done)
        except BaseException:
            self.execute([self.container.kind, "rm", "--force", name], timeout_s=60)
            raise
        wanted = Wanted(self.wanted.vendor, ranks_per_node, self.wanted.product)
        health.check(folder, 1, wanted, when)


def wait_for(there: Callable[[], bool], seconds: float = SETTLE_S) -> None:
    """Until something is seen, or `seconds` have passed; a shared file system shows files late."""
    until = time.monotonic() + seconds
    while not there() and time.monotonic() < until:
        time.sleep(0.05)


def docker_image(program: str, reference: str, arch: str, execute: Run = run) -> tuple[str, dict[str, Any]]:
    """(reference by digest, provenance) of an image, pulled. Raises InfraError when it cannot be had."""
    full = pulled_as(reference)
    must(f"pulling {reference}", execute([program, "pull", "--quiet", full], timeout_s=3600))
    form = "{{range .RepoDigests}}{{println .}}{{end}}"
    text = must("inspecting the image", execute([program, "image", "inspect", f"--format={form}", full]))
    # an image that was pulled from several places has a digest of each
    repository = images.parse(reference).name.rpartition(":")[0]
    pairs = re.findall(r"^(\S+)@(sha256:[0-9a-f]{64})$", text, re.MULTILINE)
    digests = [d for name, d in pairs if images.parse(f"{name}:x").name.rpartition(":")[0] == repository]
    if not digests:
        raise InfraError(f"{program} knows no digest of image {reference}", "pull it from a registry")
    digest = full.partition("@")[2] or digests[0]
    name = reference.partition("@")[0]
    return f"{repository}@{digest}", {"reference": name, "digest": digest, "arch": arch}


def pulled_as(reference: str) -> str:
    """A reference with its registry: podman does not take docker.io for granted, and asks on a terminal."""
    image = images.parse(reference)
    return image.name + (f"@{image.digest}" if image.digest else "")
