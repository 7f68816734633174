"""Installing a library with a real git repository and a real pip, for a library that is a few lines long."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from collectivex.backends.base import Facts, Recipe, Source
from collectivex.runtime import cli, environment, install, prepared, registry, toolchain
from collectivex.runtime.errors import InfraError, UserError
from collectivex.runtime.install import Place

PROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
PROJECT += '[project]\nname = "tinycomm"\nversion = "1.2"\n[tool.setuptools]\npy-modules = ["tinycomm"]\n'
# As an extension does on a machine without the driver that it was linked with.
NEEDS_DRIVER = """\
import os
if "TINY_DRIVER" not in os.environ:
    raise ImportError("libcuda.so.1: cannot open shared object file: No such file or directory")
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "libraries", cache=tmp_path / "cache")


@pytest.fixture
def upstream(tmp_path: Path) -> tuple[str, str]:
    """URL and commit of a library with two commits; the first is the pin, and has the tag v1."""
    source = tmp_path / "upstream"
    source.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "tool").write_text('#!/bin/sh\ntest "$1" = -h\n')
    (source / "tool").chmod(0o755)
    (source / "driver.py").write_text(NEEDS_DRIVER)
    for number in (1, 2):
        (source / "tinycomm.py").write_text(f"number = {number}\n")
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", f"{number}"], check=True)
    subprocess.run([*git, "tag", "v1", "HEAD~1"], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD~1"], check=True, capture_output=True, text=True)
    return str(source), first.stdout.strip()


def facts(upstream: tuple[str, str], pin: str | None = None, name: str = "tiny", **more) -> Facts:
    url, commit = upstream
    said = {"modules": ("tinycomm",), "versions": {"tinycomm": "1.2"}, **more}
    source = Source("git", url, pin or commit, "the commit that was tested")
    return Facts(name, name, source, (), ("cpu",), recipe=Recipe(git=url, **said))


def folders(place: Place) -> set[str]:
    return {path.name for path in place.libraries.iterdir() if path.is_dir()}


def ask(place: Place, code: str, backend: str = "tiny") -> str:
    """What a rank of that backend says to some code."""
    env = environment.child_environment(prepared.variables(backend, place.libraries), environ={})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_what_is_installed_is_the_pinned_commit_and_only_its_ranks_see_it(upstream, place) -> None:
    """Not the newest: the one that was tested; found through the environment of that backend alone."""
    folder = install.prepare(facts(upstream, sets={"TINY": "{folder} {cache}"}), place)

    told = ask(place, "import os, tinycomm; print(tinycomm.number, os.environ['TINY'])")
    assert told == f"1 {folder.resolve()} {place.cache / folder.resolve().name[1:]}"
    assert prepared.variables("other", place.libraries) == {"CX_LIBRARIES": str(place.libraries)}
    said = prepared.read(folder)
    assert said["commit"] == upstream[1]
    assert said["check"] == {"state": "passed", "said": "tinycomm 1.2"}


def test_it_is_installed_once(upstream, place) -> None:
    """The same pin again costs nothing; another pin, or --force, replaces it and leaves nothing behind."""
    folder = install.prepare(facts(upstream), place)
    first = folder.resolve()
    assert install.prepare(facts(upstream), place).resolve() == first

    install.prepare(facts(upstream, pin="HEAD"), place)
    second = folder.resolve()
    assert prepared.read(folder)["pin"] == "HEAD"
    install.prepare(facts(upstream, pin="HEAD"), replace(place, force=True))
    assert len({first, second, folder.resolve()}) == 3
    assert folders(place) == {"tiny", folder.resolve().name}


@pytest.mark.parametrize("what", ["arch", "torch", "python"])
def test_a_build_for_something_else_is_replaced(upstream, place, what: str) -> None:
    """Another GPU, torch or Python since: what was compiled for the old one is not what is wanted."""
    folder = install.prepare(facts(upstream), place)
    first = folder.resolve()
    said = {**prepared.read(folder), what: "another"}
    (first / prepared.FILE).write_text(json.dumps(said))

    assert install.prepare(facts(upstream), place).resolve() != first


def test_a_step_that_fails_keeps_its_log_and_leaves_the_old_one_alone(upstream, place) -> None:
    """An unknown commit: the reason, where the log is, and what was there still works."""
    folder = install.prepare(facts(upstream), place)
    before = folders(place)

    with pytest.raises(InfraError, match=r"git failed \(128\): fatal: ") as caught:
        install.prepare(facts(upstream, pin="0" * 40), place)

    log = place.libraries / "tiny.prepare.log"
    assert str(log) in str(caught.value.hint)
    assert "checkout" in log.read_text()
    assert prepared.read(folder)["pin"] == upstream[1]
    assert folders(place) == before
    install.prepare(facts(upstream), replace(place, force=True))
    assert not log.exists()


def test_a_folder_that_somebody_else_filled_is_not_thrown_away(upstream, place) -> None:
    """Libraries put there by hand work; they are nobody's to delete but their owner's."""
    (place.libraries / "tiny").mkdir(parents=True)

    with pytest.raises(UserError, match="is not from `cx prepare`"):
        install.prepare(facts(upstream), place)


def test_a_tag_that_was_moved_is_refused(upstream, place) -> None:
    """The pin names a tag and the commit that it had when it was tested."""
    install.prepare(facts(upstream, pin="v1", commit=upstream[1][:12]), place)

    with pytest.raises(InfraError, match=f"v1 of .* is {upstream[1]}, not 0123456789ab"):
        install.prepare(facts(upstream, pin="v1", commit="0123456789ab"), replace(place, force=True))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"modules": ("tinycomm_extension",)}, "No module named 'tinycomm_extension'"),
        ({"modules": ("json",)}, "importing json loads .* another copy hides the one installed here"),
        ({"versions": {"tinycomm": "1.3"}}, "tinycomm is 1.2, not 1.3"),
        ({"versions": {"tinydist": "1"}}, "tinydist is not there, not 1"),
        ({"nccl": "2.30.7"}, "no NCCL is loaded"),
    ],
)
def test_what_loads_must_be_what_was_installed(upstream, place, more, told: str) -> None:
    """Installed is not enough: it must import, from this folder, in the pinned version."""
    with pytest.raises(InfraError, match=told):
        install.prepare(facts(upstream, **more), place)
    assert folders(place) == set()


