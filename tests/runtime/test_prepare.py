"""`cx prepare`: which libraries, where, and what a user is told before anything is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from collectivex.backends.base import Facts, Recipe, Source
from collectivex.runtime import cli, install, prepare_inside, registry
from collectivex.runtime.yamlfile import ROOT

TINY = Facts("tiny", "t", Source("package", "tiny", "1", "w"), (), ("cuda",), recipe=Recipe(modules=("t",)))
BARE = replace(TINY, name="bare", recipe=None)
PLAIN = replace(TINY, name="plain", source=Source("bundled", "torch", "as installed", "-"), recipe=None)


@pytest.fixture
def made(monkeypatch, tmp_path: Path) -> list[tuple[str, install.Place]]:
    """What would have been installed, and where."""
    found: list[tuple[str, install.Place]] = []
    known = {of.name: SimpleNamespace(facts=of) for of in (TINY, BARE, PLAIN)}

    def prepare(facts: Facts, place: install.Place) -> Path:
        found.append((facts.name, place))
        return place.libraries / facts.name

    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path))
    monkeypatch.setattr(registry, "load", known.__getitem__)
    monkeypatch.setattr(install, "prepare", prepare)
    return found


def cx(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["prepare", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_without_a_pool_it_is_for_this_python_and_its_gpus(made, capsys, tmp_path: Path) -> None:
    """Also in an image that somebody is inside of, where there is no PyYAML to read a pool with."""
    code, out, _ = cx(capsys, "--backend", "tiny,plain,tiny", "--force")
    assert code == 0
    ((name, place),) = made
    assert (name, place.libraries, place.arch, place.force) == ("tiny", tmp_path, None, True)
    assert "plain: nothing to install, it is torch, as installed" in out


def test_a_pool_of_processes_says_for_which_gpus(made, capsys, tmp_path: Path) -> None:
    """A login node without a GPU can build for the nodes."""
    code, _, err = cx(capsys, "--backend", "tiny", "--sku", "h200x4-nvlink")
    assert code == 0, err
    assert [(place.libraries, place.arch) for _, place in made] == [(tmp_path, "sm90")]


def test_a_library_without_a_recipe_says_what_to_build(made, capsys) -> None:
    """Before the others are built."""
    code, _, err = cx(capsys, "--backend", "tiny,bare")
    assert (code, made) == (2, [])
    assert "error: there is no recipe for bare\nhint: build tiny at 1 yourself" in err


def test_a_library_of_another_vendor_is_refused(made, capsys) -> None:
    """Before anything is allocated."""
    code, _, err = cx(capsys, "--backend", "tiny", "--sku", "mi355x-amds", "--site", str(SITE))
    assert (code, made) == (2, [])
    assert "tiny is for cuda, mi355x-amds has hip" in err


SITE = ROOT / "tests" / "golden" / "launch" / "example-site.yaml"


def test_a_pool_with_containers_is_prepared_inside(made, capsys, monkeypatch) -> None:
    """Nothing is installed with the Python of the login node."""
    asked = []
    monkeypatch.setattr(
        prepare_inside.Inside, "install", lambda self, wanted: asked.append((self.sku.name, wanted)) or 0
    )
    code, _, err = cx(capsys, "--backend", "tiny", "--sku", "h100-dgxc", "--site", str(SITE))
    assert code == 0, err
    assert (asked, made) == ([("h100-dgxc", [TINY])], [])
