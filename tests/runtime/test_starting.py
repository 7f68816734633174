"""Ranks started by the real torchrun and, where there is one, the real mpirun, in place of our own runner."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import fault_cells
import program_pool
import pytest

from collectivex.runtime import environment
from collectivex.runtime.errors import UserError
from collectivex.runtime.ranker import launcher_argv
from collectivex.runtime.sku import load_sku
from collectivex.runtime.yamlfile import ROOT

no_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun is installed")
STARTS = ["torchrun", pytest.param("mpi", marks=no_mpi)]
FEW = ("--only", "all_reduce-4096B", "--only", "tiny-t1-bf16-uniform-normal")


class Box(fault_cells.Box):
    """A pool of this machine, whose ranks `start` starts."""

    def __init__(self, folder: Path, start: str, mechanism: str = "process"):
        # what leaks in from a shell inside somebody else's job must not count
        super().__init__(folder, {**os.environ, "RANK": "9", "OMPI_COMM_WORLD_RANK": "8"})
        env = {"GLOO_LOG_LEVEL": "ERROR"}
        self.pool = program_pool.write_pool(folder, "box", mechanism=mechanism, start=start, env=env)
        self.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.path_list("PYTHONPATH")])

    def argv(self, command: str, *more: str) -> list[str]:
        words = [command, "--sku", self.pool, "--out", str(self.out), "--ranks", "2"]
        return [sys.executable, "-m", "collectivex", *words, *more]

    def faulty(self, *faults: str) -> list[str]:
        suite = fault_cells.write_suite(self.folder, faults)
        return self.argv("run", "--suite", suite, "--backend", "fake")


@pytest.mark.parametrize("start", STARTS)
def test_ranks_of_another_launcher_end_in_the_same_records(start: str, tmp_path: Path) -> None:
    """Two gloo ranks, exit code 0, each told who it is by the launcher alone."""
    box = Box(tmp_path, start)
    done = box.run(box.argv("launch", "--suite", "smoke", "--backend", "torch_dist", *FEW))

    assert done.returncode == 0, done.stdout + done.stderr
    assert {record["status"] for record in box.records()} == {"ok"}
    assert all(record["case"]["ranks"] == 2 for record in box.records())
    folder = box.out / "logs" / "torch_dist.r0.0"
    assert f"--launcher {start}" in (folder / "launcher.log").read_text()
    assert "Fatal" not in (folder / "launcher.log").read_text()
    assert [(folder / f"rank{rank}.exit").read_text() for rank in (0, 1)] == ["0", "0"]
    assert box.ends()


@pytest.mark.parametrize("start", STARTS)
def test_a_crash_and_a_hang_behind_a_launcher_are_told_apart(start: str, tmp_path: Path) -> None:
    """Exit codes are the ranks' own, stacks come although torchrun forwards no signal; nothing is left."""
    box = Box(tmp_path, start)
    done = box.run(box.faulty("hang", "", "crash"))

    hang, honest, crash = box.records()
    assert done.returncode == 1, done.stdout + done.stderr
    assert (hang["status"], honest["status"], crash["status"]) == ("timeout", "ok", "failed"), done.stderr
    assert "rank 1 killed by SIGSEGV" in crash["reason"]
    assert all("File" in rank["stack"] for rank in hang["failure"]["ranks"])
    assert box.ends()


@pytest.mark.parametrize("start", STARTS)
def test_killed_outright_no_launcher_goes_on(start: str, tmp_path: Path) -> None:
    """Ranks end with the launcher, the launcher with the runner, the runner with its stdin."""
    box = Box(tmp_path, start)
    process = box.start(box.faulty("slow"))
    try:
        assert box.started()
        assert len(box.left()) >= 6, "the runner, the launcher, two of its ranks and two workers, and cx"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert box.ends(), box.left()


def test_a_launcher_that_is_not_installed_is_infra_with_its_name(tmp_path: Path) -> None:
    """Not a hang and not a traceback: no rank ever ran."""
    box = Box(tmp_path, "mpi")
    box.env["PATH"] = str(tmp_path)
    done = box.run(box.faulty(""))

    assert done.returncode == 3, done.stdout + done.stderr
    assert [record["status"] for record in box.records()] == ["infra"]
    assert "cannot start mpirun" in box.records()[0]["reason"]


def test_the_plan_shows_the_launcher(tmp_path: Path) -> None:
    """What a dry run prints is what is started."""
    box = Box(tmp_path, "torchrun")
    done = box.run(box.argv("launch", "--suite", "smoke", "--backend", "torch_dist", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert " rank --cases " in done.stdout
    assert "--local 2 --launcher torchrun" in done.stdout


def test_launchers_start_our_runner_once_for_each_rank() -> None:
    """torchrun by the Python that runs us, whatever `torchrun` is on the search path."""
    assert launcher_argv("mpi", 4, ["py", "-c", "x"]) == ["mpirun", "-n", "4", "py", "-c", "x"]
    torchrun = ["py", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "--no-python"]
    assert launcher_argv("torchrun", 4, ["py", "-c", "x"]) == [*torchrun, "py", "-c", "x"]


def test_a_rank_listens_to_its_own_launcher() -> None:
    """A RANK of the shell does not make all of mpirun's ranks the ninth."""
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    env = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, "1212", strict=True)}
    env |= {"RANK": "9", "WORLD_SIZE": "99", "SLURM_PROCID": "5", "SLURM_STEP_ID": "0"}
    found = environment.step_rank("127.0.0.1", 29500, env, launcher="mpi")
    assert (found.rank, found.world_size, found.local_rank, found.source) == (1, 2, 1, "Open MPI")


def test_a_step_of_slurm_has_its_own_way(tmp_path: Path) -> None:
    """srun starts the ranks; a key that would change nothing is refused."""
    with pytest.raises(UserError, match="srun starts the ranks"):
        load_sku(Box(tmp_path, "mpi", "slurm").pool)
