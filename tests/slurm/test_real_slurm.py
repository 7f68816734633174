"""Launches through a real Slurm: three nodes on this host, a container plugin over a squashfs image, gloo.

Whatever becomes of a job, the folder tells it: every requested cell has one record, and the exit code is that
of the gate.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster
from program_pool import write_pool

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = str(ROOT / "launchers" / "launch_local.sh")  # the SKU of the tests is given by path

pytestmark = pytest.mark.slurm

SITE = """\
schema: collectivex.site.v1
pools:
  testpool: {{account: hushhush, partition: main, exclude: [n3], image_file: "{image}"}}
  nopool: {{partition: main, exclude: [n3], image_file: "{image}.not-there"}}
  slowpool: {{partition: main, nodelist: [n3]}}
  stagepool: {{partition: main, exclude: [n3], stage_folder: "{stage}"}}
"""
SUITE = """\
schema: collectivex.suite.v1
name: three
description: a quick cell, a slow one, a quick one
runs: 1
order: declared
deadline_s: 200
sampling: {warmup_iterations: 1, warmup_s: 0, trials: 1, iterations: 4, chain_blocks: 4, chain_block: 2}
groups:
"""
GROUP = """\
  - family: moe
    backends: [fake]
    workloads: [tiny]
    dtypes: [bf16]
    tokens: [%d]
    modes: [normal]
    variants: [rank-sum]
    regimes: [fresh, chained]
    knobs: {latency_us: "dispatch=10,combine=20"%s}
