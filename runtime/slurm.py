"""Slurm's commands as argument lists, and its answers as plain values.

Every command is bounded by a time limit, job ids come from Slurm's own answers, and no job is looked up by
its name: two users, or two runs of one user, may have jobs of the same name.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .commands import Run, must, run
from .environment import without_ranks
from .errors import InfraError, UserError
from .sku import Sku

# squeue(1), "JOB STATE CODES". Whatever is in neither list is told as it is, and asked for again.
ALIVE = {
    *("PENDING", "RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"),
    *(
        "RESIZING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESV_DEL_HOLD",
        "SPECIAL_EXIT",
        "POWER_UP_NODE",
    ),
}
ENDED = {
    "COMPLETED": "it ended",
    "FAILED": "it ended with an error",
    "CANCELLED": "it was cancelled",
    "TIMEOUT": "it reached its time limit",
    "DEADLINE": "it reached its deadline",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not boot",
    "LAUNCH_FAILED": "it could not be started",
    "RECONFIG_FAIL": "a node could not be reconfigured",
    "OUT_OF_MEMORY": "it ran out of memory",
    "PREEMPTED": "another job took its nodes",
    "REVOKED": "another cluster runs it",
    "EXPIRED": "the scheduler has forgotten it",
    "COMPLETING": "it is ending",
}
UNKNOWN = "UNKNOWN"
MISSES = 5  # answers without a state until a job counts as lost
COMPLETING_S = 60
_ELSEWHERE = {"NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL"}  # worth other nodes
_JOB_ID = re.compile(r"^salloc: (Granted|Pending) job allocation (\d+)", re.MULTILINE)
_GONE = re.compile(r"Invalid job id|expired|does not exist", re.IGNORECASE)


class AllocationLost(InfraError):
    """The job under us has ended."""

    def __init__(self, job: str, state: str):
        super().__init__(f"job {job}: {state}: {ENDED.get(state, 'its state is not known')}")
        self.state = state

    @property
    def elsewhere(self) -> bool:
        return self.state in _ELSEWHERE


@dataclass(frozen=True)
class Request:
    """What an allocation asks for. Account to exclude are facts of a site, never written into results."""

    nodes: int
    gpus_per_node: int = 0
    gpu_option: str | None = "gpus-per-node"
    time_minutes: int = 240
    exclusive: bool = True
    all_memory: bool = False
    segment: bool = False
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    nodelist: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """As salloc and sbatch take them."""
        found = [f"--nodes={self.nodes}", f"--time={self.time_minutes}"]
        if self.exclusive:
            found.append("--exclusive")
        if self.gpus_per_node and self.gpu_option:
            kind = "gpu:" if self.gpu_option == "gres" else ""
            found.append(f"--{self.gpu_option}={kind}{self.gpus_per_node}")
        if self.all_memory:
            found.append("--mem=0")
        if self.segment and self.nodes > 1:
            found.append(f"--segment={self.nodes}")
        for name in ("account", "partition", "qos", "reservation"):
            if getattr(self, name):
                found.append(f"--{name}={getattr(self, name)}")
        for name in ("nodelist", "exclude"):
            if getattr(self, name):
                found.append(f"--{name}={','.join(getattr(self, name))}")
        return found


def request(sku: Sku, nodes: int) -> Request:
    """What the pool itself says of an allocation; the site adds its own."""
    return Request(nodes=nodes, gpus_per_node=sku.gpus_per_node, **sku.scheduler)


def salloc(asked: Request, name: str) -> list[str]:
    """An allocation that lasts as long as our end of cat's pipe: also when we are killed."""
    return ["salloc", f"--job-name={name}", *asked.options(), "cat"]


def srun(
    job: str, name: str, nodes: int, per_node: int, minutes: int, more: Sequence[str], command: Sequence[str]
) -> list[str]:
    """One step. All counts are said: inside a job srun would inherit them from the job's own request."""
    counts = [f"--nodes={nodes}", f"--ntasks={nodes * per_node}", f"--ntasks-per-node={per_node}"]
    how = ["--distribution=block", "--overlap", "--kill-on-bad-exit=1", "--input=none", "--unbuffered"]
    limits = [f"--time={minutes}", "--export=ALL"]
    return ["srun", f"--jobid={job}", f"--job-name={name}", *counts, *how, *limits, *more, *command]


def step_minutes(seconds: float) -> int:
    """A step's time limit for work that the watchdog bounds to `seconds`: later than it, to the minute."""
    return math.ceil(seconds / 60) + 2


