"""Ranks started by the real torchrun and, where there is one, the real mpirun, in place of our own runner."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fault_cells
import pytest

from collectivex.runtime import environment
from collectivex.runtime.errors import UserError
from collectivex.runtime.ranker import launcher_argv
from collectivex.runtime.sku import load_sku
from collectivex.runtime.yamlfile import ROOT

POOL = """\
schema: collectivex.sku.v1
name: box
title: one machine
vendor: cpu
arch: null
product: test
gpus_per_node: 0
scale_up: null
scale_out: null
limits: []
mechanism: {mechanism}
start: {start}
image: null
env: {{GLOO_LOG_LEVEL: "ERROR"}}
refuse: []
"""
no_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun is installed")
STARTS = ["torchrun", pytest.param("mpi", marks=no_mpi)]
FEW = ("--only", "all_reduce-4096B", "--only", "tiny-t1-bf16-uniform-normal")


class Box:
    """A pool of this machine, whose ranks `start` starts."""

    def __init__(self, folder: Path, start: str, mechanism: str = "process"):
        self.folder, self.out = folder, folder / "out"
        self.pool = folder / "box.yaml"
        self.pool.write_text(POOL.format(start=start, mechanism=mechanism))
        # what leaks in from a shell inside somebody else's job must not count
        self.env = {**os.environ, "RANK": "9", "OMPI_COMM_WORLD_RANK": "8", "OMP_NUM_THREADS": "1"}
        self.env.pop("SLURM_JOB_ID", None)
        self.env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *environment.path_list("PYTHONPATH")])

    def argv(self, command: str, *more: str) -> list[str]:
        words = [command, "--sku", str(self.pool), "--out", str(self.out), "--ranks", "2"]
        return [sys.executable, "-m", "collectivex", *words, *more]

    def faulty(self, *faults: str) -> list[str]:
        return self.argv(
            "run", "--suite", fault_cells.write_suite(self.folder, faults, 5), "--backend", "fake"
        )

    def run(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, env=self.env, capture_output=True, text=True, check=False, timeout=180)

    def records(self) -> list[dict]:
        return fault_cells.records(self.out)

    def left(self) -> list[str]:
        return fault_cells.processes(self.out)

    def ends(self, seconds: float = 20) -> bool:
        until = time.monotonic() + seconds
        while self.left() and time.monotonic() < until:
            time.sleep(0.1)
        return not self.left()


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
    done = box.run(box.faulty("crash", "hang", ""))

    crash, hang, honest = box.records()
    assert done.returncode == 1, done.stdout + done.stderr
    assert (crash["status"], hang["status"], honest["status"]) == ("failed", "timeout", "ok"), done.stderr
    assert "rank 1 killed by SIGSEGV" in crash["reason"]
    assert all("File" in rank["stack"] for rank in hang["failure"]["ranks"])
    assert box.ends()


@pytest.mark.parametrize("start", STARTS)
def test_killed_outright_no_launcher_goes_on(start: str, tmp_path: Path) -> None:
    """Ranks end with the launcher, the launcher with the runner, the runner with its stdin."""
    box = Box(tmp_path, start)
    null = subprocess.DEVNULL
    process = subprocess.Popen(box.faulty("slow"), env=box.env, stdout=null, stderr=null)
    until = time.monotonic() + 60
    while not list(box.out.glob("logs/fake.r0.0/rank1.beat.json")) and time.monotonic() < until:
        time.sleep(0.1)
    try:
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
        load_sku(str(Box(tmp_path, "mpi", "slurm").pool))