"""
SMOKE = ("--suite", "smoke", "--backend", "torch_dist", "--nodes", "2", "--ranks", "4")
FEW = ("--only", "all_reduce-4096B", "--only", "tiny-t1-bf16-uniform-normal")


class Site:
    """The files of a test site, and launches from its login shell."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        pools = {"testpool": "pyxis", "nopool": "pyxis", "slowpool": "none", "stagepool": "none"}
        for name, container in pools.items():
            scheduler = {"gpu_option": None, "time_minutes": 10}
            write_pool(folder, name, mechanism="slurm", container=container, scheduler=scheduler, env={})
        (folder / "stage").mkdir()
        text = SITE.format(image=cluster.folder / "image.sqsh", stage=folder / "stage")
        (folder / "facts.yaml").write_text(text)
        for name, iterations in (("three", 4), ("brisk", 1), ("long", 16)):
            groups = [GROUP % (t, f", fault: {f}" if f else "") for t, f in enumerate(["", "slow", ""], 1)]
            text = SUITE.replace("three", name).replace("iterations: 4", f"iterations: {iterations}")
            if name == "brisk":
                text = text.replace("chain_blocks: 4, chain_block: 2", "chain_blocks: 1, chain_block: 1")
            (folder / f"{name}.yaml").write_text(text + "".join(groups))

    def argv(self, pool: str, out: Path, *more: str) -> list[str]:
        files = ["--sku", str(self.folder / f"{pool}.yaml"), "--site", str(self.folder / "facts.yaml")]
        return [LAUNCH, *files, "--out", str(out), *more]

    def three(self, pool: str, out: Path, *more: str, suite: str = "three") -> list[str]:
        return self.argv(pool, out, "--suite", str(self.folder / f"{suite}.yaml"), "--backend", "fake", *more)

    def start(self, argv: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            argv,
            env=self.cluster.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, what: Callable[[], object], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, "it did not come to that"
            time.sleep(0.1)


def statuses(out: Path) -> list[str]:
    """Of the records, in the order of the manifest; a missing one raises."""
    manifest = json.loads((out / "manifest.json").read_text())
    return [json.loads((out / entry["file"]).read_text())["status"] for entry in manifest["cells"]]


def reasons(out: Path) -> list[str]:
    manifest = json.loads((out / "manifest.json").read_text())
    return [json.loads((out / e["file"]).read_text())["reason"] or "" for e in manifest["cells"]]


def told(out: Path) -> str:
    """All that would be uploaded: everything but the logs."""
    files = [p for p in out.rglob("*.json") if "logs" not in p.relative_to(out).parts]
    return "".join(p.read_text() for p in files)


@pytest.fixture(scope="session")
def limited(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A launch on n3 whose job is given one minute, under way while the other tests run."""
    folder = tmp_path_factory.mktemp("limited")
    site, out = Site(cluster, folder), folder / "out"
    process = site.start(site.three("slowpool", out, "--ranks", "2", suite="long"))
    site.until(lambda: any("cx-" in job and "RUNNING" in job for job in cluster.jobs()))
    job = next(line.split()[0] for line in cluster.jobs() if "cx-" in line)
    assert cluster.run("scontrol", "update", f"jobid={job}", "timelimit=1").returncode == 0
    yield out, process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.fixture
def site(cluster: Cluster, limited: object, tmp_path: Path) -> Site:
    cluster.wait_idle("n1,n2")
    return Site(cluster, tmp_path)


def test_a_login_shell_allocates_two_nodes_and_measures_in_the_image(site: Site, tmp_path: Path) -> None:
    """The whole path: salloc, pyxis options, read-only checkout, rendezvous between nodes, records."""
    out = tmp_path / "a folder with spaces"
    done = site.cluster.run(*site.argv("testpool", out, *SMOKE, *FEW), timeout=120)

    assert done.returncode == 0, done.stderr
    assert statuses(out) == ["ok", "ok"]
    record = json.loads(next((out / "cells").glob("tiny*.json")).read_text())
    assert record["identity"]["topology_class"] == "test-cpu-x2"
    assert len(set(record["provenance"]["hosts"])) == 2
    assert record["provenance"]["scheduler"]["nodes"] == 2
    assert record["provenance"]["image"]["arch"] == "x86_64"
    assert not [job for job in site.cluster.jobs() if "cx-" in job and "n3" not in job][1:]


def test_the_container_is_pyxis_own_where_it_is_installed(site: Site, tmp_path: Path) -> None:
    """With pyxis and enroot the whole of this file runs through them: their mounts, the image's PATH."""
    if site.cluster.pyxis is None:
        pytest.skip("needs pyxis and enroot, see docs/launching.md")
    done = site.cluster.run(*site.argv("testpool", tmp_path / "out", *SMOKE, *FEW[:2]), timeout=120)

    assert done.returncode == 0, done.stderr
    image = f"--container-image={site.cluster.folder / 'image.sqsh'}"
    seen = site.cluster.run("srun", "--exclude=n3", image, "sh", "-c", "cat /proc/self/mountinfo; echo $PATH")
    assert "pyxis" in seen.stdout, seen.stderr
    assert seen.stdout.splitlines()[-1] == "/image/bin:/usr/bin:/bin"


def test_facts_of_the_site_are_in_no_result(site: Site, tmp_path: Path) -> None:
    """Account, node names and the site file's path stay out; the command line without --site is kept."""
    out = tmp_path / "out"
    assert site.cluster.run(*site.argv("testpool", out, *SMOKE, *FEW[:2]), timeout=120).returncode == 0

    text = told(out)
    assert "hushhush" not in text
    assert "facts.yaml" not in text
    assert not re.search(r'"n[123]"|\bn[123]\b', text.replace("-n2r4", ""))


def test_inside_an_allocation_it_is_used_and_left_alone(site: Site, tmp_path: Path) -> None:
    """No second job, and the person's own allocation is not cancelled."""
    out = tmp_path / "out"
    argv = [
        "salloc",
        "--nodes=2",
        "--exclude=n3",
        "--exclusive",
        *site.argv("testpool", out, *SMOKE, *FEW[:2]),
    ]
    done = site.cluster.run(*argv, timeout=120)

    assert done.returncode == 0, done.stderr
    assert statuses(out) == ["ok"]
    assert "allocation: job" not in done.stderr
    assert "Relinquishing" in done.stderr


def test_an_allocation_of_another_size_is_an_error(site: Site, tmp_path: Path) -> None:
    """Planned for two nodes, given one: no number is published for what did not happen."""
    out = tmp_path / "out"
    argv = ["salloc", "--nodes=1", "--exclude=n3", *site.argv("testpool", out, *SMOKE, *FEW[:2])]
    done = site.cluster.run(*argv, timeout=60)

    assert done.returncode == 1
    assert "planned for 2 nodes, the allocation has 1" in done.stderr
    assert statuses(out) == ["not-run"]


def test_as_a_batch_script_it_finds_the_checkout(site: Site, tmp_path: Path) -> None:
    """Slurm runs a copy from its spool folder, started from somewhere else."""
    out = tmp_path / "out"
    options = ["--parsable", "--nodes=2", "--exclude=n3", "--exclusive", f"--output={tmp_path}/batch.log"]
    done = site.cluster.run("sbatch", *options, *site.argv("testpool", out, *SMOKE, *FEW[:2]), cwd=tmp_path)
    job = done.stdout.strip()
    assert job.isdecimal(), done.stderr
    site.until(lambda: not any(line.startswith(f"{job} ") for line in site.cluster.jobs()), 90)

    log = (tmp_path / "batch.log").read_text()
    assert statuses(out) == ["ok"], log
    assert "ExitCode=0:0" in site.cluster.run("scontrol", "show", "job", job).stdout


def test_a_missing_image_is_a_record_and_no_job(site: Site, tmp_path: Path) -> None:
    """Exit code 3, every cell `infra` with the reason, and nothing was allocated for it."""
    out = tmp_path / "out"
    done = site.cluster.run(*site.argv("nopool", out, *SMOKE, *FEW))

    assert done.returncode == 3, done.stderr
    assert statuses(out) == ["infra", "infra"]
    assert "does not exist" in reasons(out)[0]
    assert "allocation" not in done.stderr


def test_a_rejected_request_is_a_record(site: Site, tmp_path: Path) -> None:
    """The scheduler's own words are the reason."""
    text = (site.folder / "facts.yaml").read_text().replace("partition: main", "partition: nowhere")
    (site.folder / "facts.yaml").write_text(text)
    done = site.cluster.run(*site.argv("testpool", tmp_path / "out", *SMOKE, *FEW))

    assert done.returncode == 3, done.stderr
    assert "nvalid partition" in reasons(tmp_path / "out")[0]
    assert "nowhere" not in told(tmp_path / "out")


def test_a_cancelled_job_keeps_what_was_measured(site: Site, tmp_path: Path) -> None:
    """scancel by somebody: the finished cell stays, the one under way and the next say what happened."""
    out = tmp_path / "out"
    process = site.start(site.three("testpool", out, "--nodes", "2", "--ranks", "2"))
    site.until(lambda: list((out / "cells").glob("tiny-t1-*")))
    ours = [line for line in site.cluster.jobs() if "cx-" in line]
    newest = max((line.split()[0] for line in ours), key=int)
    site.cluster.run("scancel", newest)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 1, err
    assert statuses(out) == ["ok", "infra", "not-run"]
    assert all("CANCELLED" in reason for reason in reasons(out)[1:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_we_end_our_job_ends_and_nobody_elses(
    site: Site, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C, SIGTERM and even SIGKILL give the nodes back; a stranger's job of the same name stays."""
    out = tmp_path / "out"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    process = site.start(site.three("testpool", out, "--ranks", "2"))
    site.until(lambda: list((out / "cells").glob("tiny-t1-*")))
    execution = json.loads((out / "manifest.json").read_text())["execution"]
    name = f"cx-{execution}"
    hold = [*as_nobody, "sbatch", "--parsable", f"--job-name={name}", "--output=/dev/null", "--chdir=/"]
    theirs = site.cluster.run(*hold, "--exclude=n3", "--wrap", "sleep 300").stdout.strip()
    mine = next(line.split()[0] for line in site.cluster.jobs() if name in line and "nobody" not in line)
    process.send_signal(number)
    process.communicate(timeout=60)

    def living() -> list[str]:
        return [line.split()[0] for line in site.cluster.jobs() if "COMPLETING" not in line]

    site.until(lambda: mine not in living(), 20)
    assert theirs in living()
    site.cluster.run("scancel", theirs)
    if number is not signal.SIGKILL:
        assert statuses(out) == ["ok", "not-run", "not-run"]


def test_a_node_that_crashes_and_reboots_is_not_the_librarys_fault(site: Site, tmp_path: Path) -> None:
    """n2 is gone and back before Slurm notices. The cell is `infra`, not `failed`, and measured again."""
    out = tmp_path / "out"
    process = site.start(site.three("testpool", out, "--nodes", "2", "--ranks", "2", suite="brisk"))
    site.until(lambda: list((out / "cells").glob("tiny-t1-*")))
    site.cluster.crash("n2")
    site.cluster.start_node("n2")
    _, err = process.communicate(timeout=150)

    assert process.returncode == 0, err
    assert "retrying" in err
    assert statuses(out) == ["ok", "ok", "ok"]
    superseded = list((out / "logs" / "superseded").glob("tiny-t2-*"))
    assert json.loads(superseded[0].read_text())["status"] == "infra", superseded[0].read_text()


def test_a_failed_node_ends_the_job_and_other_nodes_are_tried(site: Site, tmp_path: Path) -> None:
    """NODE_FAIL in the middle of a cell: what was measured stays, the rest is measured in another job."""
    out = tmp_path / "out"
    process = site.start(site.three("testpool", out, "--nodes", "2", "--ranks", "2", suite="brisk"))
    site.until(lambda: list((out / "cells").glob("tiny-t1-*")))
    site.cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    time.sleep(1)
    site.cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    _, err = process.communicate(timeout=150)

    assert "NODE_FAIL: a node failed" in err
    assert process.returncode == 0, err
    assert statuses(out) == ["ok", "ok", "ok"]
    allocations = {
        json.loads(p.read_text())["identity"]["allocation"] for p in (out / "cells").glob("*.json")
    }
    assert len(allocations) == 2


def test_staging_brings_every_result_back(site: Site, tmp_path: Path) -> None:
    """The nodes see the stage and not --out: what comes back is counted, and the stage is gone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as unseen:  # each node has a /tmp of its own
        out = Path(unseen) / "out"
        done = site.cluster.run(*site.argv("stagepool", out, *SMOKE, *FEW), timeout=120)

        assert done.returncode == 0, done.stderr
        assert statuses(out) == ["ok", "ok"]
    assert "2 results copied back" in done.stderr
    assert os.listdir(site.folder / "stage") == []


def test_a_time_limit_is_told_and_the_rest_did_not_run(limited: tuple[Path, subprocess.Popen[str]]) -> None:
    """The job's limit, not the watchdog's: the cell under way is `infra`, the ones after it `not-run`."""
    out, process = limited
    _, err = process.communicate(timeout=150)

    assert process.returncode == 1, err
    assert statuses(out) == ["ok", "infra", "not-run"]
    assert all("TIMEOUT: it reached its time limit" in reason for reason in reasons(out)[1:])
