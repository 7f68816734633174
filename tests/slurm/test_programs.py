"""External programs through a real Slurm: one process for a node, and an MPI program over two of them.

The program is a stand-in (nccl_tests_fake.py); MPI, PMIx, srun and the container plugin are real.
"""

from __future__ import annotations

import ctypes.util
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import fault_cells
import program_pool
import pytest
from cluster import Cluster

from collectivex.runtime import prepared
from collectivex.runtime.yamlfile import ROOT

pytestmark = pytest.mark.slurm

SITE = """\
schema: collectivex.site.v1
pools:
  onepool: {{partition: main, exclude: [n3], image_file: "{image}"}}
  mpipool: {{partition: main, exclude: [n3]}}
"""
SCHEDULER = {"gpu_option": None, "time_minutes": 10}


class Site:
    """Launches from the login shell of a site with two pools, and what they leave."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.out = cluster, folder, folder / "out"
        image = cluster.folder / "image.sqsh"
        (folder / "facts.yaml").write_text(SITE.format(image=image))
        libraries = {"CX_LIBRARIES": str(folder / "libraries"), "PYTHONPATH": str(program_pool.FOLDER)}
        self.env = {**cluster.env, **libraries, "NCCL_NVLS_ENABLE": "0"}
        self.of_image = folder / "libraries" / prepared.of_image(str(image), "x86_64", None).name

    def pool(self, name: str, **more: object) -> list[str]:
        path = program_pool.write_pool(self.folder, name, mechanism="slurm", scheduler=SCHEDULER, **more)
        return ["--sku", path, "--site", str(self.folder / "facts.yaml")]

    def one(self) -> list[str]:
        return self.argv(*self.pool("onepool", container="pyxis"))

    def two(self, mpi: str = "pmix") -> list[str]:
        return self.argv(*self.pool("mpipool", container="none", mpi=mpi), "--nodes", "2", "--ranks", "4")

    def argv(self, *more: str, deadline: int = 2) -> list[str]:
        suite = program_pool.write_suite(self.folder, deadline)
        launch = str(ROOT / "launchers" / "launch_local.sh")
        return [launch, "--suite", suite, "--out", str(self.out), *more]

    def start(self, argv: list[str]) -> subprocess.Popen[str]:
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(argv, env=self.env, stdin=subprocess.DEVNULL, text=True, **out)  # type: ignore

    def run(self, argv: list[str]) -> tuple[int, list[dict], str]:
        """(exit code, records in order, stderr)."""
        process = self.start(argv)
        _, err = process.communicate(timeout=180)
        return process.returncode, fault_cells.records(self.out), err

    def run_mpi(self, statuses: list[str]) -> tuple[int, list[dict], str]:
        """As `run`, over two nodes, twice where the first ends otherwise: on a busy machine a process rarely
        crashes within MPI_Init of Open MPI 4.1, also without any code of ours."""
        found = self.run(self.two())
        if [record["status"] for record in found[1]] != statuses:
            self.cluster.wait_idle("n1,n2")
            self.out = self.folder / "again"
            found = self.run(self.two())
        return found

    def until(self, what: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.1)

    def left(self) -> list[str]:
        """Processes of the program; those of the nodes are seen from here."""
        return fault_cells.processes(self.folder / "libraries") + fault_cells.processes(self.out)

    def steps(self) -> int:
        return len(list(self.out.glob("logs/*/launcher.log")))


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Site:
    cluster.wait_idle("n1,n2")
    return Site(cluster, tmp_path)


@pytest.fixture
def mpi(cluster: Cluster) -> None:
    """Slurm's plugin for PMIx, with the library that it loads, and Open MPI."""
    listed = cluster.run("srun", "--mpi=list")
    tried = cluster.run("srun", "--mpi=pmix", "--nodes=1", "--exclude=n3", "true")
    if "pmix" not in listed.stdout + listed.stderr or tried.returncode:
        pytest.skip("srun has no --mpi=pmix here (Debian: libpmix-dev)")
    if (
        ctypes.util.find_library("mpi") is None
        and not Path("/usr/lib/x86_64-linux-gnu/libmpi.so.40").exists()
    ):
        pytest.skip("Open MPI is not installed")


def test_one_process_in_the_image_drives_the_ranks_of_a_node(site: Site) -> None:
    """One task, whose program sees what was prepared for the image, and the shell's multicast switch."""
    seen = site.out / "seen.jsonl"
    program_pool.install(site.of_image, record=str(seen))
    code, records, err = site.run(site.one())

    assert code == 0, err
    assert [record["status"] for record in records] == ["ok"] * 3
    assert records[0]["provenance"]["scheduler"]["tasks"] == 1
    assert len(records[0]["provenance"]["hosts"]) == 4
    told = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [one["argv"][one["argv"].index("-g") + 1] for one in told] == ["4", "4"]
    assert all(one["env"]["NVSHMEM_DISABLE_NVLS"] == "1" for one in told)
    assert site.steps() == 1


