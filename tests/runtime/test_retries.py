"""Unfit nodes: cells become `infra`, and a launch that owns its allocation tries others, at most twice."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collectivex.runtime import cli, execute, launch
from collectivex.runtime.execute import Execution
from collectivex.runtime.fabric import Fabric
from collectivex.runtime.health import Unhealthy
from collectivex.runtime.launch import Launch
from collectivex.runtime.manifest import Manifest
from collectivex.runtime.mechanism import Processes
from collectivex.runtime.progress import Progress
from collectivex.runtime.site import Pool
from collectivex.runtime.sku import Sku, load_sku
from collectivex.runtime.slurm import AllocationLost, Request
from collectivex.runtime.types import Status

SUITE = """\
schema: collectivex.suite.v1
name: one
description: one honest cell
runs: 1
order: declared
deadline_s: 20
sampling: {warmup_iterations: 1, warmup_s: 0, trials: 1, iterations: 4, chain_blocks: 4, chain_block: 2}
groups:
  - {family: moe, backends: [fake], workloads: [tiny], dtypes: [bf16], tokens: [1], modes: [normal],
     variants: [rank-sum], regimes: [fresh, chained], knobs: {latency_us: "dispatch=10,combine=20"}}
"""


class Failing(Processes):
    """Processes of this machine, whose health check fails at one time."""

    def __init__(self, at: str):
        self.at = at

    def check(self, when: str, folder: Path, ranks_per_node: int) -> None:
        if when == self.at:
            raise Unhealthy([f"{when} measuring: GPU 3 is held back: hw-thermal"], ["n7"])


def execution(tmp_path: Path, fault: str = "") -> Execution:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "one.yaml").write_text(SUITE.replace("}}", f", fault: {fault}}}}}") if fault else SUITE)
    argv = ["run", "--suite", str(tmp_path / "one.yaml"), "--backend", "fake", "--ranks", "2"]
    args = cli.parser().parse_args([*argv, "--out", str(tmp_path / "out")])
    suite, sku, planned = execute.plan(args)
    manifest = Manifest.open(tmp_path / "out", suite.name, sku.name, [], [p.cell for p in planned], False)
    return Execution(suite, sku, planned, tmp_path / "out", manifest, Progress(len(planned)))


def record(tmp_path: Path) -> dict[str, Any]:
    return json.loads(next((tmp_path / "out" / "cells").glob("*.json")).read_text())


def test_a_gpu_that_throttled_meanwhile_makes_its_cells_infra(tmp_path: Path) -> None:
    """A slow number looks like any other; it is kept beside the logs, and the folder is valid."""
    found = execution(tmp_path)
    found.mechanism = Failing("after")
    with pytest.raises(Unhealthy):
        found.run()

    assert record(tmp_path)["status"] == "infra"
    assert record(tmp_path)["measurements"] == []
    assert "hw-thermal" in record(tmp_path)["reason"]
    assert "n7" not in record(tmp_path)["reason"]
    assert len(list((tmp_path / "out" / "logs" / "superseded").iterdir())) == 2, "the record and its samples"
    assert cli.main(["validate", str(tmp_path / "out")]) == 0
    assert cli.main(["summarize", str(tmp_path / "out")]) == 3


@pytest.mark.parametrize("fault", ["wrong-expert", "crash"])
def test_a_wrong_answer_or_a_crash_on_an_unfit_node_is_not_the_librarys(tmp_path: Path, fault: str) -> None:
    """It becomes `infra`, so another node measures it again."""
    found = execution(tmp_path, fault)
    found.mechanism = Failing("after")
    with pytest.raises(Unhealthy):
        found.run()

    assert record(tmp_path)["status"] == "infra"
    assert "hw-thermal" in record(tmp_path)["reason"]
    assert not found.done(found.planned[0].cell)


def test_a_library_that_failed_gets_no_second_try_because_of_another_cells_node(tmp_path: Path) -> None:
    """The retry of a launch goes over what the machine failed; --resume, a new execution, over this too."""
    found = execution(tmp_path, "crash")
    found.run()

    assert record(tmp_path)["status"] == "failed"
    assert [] == found.shards()
    found.failed.clear()  # as in a new execution
    assert 1 == len(found.shards())


def test_an_unfit_node_is_not_measured_on(tmp_path: Path) -> None:
    """Nothing is started when the check before says no."""
    found = execution(tmp_path)
    found.mechanism = Failing("before")
    with pytest.raises(Unhealthy):
        found.run()
    assert not list((tmp_path / "out").glob("logs/fake.r0.*/cases.json"))


def test_a_run_that_fell_back_to_sockets_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's network is InfiniBand and NCCL says it took sockets."""
    found = execution(tmp_path)
    found.run()
    shard = execute.Shard("fake.r0", "fake", 0, [p.cell for p in found.planned])
    log = tmp_path / "rank10.log"
    log.write_text("n1:1:1 [0] NCCL INFO Using network Socket\n")
    monkeypatch.setattr(Sku, "fabric", lambda self: Fabric("infiniband"))
    monkeypatch.setattr(execute, "fallen_back", lambda fabric, nodes, logs: execute_fallen(fabric, 2, logs))
    found.look_after(shard, [log])
    assert record(tmp_path)["status"] == "infra"
    assert "rank 10 fell back to sockets" in record(tmp_path)["reason"]