@pytest.mark.parametrize(
    ("ccl", "problems"),
    [
        ([["nccl", "2.30.7", "/lib/tiny/nccl.so"]], 0),
        ([["nccl", "2.30.7", "/lib/tiny/nccl.so"], ["nccl", "2.28.9", "/torch/nccl.so"]], 1),
        ([["nccl", "2.30.7", "/torch/nccl.so"]], 1),
        ([["nccl", "2.28.9", "/lib/tiny/nccl.so"]], 1),
        ([["rccl", "2.30.7", "/lib/tiny/nccl.so"]], 1),
    ],
)
def test_the_nccl_of_the_library_is_the_only_one(ccl: list, problems: int) -> None:
    """Its own version, from its own folder, and no second one beside it."""
    found = {"files": {}, "errors": {}, "versions": {}, "ccl": ccl}
    assert len(list(install._unlike(Recipe(nccl="2.30.7"), found, Path("/lib/tiny")))) == problems


def test_without_the_driver_it_is_untried_and_tried_where_one_is(upstream, place, monkeypatch) -> None:
    """A login node has no driver. The same command on a GPU node checks what is there and builds nothing."""
    steps = (("cp", "driver.py", "tinycomm.py"),)
    keep = {"site": "tinycomm.py"}
    of = facts(upstream, steps=steps, keep=keep, versions={})
    folder = install.prepare(of, place)
    first = folder.resolve()
    assert prepared.read(folder)["check"]["state"] == "untried"

    monkeypatch.setenv("TINY_DRIVER", "1")
    assert install.prepare(of, place).resolve() == first
    assert prepared.read(folder)["check"]["state"] == "passed"


def test_a_program_is_built_by_its_steps_kept_and_started(upstream, place) -> None:
    """No Python project: commands in the repository, what they made in the folder, the rest thrown away."""
    steps = (("cp", "tool", "tool_perf"),)
    more = {"steps": steps, "keep": {"bin": "*_perf"}, "modules": (), "versions": {}}
    more |= {"programs": ("bin/tool_perf",), "prepend": {"PATH": ("bin",)}}
    folder = install.prepare(facts(upstream, **more), place)

    names = {path.name for path in folder.iterdir()}
    assert names == {"bin", prepared.FILE, install.LOG}
    assert (
        ask(place, "import shutil; print(shutil.which('tool_perf'))") == f"{folder.resolve()}/bin/tool_perf"
    )
    with pytest.raises(InfraError, match="the build made no none_perf"):
        install.prepare(facts(upstream, name="b", **{**more, "keep": {"bin": "none_perf"}}), place)


def test_a_program_that_does_not_start_is_not_installed(upstream, place) -> None:
    """It must answer -h."""
    more = {"steps": (("cp", "/bin/false", "tool_perf"),), "keep": {"bin": "*_perf"}, "modules": ()}
    with pytest.raises(InfraError, match="bin/tool_perf -h ended with 1"):
        install.prepare(facts(upstream, **more, versions={}, programs=("bin/tool_perf",)), place)


