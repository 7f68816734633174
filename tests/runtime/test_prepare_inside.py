"""Installing inside a pool's image: the commands of each container program, word for word. test_podman.py
does it for real."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from collectivex.backends.base import Facts, Recipe, Source
from collectivex.runtime import prepare_inside, recipe, slurm
from collectivex.runtime.commands import shown
from collectivex.runtime.errors import InfraError, UserError
from collectivex.runtime.prepare_inside import Inside
from collectivex.runtime.site import Pool
from collectivex.runtime.sku import Sku

DIGEST = "4f1c" * 16
FACTS = Facts("tiny", "t", Source("package", "tiny", "1", "w"), (), ("cuda",), recipe=Recipe())
IMAGES = {
    "pyxis": f"/images/{DIGEST}.x86_64.sqsh",
    "apptainer": f"/images/{DIGEST}.x86_64.sqsh",
    "podman": f"docker.io/a/b@sha256:{DIGEST}",
    "docker": f"docker.io/a/b@sha256:{DIGEST}",
    "none": None,
}
WAYS = [("slurm", kind) for kind in ("pyxis", "apptainer", "podman", "none")]
WAYS += [("docker", kind) for kind in ("docker", "podman")]


def pool(mechanism: str, container: str) -> Sku:
    places = (None, None, mechanism, "a/b:c", Path("/pool.yaml"))
    return Sku("pool", "a pool", "nvidia", "sm90", "h200", 8, 0, *places, container=container)


@pytest.fixture
def started(monkeypatch, tmp_path: Path) -> list[str]:
    """The commands that would have run, in job 7 on one node, as user 1000."""
    found: list[str] = []
    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "hostnames", lambda job: ["node1"])
    monkeypatch.setattr(prepare_inside, "hide", lambda *names: None)
    monkeypatch.setattr(prepare_inside, "step_image", lambda sku, _pool, _job: (IMAGES[sku.container], None))
    monkeypatch.setattr(prepare_inside, "docker_image", lambda kind, name, cpu: (IMAGES[kind], {}))
    ids = SimpleNamespace(getuid=lambda: 1000, getgid=lambda: 100, getpid=lambda: 42)
    monkeypatch.setattr(prepare_inside, "os", ids)
    monkeypatch.setattr(prepare_inside, "finish", lambda argv, env, facts: found.append(shown(argv)))
    return found


@pytest.mark.parametrize(("mechanism", "container"), WAYS)
def test_the_installation_runs_in_the_image_with_its_libraries_writable(
    mechanism: str, container: str, started: list[str], golden: Callable[[str, str], None], tmp_path: Path
) -> None:
    """As ranks are started, with one folder more, which exists: docker would make it as root."""
    Inside(pool(mechanism, container), Pool(), force=True, root=Path("/checkout")).install([FACTS])

    (line,) = started
    line = line.replace(sys.executable, "/python").replace(str(tmp_path), "/libraries")
    golden(f"prepare/{mechanism}.{container}.txt", line + "\n")
    made = [path.name for path in tmp_path.iterdir()]
    assert made == ([] if container == "none" else ["4f1c4f1c4f1c4f1c.x86_64.sm90"])


@pytest.mark.parametrize("container", ["pyxis", "apptainer", "podman", "docker"])
def test_ranks_see_the_same_folder_at_the_same_path_and_cannot_write(
    container: str, started: list[str], tmp_path: Path
) -> None:
    """What was prepared is mounted, and only once there is something; every mechanism is told where."""
    sku, image = pool("slurm", container), IMAGES[container]
    before = recipe.mounted(sku, Pool(), image, Path("/checkout"), Path("/out"))
    Inside(pool("docker" if container == "docker" else "slurm", container), Pool()).install([FACTS])
    after = recipe.mounted(sku, Pool(), image, Path("/checkout"), Path("/out"))

    libraries = tmp_path / "4f1c4f1c4f1c4f1c.x86_64.sm90"
    assert libraries not in before.mounts
    assert after.mounts == {Path("/checkout"): False, Path("/out"): True, libraries: False}
    assert before.libraries == after.libraries == libraries
    words = " ".join([*after.prefix(), *after.srun_options()])
    assert f"{libraries}:{libraries}:ro" in words


def test_a_stage_is_filled_for_nodes_that_do_not_see_the_checkout(started: list[str], tmp_path: Path) -> None:
    """The code that runs there is the copy, which is gone afterwards."""
    stage = tmp_path / "stage"
    Inside(pool("slurm", "pyxis"), Pool(stage_folder=str(stage))).install([FACTS])
    assert f"--container-mounts={stage}/collectivex-" in started[0]
    assert list(stage.iterdir()) == []


def test_without_a_job_one_node_is_asked_for(started: list[str], monkeypatch) -> None:
    """However many nodes the pool's measurements take."""
    asked = []
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setattr(
        prepare_inside, "allocated", lambda request, *more: asked.append(request.nodes) or nullcontext("9")
    )
    Inside(pool("slurm", "pyxis"), Pool()).install([FACTS])
    assert asked == [1]
    assert started[0].startswith("srun --jobid=9 ")


@pytest.mark.parametrize(("code", "kind"), [(2, UserError), (3, InfraError), (137, InfraError)])
def test_how_it_ended_inside_is_how_the_command_ends(code: int, kind: type[Exception]) -> None:
    """What must be changed is the user's, the rest the machine's; the reason was printed there."""
    with pytest.raises(kind, match="tiny was not installed"):
        prepare_inside.finish(["sh", "-c", f"exit {code}"], {"PATH": "/usr/bin:/bin"}, FACTS)
    prepare_inside.finish(["true"], {"PATH": "/usr/bin:/bin"}, FACTS)


def test_a_program_that_is_not_there_is_an_error_with_its_name() -> None:
    """No traceback."""
    with pytest.raises(InfraError, match="cannot start no-such-srun"):
        prepare_inside.finish(["no-such-srun"], {}, FACTS)
