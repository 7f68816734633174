"""`cx prepare` with a real git repository and a real pip, for a library that is a few lines long."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from collectivex.backends.base import Facts, Recipe, Source
from collectivex.runtime import prepare, prepared
from collectivex.runtime.errors import InfraError, UserError

PROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
PROJECT += '[project]\nname = "tinycomm"\nversion = "1.2"\n[tool.setuptools]\npy-modules = ["tinycomm"]\n'


@pytest.fixture
def upstream(tmp_path, monkeypatch) -> tuple[str, str]:
    """URL and commit of a library with two commits; the first is the pin."""
    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path / "libraries"))
    source = tmp_path / "upstream"
    source.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    (source / "pyproject.toml").write_text(PROJECT)
    for number in (1, 2):
        (source / "tinycomm.py").write_text(f"number = {number}\n")
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", f"{number}"], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD~1"], check=True, capture_output=True, text=True)
    return str(source), first.stdout.strip()


def facts(upstream: tuple[str, str], pin: str | None = None, **more) -> Facts:
    url, commit = upstream
    recipe = Recipe(git=url, modules=("tinycomm",), sets={"TINY_HOME": "{folder}/site"}, **more)
    source = Source("git", url, pin or commit, "the commit that was tested")
    return Facts("tiny", "tiny", source, (), ("cpu",), recipe=recipe)


def install(of: Facts, force: bool = False) -> Path:
    assert of.recipe is not None
    return prepare.prepare(of, of.recipe, force)


def test_what_is_installed_is_the_pinned_commit_and_only_its_ranks_see_it(upstream) -> None:
    """Not the newest: the one that was tested; found through the environment of that backend alone."""
    folder = install(facts(upstream))

    env = prepared.variables("tiny")
    code = "import os, tinycomm; print(tinycomm.number, os.environ['TINY_HOME'])"
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert f"1 {folder / 'site'}" == said.stdout.strip()
    assert {} == prepared.variables("other")


def test_it_is_installed_once(upstream) -> None:
    """The same pin again costs nothing; another pin replaces it."""
    folder = install(facts(upstream))
    stamp = (folder / prepared.FILE).stat().st_mtime_ns

    install(facts(upstream))
    assert stamp == (folder / prepared.FILE).stat().st_mtime_ns

    install(facts(upstream, pin="HEAD"))
    assert "HEAD" == json.loads((folder / prepared.FILE).read_text())["pin"]
    assert [folder] == [p for p in folder.parent.iterdir() if p.is_dir()]


def test_a_step_that_fails_keeps_its_log_and_leaves_the_old_folder_alone(upstream) -> None:
    """An unknown commit: the reason, where the log is, and what was there still works."""
    folder = install(facts(upstream))

    with pytest.raises(InfraError, match="git failed") as caught:
        install(facts(upstream, pin="0" * 40))

    log = folder.parent / "tiny.prepare.log"
    assert str(log) in str(caught.value.hint)
    assert "checkout" in log.read_text()
    assert upstream[1] == json.loads((folder / prepared.FILE).read_text())["pin"]
    assert [folder] == [p for p in folder.parent.iterdir() if p.is_dir()]


def test_a_program_that_the_build_needs_is_asked_for_before_anything_is_built(upstream) -> None:
    """One sentence with its name."""
    with pytest.raises(UserError, match="no-such-compiler"):
        install(facts(upstream, needs=("git", "no-such-compiler")))


def test_a_module_that_does_not_import_is_an_error(upstream) -> None:
    """Installed is not enough: it must load."""
    of = facts(upstream)
    recipe = Recipe(git=upstream[0], modules=("tinycomm_extension",))

    with pytest.raises(InfraError, match="No module named 'tinycomm_extension'"):
        prepare.prepare(of, recipe)
