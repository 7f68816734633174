"""`cx doctor`: always an answer, never a traceback."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from collectivex.backends.base import Facts, Recipe, Source
from collectivex.runtime import detect, doctor, prepared, registry, torch_probe
from collectivex.runtime.errors import UserError
from collectivex.runtime.smi import Links

ROOT = Path(__file__).resolve().parents[2]
CPU = {
    "version": "2.11.0",
    "cuda": None,
    "hip": None,
    "path_kind": "installed package",
    "gloo": True,
    "nccl": False,
    "gpus": [],
    "libraries": [],
    "findings": [],
}
GPU = {"name": "NVIDIA H200", "arch": "sm_90", "memory_bytes": 150754820096, "sms": 132}
CUDA = {**CPU, "cuda": "13.0", "nccl": True, "gpus": [GPU, GPU]}
BUNDLED = Facts("plain", "Plain", Source("bundled", "torch", "as installed", "-"), (), ("cpu", "cuda"))


def facts(kind, name, pin="1.2", devices=("cuda",), **more):
    return Facts("lib", "Lib", Source(kind, name, pin, "the newest that works"), (), devices, **more)


def run(monkeypatch, capsys, torch, backends=(BUNDLED,), form="text"):
    """Exit code and output of the command on a machine with this torch and these backends."""
    monkeypatch.setattr(doctor, "probe_torch", lambda: torch)
    monkeypatch.setattr(doctor, "backend_facts", lambda: (list(backends), []))
    code = doctor.command(argparse.Namespace(format=form))
    return code, capsys.readouterr().out


def test_the_real_command_answers_on_this_machine(monkeypatch, tmp_path):
    """As a user starts it: exit code 0 because torch's gloo is here, JSON that parses, no traceback."""
    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path))
    write(tmp_path / "lib", pin="1")
    argv = [sys.executable, "-m", "collectivex", "doctor", "--format", "json"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)

    assert done.returncode == 0
    assert "torch_dist" in told["runnable"]
    assert {line["section"] for line in told["lines"]} == {
        *("machine", "software", "backends", "prepared", "limits")
    }
    assert all(line["hint"] for line in told["lines"] if line["state"] == "missing")


def test_without_torch_there_is_an_answer_and_exit_code_2(monkeypatch, capsys):
    """Every backend needs it; the report says how to get it."""
    code, out = run(monkeypatch, capsys, {"error": "ModuleNotFoundError: No module named 'torch'"})

    assert code == 2
    assert "No module named 'torch'" in out
    assert "runs here: no backend" in out


def test_with_torch_there_is_a_backend_and_exit_code_0(monkeypatch, capsys):
    """The text ends with what runs here."""
    code, out = run(monkeypatch, capsys, CPU)

    assert code == 0
    assert out.endswith("runs here: plain\n")


def test_the_link_matrix_is_shown_below_its_line(monkeypatch, capsys):
    """A person wants to see who is joined to whom."""
    matrix = (("X", "NV18"), ("NV18", "X"))
    monkeypatch.setattr(doctor.machine, "links", lambda: Links("nvlink", 18, None, matrix))
    monkeypatch.setattr(doctor.machine, "clocks", lambda: [])
    _, out = run(monkeypatch, capsys, CUDA)
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if "links" in line)

    assert "18 per GPU" in lines[at]
    assert [row.split() for row in lines[at + 1 : at + 3]] == [list(row) for row in matrix]
    _, out = run(monkeypatch, capsys, CUDA, form="json")
    assert json.loads(out)["links"]["matrix"] == [list(row) for row in matrix]


