"""Container programs: argument lists for both vendors, and an execution through a container program.

The program here is a stand-in that drops the container and keeps the command; what docker itself does with
the arguments is not tested on machines without it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import fault_cells
import program_pool
import pytest

from collectivex.runtime.commands import Done, run
from collectivex.runtime.containers import Container
from collectivex.runtime.errors import InfraError, UserError
from collectivex.runtime.health import Wanted
from collectivex.runtime.started import ContainerMechanism, SlurmMechanism, docker_image
from collectivex.runtime.yamlfile import ROOT

MOUNTS = {Path("/code"): False, Path("/out"): True}
DIGEST = "sha256:" + "d" * 64

DOCKER = """\
#!{python}
import json, os, signal, subprocess, sys
words = sys.argv[1:]
folder = {folder!r}
with open(folder + "/calls", "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[0] == "image":
    print("elsewhere/b@sha256:" + "e" * 64)
    print("a/b@{digest}")
elif words[0] == "run":
    command = words[words.index("docker.io/a/b@{digest}") + 1:]
    if os.path.exists(folder + "/broken"):
        sys.exit("docker: could not select device driver with capabilities: [[gpu]].")
    name = next(w for w in words if w.startswith("--name=")).partition("=")[2]
    process = subprocess.Popen([{python!r}, *command[1:]])
    with open(folder + "/" + name, "w") as file:
        file.write(str(process.pid))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    sys.exit(process.wait())
elif words[0] in ("kill", "rm"):
    with open(folder + "/" + words[-1]) as file:
        os.kill(int(file.read()), signal.SIGUSR1 if words[0] == "kill" else signal.SIGKILL)
"""


def test_pyxis_mounts_the_code_read_only_and_no_home() -> None:
    """Only the output folder is writable."""
    options = Container("pyxis", "/i.sqsh", "nvidia", "python3", MOUNTS).srun_options()
    assert "--container-mounts=/code:/code:ro,/out:/out" in options
    assert {"--no-container-mount-home", "--no-container-entrypoint", "--container-image=/i.sqsh"} <= set(
        options
    )


def test_docker_gets_the_devices_of_each_vendor() -> None:
    """NVIDIA by --gpus, AMD by its two device files and the video group, a CPU nothing."""

    def argv(kind: str, vendor: str) -> set[str]:
        return set(Container(kind, "i", vendor, "python3", MOUNTS).prefix("x", (1, 2)))

    assert "--gpus=all" in argv("docker", "nvidia")
    assert "--device=nvidia.com/gpu=all" in argv("podman", "nvidia")
    assert {"--device=/dev/kfd", "--device=/dev/dri", "--group-add=video"} <= argv("docker", "amd")
    assert not any("device" in word or "gpu" in word for word in argv("docker", "cpu"))
    assert {"--volume=/code:/code:ro", "--volume=/out:/out", "--user=1:2", "--name=x"} <= argv(
        "docker", "cpu"
    )


def test_containers_inside_a_step_see_their_rank() -> None:
    """podman hides the environment, apptainer passes it on."""
    podman = Container("podman", "i", "amd", "python3", MOUNTS).prefix()
    assert {"--env=SLURM_PROCID", "--env=SLURM_STEP_NUM_TASKS"} <= set(podman)
    apptainer = Container("apptainer", "/i.sqsh", "amd", "python3", MOUNTS).prefix()
    assert apptainer[:2] == ["apptainer", "exec"]
    assert "--rocm" in apptainer
    assert "--bind=/code:/code:ro" in apptainer


def test_containers_of_one_step_have_no_name() -> None:
    """Two tasks of a node would want the same one, and podman refuses the second."""
    step = SlurmMechanism(
        "7", ["n1"], Container("podman", "i", "cpu", "python3", MOUNTS), ROOT, Wanted("cpu", 2), execute=run
    )
    argv = step.argv("cx-1", 1, 2, 60, "rank")
    assert "podman" in argv
    assert not any(word.startswith("--name") for word in argv)


def test_podman_without_root_writes_as_its_user() -> None:
    """The user's id inside is else a sub-id outside, which may not write the output folder."""

    def argv(kind: str, uid: int) -> list[str]:
        return Container(kind, "i", "cpu", "python3", MOUNTS).prefix("x", (uid, 5))

    assert {"--user=1000:5", "--userns=keep-id"} <= set(argv("podman", 1000))
    assert "--userns=keep-id" not in argv("podman", 0)
    assert "--userns=keep-id" not in argv("docker", 1000)


def test_rdma_needs_its_devices_and_locked_memory() -> None:
    """Otherwise registration fails with errno 12 inside."""
    needed = {"--device=/dev/infiniband", "--ulimit=memlock=-1"}
    assert needed <= set(Container("podman", "i", "amd", "python3", MOUNTS, rdma=True).prefix("x"))
    assert not needed & set(Container("podman", "i", "amd", "python3", MOUNTS).prefix("x"))


@pytest.mark.parametrize("path", ["/a,b", "/a:b"])
def test_a_path_that_would_end_a_mount_is_refused(path: str) -> None:
    """Silently mounting something else is worse."""
    with pytest.raises(UserError, match="comma or colon"):
        Container("pyxis", "i", "cpu", "python3", {Path(path): True})


class Box(fault_cells.Box):
    """A machine whose docker is the stand-in."""

    def __init__(self, folder: Path):
        (folder / "docker").write_text(
            DOCKER.format(python=sys.executable, folder=str(folder), digest=DIGEST)
        )
        (folder / "docker").chmod(0o755)
        path = f"{folder}:{os.environ['PATH']}"
        super().__init__(folder, {**os.environ, "PATH": path, "CX_PYTHON": sys.executable})

    def argv(self, *faults: str) -> list[str]:
        launcher = str(ROOT / "launchers" / "launch_local.sh")
        keys = {"mechanism": "docker", "container": "docker", "image": "a/b:c"}
        pool = program_pool.write_pool(self.folder, "box", env={"GLOO_LOG_LEVEL": "ERROR"}, **keys)
        files = ["--sku", pool, "--suite", fault_cells.write_suite(self.folder, faults)]
        return [launcher, *files, "--backend", "fake", "--ranks", "2", "--out", str(self.out)]

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_launch_in_a_container_ends_in_the_same_records(box: Box) -> None:
    """One container for all ranks; crash and honest cell told apart; the image's digest is recorded."""
    done = box.run(box.argv("crash", ""))

    first, second = box.records()
    assert done.returncode == 1, done.stderr
    assert (first["status"], second["status"]) == ("failed", "ok")
    assert "rank 1 killed by SIGSEGV" in first["reason"]
    assert second["provenance"]["image"] == {"reference": "a/b:c", "digest": DIGEST, "arch": "x86_64"}
    runs = [call for call in box.calls() if call[0] == "run" and "rank" in call]
    assert len(runs) == 2
    assert len({word for call in runs for word in call if word.startswith("--name=")}) == 2


def test_a_hang_in_a_container_has_stacks_and_ends(box: Box) -> None:
    """The watchdog reaches into the container by our own container's name."""
    done = box.run(box.argv("hang", ""))

    first, second = box.records()
    assert (first["status"], second["status"]) == ("timeout", "ok"), done.stderr
    assert all("File" in rank["stack"] for rank in first["failure"]["ranks"])


def test_a_container_that_does_not_start_is_infra_with_its_words(box: Box) -> None:
    """The first thing that asks for one is the health check."""
    (box.folder / "broken").touch()
    done = box.run(box.argv("", ""))

    assert done.returncode == 3
    assert {record["status"] for record in box.records()} == {"infra"}
    assert "could not select device driver" in box.records()[0]["reason"]


def test_killed_outright_nothing_goes_on_inside(box: Box) -> None:
    """The container ends with its stdin."""
    process = box.start(box.argv("slow"))
    assert box.started()
    assert len(box.left()) >= 4, "the launch, the container and two ranks"
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert box.ends(), box.left()


@pytest.mark.parametrize("ending", [InfraError, KeyboardInterrupt])
def test_a_health_check_that_does_not_end_leaves_no_container(
    tmp_path: Path, ending: type[BaseException]
) -> None:
    """Ending the program that we started does not end what its daemon runs for it."""
    asked: list[list[str]] = []

    def execute(argv: Sequence[str], *more: object, **others: object) -> Done:
        asked.append(list(argv))
        if ending is KeyboardInterrupt and argv[1] == "run":
            raise ending
        return Done(124, err="docker did not end within 240 s")

    container = Container("docker", "a/b", "cpu", "python3")
    mechanism = ContainerMechanism(container, ROOT, Wanted("cpu", 1), {}, execute)
    with pytest.raises(ending):
        mechanism.check("before", tmp_path / "health", 1)
    (name,) = (word.partition("=")[2] for word in asked[0] if word.startswith("--name="))
    assert asked[1:] == [["docker", "rm", "--force", name]]


def test_docker_images_are_run_by_digest(tmp_path: Path) -> None:
    """What is run is what is recorded: the digest of the place that the image was asked from, by its whole
    name, because podman takes no registry for granted."""
    box = Box(tmp_path)
    reference, image = docker_image(str(box.folder / "docker"), "a/b:c", "x86_64")
    assert reference == f"docker.io/a/b@{DIGEST}"
    assert image == {"reference": "a/b:c", "digest": DIGEST, "arch": "x86_64"}
    assert box.calls()[0] == ["pull", "--quiet", "docker.io/a/b:c"]
