"""Slurm's odd answers, by recorded text: every state, lost accounting, a slow controller, requeue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from collectivex.runtime import allocation, slurm
from collectivex.runtime.commands import Done
from collectivex.runtime.environment import without_ranks
from collectivex.runtime.errors import InfraError, UserError
from collectivex.runtime.sku import load_sku
from collectivex.runtime.started import MPI_ENDED

DISABLED = Done(1, err="Slurm accounting storage is disabled\n")
GONE = Done(1, err="slurm_load_jobs error: Invalid job id specified\n")
SLOW = Done(124, err="squeue did not end within 30 s")


def answers(**by_program: Done | list[Done]) -> Callable[..., Done]:
    """A stand-in for commands.run: the recorded answer of each program, the last of a list for ever."""
    asked: list[list[str]] = []

    def execute(argv: Sequence[str], timeout_s: float = 60, env: Any = None) -> Done:
        asked.append(list(argv))
        answer = by_program[argv[0]]
        if isinstance(answer, list):
            return answer.pop(0) if len(answer) > 1 else answer[0]
        return answer

    execute.asked = asked  # type: ignore[attr-defined]
    return execute


@pytest.mark.parametrize(
    "state",
    # squeue(1) of Slurm 24.11, JOB STATE CODES
    """BOOT_FAIL CANCELLED COMPLETED COMPLETING CONFIGURING DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PENDING
    PREEMPTED RESV_DEL_HOLD REQUEUE_FED REQUEUE_HOLD REQUEUED RESIZING REVOKED RUNNING SIGNALING SPECIAL_EXIT
    STAGE_OUT STOPPED SUSPENDED TIMEOUT""".split(),
)
def test_every_state_of_slurm_is_alive_or_ended(state: str) -> None:
    """A state in neither list would be waited for until the client's deadline."""
    assert (state in slurm.ALIVE) != (state in slurm.ENDED)


def test_a_job_that_left_the_queue_is_asked_of_the_controller() -> None:
    """squeue forgets at once, scontrol only after MinJobAge."""
    said = "JobId=7 JobName=x UserId=a(1) JobState=NODE_FAIL Reason=NodeDown Restarts=0"
    execute = answers(squeue=Done(0, "\n"), scontrol=Done(0, said), sacct=DISABLED)

    assert slurm.state("7", execute) == "NODE_FAIL"


def test_accounting_is_asked_last_and_its_additions_are_ignored() -> None:
    """`CANCELLED by 1000` is CANCELLED."""
    execute = answers(squeue=GONE, scontrol=GONE, sacct=Done(0, "CANCELLED by 1000\n"))

    assert slurm.state("7", execute) == "CANCELLED"


def test_lost_accounting_does_not_make_a_job_run_for_ever() -> None:
    """Nobody knows the job any more: it has ended, whatever accounting says."""
    assert slurm.state("7", answers(squeue=GONE, scontrol=GONE, sacct=DISABLED)) == "EXPIRED"
    assert "EXPIRED" in slurm.ENDED


def test_a_slow_controller_is_asked_again() -> None:
    """A timeout is no state."""
    naps: list[float] = []
    execute = answers(squeue=[SLOW, SLOW, Done(0, "RUNNING\n")], scontrol=SLOW, sacct=DISABLED)

    assert slurm.settled_state("7", execute, naps.append) == "RUNNING"
    assert naps == [1.0, 2.0]


def test_a_controller_that_stays_silent_is_given_up() -> None:
    """After five questions the state is unknown, and the caller treats the job as lost."""
    execute = answers(squeue=SLOW, scontrol=SLOW, sacct=DISABLED)

    assert slurm.settled_state("7", execute, lambda s: None) == "UNKNOWN"
    assert sum(argv[0] == "squeue" for argv in execute.asked) == 5  # type: ignore[attr-defined]


def test_a_completing_job_is_asked_until_it_says_how_it_ended() -> None:
    """COMPLETING hides TIMEOUT and NODE_FAIL."""
    execute = answers(
        squeue=[Done(0, "COMPLETING\n"), Done(0, "")], scontrol=Done(0, "JobState=TIMEOUT "), sacct=DISABLED
    )

    assert slurm.settled_state("7", execute, lambda s: None) == "TIMEOUT"


def test_a_requeued_job_is_alive() -> None:
    """It will start again; restart counts are the launcher's business."""
    assert slurm.state("7", answers(squeue=Done(0, "REQUEUED\n"), scontrol=GONE, sacct=GONE)) in slurm.ALIVE


def test_the_job_id_is_sallocs_own_answer() -> None:
    """Also while it is pending, so that Ctrl-C can cancel it."""
    pending = "salloc: Pending job allocation 41\nsalloc: job 41 queued and waiting for resources\n"

    assert slurm.granted(pending) == ("41", False)
    assert slurm.granted(pending + "salloc: Granted job allocation 41\n") == ("41", True)
    assert slurm.granted("salloc: error: Job submit/allocate failed: Invalid account\n") == (None, False)


@pytest.mark.parametrize("what", ["", "cx-job", "--user=me", "7_1", "7;8", "-u"])
def test_nothing_is_cancelled_but_by_id(what: str) -> None:
    """A name could be somebody else's."""
    with pytest.raises(UserError):
        slurm.cancel(what, answers())