# ----------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "raise ImportError('libcudart.so.13: cannot open shared object file')",
            "ImportError: libcudart.so.13",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "importing torch ended with SIGSEGV"),
        ("import os\nos._exit(3)", "exit code 3"),
        ("raise ValueError('no such config')", "ValueError: no such config"),
    ],
)
def test_a_broken_torch_is_described_not_suffered(monkeypatch, tmp_path, source, expected):
    """It is imported in a process of its own: whatever it does there is one line here."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    assert expected in doctor.probe_torch()["error"]


def test_a_torch_that_never_finishes_importing_is_given_up(monkeypatch, tmp_path):
    """A dead network file system."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)

    assert "more than 0.5 s" in doctor.probe_torch()["error"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v/lib/python3.12/site-packages/torch/__init__.py", "installed package"),
        ("/usr/local/lib/python3.12/dist-packages/torch/__init__.py", "system or container package"),
        ("/src/pytorch/torch/__init__.py", "source checkout"),
    ],
)
def test_the_kind_of_torch_follows_from_where_it_lies(path, kind):
    """A vendor container's torch is another build than PyPI's."""
    assert torch_probe.path_kind(path) == kind


@pytest.mark.parametrize(
    ("torch", "vendor", "state"),
    [
        (CPU, "cpu", "ok"),
        (CUDA, "nvidia", "ok"),
        (CPU, "nvidia", "warn"),  # a CPU build on a GPU machine
        ({**CUDA, "gpus": []}, "nvidia", "warn"),  # driver too old, or no devices in the container
        (CUDA, "amd", "warn"),
    ],
)
def test_a_build_that_does_not_fit_the_machine_is_pointed_out(torch, vendor, state):
    """With what to do about it."""
    line = doctor.torch_line(torch, vendor)

    assert line.state == state
    assert (line.hint is not None) == (state == "warn")


def test_loaded_libraries_and_findings_are_listed(monkeypatch):
    """Version as loaded, version built with, path; findings with where to look."""
    monkeypatch.setattr(detect, "machine", lambda: detect.Machine("nvidia", ("x",), "c", 1))
    library = {"name": "nccl", "version": "2.30.4", "build_version": "2.28.9", "path": "libnccl.so.2"}
    lines = doctor.software_lines({**CUDA, "libraries": [library], "findings": ["two nccl"]})
    shown = {line.name: line for line in lines}

    assert shown["nccl"].value == "2.30.4 (torch built with 2.28.9)  libnccl.so.2"
    assert (shown["libraries"].state, shown["libraries"].value) == ("warn", "two nccl")


def test_missing_packages_of_the_host_half_are_named(monkeypatch):
    """In a vendor container there may be no jsonschema-rs; the name to install is not the module's."""
    monkeypatch.setattr(doctor, "_importable", lambda module: module not in ("yaml", "jsonschema_rs"))
    (line,) = [line for line in doctor.software_lines(CPU) if line.name == "host half"]

    assert line.hint == "pip install PyYAML jsonschema-rs"


# -------------------------------------------------------------------------------------------- backends


def test_a_bundled_backend_runs_where_torch_has_its_device():
    """On a CPU machine on the CPU, on a GPU machine on both."""
    assert (
        doctor.backend_line(BUNDLED, CPU)[0].value
        == "as installed on cpu, contract-only on cpu: never yet run there"
    )
    assert "on cpu, cuda" in doctor.backend_line(BUNDLED, CUDA)[0].value


@pytest.mark.parametrize(
    ("backend", "torch", "value", "hint"),
    [
        (facts("bundled", "torch"), CPU, "needs an NVIDIA GPU that torch sees", "such a machine"),
        (
            facts("bundled", "torch", devices=("hip",)),
            CUDA,
            "needs an AMD GPU that torch sees",
            "such a machine",
        ),
        (
            facts("package", "no-such-thing"),
            CUDA,
            "no-such-thing is not installed",
            "pip install no-such-thing==1.2",
        ),
        (
            facts("git", "https://x.org/a/NoSuch.git"),
            CUDA,
            "is not installed",
            "build https://x.org/a/NoSuch.git at 1.2",
        ),
        (facts("image", "no/such"), CUDA, "is not installed", "run inside the image no/such"),
        (facts("git", "NVIDIA/nccl-tests"), CUDA, "is not installed", "build NVIDIA/nccl-tests"),
    ],
)
def test_what_is_missing_comes_with_how_to_get_it(backend, torch, value, hint):
    """The device, the package, the build, the image; always the pin."""
    line, runs = doctor.backend_line(backend, torch)

    assert not runs
    assert line.state == "missing"
    assert value in line.value
    assert hint in line.hint


