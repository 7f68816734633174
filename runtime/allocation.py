"""A Slurm allocation of our own, from asking to giving back, that cannot outlive us."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import slurm
from .commands import Run, run
from .errors import InfraError
from .scrub import scrub
from .slurm import Request

POLL_S = 0.2
LOOK_S = 15.0  # between questions why a job is still pending
GIVE_BACK_S = 30.0
# Reasons (squeue %r) for which a job will never start by itself.
HOPELESS = {
    *("PartitionNodeLimit", "PartitionTimeLimit", "PartitionInactive", "PartitionDown", "BadConstraints"),
    *("InvalidAccount", "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed", "DependencyNeverSatisfied"),
    *(
        "JobHeldAdmin",
        "JobHeldUser",
        "ReqNodeNotAvail",
        "FrontEndDown",
        "NodeDown",
        "AssocMaxNodePerJobLimit",
    ),
}

Say = Callable[[str], None]


@contextlib.contextmanager
def allocated(asked: Request, name: str, wait_s: float, say: Say, execute: Run = run) -> Iterator[str]:
    """A job id, for as long as the block lasts. Raises InfraError when none is granted within `wait_s`.

    salloc runs `cat` on a pipe that we hold. Whatever ends us closes the pipe, cat ends, and salloc gives the
    nodes back. What is cancelled besides is the id that salloc told us.
    """
    argv = slurm.salloc(asked, name)
    with tempfile.TemporaryDirectory(prefix="collectivex-") as folder:
        path = Path(folder) / "salloc.log"
        with path.open("wb") as log:
            try:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise InfraError(f"cannot start salloc: {error.strerror}", "is this a login node?") from error
        try:
            yield _granted(process, path, wait_s, say, execute)
        finally:
            _give_back(process, path, execute)


def _granted(process: subprocess.Popen[bytes], path: Path, wait_s: float, say: Say, execute: Run) -> str:
    until, look, told = time.monotonic() + wait_s, time.monotonic() + LOOK_S, False
    while True:
        text = path.read_text(errors="replace")
        job, ready = slurm.granted(text)
        if job is not None and ready:
            say(f"allocation: job {job}")
            return job
        if process.poll() is not None:
            raise InfraError(f"no allocation: {scrub(' / '.join(text.splitlines()[-3:]))}")
        now = time.monotonic()
        if job is not None and not told:
            say(f"allocation: job {job} is waiting for nodes")
            told = True
        if job is not None and now > look:
            look = now + LOOK_S
            reason = execute(["squeue", "--noheader", f"--jobs={job}", "--format=%r"], timeout_s=30).out
            if hopeless(reason):
                raise InfraError(f"job {job} will not start: {reason.strip()}")
        if now > until:
            raise InfraError(
                f"no allocation within {wait_s / 60:g} minutes", "see wait_minutes in the site file"
            )
        time.sleep(POLL_S)


def hopeless(reason: str) -> bool:
    """`(ReqNodeNotAvail, UnavailableNodes:n2)` is `ReqNodeNotAvail`."""
    return reason.strip().strip("()").partition(",")[0].strip() in HOPELESS


def _give_back(process: subprocess.Popen[bytes], path: Path, execute: Run) -> None:
    assert process.stdin is not None
    process.stdin.close()
    job, ready = slurm.granted(path.read_text(errors="replace"))
    if not ready:
        process.terminate()  # salloc gives up a request that is still waiting
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GIVE_BACK_S)
    if process.poll() is None:
        process.kill()
        process.wait()
    if job is not None and slurm.state(job, execute) in slurm.ALIVE:
        slurm.cancel(job, execute)