def test_the_step_to_signal_is_ours_by_name_in_our_job() -> None:
    """A step of the same name in another job, or another step of ours, is left alone."""
    lines = "9.0|cx-a\n7.batch|batch\n7.0|cx-health\n7.1|cx-a\n"

    assert slurm.step_id("7", "cx-a", answers(squeue=Done(0, lines))) == "7.1"
    assert slurm.step_id("8", "cx-a", answers(squeue=Done(0, lines))) is None


def test_hostnames_are_asked_not_parsed() -> None:
    """Two brackets in a list defeat home-made parsers; scontrol knows."""
    execute = answers(squeue=Done(0, "a[1-2]b[0-1],c\n"), scontrol=Done(0, "a1b0\na1b1\n"))

    assert slurm.hostnames("7", execute) == ["a1b0", "a1b1"]
    assert ["scontrol", "show", "hostnames", "a[1-2]b[0-1],c"] in execute.asked  # type: ignore[attr-defined]


def test_a_job_without_nodes_is_an_error() -> None:
    """squeue answers with an empty line for a job that is gone."""
    with pytest.raises(InfraError, match="nodes"):
        slurm.hostnames("7", answers(squeue=Done(0, "\n"), scontrol=Done(0, "")))


def test_a_step_says_all_its_counts() -> None:
    """Inside a job srun would otherwise inherit SLURM_NTASKS and start as many tasks as the job asked for."""
    argv = slurm.srun("7", "cx-a", 2, 4, 9, ["--mpi=none"], ["python3"])

    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--jobid=7", "--time=9"} <= set(argv)
    assert {"--input=none", "--distribution=block", "--kill-on-bad-exit=1"} <= set(argv)
    assert argv[-1] == "python3"


@pytest.mark.parametrize(("seconds", "minutes"), [(1, 3), (60, 3), (61, 4), (3600, 62)])
def test_the_steps_limit_comes_after_the_watchdogs(seconds: float, minutes: int) -> None:
    """Inner before outer: at least a minute between them, although Slurm counts in whole minutes."""
    assert slurm.step_minutes(seconds) == minutes
    assert minutes * 60 >= seconds + 60


def test_what_another_job_says_of_ranks_is_not_inherited() -> None:
    """A launch from inside an interactive step must not take that step's rank for its own."""
    stale = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "RANK": "1",
        "PMIX_RANK": "1",
        "SLURM_CONF": "/etc/s.conf",
        "A": "b",
    }

    assert slurm.environment("7", 2, stale) == {
        "SLURM_CONF": "/etc/s.conf",
        "A": "b",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
    }


def test_parameters_of_open_mpi_are_no_rank() -> None:
    """A site sets OMPI_MCA_* for its network; what mpirun tells its ranks is another matter."""
    env = {"OMPI_MCA_btl": "tcp,self", "OMPI_COMM_WORLD_RANK": "3", "PMI_RANK": "3", "PMIX_NAMESPACE": "x"}
    assert without_ranks(env) == {"OMPI_MCA_btl": "tcp,self"}


# What srun printed when rank 3 of four ended without MPI_Finalize (Slurm 22.05, PMIx 4, two nodes).
PMIX = """\
slurmstepd-n2: error:  mpi/pmix_v4: _errhandler: n2 [1]: pmixp_client_v2.c:211: Error handler invoked
srun: Job step aborted: Waiting up to 5 seconds for job step to finish.
slurmstepd-n1: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-11-20T12:07:33 ***
srun: error: n2: tasks 2-3: Killed
"""


def test_a_step_that_mpi_ended_is_told_from_one_that_somebody_cancelled() -> None:
    """The first is the program's fault, the second the machine's."""
    assert MPI_ENDED.search(PMIX)
    assert not MPI_ENDED.search(PMIX.partition("\n")[2])


def test_an_allocation_is_compared_with_the_plan() -> None:
    """Realised, not believed."""
    slurm.realised(2, ["a", "b"])
    with pytest.raises(UserError, match="planned for 2 nodes, the allocation has 1"):
        slurm.realised(2, ["a"])


def test_gpus_are_asked_for_as_the_scheduler_counts_them() -> None:
    """gres, gpus-per-node, or not at all."""
    pool = load_sku("gb200-nv")
    assert "--gres=gpu:4" in slurm.request(pool, 2).options()
    assert "--segment=2" in slurm.request(pool, 2).options()
    assert not any("segment" in option for option in slurm.request(pool, 1).options())
    assert "--gpus-per-node=8" in slurm.request(load_sku("h100-dgxc"), 1).options()


@pytest.mark.parametrize(
    ("reason", "hopeless"),
    [
        ("(Resources)", False),
        ("(Priority)", False),
        ("PartitionTimeLimit\n", True),
        ("(ReqNodeNotAvail, Unav:n2)", True),
    ],
)
def test_a_job_that_can_never_start_is_not_waited_for(reason: str, hopeless: bool) -> None:
    """squeue's reason tells."""
    assert allocation.hopeless(reason) is hopeless