execute_fallen = execute.fallen_back  # as it is; above it is told of two nodes


class Jobs:
    """Stands in for Slurm: allocations that are granted, and what each ends with."""

    def __init__(self, endings: list[Exception | None]):
        self.endings, self.asked = endings, list[Request]()

    @contextlib.contextmanager
    def allocated(self, asked: Request, *rest: Any) -> Iterator[str]:
        self.asked.append(asked)
        yield str(len(self.asked))

    def on_job(self, launch: Launch, job: str, execution: Execution) -> None:
        ending = self.endings[len(self.asked) - 1]
        if ending is not None:
            raise ending


def conduct(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *endings: Exception | None,
    infra: bool = False,
    **options: bool,
) -> Jobs:
    jobs = Jobs(list(endings))
    monkeypatch.setattr(launch, "allocated", jobs.allocated)
    monkeypatch.setattr(Launch, "on_job", lambda *arguments: jobs.on_job(*arguments))
    monkeypatch.setattr(Launch, "container", lambda self, job: None)
    args = argparse.Namespace(resume=False)
    pool = Pool(image_folder="/i", exclude=("bad0",))
    found = execution(tmp_path)
    found.fail_fast = options.get("fail_fast", False)
    if infra:
        found.manifest.set(found.planned[0].cell.id, Status.INFRA)
    Launch(args, load_sku("h100-dgxc"), pool, tmp_path / "out").conduct(found, None)
    return jobs


def test_fail_fast_does_not_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `infra` cell makes a launch try twice more, unless the first failure was to be the end."""
    assert 3 == len(conduct(tmp_path / "a", monkeypatch, None, None, None, infra=True).asked)
    assert 1 == len(conduct(tmp_path / "b", monkeypatch, None, infra=True, fail_fast=True).asked)


def test_bad_nodes_are_avoided_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request excludes what the first found unfit, beside what the site excludes."""
    jobs = conduct(tmp_path, monkeypatch, Unhealthy(["hot"], ["bad1"]), None)
    assert [asked.exclude for asked in jobs.asked] == [("bad0",), ("bad0", "bad1")]


def test_other_nodes_are_tried_twice_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is told, and every cell has its record."""
    with pytest.raises(Unhealthy):
        conduct(tmp_path, monkeypatch, *[Unhealthy(["hot"], [f"bad{n}"]) for n in range(3)])


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY"])
def test_a_job_that_somebody_ended_is_not_asked_for_again(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only nodes that failed are worth another try."""
    with pytest.raises(AllocationLost):
        conduct(tmp_path, monkeypatch, AllocationLost("1", state), None)


@pytest.mark.parametrize(
    ("state", "status"),
    [("TIMEOUT", Status.NOT_RUN), ("CANCELLED", Status.NOT_RUN), ("NODE_FAIL", Status.INFRA)],
)
def test_cells_that_were_never_reached_say_whose_doing_it_was(state: str, status: Status) -> None:
    """The machine's, or nobody's."""
    assert launch.status_of(AllocationLost("1", state)) is status
