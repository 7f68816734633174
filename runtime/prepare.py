"""`cx prepare`: install a backend's library from its upstream pin into its own folder, and prove it loads.

The folder appears whole or not at all: everything is built in a temporary one beside it, checked there, and
renamed. Nothing outside it is touched, so libraries that need different versions of the same thing can stand
side by side (see prepared.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..backends.base import Facts, Recipe
from . import environment, prepared, registry
from .errors import InfraError, UserError
from .scrub import scrub

LOG = "prepare.log"


def command(args: argparse.Namespace) -> int:
    for name in args.backend:
        facts = registry.load(name).facts
        if facts.recipe is None:
            print(f"{name}: nothing to install ({facts.source.kind} {facts.source.name}, {facts.source.pin})")
            continue
        print(f"{name}: {prepare(facts, facts.recipe, args.force)}")
    return 0


def prepare(facts: Facts, recipe: Recipe, force: bool = False) -> Path:
    """The library's folder, installed and checked. Raises UserError where something must be changed first,
    InfraError where an installation step fails."""
    final = prepared.folder(facts.name)
    if (final / prepared.FILE).exists() and not force and _pin(final) == facts.source.pin:
        return final
    missing = [program for program in recipe.needs if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"{facts.name} is built with {', '.join(missing)}, which this machine does not have",
            "prepare it inside the container that will run it, or install them",
        )
    building = final.with_name(f".{final.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        _install(facts, recipe, building)
        said = json.dumps(_environment(facts, recipe, final), indent=1)
        (building / prepared.FILE).write_text(said + "\n")
        _check(facts, recipe, building)
    except BaseException:
        _keep_log(building, final)
        raise
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    building.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _install(facts: Facts, recipe: Recipe, folder: Path) -> None:
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
    pip += ["--target", str(site)]
    env = {name: value.format(folder=folder) for name, value in recipe.build.items()}
    if recipe.packages:
        _step(facts, [*pip, *recipe.packages], folder, env)
    if recipe.git is None:
        return
    source = folder / "source"
    _step(facts, ["git", "clone", "--quiet", recipe.git, str(source)], folder, env)
    _step(facts, ["git", "-C", str(source), "checkout", "--quiet", facts.source.pin], folder, env)
    _step(facts, ["git", "-C", str(source), "submodule", "update", "--init", "--recursive"], folder, env)
    _step(facts, [*pip, "--no-build-isolation", str(source / recipe.subfolder)], folder, env)


def _environment(facts: Facts, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What the ranks need when the library lies in `folder` (see prepared.py)."""
    prepend = {"PYTHONPATH": [str(folder / "site")]}
    for name, entries in recipe.prepend.items():
        prepend[name] = [*prepend.get(name, []), *(str(folder / entry) for entry in entries)]
    sets = {name: value.format(folder=folder) for name, value in recipe.sets.items()}
    return {"pin": facts.source.pin, "prepend": prepend, "set": sets}


def _check(facts: Facts, recipe: Recipe, folder: Path) -> None:
    """What is loaded must come from this folder: a copy elsewhere on the path would be measured instead."""
    env = prepared.merged(_environment(facts, recipe, folder))
    for module in recipe.modules:
        code = f"import sys, {module}; print(sys.modules[{module!r}].__file__)"
        found = _step(facts, [sys.executable, "-c", code], folder, env).strip().splitlines()
        if not found or not Path(found[-1]).resolve().is_relative_to(folder.resolve()):
            raise InfraError(
                f"{facts.name}: importing {module} loads {scrub(found[-1]) if found else 'nothing'}",
                "another copy hides the one that was just installed; remove it from PYTHONPATH",
            )


def _step(facts: Facts, argv: Sequence[str], folder: Path, env: dict[str, str]) -> str:
    """Run one command, its output into the log; its standard output."""
    print(f"{facts.name}: {' '.join(map(str, argv[:6]))} ...", file=sys.stderr)
    try:
        done = subprocess.run(
            argv,
            env=environment.child_environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise UserError(
            f"{facts.name}: cannot run {argv[0]}: {error.strerror}", "install it first"
        ) from error
    with (folder / LOG).open("a") as log:
        log.write(f"$ {' '.join(map(str, argv))}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        hint = f"the whole log: {prepared.folder(facts.name).parent / f'{facts.name}.{LOG}'}"
        raise InfraError(f"{facts.name}: {argv[0]} failed ({done.returncode}): {scrub(last)[:300]}", hint)
    return done.stdout


def _keep_log(building: Path, final: Path) -> None:
    if (building / LOG).exists():
        shutil.copy(building / LOG, final.parent / f"{final.name}.{LOG}")
    shutil.rmtree(building, ignore_errors=True)


def _pin(folder: Path) -> str | None:
    try:
        return json.loads((folder / prepared.FILE).read_text()).get("pin")
    except (OSError, ValueError, AttributeError):
        return None
