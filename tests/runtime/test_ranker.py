"""Between launcher and rank: placement as planned, and exit codes that no launcher loses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from collectivex.runtime import environment, ranker
from collectivex.runtime.commands import Done
from collectivex.runtime.containers import Container
from collectivex.runtime.environment import RankEnvironment
from collectivex.runtime.errors import UserError
from collectivex.runtime.heartbeat import read
from collectivex.runtime.mechanism import Work
from collectivex.runtime.started import SlurmGroup, StartedGroup
from collectivex.runtime.types import CASES_SCHEMA
from collectivex.runtime.yamlfile import ROOT

START: dict[str, Any] = {"ranks": 4, "ranks_per_node": 2, "address": "n1", "port": 29500, "env": {}}


def test_a_placement_that_was_not_planned_is_an_error() -> None:
    """All four ranks on one node would be published as a number of two."""
    ranker.check_placement(START, RankEnvironment(1, 4, 1, 2, "n1", 1))
    with pytest.raises(UserError, match="planned 4 ranks, 2 per node; started were 4 ranks, 4 per node"):
        ranker.check_placement(START, RankEnvironment(1, 4, 1, 4, "n1", 1))


def test_a_step_knows_its_rank_whatever_else_is_set() -> None:
    """A RANK that leaked in from somebody's shell is not ours."""
    env = {"RANK": "9", "WORLD_SIZE": "99", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}
    env |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    found = environment.step_rank("n1", 29500, env)
    assert (found.rank, found.world_size, found.ranks_per_node, found.master_address) == (3, 4, 2, "n1")


def test_a_wrong_placement_is_told_where_the_host_half_looks(tmp_path: Path) -> None:
    """Exit file and error file of the rank, kind `infra`; the launcher itself ends with 0."""
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps({"schema": CASES_SCHEMA, "start": START}))
    entry = Container("none", None, "cpu", sys.executable).entry(ROOT, "rank", "--cases", str(cases))
    argv = [*entry, "--out", str(tmp_path), "--local", "2"]
    done = subprocess.run(
        argv, stdin=subprocess.PIPE, capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{r}.exit").read_text() for r in (0, 1)] == ["3", "3"]
    error = read(tmp_path / "rank1.error.json")
    assert error is not None
    assert (error["kind"], error["rank"]) == ("infra", 1)
    assert "planned 4 ranks" in error["message"]


class Group(StartedGroup):
    """Ranks behind a shell command."""

    def __init__(self, folder: Path, command: str, ranks: int = 2):
        work = Work(folder / "cases.json", {}, folder, ranks, 1, {}, 1.0)
        super().__init__(["sh", "-c", command], environment.inherited(), work, subprocess.DEVNULL)


def ended(group: Group, monkeypatch: pytest.MonkeyPatch) -> dict[int, int | None]:
    monkeypatch.setattr("collectivex.runtime.started.SETTLE_S", 0.2)
    group.process.wait()
    codes = group.poll()
    while None in codes.values():
        codes = group.poll()
    return codes


def test_exit_codes_come_from_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher tells one code for all, if any."""
    group = Group(tmp_path, f"printf %s 0 > '{tmp_path}/rank0.exit'; printf %s -11 > '{tmp_path}/rank1.exit'")
    assert ended(group, monkeypatch) == {0: 0, 1: -11}


def test_a_launcher_that_ends_with_0_and_no_rank_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Success of srun is no evidence; its words are kept."""
    codes = ended(Group(tmp_path, "echo nothing to do here"), monkeypatch)
    assert all(codes.values())
    error = read(tmp_path / "rank0.error.json")
    assert error is not None
    assert error["kind"] == "infra"
    assert "the launcher ended with 0: nothing to do here" in error["message"]


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (
            "slurmstepd-n2: error:  mpi/pmix_v4: _errhandler: n2 [1]: client.c:211: Error handler invoked",
            "peer",
        ),
        ("slurmstepd-n2: error: something else", None),
    ],
)
def test_a_rank_that_srun_killed_for_another_is_not_what_went_wrong(
    tmp_path: Path, said: str, kind: str | None
) -> None:
    """Its runner may live long enough to write the kill down; the job is alive, and srun has told why."""
    work = Work(tmp_path / "cases.json", {"place": {"execution": "e-1"}}, tmp_path, 1, 1, {}, 1.0)
    command = ["sh", "-c", f"printf %s -9 > '{tmp_path}/rank0.exit'; echo '{said}'"]
    alive = Done(0, "RUNNING\n")
    group = SlurmGroup(command, environment.inherited(), work, "77", lambda *argv, **more: alive)
    group.process.wait()

    assert group.poll() == {0: -9}
    error = read(tmp_path / "rank0.error.json")
    assert (error and error["kind"]) == kind
    assert kind is None or "without MPI_Finalize" in error["message"]
