"""House rules that a machine can keep (docs: CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import collectivex
from collectivex.runtime import cli, registry, sku, suite

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("runtime", "backends", "plot", "launchers")
# Both halves use these; the host half must be able to import them.
SHARED = "types errors stats counts bandwidth environment document writing provenance device ranks".split()
HOST_PACKAGES = ("yaml", "jsonschema_rs", "rich", "jinja2", "matplotlib", "shtab")
LONGEST_FILE, LONGEST_FUNCTION = 400, 80
# path -> why it may be longer. Splitting is better.
LONG_FILES = {"backends/torch_dist.py": "ten collectives and three exchanges of one library belong together"}


def modules(*folders: str) -> dict[str, Path]:
    """`runtime.suite` -> its file."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path, name: str) -> Iterator[str]:
    """Every module that a file imports, lazily or not, relative ones as `runtime.suite`. Imports for type
    checkers only do not count."""
    skipped = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            yield base
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)


def import_blocked(names: list[str], blocked: tuple[str, ...]) -> str:
    """Import modules of ours in a fresh interpreter that cannot import `blocked`; its stderr."""
    code = (
        "import importlib, sys\n"
        f"blocked = {blocked!r}\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in blocked:\n"
        "            raise ImportError(name + ' is not for this half')\n"
        "sys.meta_path.insert(0, Blocker())\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module('collectivex.' + name)\n"
    )
    argv, home = [sys.executable, "-c", code], Path(collectivex.__file__).parents[1]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=home).stderr


def is_kernels(name: str) -> bool:
    """GPU kernels in Triton's language: imported on a GPU only, and one function each, however long."""
    return "_kernel" in name


def host_half() -> list[str]:
    """The handlers of the command line but for the worker, what draws, and what both halves share."""
    handlers = {name: p.get_default("handler") for name, p in cli.parser().commands().items()}
    named = {h.partition(":")[0] for name, h in handlers.items() if name != "worker"}
    runtime = {f"runtime{name}" for name in named if not name.startswith("..")}
    return sorted({*runtime, *modules("plot"), *(f"runtime.{name}" for name in SHARED)})


def rank_half() -> dict[str, set[str]]:
    """Every module that the worker and the backends can reach, lazily or not, with what it imports."""
    ours = modules("runtime", "backends")
    reached: dict[str, set[str]] = {}
    todo = {"runtime.worker", "runtime.ranker", "runtime.health", *modules("backends")}
    todo |= {"runtime.install", "runtime.load_check"}  # run inside an image too
    while todo:
        name = todo.pop()
        if name in ours and name not in reached:
            reached[name] = set(imports(ours[name], name))
            todo |= reached[name]
    return reached


def test_host_half_and_backends_import_without_torch() -> None:
    """A laptop or login node plans, validates and plots without torch; so does every backend file."""
    names = [*host_half(), *(name for name in modules("backends") if not is_kernels(name))]
    assert {"runtime.execute", "runtime.planning", "plot.command", "backends.torch_dist"} <= set(names)
    failed = import_blocked(names, ("torch",))
    assert failed == "", failed


def test_rank_half_imports_without_the_host_packages() -> None:
    """A vendor's container brings torch and nothing of ours: the standard library and torch must do."""
    names = [name for name in rank_half() if not is_kernels(name)]
    failed = import_blocked(["runtime.cli", *sorted(names)], HOST_PACKAGES)
    assert failed == "", failed


def test_nothing_the_worker_can_reach_imports_a_host_package() -> None:
    """Lazy imports count too: the rank half must not fail in the middle of a measurement."""
    reached = rank_half()
    assert {"runtime.worker", "runtime.measure", "runtime.registry"} <= set(reached)
    for name, found in reached.items():
        used = {f.partition(".")[0] for f in found} & {*HOST_PACKAGES, "numpy"}
        assert not used, f"{name} imports {used}"


def test_the_environment_is_read_in_one_file() -> None:
    """os.environ and os.getenv appear in runtime/environment.py only."""
    for name, path in modules("runtime", "backends", "plot", "collectivex").items():
        if name == "runtime.environment":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ("environ", "environb", "getenv", "putenv"), f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                taken = {alias.name for alias in node.names}
                assert not taken & {"environ", "environb", "getenv", "putenv"}, f"{path}:{node.lineno}"


