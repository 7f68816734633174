"""The process environment: ranks, settings, children, keys."""

import ctypes
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime import environment
from collectivex.runtime.environment import RankEnvironment, child_environment, rank_environment
from collectivex.runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}


def read(env, **changes):
    kept = {**env, **changes}
    return rank_environment(environ={name: value for name, value in kept.items() if value is not None})


def test_torchrun_variables_say_who_a_rank_is():
    """Rank 5 of 8 on the second of two nodes."""
    assert read(TORCHRUN) == RankEnvironment(5, 8, 1, 4, "10.0.0.1", 29500, "torchrun")
    assert read(TORCHRUN).nodes == 2


def test_slurm_variables_say_who_a_rank_is():
    """The master comes from the arguments, the ranks per node from 2(x2)."""
    found = rank_environment("n1", 29551, SLURM)

    assert found == RankEnvironment(3, 4, 1, 2, "n1", 29551, "Slurm")


@pytest.mark.parametrize("per_node", ["4", "4(x1)"])
def test_on_one_node_the_master_is_loopback(per_node):
    """Slurm with one node needs a port only."""
    env = {**SLURM, "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": per_node}

    assert rank_environment(master_port=29500, environ=env).master_address == "127.0.0.1"


def test_the_job_wide_number_of_tasks_per_node_is_the_second_choice():
    """SLURM_NTASKS_PER_NODE is what was asked for the job; the step's own list is what it got."""
    step = rank_environment("n1", 1, {**SLURM, "SLURM_NTASKS_PER_NODE": "8"})
    job = rank_environment(
        "n1", 1, {**{k: v for k, v in SLURM.items() if "TASKS_PER" not in k}, "SLURM_NTASKS_PER_NODE": "2"}
    )

    assert step == job


def test_open_mpi_inside_slurm_is_asked_first():
    """mpirun's ranks inherit the SLURM_PROCID of the daemon that srun started, one per node."""
    found = rank_environment(master_port=29500, environ={**SLURM, "SLURM_PROCID": "0", **MPI})

    assert (found.rank, found.world_size, found.source) == (2, 4, "Open MPI")


def test_torchrun_inside_slurm_is_asked_first():
    """srun starts one torchrun per node, which starts the ranks."""
    assert read({**SLURM, **TORCHRUN}).source == "torchrun"


def test_mpich_variables_say_who_a_rank_is():
    """Hydra's names."""
    env = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}

    assert rank_environment(master_port=1, environ=env).rank == 1


def test_a_batch_script_is_not_a_rank():
    """Slurm sets SLURM_PROCID=0 in the batch script too; only a step has ranks."""
    script = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}

    with pytest.raises(UserError, match="not a rank"):
        rank_environment(environ=script)


def test_pmix_alone_is_not_enough():
    """PMIx names the rank and not the size; the error says so."""
    with pytest.raises(UserError, match="PMIx"):
        rank_environment(environ={"PMIX_RANK": "0"})


@pytest.mark.parametrize(
    ("env", "changes", "message"),
    [
        (TORCHRUN, {"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": None}, "LOCAL_WORLD_SIZE is not set"),
        (TORCHRUN, {"MASTER_PORT": None}, "MASTER_PORT is not set"),
        (TORCHRUN, {"MASTER_ADDR": None}, "8 ranks on 2 nodes, but MASTER_ADDR is not set"),
        (TORCHRUN, {"RANK": "five"}, "RANK='five' is not a whole number"),
        (TORCHRUN, {"RANK": "-1"}, "not a whole number"),
        (TORCHRUN, {"RANK": "8"}, "contradictory"),
        (TORCHRUN, {"LOCAL_RANK": "4"}, "contradictory"),
        (TORCHRUN, {"WORLD_SIZE": "0"}, "contradictory"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "3"}, "uneven"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "not placed in blocks"),
        (TORCHRUN, {"MASTER_PORT": "70000"}, "not a port"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": "2(x1),1(x2)"}, "different numbers of ranks"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, "not a list of task counts"),
        (SLURM, {"SLURM_STEP_TASKS_PER_NODE": None}, "SLURM_NTASKS_PER_NODE is not set"),
    ],
)
def test_incomplete_or_contradictory_variables_are_the_users_to_mend(env, changes, message):
    """One error with a hint, for each way in which they can be wrong."""
    with pytest.raises(UserError, match=message) as raised:
        read(env, **changes)

    assert raised.value.hint


@given(st.integers(1, 16), st.integers(1, 16), st.integers(0, 255), st.integers(1, 65535))
def test_what_a_rank_passes_on_reads_back(nodes, per_node, rank, port):
    """The variables set for a child make the same RankEnvironment again."""
    rank %= nodes * per_node
    here = RankEnvironment(rank, nodes * per_node, rank % per_node, per_node, "n1", port)

    assert rank_environment(environ=child_environment({}, here, environ={"RANK": "77"})) == here


