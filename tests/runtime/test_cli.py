"""The command line: fast, lazy, and clear about mistakes."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import collectivex
from collectivex.runtime import cli
from collectivex.runtime.errors import InfraError, UserError
from collectivex.runtime.types import CONTRACT

COMMAND = [sys.executable, "-m", "collectivex"]
# The package under test, whether it lies in a checkout or in site-packages.
HOME = Path(collectivex.__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    return (code, *capsys.readouterr())


def handled(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The namespace that a handler would get."""
    seen = []

    class Module:
        @staticmethod
        def command(args: argparse.Namespace) -> int:
            seen.append(args)
            return 0

    with monkeypatch.context() as patch:
        patch.setattr(cli.importlib, "import_module", lambda name, package: Module)
        assert cli.main(argv) == 0
    return seen[0]


def test_help_loads_no_package_but_ours() -> None:
    """What makes it fast; also: help works before anything is installed."""
    code = (
        "import sys; from collectivex.runtime import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'yaml', 'rich', 'torch', 'numpy', 'jsonschema_rs', 'jinja2', 'matplotlib', 'shtab'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=HOME)
    assert done.returncode == 0, done.stderr
    for name in ("run", "list", "plan", "validate", "summarize", "plot", "doctor", "completion"):
        assert f"\n    {name}" in done.stdout
    assert "worker" not in done.stdout


def test_every_command_has_a_handler_that_exists() -> None:
    """Handlers are named as text; a wrong name would show only when it is called."""
    for name, command in cli.parser().commands().items():
        module, _, function = command.get_default("handler").partition(":")
        loaded = importlib.import_module(module, "collectivex.runtime")
        assert callable(getattr(loaded, function or "command")), name


def test_version_names_the_measurement_contract(capsys: pytest.CaptureFixture[str]) -> None:
    """Two versions with one contract give comparable numbers."""
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"collectivex {collectivex.__version__} (contract {CONTRACT})\n"


@pytest.mark.parametrize(
    ("argv", "error", "hint"),
    [
        (["plna"], "no command named 'plna'; have: ", "did you mean 'plan'?"),
        ([], "the following arguments are required: command", "see `cx --help`"),
        (["run"], "the following arguments are required: --suite", "see `cx run --help`"),
        (["run", "--sute", "x"], "the following arguments are required: --suite", None),
        (["run", "--suite", "smoke", "--rank", "2"], "no option of `cx run` named '--rank'", "'--ranks'"),
        (["plan", "--sutie=x"], "no option of `cx plan` named '--sutie'", "did you mean '--suite'?"),
        (["plan", "smoke"], "unexpected argument 'smoke'", "see `cx plan --help`"),
        (["plan", "--ranks", "0"], "argument --ranks: '0' is not a whole number from 1", None),
        (["plan", "--ranks", "two"], "argument --ranks: 'two' is not a whole number", None),
        (["plan", "--format", "jsno"], "no format named 'jsno'; have: json, table", "did you mean 'json'?"),
        (["plan", "--backend", ","], "argument --backend: no name given", None),
        (["run", "--suite", "smoke", "--deadline", "-1"], "argument --deadline: '-1' is not a number", None),
        (
            ["run", "--suite", "smoke", "--deadline", "inf"],
            "argument --deadline: 'inf' is not a number",
            None,
        ),
        (["run", "--suite", "smok"], "no suite named 'smok'; have: ", "did you mean 'smoke'?"),
        (["run", "--suite", "smoke", "--sku", "locl"], "no SKU named 'locl'", "did you mean 'local'?"),
        (["run", "--suite", "smoke", "--backend", "torch"], "no backend named 'torch'", "'torch_dist'"),
        (["run", "--suite", "smoke", "--nodes", "2"], "starts processes on one machine", None),
        (["list", "bckends"], "no list named 'bckends'", "did you mean 'backends'?"),
        (["list", "backends", "depep"], "no backend named 'depep'", "did you mean 'deepep'?"),
        (["completion", "fish"], "no shell named 'fish'; have: bash, tcsh, zsh", None),
        (["validate", "/no/such/folder"], "no folder /no/such/folder", "cx run --out"),
    ],
)
def test_a_mistake_is_one_error_and_a_hint(
    capsys: pytest.CaptureFixture[str], argv: list[str], error: str, hint: str | None
) -> None:
    """Exit code 2, nothing on stdout, no traceback."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    first, *rest = err.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert hint is None or (len(rest) == 1 and rest[0].startswith("hint: ") and hint in rest[0])


def test_options_of_run_reach_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends may be repeated, listed with commas, or both; --only may be repeated."""
    argv = "run --suite s --sku k --backend a,b --backend c --ranks 2 --nodes 1 --runs 5 --out o --resume"
    args = handled(f"{argv} --fail-fast --deadline 7.5 --only x --only y --dry-run".split(), monkeypatch)
    assert (args.suite, args.sku, args.backend, args.out) == ("s", "k", ["a", "b", "c"], "o")
    assert (args.ranks, args.nodes, args.runs, args.deadline) == (2, 1, 5, 7.5)
    assert (args.resume, args.fail_fast, args.dry_run, args.only) == (True, True, True, ["x", "y"])


def test_defaults_of_run_leave_the_choice_to_suite_and_sku(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the SKU has one: this machine."""
    args = handled(["run", "--suite", "s"], monkeypatch)
    assert args.sku == "local"
    for name in ("backend", "ranks", "nodes", "runs", "out", "deadline", "only"):
        assert getattr(args, name) is None
    assert (args.resume, args.fail_fast, args.dry_run) == (False, False, False)


def test_options_of_summarize_reach_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, the form, and what the tables show."""
    argv = "summarize a b --format json --percentile p99 --regime fresh --regime graph"
    args = handled(argv.split(), monkeypatch)
    assert (args.dirs, args.format, args.percentile) == (["a", "b"], "json", "p99")
    assert args.regime == ["fresh", "graph"]
    args = handled(["summarize", "a"], monkeypatch)
    assert (args.format, args.percentile, args.regime) == ("text", "p50", None)


def test_the_worker_takes_cases_and_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden from help, but the launchers call it."""
    args = handled("worker --cases c.json --out o".split(), monkeypatch)
    assert (args.cases, args.out) == ("c.json", "o")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("wrong", "do this"), 2, "error: wrong\nhint: do this\n"),
        (InfraError("disk"), 3, "error: disk\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ModuleNotFoundError("x", name="yaml"), 2, "error: this command needs the Python package PyYAML\n"),
        (ModuleNotFoundError("x", name="matplotlib.figure"), 2, "needs the Python package matplotlib\n"),
        (ModuleNotFoundError("x", name="torch"), 2, "error: measuring needs torch"),
    ],
)
def test_an_end_that_is_not_our_bug_has_a_message_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    said: str,
) -> None:
    """2: the user must change something, 3: infrastructure, 130: Ctrl-C."""

    def fail(*unused: Any) -> int:
        raise raised

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main([]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


def test_a_bug_of_ours_shows_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is caught that we do not understand, a module of ours that is missing included."""
    for bug in (ZeroDivisionError("bug"), ModuleNotFoundError("x", name="collectivex.runtime.gone")):

        def fail(*unused: Any, bug: BaseException = bug) -> int:
            raise bug

        monkeypatch.setattr(cli, "_run", fail)
        with pytest.raises(type(bug)):
            cli.main([])


def test_a_bare_checkout_without_packages_says_what_to_install() -> None:
    """`python -m collectivex plan` on a machine that has only Python."""
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('yaml', 'jsonschema_rs'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from collectivex.runtime import cli\n"
        "sys.exit(cli.main(['plan']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=HOME)
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith("error: this command needs the Python package ")
    assert second.startswith("hint: `pip install .` in the checkout")


def test_a_closed_pipe_is_no_error() -> None:
    """`cx list suites | true` leaves no traceback."""
    shell = (
        f"{sys.executable} -m collectivex plan --suite ep-core --format json | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, cwd=HOME)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_names_of_this_installation(
    capsys: pytest.CaptureFixture[str], shell: str
) -> None:
    """Commands, suites, SKUs and backends; not the hidden ones."""
    code, out, _ = run(capsys, "completion", shell)
    assert code == 0
    for name in ("summarize", "ep-core", "h200x4-nvlink", "torch_dist"):
        assert name in out
    assert "fake" not in out


def test_completion_scripts_are_valid_bash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """bash itself parses what we print."""
    _, out, _ = run(capsys, "completion", "bash")
    (tmp_path / "completion").write_text(out)
    subprocess.run(["bash", "-n", str(tmp_path / "completion")], check=True)


def test_the_module_and_the_script_are_the_same_program() -> None:
    """`python -m collectivex` in a bare checkout is `cx`."""
    done = subprocess.run([*COMMAND, "plna"], capture_output=True, text=True, check=False, cwd=HOME)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no command named 'plna'")