@pytest.mark.parametrize(
    ("torchs", "told"),
    [
        ("/torch/libnccl.so.2", "bin/p loads libnccl.so.2 from /system/libnccl.so.2, torch another one"),
        ("/system/libnccl.so.2", None),
    ],
)
def test_a_program_must_load_the_nccl_that_torch_loads(
    torchs: str, told: str | None, tmp_path: Path, monkeypatch
) -> None:
    """What is measured by nccl-tests is else another library than what everything else is measured with."""
    linked = "\tlibnccl.so.2 => /system/libnccl.so.2 (0x00007f)\n\tlibc.so.6 => /lib/libc.so.6 (0x00007e)\n"
    steps = install.Steps("tiny", tmp_path)
    monkeypatch.setattr(steps, "ask", lambda argv, env: (0, linked, ""))
    found = {"ccl": [["nccl", "2.28.9", torchs]]}
    problems = list(install._unstarted(Recipe(programs=("bin/p",)), found, steps, {}))
    assert problems == ([told] if told else [])


def test_one_build_serves_two_backends(upstream, place, monkeypatch) -> None:
    """The second name follows the first, also when that is built anew."""
    first = facts(upstream)
    second = replace(first, name="old", recipe=Recipe(same_as="tiny"))
    known = {of.name: SimpleNamespace(facts=of) for of in (first, second)}
    monkeypatch.setattr(registry, "load", known.__getitem__)

    install.prepare(second, place)
    built = (place.libraries / "tiny").resolve()
    assert (place.libraries / "old").resolve() == built
    install.prepare(first, replace(place, force=True))
    assert (place.libraries / "old").resolve() == (place.libraries / "tiny").resolve() != built
    assert ask(place, "import tinycomm; print(tinycomm.number)", "old") == "1"


def test_what_a_build_lacks_is_told_at_once_and_together(upstream, place) -> None:
    """Before anything is fetched: programs, headers, libraries, modules, each with who brings it."""
    more = {"needs": ("git", "no-such-compiler"), "headers": ("stdio.h", "infiniband/no-such.h")}
    more |= {"libraries": ("c", "nosuch"), "imports": ("json", "no_such_module")}
    with pytest.raises(UserError) as caught:
        install.prepare(facts(upstream, **more), place)

    told = caught.value.message.partition("Lacking: ")[2]
    assert told == "no-such-compiler; the Python package no_such_module; infiniband/no-such.h; -lnosuch"
    assert "--sku" in str(caught.value.hint)
    assert not place.libraries.exists()


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        ({}, r"torch with CUDA \(.* has none\)"),
        ({"version": "2.13.0+cpu", "cuda": None}, r"torch with CUDA \(this one is 2.13.0\+cpu\)"),
        ({"error": "ImportError: libcudart"}, "a torch that imports .ImportError: libcudart."),
    ],
)
def test_without_a_torch_of_the_right_kind_nothing_is_built(
    upstream, place, monkeypatch, torch: dict, told: str
) -> None:
    """At once, not after ten minutes of compiling, and nothing else is asked for."""
    monkeypatch.setattr(toolchain, "ask_torch", lambda: torch)
    of = replace(facts(upstream, needs=("no-such-compiler",)), devices=("cuda",))
    with pytest.raises(UserError, match=f"Lacking: {told}\nhint: "):
        install.prepare(of, place)
    assert not place.libraries.exists()


def test_the_reason_is_found_in_what_pip_and_make_say_around_it() -> None:
    """The linker's line, not pip's last one."""
    out = "[8/8] g++ -Werror=x a.o\n/usr/bin/ld: cannot find -l:libnvshmem_host.so: No such file\n"
    out += "collect2: error: ld returned 1 exit status\nerror: command 'g++' failed with exit code 1\n"
    err = "error: subprocess-exited-with-error\nERROR: Failed building wheel for deep_ep\n"
    assert install.cause(out, err) == "/usr/bin/ld: cannot find -l:libnvshmem_host.so: No such file"
    assert install.cause("", "") == "no output"
    assert install.cause("all is well\nor not\n", "") == "or not"


def test_the_hidden_command_installs_by_name(
    upstream, place, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the host half starts inside an image."""
    monkeypatch.setattr(registry, "load", lambda name: SimpleNamespace(facts=facts(upstream, name=name)))
    words = ("--libraries", str(place.libraries), "--cache", str(place.cache))
    assert cli.main(["install", "--backend", "tiny", *words]) == 0
    assert f"tiny: {place.libraries / 'tiny'} (passed: tinycomm 1.2)" in capsys.readouterr().out
