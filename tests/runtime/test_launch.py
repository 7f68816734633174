"""`cx launch` and the launcher scripts: plans word for word, and mistakes told before anything starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from collectivex.runtime import cli, detect, execute, launch, scrub, sku, slurm, suite
from collectivex.runtime.errors import InfraError
from collectivex.runtime.yamlfile import ROOT

SITE = ROOT / "tests" / "golden" / "launch" / "example-site.yaml"
GOLDEN = SITE.parent
LAUNCHERS = ROOT / "launchers"
MACHINE = detect.Machine("cpu", (), "Example CPU", 2)
SEVERAL = {"b200-dgxc-slurm": 2, "h100-dgxc": 2, "mi355x-amds": 2, "gb200-nv": 2, "gb300-nv": 4}


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a job, on a machine that is the same everywhere; what is hidden here is hidden nowhere else."""
    for name in ("SLURM_JOB_ID", "COLLECTIVEX_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(detect, "machine", lambda: MACHINE)
    monkeypatch.setattr(scrub, "_also", [])
    yield
    scrub._redactor.cache_clear()


def cx(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def words(out: Path, *more: str, pool: str = "h100-dgxc", site: Path | None = SITE) -> list[str]:
    """A launch of the smoke suite."""
    where = ["--site", str(site)] if site else []
    return ["launch", "--sku", pool, "--suite", "smoke", *where, "--out", str(out), *more]


def dry(capsys: pytest.CaptureFixture[str], pool: str, name: str, *more: str) -> str:
    fixed = ["--backend", "torch_dist", "--out", "/results/a run", "--site", str(SITE), "--dry-run"]
    code, out, err = cx(capsys, "launch", "--sku", pool, "--suite", name, *fixed, *more)
    assert code == 0, err
    # the interpreter first: it may lie inside the checkout
    return out.replace(sys.executable, "/python").replace(str(ROOT), "/checkout")


@pytest.mark.parametrize("pool", sku.names())
@pytest.mark.parametrize("name", suite.names())
def test_a_dry_run_prints_exactly_this(
    pool: str, name: str, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    """Every SKU and suite: what would run, reviewed whenever it changes."""
    golden(f"launch/{name}.{pool}.txt", dry(capsys, pool, name))


@pytest.mark.parametrize("pool", SEVERAL)
def test_a_dry_run_over_several_nodes_prints_exactly_this(
    pool: str, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    """Network settings, segments and counts appear with the second node."""
    nodes = str(SEVERAL[pool])
    golden(f"launch/smoke.{pool}.n{nodes}.txt", dry(capsys, pool, "smoke", "--nodes", nodes))


def test_a_plan_tells_where_prepared_libraries_are(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    golden: Callable[[str, str], None],
) -> None:
    """A folder for each image, which only the run itself can name; nothing of it for a backend without a
    library, or for ranks in no image."""
    monkeypatch.setenv("CX_LIBRARIES", "/libraries")
    words = ("--backend", "deepep,nccl_ep", "--only", "t128-bf16-uniform-low-latency")
    golden("launch/prepared.h100-dgxc.txt", dry(capsys, "h100-dgxc", "ep-core", *words))
    assert "prepared libraries" not in dry(capsys, "h100-dgxc", "ep-core")
    assert "prepared libraries" not in dry(capsys, "h200x4-nvlink", "ep-core", *words)


def test_a_program_is_one_task_that_drives_its_node(capsys: pytest.CaptureFixture[str]) -> None:
    """rccl_tests on AMD's Slurm pool: all eight GPUs are those of a single process."""
    asked = ["--suite", "smoke", "--sku", "mi355x-amds", "--backend", "rccl_tests", "--out", "/results"]
    code, out, err = cx(capsys, "launch", *asked, "--site", str(SITE), "--dry-run")
    assert code == 0, err
    assert ", 8 ranks on 1 node\n" in out
    (step,) = [line for line in out.splitlines() if " rank --cases " in line]
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 " in step
    assert "--container-image=" in step


def test_no_golden_plan_is_left_over() -> None:
    """A plan of a SKU that is gone would be linted for ever and mean nothing."""
    expected = {f"{s}.{k}.txt" for s in suite.names() for k in sku.names()}
    expected |= {"prepared.h100-dgxc.txt", *(f"smoke.{pool}.n{nodes}.txt" for pool, nodes in SEVERAL.items())}
    assert {p.name for p in GOLDEN.glob("*.txt")} == expected


def test_scripts_and_plans_are_good_shell() -> None:
    """bash -n and shellcheck on every script and every golden plan."""
    scripts = [*sorted(LAUNCHERS.glob("*.sh")), *sorted((ROOT / "tests" / "slurm").glob("*.sh"))]
    plans = sorted(GOLDEN.glob("*.txt"))
    for path in (*scripts, *plans):
        done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("shellcheck is not installed")
    argv = [tool, "--shell=bash", "--external-sources", *map(str, (*scripts, *plans))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("pool", sku.names())
def test_every_sku_has_its_launcher_with_its_own_batch_lines(pool: str) -> None:
    """The #SBATCH lines are the SKU file's facts; a second list would drift."""
    path = LAUNCHERS / f"launch_{pool}.sh"
    lines = path.read_text().splitlines()
    loaded = sku.load_sku(pool, MACHINE)
    wanted = slurm.header(loaded) if loaded.mechanism == "slurm" else []
    assert lines[0] == "#!/usr/bin/env bash"
    assert [line for line in lines if line.startswith("#SBATCH")] == wanted
    assert lines[1 : 1 + len(wanted)] == wanted, "sbatch stops reading at the first command"
    assert lines[-1] == f'source "$cx_here/common.sh" {pool} "$@"'
    assert os.access(path, os.X_OK)


def test_there_is_no_launcher_without_a_sku() -> None:
    """A runner name chooses the script: launch_${RUNNER_NAME%%_*}.sh."""
    assert {p.stem for p in LAUNCHERS.glob("launch_*.sh")} == {f"launch_{name}" for name in sku.names()}


def script(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "CX_", "COLLECTIVEX"))}
    return subprocess.run(
        arguments, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_runners_name_picks_the_script(tmp_path: Path) -> None:
    """`h100-dgxc_03` is a runner of h100-dgxc; a name of no SKU is a clear failure."""
    call = ["bash", "-c", 'exec "$1/launch_${RUNNER_NAME%%_*}.sh" --suite smoke --site "$2" --dry-run', "_"]
    env = {"CX_PYTHON": sys.executable}
    done = script(*call, str(LAUNCHERS), str(SITE), cwd=tmp_path, RUNNER_NAME="h100-dgxc_03", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# smoke on h100-dgxc")
    done = script(*call, str(LAUNCHERS), str(SITE), cwd=tmp_path, RUNNER_NAME="h20_1", **env)
    assert done.returncode == 127
    assert "launch_h20.sh" in done.stderr


def test_a_spooled_copy_finds_the_checkout_by_slurms_word(tmp_path: Path) -> None:
    """As sbatch runs it: another name, another folder, and a Command= line with spaces in it."""
    checkout = tmp_path / "my checkout"
    checkout.symlink_to(ROOT)
    spool = tmp_path / "job00007"
    spool.mkdir()
    shutil.copy(LAUNCHERS / "launch_local.sh", spool / "slurm_script")
    tools = tmp_path / "bin"
    tools.mkdir()
    answer = (
        f"JobId=7 JobName=x\n   Command={checkout}/launchers/launch_local.sh --suite smoke\n   WorkDir=/\n"
    )
    (tmp_path / "answer").write_text(answer)
    (tools / "scontrol").write_text(f'#!/bin/sh\ncat "{tmp_path}/answer"\n')
    (tools / "scontrol").chmod(0o755)
    env = {"CX_PYTHON": sys.executable, "PATH": f"{tools}:{os.environ['PATH']}"}
    argv = ["bash", str(spool / "slurm_script"), "--suite", "smoke", "--dry-run"]
    done = script(*argv, cwd=spool, SLURM_JOB_ID="7", **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# smoke on local")
    done = script(*argv, cwd=spool, **{**env, "CX_ROOT": str(checkout)})
    assert done.returncode == 0, done.stderr
    done = script(*argv, cwd=spool, **env)
    assert done.returncode == 2
    assert "CX_ROOT=" in done.stderr


def test_without_a_python_the_script_says_how_to_get_one(tmp_path: Path) -> None:
    """error and hint, exit 2, as everywhere."""
    done = script(str(LAUNCHERS / "launch_local.sh"), cwd=tmp_path, CX_PYTHON="/no/python")
    assert done.returncode == 2
    assert re.search("error: there is no Python.*\nhint: ", done.stderr)


POOL = """\
schema: collectivex.sku.v1
name: pool
title: a pool
vendor: nvidia
arch: sm90
product: h200
gpus_per_node: 8
max_nodes: 2
scale_up: null
scale_out: null
limits: []
mechanism: slurm
container: pyxis
image: a/b:c
env: {}
refuse: []
"""


@pytest.mark.parametrize(
    ("find", "put", "told"),
    [
        ("mechanism: slurm", "mechanisn: slurm", "mechanisn: unknown key"),
        ("vendor: nvidia", "vendor: nvida", "did you mean 'nvidia'?"),
        ("image: a/b:c", "image: 'a/b:c; rm -rf /'", "pool.yaml:image"),
        ("product: h200", "product: '$(id)'", "pool.yaml:product"),
        ("arch: sm90", "arch: 'sm90`id`'", "pool.yaml:arch"),
        ("name: pool", "name: 'po|ol'", "pool.yaml:name"),
        ("env: {}", "env: {A: '$(id)'}", "pool.yaml:env.A"),
        ("env: {}", "env: {'A;B': x}", "pool.yaml:env"),
        ("container: pyxis", "container: docker", "Slurm starts ranks with pyxis"),
        ("mechanism: slurm", "mechanism: process", "run in no image and no container"),
        ("max_nodes: 2", "max_nodes: two", "pool.yaml:max_nodes"),
    ],
)
def test_a_mistake_in_a_sku_file_is_told_first(
    find: str, put: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo, an unknown key, a shell metacharacter in any field: exit 2, `file:key: problem`."""
    path = tmp_path / "pool.yaml"
    path.write_text(POOL.replace(find, put))
    out = tmp_path / "out"
    code, _, err = cx(capsys, *words(out, pool=str(path), site=None))
    assert code == 2
    assert told in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("{partition: gpu}", "pools.pool.image_folder: is needed"),
        ("{partition: 'gpu;id', image_folder: /i}", "pools.pool.partition"),
        ("{account: '$(id)', image_folder: /i}", "pools.pool.account"),
        ("{image_folder: relative}", "an absolute path"),
        ("{image_folder: '/a,b'}", "pools.pool.image_folder"),
        ("{imagefolder: /i}", "did you mean 'image_folder'?"),
        ("{exclude: 'n1,n2', image_folder: /i}", "pools.pool.exclude"),
    ],
)
def test_a_site_file_that_will_not_do_is_told_first(
    entry: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the mechanism needs and is not there, and every field that is no plain word."""
    (tmp_path / "pool.yaml").write_text(POOL)
    site = tmp_path / "facts.yaml"
    site.write_text(f"schema: collectivex.site.v1\npools:\n  pool: {entry}\n")
    out = tmp_path / "out"
    code, _, err = cx(capsys, *words(out, pool=str(tmp_path / "pool.yaml"), site=site))
    assert code == 2
    assert told in err
    assert not out.exists()


def test_slurm_without_a_site_file_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where to write one; a file without this pool names the nearest one it has."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    code, _, err = cx(capsys, *words(tmp_path / "out", site=None))
    assert code == 2
    assert "needs a site file" in err
    site = tmp_path / "facts.yaml"
    site.write_text("schema: collectivex.site.v1\npools: {h100-dgx: {image_folder: /i}}\n")
    monkeypatch.setenv("COLLECTIVEX_SITE", str(site))
    code, _, err = cx(capsys, *words(tmp_path / "out", site=None))
    assert code == 2
    assert "did you mean 'h100-dgx'?" in err


def test_a_folder_with_foreign_files_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before an allocation, and nothing of the user's is touched."""
    (tmp_path / "thesis.tex").write_text("")
    code, _, err = cx(capsys, *words(tmp_path))
    assert code == 2
    assert "files that are not ours" in err
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_mount_that_cannot_be_written_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comma or colon ends a mount in every container program's list."""
    code, _, err = cx(capsys, *words(tmp_path / "a,b"))
    assert code == 2
    assert "comma or colon" in err
    assert os.listdir(tmp_path) == []


def test_cx_run_sends_other_machines_to_launch(capsys: pytest.CaptureFixture[str]) -> None:
    """Eight processes on a login node would be no measurement of that pool."""
    code, _, err = cx(capsys, "run", "--sku", "h100-dgxc", "--suite", "smoke", "--backend", "torch_dist")
    assert code == 2
    assert "launchers/launch_h100-dgxc.sh" in err


def test_without_slurm_a_launch_ends_in_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No salloc here: exit code 3, every cell `infra`, the same in text, Markdown and JSON."""
    monkeypatch.setenv("PATH", str(tmp_path))
    site = tmp_path / "facts.yaml"
    (tmp_path / "i.sqsh").write_text("")
    site.write_text(
        "schema: collectivex.site.v1\n"
        f"pools: {{h100-dgxc: {{account: hush, image_file: {tmp_path}/i.sqsh}}}}\n"
    )
    code, out, err = cx(capsys, *words(tmp_path / "out", "--backend", "torch_dist", site=site))
    assert code == 3
    assert "error: cannot start salloc" in err
    assert re.search(r"ok 0 / (\d+) requested · infra \1", out)
    for form in ("text", "markdown", "json"):
        assert cli.main(["summarize", str(tmp_path / "out"), "--format", form]) == 3
    assert cli.main(["validate", str(tmp_path / "out")]) == 0
    assert not any(
        "hush" in p.read_text() or "facts" in p.read_text() for p in tmp_path.glob("out/**/*.json")
    )


def test_a_requeued_job_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm starts the same script again: its folder is resumed. A second start by a person is refused."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    argv = words(tmp_path / "out", "--backend", "torch_dist")
    assert cx(capsys, *argv)[0] == 3
    code, _, err = cx(capsys, *argv)
    assert code == 2
    assert "already holds an execution" in err
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert cx(capsys, *argv)[0] == 3


def test_a_stage_that_cannot_be_made_is_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any allocation, and for every cell."""
    site = tmp_path / "facts.yaml"
    pool = "{stage_folder: /dev/null/stage, image_folder: /shared/images}"
    site.write_text(f"schema: collectivex.site.v1\npools: {{h100-dgxc: {pool}}}\n")
    code, out, _ = cx(capsys, *words(tmp_path / "out", "--backend", "torch_dist", site=site))
    assert code == 3
    assert "staging failed" in out
    assert not any("/dev/null" in p.read_text() for p in tmp_path.glob("out/cells/*.json"))


def test_what_was_measured_comes_back_from_the_stage_when_its_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The account of what did not run cannot be written then; the first error counts, and nothing is lost."""

    def full(self: launch.Launch, execution: execute.Execution, given: str | None) -> None:
        (execution.out / "cells").mkdir()
        (execution.out / "cells" / "measured.r0.json").write_text("{}")
        monkeypatch.setattr(execute.Execution, "record", full_disk)
        raise InfraError("no space left on device", "free some and run again with --resume")

    def full_disk(*arguments: object) -> None:
        raise InfraError("no space left on device")

    monkeypatch.setattr(launch.Launch, "conduct", full)
    site = tmp_path / "facts.yaml"
    pool = f"{{stage_folder: {tmp_path / 'stage'}, image_folder: /shared/images}}"
    site.write_text(f"schema: collectivex.site.v1\npools: {{h100-dgxc: {pool}}}\n")
    (tmp_path / "stage").mkdir()
    code, _, err = cx(capsys, *words(tmp_path / "out", "--backend", "torch_dist", site=site))
    assert code != 0
    assert "no space left on device" in err
    assert (tmp_path / "out" / "cells" / "measured.r0.json").exists()
    assert not list((tmp_path / "stage").iterdir())


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["launch", "--site", "/home/me/x", "--out", "o"], ["launch", "--out", "o"]),
        (["launch", "--site=/home/me/x"], ["launch"]),
        (["launch", "--out", "--site"], ["launch", "--out"]),
    ],
)
def test_the_site_files_name_is_not_recorded(given: list[str], kept: list[str]) -> None:
    """It may tell who and where."""
    assert launch.without_site(given) == kept


def test_a_sweep_is_one_launcher_call_per_shard(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each SKU, suite and backend that has work there; a backend without any has none."""
    argv = ["sweep", "--sku", "h100-dgxc,mi300x-amds", "--suite", "smoke", "--backend", "torch_dist"]
    code, out, _ = cx(capsys, *argv, "--runs", "2")
    assert code == 0
    assert out.splitlines() == [
        f"launchers/launch_{pool}.sh --suite smoke --backend torch_dist --runs 2"
        f" --out out/{pool}-smoke-torch_dist"
        for pool in ("h100-dgxc", "mi300x-amds")
    ]


def test_inside_a_job_no_other_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dry run says so too."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    out = dry(capsys, "h100-dgxc", "smoke")
    assert "# allocation: the one we are in, job 77" in out
    assert "salloc" not in out