def test_scheduler_facts_are_numbers_of_the_job():
    """No account, node list, partition, user or job name; nothing outside a job."""
    told = {
        **SLURM,
        "SLURM_JOB_ACCOUNT": "acme",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_JOB_PARTITION": "secret",
    }

    assert environment.scheduler_facts(told) == {"kind": "slurm", "job_id": 4711, "step_id": 0, "tasks": 4}
    assert environment.inside_allocation(told)
    assert environment.scheduler_facts({}) is None


# ------------------------------------------------------------------------------------------ children

OFF = environment.MULTICAST_OFF


def test_a_child_gets_our_environment_the_extras_and_its_rank():
    """In this order: the rank's variables win over stale ones."""
    here = RankEnvironment(1, 2, 1, 2, "127.0.0.1", 29500)
    child = child_environment(
        {"NCCL_DEBUG": "WARN"}, here, environ={"PATH": "/bin", "NCCL_DEBUG": "INFO", "RANK": "9"}
    )

    assert child["PATH"] == "/bin"
    assert child["NCCL_DEBUG"] == "WARN"
    assert (child["RANK"], child["LOCAL_WORLD_SIZE"]) == ("1", "2")


@pytest.mark.parametrize("name", list(OFF))
def test_one_switch_off_turns_all_four_off_in_the_child(name):
    """A machine that forbids multicast to one library forbids it to all."""
    child = child_environment({}, environ={name: OFF[name]})

    assert {n: child[n] for n in OFF} == OFF


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"NCCL_NVLS_ENABLE": "1"}, "NCCL_NVLS_ENABLE"),
        ({"NCCL_NVLS_ENABLE": "2"}, "NCCL_NVLS_ENABLE"),
        ({"NVSHMEM_DISABLE_NVLS": "0"}, "NVSHMEM_DISABLE_NVLS"),
        ({"MSCCLPP_FORCE_DISABLE_NVLS": "false"}, "MSCCLPP_FORCE_DISABLE_NVLS"),
    ],
)
def test_an_extra_that_turns_multicast_on_is_refused(extra, named):
    """Where it is off here no suite, SKU or backend may turn it on."""
    with pytest.raises(UserError, match=named):
        child_environment(extra, environ={"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"})


def test_our_own_switches_that_contradict_each_other_are_refused():
    """One variable forbids multicast, another asks for it: nobody can tell what is meant."""
    with pytest.raises(UserError, match="NCCL_NVLS_ENABLE=1 turns NVLink multicast on"):
        child_environment({}, environ={"NCCL_NVLS_ENABLE": "1", "NVSHMEM_DISABLE_NVLS": "1"})


def test_a_container_is_told_what_it_does_not_inherit():
    """docker and podman hand on nothing of our environment: the switches travel with the case."""
    told = environment.for_elsewhere({"A": "b"}, {"NCCL_NVLS_ENABLE": "0", "C": "d"})
    assert told == {"A": "b", **environment.MULTICAST_OFF}
    assert environment.for_elsewhere({"A": "b"}, {"C": "d"}) == {"A": "b"}
    with pytest.raises(UserError, match="turns NVLink multicast on"):
        environment.for_elsewhere({"NCCL_NVLS_ENABLE": "1"}, {"NVSHMEM_DISABLE_NVLS": "1"})


def test_without_a_switch_the_libraries_decide():
    """Nothing is added where nothing is forbidden; asking for multicast is then allowed."""
    assert child_environment({"NCCL_NVLS_ENABLE": "1"}, environ={}) == {"NCCL_NVLS_ENABLE": "1"}


VALUES = st.sampled_from([None, "", "0", "1", "2", "true", "false", "TRUE", "yes", " 1 "])
SWITCHES = st.fixed_dictionaries(dict.fromkeys(OFF, VALUES)).map(
    lambda d: {k: v for k, v in d.items() if v is not None}
)


@given(SWITCHES, SWITCHES)
def test_a_child_never_has_multicast_on_where_we_have_it_off(parent, extra):
    """For any mixture of settings: an error, or all four off in the spelling that the libraries honour."""
    off = [
        n
        for n, v in parent.items()
        if v.strip().lower() in (("0", "false") if OFF[n] == "0" else ("1", "true", "yes"))
    ]
    try:
        child = child_environment(extra, environ=parent)
    except UserError:
        assert off
        return

    if off:
        assert {n: child[n] for n in OFF} == OFF


def test_the_kernel_ends_a_rank_whose_starter_is_gone(tmp_path):
    """A rank that asked for it does not outlive the process that started it, whatever kills that one."""
    rank = (
        "import os, sys, time; from collectivex.runtime.environment import die_with_parent\n"
        "die_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    process = subprocess.Popen([sys.executable, "-c", starter], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.stdout.read()  # ends when the last holder of the pipe is gone
    until = time.monotonic() + 5
    while _lives(pid) and time.monotonic() < until:
        time.sleep(0.01)

    assert not _lives(pid)


@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 0), ("os.getppid() + 1", -signal.SIGKILL)])
def test_a_rank_whose_starter_was_gone_before_it_could_ask_ends_at_once(parent, code):
    """Between the start of a process and its request to the kernel its parent may die: nobody tells it."""
    rank = (
        "import os; from collectivex.runtime.environment import die_with_parent\n"
        f"die_with_parent(parent={parent})"
    )
    done = subprocess.run([sys.executable, "-c", rank], cwd=ROOT, check=False)

    assert code == done.returncode


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# -------------------------------------------------------------------------------------------- settings


