"""Install one library from its upstream pin into a folder of its own, and prove that it loads from there.

It is built in the place where it will stay (compilers write that path into what they link), under a name
that nobody looks for; when everything is there and checked, the backend's name is made to point to it. So a
library appears whole or not at all, and a failure leaves the one before untouched. Nothing outside is
changed, so libraries that need different versions of the same thing stand side by side (see prepared.py).

Standard library only: this runs inside the image whose ranks will use the library.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import collectivex

from ..backends.base import Facts, Recipe
from . import environment, prepared, registry, toolchain
from .errors import InfraError, UserError
from .scrub import scrub
from .toolchain import Here
from .writing import write_json

LOG = "prepare.log"
# A library that cannot load because the driver is not here was built well, for another machine.
DRIVER = ("libcuda.so", "libnvidia-ml.so")


@dataclass(frozen=True)
class Place:
    """libraries   the folder above those of the libraries
    arch       the pool's architecture; None: that of the GPU here
    cache      a folder that ranks may write to, for what they compile
    force      again, even where the pinned one is there
    """

    libraries: Path
    arch: str | None = None
    cache: Path | None = None
    force: bool = False


def command(args: argparse.Namespace) -> int:
    """The hidden command that the host half starts inside an image. What it prints is the user's to read."""
    place = Place(Path(args.libraries), args.arch, Path(args.cache), args.force)
    print(told(args.backend, prepare(registry.load(args.backend).facts, place)))
    return 0


def told(name: str, folder: Path) -> str:
    """One line about a library that is there."""
    check = (prepared.read(folder) or {}).get("check", {})
    return f"{name}: {folder} ({check.get('state')}: {check.get('said')})"


def prepare(facts: Facts, place: Place) -> Path:
    """The library's folder, installed and checked. Raises UserError where something must be changed first,
    InfraError where an installation step fails."""
    recipe, final = recipe_of(facts), place.libraries / facts.name
    if final.exists() and not final.is_symlink():
        raise UserError(f"{final} is not from `cx prepare`", "move it away, or name another CX_LIBRARIES")
    if recipe.same_as is not None:
        prepare(registry.load(recipe.same_as).facts, place)
        return point(final, recipe.same_as)
    here = toolchain.here(place.arch, gpu=bool({"cuda", "hip"} & set(facts.devices)))
    if not place.force and _is_there(facts, recipe, final, here):
        return final
    folder = place.libraries / f".{facts.name}-{secrets.token_hex(4)}"
    names = here.names(folder, (place.cache or environment.cache_dir() / "jit") / folder.name.lstrip("."))
    toolchain.require(facts, recipe, here, names)
    steps = Steps(facts.name, folder)
    folder.mkdir(parents=True)
    try:
        commit = build(facts, recipe, here, names, steps)
        said = {**environment_of(facts, recipe, names), "commit": commit, **_made_with(here)}
        write_json(folder / prepared.FILE, check(recipe, said, steps))
    except BaseException:
        steps.keep_log()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    old = final.resolve() if final.is_symlink() else None
    point(final, folder.name)
    steps.kept_log.unlink(missing_ok=True)  # of an attempt before
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return final


def recipe_of(facts: Facts) -> Recipe:
    """Raises UserError where there is none."""
    if facts.recipe is not None:
        return facts.recipe
    source = facts.source
    if source.kind == "bundled":
        raise UserError(f"{facts.name} needs no installation: it is {source.name}, {source.pin}")
    raise UserError(f"there is no recipe for {facts.name}", f"build {source.name} at {source.pin} yourself")


def point(link: Path, target: str) -> Path:
    """Make `link` lead to its sibling `target`, at one moment to the next."""
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}.link")
    temporary.symlink_to(target)
    temporary.replace(link)
    return link


def _is_there(facts: Facts, recipe: Recipe, final: Path, here: Here) -> bool:
    """Whether the pinned one is there, built for this torch, Python and GPU. One that could not be tried
    before is tried now."""
    said = prepared.read(final)
    wanted = {"pin": facts.source.pin, **_made_with(here)}
    if said is None or any(said.get(name) != value for name, value in wanted.items()):
        return False
    if said["check"]["state"] != prepared.PASSED:
        folder = final.resolve()
        write_json(folder / prepared.FILE, check(recipe, said, Steps(facts.name, folder)))
    return True


