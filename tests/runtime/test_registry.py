"""Backends by name."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from collectivex.backends import torch_dist
from collectivex.runtime import registry
from collectivex.runtime.errors import UserError


class Backend:
    """A backend of another package."""

    facts = replace(torch_dist.FACTS, name="theirs")


class Misnamed(Backend):
    facts = replace(torch_dist.FACTS, name="something_else")


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install an entry point under the name `theirs`."""

    def install(value: str, name: str = "theirs") -> None:
        made = EntryPoint(name, value, registry.GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [made])
        registry._entry_points.cache_clear()
        registry.load.cache_clear()

    yield install
    monkeypatch.undo()
    registry._entry_points.cache_clear()
    registry.load.cache_clear()


def test_every_file_under_backends_is_a_backend() -> None:
    """No central list: dropping a file in is the registration. A leading underscore marks a part of one."""
    files = {p.stem for p in registry.FOLDER.glob("[!_]*.py")} - {"base"}
    assert set(registry.names()) >= files >= {"torch_dist", "fake"}
    assert not [name for name in registry.names() if name.startswith("_")]


def test_the_fake_is_not_shown() -> None:
    """It moves nothing; whoever names it gets it, nobody else."""
    assert "torch_dist" in registry.visible()
    assert "fake" not in registry.visible()
    assert registry.load("fake").facts.hidden


def test_an_unknown_backend_names_the_known_ones() -> None:
    """Hidden ones are not advertised, the nearest name is."""
    with pytest.raises(UserError) as error:
        registry.load("torch_dst")
    assert str(error.value).startswith("no backend named 'torch_dst'; have: ")
    assert "did you mean 'torch_dist'?" in str(error.value)
    assert "fake" not in error.value.message


def test_another_package_can_bring_a_backend(entry: Any) -> None:
    """Through the entry-point group collectivex.backends."""
    entry(f"{__name__}:Backend")
    assert "theirs" in registry.visible()
    assert registry.load("theirs").facts.name == "theirs"


def test_another_package_cannot_replace_ours(entry: Any) -> None:
    """`torch_dist` is ours whatever is installed."""
    entry(f"{__name__}:Backend", name="torch_dist")
    assert isinstance(registry.load("torch_dist"), torch_dist.Backend)


@pytest.mark.parametrize("value", ["no.such.module:Backend", "json:Backend", f"{__name__}:Misnamed"])
def test_a_package_that_breaks_the_contract_is_named(entry: Any, value: str) -> None:
    """Not our bug, so no traceback: what is wrong with it, and whose it is."""
    entry(value)
    with pytest.raises(UserError, match=r"backend 'theirs' \(.*\) (cannot be loaded|calls itself)"):
        registry.load("theirs")