def granted(text: str) -> tuple[str | None, bool]:
    """(job id, whether it is granted) out of what salloc has said so far."""
    found = _JOB_ID.findall(text)
    return (found[-1][1], any(kind == "Granted" for kind, _ in found)) if found else (None, False)


def state(job: str, execute: Run = run) -> str:
    """The state of a job in capitals, "EXPIRED" when Slurm no longer knows it, UNKNOWN when it does not say.

    squeue first, then scontrol (which remembers for MinJobAge), then accounting where there is any.
    """
    queue = execute(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], timeout_s=30)
    if queue.code == 0 and queue.out.strip():
        return _word(queue.out)
    control = execute(["scontrol", "--oneliner", "show", "job", job], timeout_s=30)
    found = re.search(r"\bJobState=(\w+)", control.out)
    if control.code == 0 and found:
        return found[1]
    argv = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={job}", "--format=State"]
    accounts = execute(argv, timeout_s=30)
    if accounts.code == 0 and accounts.out.strip():
        return _word(accounts.out)
    return "EXPIRED" if _GONE.search(queue.err + control.err) else UNKNOWN


def _word(text: str) -> str:
    """`CANCELLED by 1000` and `CANCELLED+` are CANCELLED."""
    found = re.match(r"\s*([A-Z_]+)", text)
    return found[1] if found else UNKNOWN


def settled_state(
    job: str, execute: Run = run, sleep: Callable[[float], None] = time.sleep, misses: int = MISSES
) -> str:
    """The state of a job once Slurm says one: a controller that is slow or restarting is asked again, and a
    job that is COMPLETING until it says how it ended."""
    found, attempt = UNKNOWN, 0
    for _ in range(COMPLETING_S):
        found = state(job, execute)
        if found == "COMPLETING":
            sleep(1.0)
            continue
        if found in ALIVE or found in ENDED or attempt + 1 == misses:
            break
        sleep(min(2.0**attempt, 10.0))
        attempt += 1
    return found if found in ALIVE or found in ENDED else UNKNOWN


def hostnames(job: str, execute: Run = run) -> list[str]:
    """The nodes of a job in Slurm's order. Raises InfraError when Slurm does not say."""
    queue = execute(["squeue", "--noheader", f"--jobs={job}", "--format=%N"], timeout_s=30)
    listed = must(f"asking for the nodes of job {job}", queue).strip()
    names = must("scontrol show hostnames", execute(["scontrol", "show", "hostnames", listed])).split()
    if not listed or not names:
        raise InfraError(f"job {job} has no nodes")
    return names


def step_id(job: str, name: str, execute: Run = run) -> str | None:
    """The id of our step, which has a name of its own in our job; None while there is none."""
    argv = ["squeue", "--steps", "--noheader", f"--jobs={job}", "--format=%i|%j"]
    for line in execute(argv, timeout_s=30).out.splitlines():
        step, _, step_name = line.strip().partition("|")
        if step_name == name and step.startswith(f"{job}."):
            return step
    return None


def cancel(what: str, execute: Run = run, signal: str | None = None) -> None:
    """scancel one job or step by id. Raises UserError for anything else: nothing is cancelled by name."""
    if not re.fullmatch(r"\d+(\.\d+)?", what):
        raise UserError(f"{what!r} is not the id of a job or step")
    execute(["scancel", *([f"--signal={signal}"] if signal else []), what], timeout_s=30)


def realised(planned: int, nodes: Sequence[str]) -> None:
    """Raises UserError when an allocation is not what was planned."""
    if len(nodes) != planned:
        hint = f"use --nodes {len(nodes)}, or another allocation"
        raise UserError(f"planned for {planned} nodes, the allocation has {len(nodes)}", hint)


def header(sku: Sku) -> list[str]:
    """The #SBATCH lines of a pool's script. No account or partition: those are options of sbatch."""
    asked = request(sku, 1)
    lines = ["--job-name=collectivex", "--output=%x-%j.log", "--no-requeue", "--signal=B:TERM@60"]
    return [f"#SBATCH {option}" for option in [*lines, *asked.options()]]


def environment(job: str, nodes: int, env: Mapping[str, str]) -> dict[str, str]:
    """What a step of `job` inherits: ours, without what another job or launcher says of ranks."""
    kept = without_ranks(env)
    conf = {n: env[n] for n in ("SLURM_CONF",) if n in env}
    return {**kept, **conf, "SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": str(nodes)}