@pytest.mark.parametrize(("fault", "status"), [("crash", "failed"), ("hang", "timeout")])
def test_a_program_that_goes_wrong_in_a_step_costs_one_size(site: Site, fault: str, status: str) -> None:
    """The step goes on with the others, and nothing of the program is left on the node."""
    program_pool.install(site.of_image, fault=fault, at=4096)
    code, records, err = site.run(site.one())

    assert code == 1, err
    assert [record["status"] for record in records] == ["ok", status, "ok"], err
    assert "in 4096 bytes of cycle 1 of 2" in records[1]["reason"]
    assert not [host for host in ("n1", "n2") if re.search(rf"\b{host}\b", json.dumps(records))]
    assert site.steps() == 1
    site.until(lambda: not site.left(), 20)


def test_a_program_that_the_image_lacks_is_no_fault_of_the_node(site: Site) -> None:
    """`failed` with what to build, not `infra`: another node would not have it either."""
    code, records, err = site.run(site.one())

    assert code == 1, err
    assert [record["status"] for record in records] == ["failed"] * 3
    assert all("MissingLibrary: all_reduce_perf is neither in" in r["reason"] for r in records)


def test_an_interrupted_launch_ends_the_program_of_its_step(site: Site) -> None:
    """Ctrl-C in the middle of a hang: the cells did not run, and what it wrote of its environment is gone."""
    program_pool.install(site.of_image, fault="early-hang")
    process = site.start(site.argv(*site.pool("onepool", container="pyxis"), deadline=100))
    written = "logs/cpu_tests.r0.0/process0/*.json"
    site.until(lambda: list(site.out.glob(written)))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 1, err
    assert [record["status"] for record in fault_cells.records(site.out)] == ["not-run"] * 3
    assert not list(site.out.glob(written))
    site.until(lambda: not site.left(), 20)


def test_an_mpi_program_over_two_nodes_is_one_program(site: Site, mpi: None) -> None:
    """Four processes that found each other through PMIx; rank 0's output is the result, hosts are told apart
    and named nowhere."""
    program_pool.install(site.folder / "libraries", mpi=True)
    code, records, err = site.run_mpi(["ok"] * 3)

    assert code == 0, err
    assert [record["status"] for record in records] == ["ok"] * 3
    assert [m["component"] for m in records[0]["measurements"]] == ["call"]
    hosts = records[0]["provenance"]["hosts"]
    assert len(hosts) == 4
    assert len(set(hosts)) == 2
    assert not [host for host in ("n1", "n2") if re.search(rf"\b{host}\b", json.dumps(records))]


@pytest.mark.parametrize(
    ("plan", "statuses", "said"),
    [
        ({"fault": "hang", "at": 4096}, ["ok", "timeout", "ok"], "no further line of results"),
        ({"fault": "peer-crash", "at": 4096}, ["ok", "failed", "ok"], "MPI_Finalize|killed by SIGSEGV"),
        ({"fault": "crash", "at": 4096}, ["ok", "failed", "ok"], "MPI_Finalize|killed by SIGSEGV"),
        ({"fault": "wrong", "at": 4096}, ["ok", "incorrect", "ok"], "wrong elements"),
    ],
)
def test_an_mpi_program_that_goes_wrong_costs_one_size(
    plan: dict, statuses: list[str], said: str, site: Site, mpi: None
) -> None:
    """A rank that ends without MPI_Finalize has srun end all others at once, our runners too; the size is
    known all the same, and the rest is measured in further steps."""
    program_pool.install(site.folder / "libraries", mpi=True, **plan)
    code, records, err = site.run_mpi(statuses)

    assert code == 1, err
    assert [record["status"] for record in records] == statuses, json.dumps(records, indent=1)[:6000]
    assert any(part in records[1]["reason"] for part in said.split("|")), records[1]["reason"]
    written = site.out.glob("logs/*/process*/*.json")
    assert not any("CX_FAKE" in path.read_text() for path in written)
    site.until(lambda: not site.left(), 20)


def test_a_build_without_mpi_is_refused_with_a_hint(site: Site) -> None:
    """Four programs of one GPU each that know nothing of each other are no measurement of four."""
    program_pool.install(site.folder / "libraries")
    code, records, err = site.run(site.two(mpi="pmi2"))

    assert code == 1, err
    assert [record["status"] for record in records] == ["failed"] * 3
    assert all("was built without MPI" in r["reason"] and "MPI=1" in r["reason"] for r in records)


def test_two_nodes_need_a_pool_that_states_its_mpi(site: Site) -> None:
    """Unsupported, with the key to set."""
    code, records, err = site.run(site.two(mpi="none"))

    assert [record["status"] for record in records] == ["unsupported"] * 3
    assert all("mpipool states no `mpi` for srun" in record["reason"] for record in records)
    assert code == 2, err