def test_an_installed_package_of_another_version_runs_with_a_warning():
    """pytest stands in for a library: it is here, and not the version 1.2 that was pinned."""
    line, runs = doctor.backend_line(facts("package", "pytest"), CUDA)
    same, _ = doctor.backend_line(facts("package", "pytest", pin=pytest.__version__), CUDA)

    assert runs
    assert (line.state, line.hint) == ("warn", "pinned is 1.2: the newest that works")
    assert same.state == "ok"


def test_a_program_is_looked_for_on_the_path(monkeypatch, tmp_path):
    """nccl-tests is no Python module."""
    program = tmp_path / "all_reduce_perf"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert doctor.installed_version(facts("git", "NVIDIA/nccl-tests")) == "found"


def write(folder: Path, **said: object) -> None:
    folder.mkdir(parents=True)
    (folder / prepared.FILE).write_text(json.dumps(said))


def test_prepared_libraries_are_listed_with_pin_outcome_and_place(monkeypatch, tmp_path):
    """What loads from where, whether it was ever loaded, and how to make an old one anew."""
    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path))
    passed = {"state": "passed", "said": "lib 1.2, nccl 2.30.7"}
    untried = {"state": "untried", "said": "there is no driver here"}
    write(tmp_path / "lib", pin="1.2", check=passed)
    write(tmp_path / "4f1c.x86_64.sm90" / "lib", pin="1.1", check=passed)
    write(tmp_path / "4f1c.x86_64.sm90" / "other", pin="7", check=untried)
    write(tmp_path / "byhand", set={})
    lines = {line.value: line for line in doctor.prepared_lines([facts("package", "lib")])}

    outside, hand, old, never = sorted(lines, key=lambda value: ("image" in value, value))
    assert outside == f"1.2, passed: lib 1.2, nccl 2.30.7; {tmp_path / 'lib'}"
    assert (lines[outside].state, lines[outside].hint) == ("ok", None)
    assert hand.startswith("no pin, unchecked: ")
    assert old.endswith("4f1c.x86_64.sm90/lib, inside the image 4f1c.x86_64.sm90")
    assert lines[old].hint == "pinned is 1.2: cx prepare --backend lib --sku SKU"
    assert "untried" in never
    assert lines[never].hint.startswith("`cx prepare --backend other --sku SKU` where the driver is tries it")
    assert {lines[value].state for value in (hand, old, never)} == {"warn"}


def test_a_prepared_library_counts_as_installed(monkeypatch, tmp_path):
    """It is not importable here: only its ranks see it. Without it there is the command that installs it."""
    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path))
    backend = facts("git", "https://x.org/a/NoSuch.git", recipe=Recipe())
    line, runs = doctor.backend_line(backend, CUDA)
    assert (line.state, runs) == ("missing", False)
    assert line.hint.startswith("cx prepare --backend lib: 1.2 of https://x.org/a/NoSuch.git")

    write(tmp_path / "lib", pin="1.2")
    line, runs = doctor.backend_line(backend, CUDA)
    assert (line.state, runs) == ("ok", True)
    assert line.value.startswith("1.2, prepared, on cuda")


def test_a_backend_that_cannot_be_loaded_is_a_line(monkeypatch):
    """Somebody else's broken package does not take the report down; hidden backends are not reported."""
    hidden = facts("bundled", "torch", hidden=True)

    class Loaded:
        def __init__(self, facts):
            self.facts = facts

    def load(name):
        if name == "broken":
            raise UserError("backend 'broken' cannot be loaded", "uninstall it")
        return Loaded(hidden if name == "fake" else BUNDLED)

    monkeypatch.setattr(registry, "names", lambda: ["broken", "fake", "plain"])
    monkeypatch.setattr(registry, "load", load)
    found, broken = doctor.backend_facts()

    assert found == [BUNDLED]
    assert [(line.name, line.state, line.hint) for line in broken] == [("broken", "missing", "uninstall it")]