def test_settings_are_read_from_the_environment_as_c_sees_it():
    """NCCL puts what it finds in nccl.conf there with setenv; os.environ never shows it."""
    libc = ctypes.CDLL(None)
    libc.setenv(b"NCCL_MIN_NCHANNELS", b"17", 1)
    try:
        assert "NCCL_MIN_NCHANNELS" not in os.environ
        assert environment.communication_settings("key")["NCCL_MIN_NCHANNELS"] == "17"
    finally:
        libc.unsetenv(b"NCCL_MIN_NCHANNELS")


def test_settings_follow_our_own_changes(monkeypatch):
    """What Python sets reaches the C environment too."""
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "1024")

    assert environment.communication_settings("key")["NVSHMEM_QP_DEPTH"] == "1024"


# ------------------------------------------------------------------------------------- folders and key


def test_the_cache_is_where_the_user_wants_it(tmp_path):
    """XDG_CACHE_HOME, else ~/.cache, else the temporary folder; a relative XDG path is ignored."""
    assert environment.cache_dir({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/collectivex")
    assert environment.cache_dir({"XDG_CACHE_HOME": "c", "HOME": "/h"}) == Path("/h/.cache/collectivex")
    assert environment.cache_dir({}).name == f"collectivex-{os.getuid()}"


def test_the_key_is_made_once_and_only_its_owner_may_read_it(tmp_path):
    """32 random bytes in hex, mode 0600, the same at every later call and another one elsewhere."""
    env = {"XDG_STATE_HOME": str(tmp_path / "a")}
    key = environment.user_key(environ=env)
    mode = stat.S_IMODE((tmp_path / "a/collectivex/key").stat().st_mode)

    assert len(bytes.fromhex(key)) == 32
    assert mode == 0o600
    assert environment.user_key("fallback", env) == key
    assert environment.user_key(environ={"XDG_STATE_HOME": str(tmp_path / "b")}) != key
    assert os.listdir(tmp_path / "a/collectivex") == ["key"]


def test_ranks_that_start_together_agree_on_the_key(tmp_path):
    """Whoever comes first makes it; nobody reads half of one."""
    env = {"XDG_STATE_HOME": str(tmp_path)}
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: environment.user_key(environ=env), range(32)))

    assert len(set(keys)) == 1


def test_a_damaged_key_is_replaced_and_an_open_one_is_closed(tmp_path):
    """A truncated file cannot be a key; one that others may read is made private."""
    file = tmp_path / "collectivex/key"
    file.parent.mkdir()
    file.write_text("abc")
    key = environment.user_key(environ={"XDG_STATE_HOME": str(tmp_path)})
    file.chmod(0o644)
    again = environment.user_key(environ={"XDG_STATE_HOME": str(tmp_path)})

    assert (len(key), key) == (64, again)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_no_key_can_be_kept_the_execution_has_its_own(tmp_path):
    """A state folder that cannot be made: the fallback, and without one a key of this process."""
    (tmp_path / "file").write_text("")
    env = {"XDG_STATE_HOME": str(tmp_path / "file")}

    assert environment.user_key("of this execution", env) == "of this execution"
    assert environment.user_key(environ=env) != environment.user_key(environ=env)


def test_private_names_come_from_host_user_home_and_secret_variables():
    """Also from what schedulers say; values of secret variables count when they are long enough to tell."""
    env = {
        "HOSTNAME": "gpu17",
        "SLURM_JOB_ACCOUNT": "acme",
        "HOME": "/srv/people/jdoe",
        "USER": "jdoe",
        "AWS_SECRET_ACCESS_KEY": "0123456789",
        "TOKENIZERS_PARALLELISM": "false-but-long",
        "MY_TOKEN": "short",
    }
    found = environment.private(env)

    assert "gpu17" in found.hosts
    assert {"jdoe", "acme"} <= set(found.users)
    assert "/srv/people/jdoe" in found.homes
    assert found.secrets == ("0123456789",)


def test_git_variables_stay_behind():
    """A hook's GIT_DIR would make git answer for another repository."""
    assert environment.without_git({"GIT_DIR": "/x", "PATH": "/bin"}) == {"PATH": "/bin"}


@pytest.mark.parametrize(
    ("value", "left"), [("", 0), ("0", 1), ("2,3", 2), ("0,-1,1", 1), ("-1", 0), ("GPU-a,GPU-b", 2)]
)
def test_hidden_gpus_do_not_count(value, left):
    """As the CUDA runtime reads it: the list ends at the first entry that is no device."""
    assert left == environment.visible_gpus({"CUDA_VISIBLE_DEVICES": value})
    assert environment.visible_gpus({}) is None