def test_commands_are_waited_for_in_one_file() -> None:
    """runtime/commands.py has the time limit, and ends all that a command has started."""
    others = {
        "runtime.install": "builds have no limit but that of the step around them",
        "runtime.prepare_inside": "its output goes before the user's eyes",
        "runtime.toolchain": "a compiler reads its text from stdin",
    }
    for name, path in modules("runtime", "backends", "plot", "collectivex").items():
        used = re.findall(
            r"\bsubprocess\.(?:run|call|check_\w+|getoutput)\b", path.read_text(encoding="utf-8")
        )
        assert bool(used) == (name in others), f"{path}: {used}"


def test_no_error_is_caught_without_being_named() -> None:
    """No `except Exception` and no bare except; `except BaseException` only to clean up and raise again."""
    for path in [*modules(*FOLDERS, "collectivex").values(), *ROOT.glob("*.py")]:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = ast.unparse(node.type) if node.type else "everything"
            ends_raising = isinstance(node.body[-1], ast.Raise)
            assert not re.search(r"\bException\b|everything", caught), f"{path}:{node.lineno}"
            assert "BaseException" not in caught or ends_raising, f"{path}:{node.lineno}"


def test_files_and_functions_stay_readable() -> None:
    """About 300 lines a file and 50 a function are the aim; 400 and 80 are the end."""
    for path in [p for f in FOLDERS for e in ("*.py", "*.sh") for p in sorted((ROOT / f).rglob(e))]:
        name = path.relative_to(ROOT).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_FILE or name in LONG_FILES, f"{name} has {lines} lines"
    for module, path in modules(*FOLDERS).items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and not is_kernels(module):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{path}:{node.lineno}: {node.name} has {lines} lines"
    assert all((ROOT / name).is_file() for name in LONG_FILES), "an exception for a file that is gone"


@pytest.mark.parametrize("name", registry.names())
def test_a_backend_is_called_like_its_file(name: str) -> None:
    """The file name is the registration; there is no second name to keep in step."""
    assert registry.load(name).facts.name == name


@pytest.mark.parametrize("name", sorted(set(modules("backends")) - {"backends.__init__"}))
def test_a_backend_never_sees_the_clock(name: str) -> None:
    """The harness decides what is timed: no backend reads time, makes timing events or asks the device."""
    path = modules("backends")[name]
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"perf_counter|monotonic|enable_timing|elapsed_time|elapsed_us|\.mark\(", text)
    taken = set(imports(path, name))
    assert not taken & {"time.time", "time.time_ns", "timeit", "datetime"}
    assert not re.search(r"\btime\.(?!sleep\b)", text), "of `time`, only sleep"


def test_every_test_states_its_claim() -> None:
    """Names are sentences, and the docstring says what would be wrong if the test failed."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}:{node.lineno}: {node.name} has no docstring"


def test_readme_lists_every_suite_sku_and_backend() -> None:
    """What exists is named in the README, as code, so that a reader can find and type it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for kind, names in (("suite", suite.names()), ("SKU", sku.names()), ("backend", registry.visible())):
        missing = [name for name in names if f"`{name}`" not in text]
        assert not missing, f"README.md does not name the {kind} {missing}"


def test_links_in_documents_lead_somewhere() -> None:
    """Every relative link of every Markdown file is a file or folder of the checkout."""
    ours = [p for p in ROOT.iterdir() if p.name not in ("build", "out") and not p.name.startswith(".")]
    documents = [p for top in ours for p in ([top] if top.is_file() else top.rglob("*")) if p.suffix == ".md"]
    assert ROOT / "CONTRIBUTING.md" in documents
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)}: {target}"


def test_documents_name_the_contract_version_that_is_in_force() -> None:
    """schema/HISTORY.md tells the story of the contract that results carry now."""
    from collectivex.runtime.types import CONTRACT

    assert f"`{CONTRACT}`" in (ROOT / "schema" / "HISTORY.md").read_text(encoding="utf-8")


def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(tmp_path: Path) -> None:
    """A top-level `schema` in site-packages would be somebody else's; a missing YAML file breaks all."""
    source = tmp_path / "source"
    folders = (*FOLDERS, "collectivex", "schema", "suites")
    for folder in folders:
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    argv += ["--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder in folders:
        files = (p for p in (source / folder).rglob("*") if p.is_file() and "build" not in p.parts)
        prefix = "" if folder == "collectivex" else "collectivex/"
        expected |= {prefix + p.relative_to(source).as_posix() for p in files}
    assert found == expected