# --------------------------------------------------------------------------------------------- building


class Steps:
    """Commands about one library, their output in the log of its folder."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def run(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> str:
        """The standard output of a command that had to succeed."""
        code, out, err = self.ask(argv, env, cwd)
        if code:
            what, hint = Path(argv[0]).name, f"the whole log: {self.kept_log}"
            raise InfraError(f"{self.name}: {what} failed ({code}): {scrub(cause(out, err))[:300]}", hint)
        return out

    def ask(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
    ) -> tuple[int, str, str]:
        """Exit code, standard output and error of a command."""
        print(f"{self.name}: {' '.join(map(str, argv[:6]))[:160]} ...", file=sys.stderr, flush=True)
        try:
            done = subprocess.run(
                argv,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            message = f"{self.name}: cannot run {argv[0]}: {error.strerror}"
            raise UserError(message, "install it first") from error
        with (self.folder / LOG).open("a") as log:
            log.write(f"$ {' '.join(map(str, argv))}\n{done.stdout}{done.stderr}\n")
        return done.returncode, done.stdout, done.stderr

    @property
    def kept_log(self) -> Path:
        return self.folder.parent / f"{self.name}.{LOG}"

    def keep_log(self) -> None:
        if (self.folder / LOG).exists():
            shutil.copy(self.folder / LOG, self.kept_log)


_CAUSE = re.compile(r"(?:error|Error|fatal|ERROR|Errno \d+\])[: ]|cannot find|No such file")
_WRAPPED = re.compile(r"subprocess-exited|error: command|Error 1\b|building wheel", re.IGNORECASE)


def cause(out: str, err: str) -> str:
    """The line that says why a command failed: pip and make wrap it in many others."""
    lines = [line.strip() for line in (*out.splitlines(), *err.splitlines()) if line.strip()]
    told = [line for line in lines if _CAUSE.search(line) and not _WRAPPED.search(line)]
    return (told or lines[-1:] or ["no output"])[0]


def build(facts: Facts, recipe: Recipe, here: Here, names: Mapping[str, str], steps: Steps) -> str | None:
    """Fill the folder; the commit that was built."""
    folder, site = steps.folder, steps.folder / "site"
    env = toolchain.build_environment(recipe, here, names)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-input", "--disable-pip-version-check"]
    pip += ["--target", str(site), "--upgrade"]
    if recipe.packages:
        steps.run([*pip, *(package.format(**names) for package in recipe.packages)], env)
    for link, text in recipe.links.items():
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(text.format(**names))
    if recipe.git is None:
        return None
    source = folder / "source"
    commit = checkout(facts, recipe, source, steps, env)
    for step in recipe.steps:
        steps.run([word.format(**names) for word in step], env, source)
    if not recipe.steps:
        isolation = [] if recipe.isolated else ["--no-build-isolation"]
        steps.run([*pip, *isolation, str(source / recipe.subfolder)], env)
    for target, pattern in recipe.keep.items():
        found = sorted(source.glob(pattern))
        if not found:
            raise InfraError(f"{facts.name}: the build made no {pattern}", f"see {steps.kept_log}")
        (folder / target).mkdir(parents=True, exist_ok=True)
        for path in found:
            shutil.copy2(path, folder / target)
    shutil.rmtree(source)  # with what the build left there: hundreds of megabytes
    return commit


def checkout(facts: Facts, recipe: Recipe, source: Path, steps: Steps, env: Mapping[str, str]) -> str:
    """The repository at the pin, with the submodules that are needed; the commit. InfraError where a tag is
    not, or no longer, the commit that was tested."""
    git = ["git", "-C", str(source)]
    assert recipe.git is not None
    steps.run(["git", "clone", "--quiet", recipe.git, str(source)], env)
    steps.run([*git, "checkout", "--quiet", "--detach", facts.source.pin], env)
    if recipe.submodules:
        steps.run([*git, "submodule", "update", "--init", "--recursive", *recipe.submodules], env)
    commit = steps.run([*git, "rev-parse", "HEAD"], env).strip()
    if recipe.commit is not None and not commit.startswith(recipe.commit):
        problem = f"{facts.name}: {facts.source.pin} of {recipe.git} is {commit}, not {recipe.commit}"
        raise InfraError(problem, "the tag was moved: what it is now was never tested")
    return commit


def environment_of(facts: Facts, recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """What the ranks need (see prepared.py), and the pin."""
    folder = Path(names["folder"])
    prepend = {"PYTHONPATH": [str(folder / "site")]} if recipe.modules else {}
    for name, entries in recipe.prepend.items():
        whole = (str(folder / entry.format(**names)) for entry in entries)
        prepend[name] = [*prepend.get(name, []), *whole]
    return {"pin": facts.source.pin, "prepend": prepend, "set": toolchain.filled(recipe.sets, names)}


def _made_with(here: Here) -> dict[str, Any]:
    return {"arch": here.arch, "torch": here.torch.get("version"), "python": sys.version.split()[0]}


# --------------------------------------------------------------------------------------------- checking


def check(recipe: Recipe, said: Mapping[str, Any], steps: Steps) -> dict[str, Any]:
    """`said` with the versions that load and the outcome. Raises InfraError when what loads is not what was
    installed; where only the driver is missing, the outcome is that it is untried."""
    env = environment.child_environment(prepared.merged(said))
    code = "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    code += "runpy.run_module('collectivex.runtime.load_check', run_name='__main__')"
    # extensions find torch's libraries among what is loaded
    modules = ["torch", *recipe.modules] if said["torch"] else recipe.modules
    asked = json.dumps({"modules": modules, "versions": list(recipe.versions)})
    root = Path(collectivex.__file__).resolve().parent.parent
    found = json.loads(steps.run([sys.executable, "-c", code, str(root), asked], env).splitlines()[-1])
    problems = [*_unlike(recipe, found, steps.folder), *_unstarted(recipe, found, steps, env)]
    told = [problem for problem in problems if not any(name in problem for name in DRIVER)]
    if told:
        raise InfraError(f"{steps.name}: {scrub(told[0])}", f"the whole log: {steps.kept_log}")
    versions = {**found["versions"], **{name: version for name, version, _ in found["ccl"]}}
    each = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
    outcome = {"state": prepared.PASSED, "said": each or "loads from here"}
    if problems:
        outcome = {"state": prepared.UNTRIED, "said": "there is no driver here to load it with"}
    return {**said, "versions": versions, "check": outcome}


def _unlike(recipe: Recipe, found: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Modules, distributions and NCCL that are not those of this folder."""
    folder = folder.resolve()
    for module in recipe.modules:
        file = found["files"].get(module)
        if module in found["errors"]:
            yield f"{module} does not import: {found['errors'][module]}"
        elif file is None or not Path(file).resolve().is_relative_to(folder):
            yield f"importing {module} loads {file or 'nothing'}: another copy hides the one installed here"
    for name, wanted in recipe.versions.items():
        version = found["versions"][name]
        if wanted not in (version or ""):
            yield f"{name} is {version or 'not there'}, not {wanted}"
    if recipe.nccl is None:
        return
    copies = [(version, path) for name, version, path in found["ccl"] if name == "nccl"]
    for version, path in copies:
        if version != recipe.nccl or not Path(path).resolve().is_relative_to(folder):
            yield f"NCCL {version} of {path} is loaded, not {recipe.nccl} of this library's folder"
    if not copies:
        yield "no NCCL is loaded"


def _unstarted(
    recipe: Recipe, found: Mapping[str, Any], steps: Steps, env: Mapping[str, str]
) -> Iterator[str]:
    """Programs that do not start, or would load another NCCL or RCCL than torch."""
    paths = [Path(path).resolve() for _, _, path in found["ccl"]]
    for name in recipe.programs:
        program = str(steps.folder / name)
        _, linked, _ = steps.ask([program], {**env, "LD_TRACE_LOADED_OBJECTS": "1"})  # what ldd does
        for library, path in re.findall(r"(lib[nr]ccl\.so\S*) => (/\S+)", linked):
            if Path(path).resolve() not in paths:
                yield f"{name} loads {library} from {path}, torch another one"
        for library in re.findall(r"(\S+) => not found", linked):
            yield f"{name} needs {library}, which is not found"
        status, told, error = steps.ask([program, "-h"], env)
        if status:
            yield f"{name} -h ended with {status}: {(error or told).strip()[-300:]}"
