"""Launches by the real podman of this host: an image pulled by tag, from a registry, run by its digest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fault_cells
import program_pool
import pytest
from fault_cells import until
from podman_host import PodmanHost, podman_host

from collectivex.runtime import prepared
from collectivex.runtime.containers import Container
from collectivex.runtime.yamlfile import ROOT

pytestmark = pytest.mark.podman

FEW = ("--only", "all_reduce-4096B", "--only", "tiny-t1-bf16-uniform-normal")


@pytest.fixture(scope="module")
def host() -> Iterator[PodmanHost]:
    with podman_host() as found:
        yield found


class Box(fault_cells.Box):
    """A machine whose pool says podman."""

    def __init__(self, host: PodmanHost, folder: Path):
        super().__init__(folder, {**host.env, "CX_PYTHON": sys.executable})
        self.pool = host.write_pool(folder)

    def argv(self, *more: str) -> list[str]:
        launcher = str(ROOT / "launchers" / "launch_local.sh")
        return [launcher, "--sku", str(self.pool), "--out", str(self.out), *more]

    def faulty(self, *faults: str) -> list[str]:
        suite = fault_cells.write_suite(self.folder, faults)
        return self.argv("--suite", suite, "--backend", "fake", "--ranks", "2")


@pytest.fixture
def box(host: PodmanHost, tmp_path: Path) -> Box:
    return Box(host, tmp_path)


def test_a_smoke_suite_in_a_real_container_ends_well(host: PodmanHost, box: Box) -> None:
    """Two gloo ranks of the image's Python; exit code 0, the image's digest in every record, nothing left."""
    done = box.run(box.argv("--suite", "smoke", "--backend", "torch_dist", "--ranks", "2", *FEW))

    assert done.returncode == 0, done.stdout + done.stderr
    records = box.records()
    assert len(records) >= 2
    assert {record["status"] for record in records} == {"ok"}
    image = {"reference": host.image, "digest": host.digest, "arch": "x86_64"}
    assert all(record["provenance"]["image"] == image for record in records)
    launcher = next(box.out.glob("logs/torch_dist.r0.0/launcher.log")).read_text()
    assert f"/cx/python@{host.digest} python3 " in launcher
    assert "Fatal" not in launcher, "the runner ends by itself, with stdin still open"
    assert host.containers() == []
    assert box.left() == []


def test_torchrun_of_the_image_starts_the_ranks(host: PodmanHost, box: Box) -> None:
    """`start` of the SKU counts in the container too; a dry run shows the same command."""
    box.pool.write_text(box.pool.read_text() + "start: torchrun\n")
    words = box.argv("--suite", "smoke", "--backend", "torch_dist", "--ranks", "2", *FEW[:2])
    plan, done = box.run([*words, "--dry-run"]), box.run(words)

    assert done.returncode == 0, done.stdout + done.stderr
    launcher = next(box.out.glob("logs/torch_dist.r0.0/launcher.log")).read_text()
    assert all("--local 2 --launcher torchrun" in text for text in (plan.stdout, launcher))
    assert host.containers() == []
    assert box.left() == []


def test_a_crash_and_a_hang_in_a_real_container_are_told_apart(host: PodmanHost, box: Box) -> None:
    """The exit codes of ranks and the stacks of hanging ones come out; the honest cell is measured."""
    done = box.run(box.faulty("hang", "", "crash"))

    hang, honest, crash = box.records()
    assert done.returncode == 1, done.stdout + done.stderr
    assert (hang["status"], honest["status"], crash["status"]) == ("timeout", "ok", "failed"), done.stderr
    assert "rank 1 killed by SIGSEGV" in crash["reason"]
    assert all("File" in rank["stack"] for rank in hang["failure"]["ranks"])
    assert host.containers() == []
    assert box.left() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_goes_on_in_a_real_container_after_the_launch(
    host: PodmanHost, box: Box, number: signal.Signals
) -> None:
    """Told to end, a launch ends its container and accounts for the cell; killed outright, its stdin ends."""
    process = box.start(box.faulty("slow"))
    assert box.started()
    process.send_signal(number)
    code = process.wait(60)

    assert box.ends(), box.left()
    assert until(lambda: not host.containers(), 20)
    if number == signal.SIGTERM:
        assert code == 1
        assert [record["status"] for record in box.records()] == ["not-run"]


def test_only_the_output_folder_is_writable(host: PodmanHost, tmp_path: Path) -> None:
    """What a container writes there is ours; writing to the repository fails."""
    out, code = tmp_path / "out", tmp_path / "code"
    out.mkdir()
    code.mkdir()
    container = Container("podman", host.image, "cpu", "python3", {code: False, out: True})
    prefix = container.prefix("cx-writes", (os.getuid(), os.getgid()))
    program = "import sys; open(sys.argv[1] + '/file', 'w').write('x')"
    told = [
        subprocess.run([*prefix, "python3", "-c", program, str(folder)], env=host.env, capture_output=True)
        for folder in (out, code)
    ]
    assert [done.returncode for done in told] == [0, 1]
    assert b"Read-only file system" in told[1].stderr
    assert (out / "file").stat().st_uid == os.getuid()


def test_an_image_that_is_not_there_is_infra_with_podmans_words(host: PodmanHost, box: Box) -> None:
    """No container is started, and every cell has a record."""
    box.pool.write_text(box.pool.read_text().replace("cx/python:1", "cx/python:2"))
    done = box.run(box.faulty("", ""))

    assert done.returncode == 3, done.stdout + done.stderr
    assert {record["status"] for record in box.records()} == {"infra"}
    assert "pulling" in box.records()[0]["reason"]


# ------------------------------------------------------------------------------------ external programs


@pytest.fixture
def program(host: PodmanHost, tmp_path: Path) -> Box:
    """A box whose image has binaries prepared for it."""
    box = Box(host, tmp_path)
    program_pool.write_pool(tmp_path, "box", mechanism="docker", container="podman", image=host.image)
    box.env |= {"PYTHONPATH": str(program_pool.FOLDER), "CX_LIBRARIES": str(tmp_path / "libraries")}
    return box


def prepared_for(host: PodmanHost, box: Box) -> Path:
    image = f"{host.image.rpartition(':')[0]}@{host.digest}"
    return box.folder / "libraries" / prepared.of_image(image, "x86_64", None).name


def test_a_program_in_a_real_container_drives_all_ranks(host: PodmanHost, program: Box) -> None:
    """One process of the image's own Python; what was prepared for the image reaches it, and so does a switch
    that only our own environment has; the records carry the image."""
    seen = program.out / "seen.jsonl"
    program_pool.install(prepared_for(host, program), record=str(seen))
    program.env["NCCL_NVLS_ENABLE"] = "0"
    done = program.run(program.argv("--suite", program_pool.write_suite(program.folder)))

    assert done.returncode == 0, done.stdout + done.stderr
    records = program.records()
    assert [record["status"] for record in records] == ["ok"] * 3
    image = {"reference": host.image, "digest": host.digest, "arch": "x86_64"}
    assert all(record["provenance"]["image"] == image for record in records)
    assert all(record["provenance"]["backend"]["versions"] == {"nccl-tests": "2.19.6"} for record in records)
    told = [json.loads(line) for line in seen.read_text().splitlines()]
    assert [one["argv"][one["argv"].index("-g") + 1] for one in told] == ["4", "4"]
    assert all(one["env"]["NVSHMEM_DISABLE_NVLS"] == "1" for one in told)
    folder = program.out / "logs" / "cpu_tests.r0.0"
    assert "--local 1" in (folder / "launcher.log").read_text()
    assert not any(
        "CX_FAKE" in path.read_text() for path in folder.rglob("*.json") if path.name != "cases.json"
    )
    assert host.containers() == []
    assert program.left() == []


@pytest.mark.parametrize(("fault", "status"), [("crash", "failed"), ("hang", "timeout")])
def test_a_program_that_goes_wrong_in_a_real_container_costs_one_size(
    host: PodmanHost, program: Box, fault: str, status: str
) -> None:
    """The others are measured without it, in the same container; nothing is left."""
    program_pool.install(prepared_for(host, program), fault=fault, at=4096)
    done = program.run(program.argv("--suite", program_pool.write_suite(program.folder)))

    assert done.returncode == 1, done.stdout + done.stderr
    records = program.records()
    assert [record["status"] for record in records] == ["ok", status, "ok"], done.stderr
    assert "in 4096 bytes of cycle 1 of 2" in records[1]["reason"]
    assert len(list(program.out.glob("logs/*/launcher.log"))) == 1
    assert host.containers() == []
    assert program.left() == []


def test_a_program_that_the_image_lacks_is_said(host: PodmanHost, program: Box) -> None:
    """Every cell failed, with what to build; no container for each of them."""
    done = program.run(program.argv("--suite", program_pool.write_suite(program.folder)))

    assert done.returncode == 1, done.stdout + done.stderr
    records = program.records()
    assert [record["status"] for record in records] == ["failed"] * 3
    assert all("MissingLibrary: all_reduce_perf is neither in" in r["reason"] for r in records)
    assert host.containers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_program_goes_on_in_a_real_container_after_the_launch(
    host: PodmanHost, program: Box, number: signal.Signals
) -> None:
    """Ctrl-C in the middle of a hang: the cells did not run, and nothing private stays. Killed outright, all
    ends too."""
    program_pool.install(prepared_for(host, program), fault="early-hang")
    argv = program.argv("--suite", program_pool.write_suite(program.folder, deadline=100))
    process = program.start(argv)
    written = "logs/cpu_tests.r0.0/process0/*.json"
    assert until(lambda: list(program.out.glob(written)), 60)
    process.send_signal(number)
    code = process.wait(60)

    assert program.ends(), program.left()
    assert until(lambda: not host.containers(), 20)
    if number == signal.SIGINT:
        assert code == 1
        assert [record["status"] for record in program.records()] == ["not-run"] * 3
        assert not list(program.out.glob(written))
