"""Backends by name: one file under backends/ is one backend; others come from installed packages.

Standard library only: the worker loads its backend here too.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, unknown

if TYPE_CHECKING:
    from ..backends.base import Library, Program

FOLDER = Path(__file__).resolve().parent.parent / "backends"
GROUP = "collectivex.backends"
_NOT_BACKENDS = ("base",)


def names() -> list[str]:
    """Every backend there is, hidden ones included: our files, then entry points of other packages."""
    return sorted({*_bundled(), *_entry_points()})


def visible() -> list[str]:
    """The backends that lists show and that run when none is named."""
    return [name for name in names() if not load(name).facts.hidden]


@cache
def load(name: str) -> Library | Program:
    """An instance of the class `Backend` of that name.

    Raises UserError for an unknown name, and for somebody else's package that does not keep the contract.
    """
    bundled, others = _bundled(), _entry_points()
    if name in bundled:
        module = importlib.import_module(f"..backends.{name}", __package__)
        return module.Backend()
    if name not in others:
        raise unknown("backend", name, [n for n in names() if n not in bundled or not load(n).facts.hidden])
    entry = others[name]
    try:
        backend = entry.load()()
    except (ImportError, AttributeError) as error:
        problem = f"backend {name!r} ({entry.value}) cannot be loaded: {error}"
        raise UserError(problem, _remedy(entry)) from error
    if backend.facts.name != name:
        problem = f"backend {name!r} ({entry.value}) calls itself {backend.facts.name!r}"
        raise UserError(problem, _remedy(entry))
    return backend


@cache
def _bundled() -> frozenset[str]:
    stems = (path.stem for path in FOLDER.glob("*.py"))
    return frozenset(s for s in stems if s not in _NOT_BACKENDS and not s.startswith("_"))


@cache
def _entry_points() -> dict[str, EntryPoint]:
    """Entry points `name = package.module:Backend`. Ours cannot be replaced."""
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in _bundled()}


def _remedy(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist else "that package"
    return f"update or uninstall {package}"
