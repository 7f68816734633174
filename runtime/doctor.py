"""`cx doctor`: what this machine has, which backends could run here, what is missing and how to get it.

Works without torch, without GPUs and without the host half's packages. Never measures anything.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..backends.base import Facts
from . import detect, environment, machine, prepared, registry
from .checkup import Line, limit_lines, machine_lines
from .commands import TIMED_OUT, run
from .errors import CollectiveXError
from .smi import Links

PROBE_TIMEOUT_S = 180.0  # a cold import of torch from a network file system takes minutes

# What to look for when the name of a backend's source does not say it: an importable module or a program.
MODULES = {
    "deepep": "deep_ep",
    "flashinfer-python": "flashinfer",
    "nccl4py": "nccl",
    "amd-mori": "mori",
}
PROGRAMS = {"nccl-tests": "all_reduce_perf", "rccl-tests": "all_reduce_perf"}
HOST_HALF = {
    "yaml": "PyYAML",
    "jsonschema_rs": "jsonschema-rs",
    "rich": "rich",
    "jinja2": "Jinja2",
    "matplotlib": "matplotlib",
}


@dataclass
class Report:
    lines: list[Line] = field(default_factory=list)
    runnable: list[str] = field(default_factory=list)
    links: Links | None = None


def command(args: argparse.Namespace) -> int:
    """Print the report (`args.format`: "text" or "json"). 0: at least one backend can run here, else 2."""
    report = examine()
    if args.format == "json":
        links = asdict(report.links) if report.links else None
        lines = [asdict(line) for line in report.lines]
        print(json.dumps({"lines": lines, "runnable": report.runnable, "links": links}, indent=2))
    else:
        _print(report)
    return 0 if report.runnable else 2


def examine() -> Report:
    """Everything, in the order a person reads it."""
    torch = probe_torch()
    report = Report(links=machine.links())
    report.lines += [*machine_lines(torch.get("gpus"), report.links), *software_lines(torch)]
    found, broken = backend_facts()
    for facts in found:
        line, runs = backend_line(facts, torch)
        report.lines.append(line)
        report.runnable += [facts.name] if runs else []
    report.lines += [*broken, *prepared_lines(found), *limit_lines()]
    return report


# --------------------------------------------------------------------------------------------- software


def probe_torch() -> dict[str, Any]:
    """torch_probe's answer from a process of its own: {"error": ...} also when that process dies or hangs."""
    package = Path(__file__).resolve().parent.parent
    argv = [sys.executable, "-m", "collectivex.runtime.torch_probe"]
    # A checkout is importable from its own folder, an installed package from anywhere.
    where = package if (package / "collectivex").is_dir() else None
    done = run(argv, timeout_s=PROBE_TIMEOUT_S, cwd=where)
    if done.code == TIMED_OUT:
        return {"error": f"importing torch took more than {PROBE_TIMEOUT_S:g} s"}
    if done.code < 0:
        return {"error": f"importing torch ended with {signal.Signals(-done.code).name}"}
    try:
        return json.loads(done.out)
    except ValueError:
        last = done.err.strip().splitlines()
        return {"error": last[-1] if last else f"importing torch ended with exit code {done.code}"}


def software_lines(torch: Mapping[str, Any]) -> list[Line]:
    lines = [Line("software", "Python", "ok", sys.version.split()[0])]
    if "error" in torch:
        hint = "install the torch that fits your driver (pytorch.org), or start inside a vendor image"
        lines.append(Line("software", "torch", "missing", str(torch["error"]), hint))
    else:
        lines.append(torch_line(torch, detect.machine().vendor))
        for library in torch["libraries"]:
            version = library["version"] or "version not told"
            built = f" (torch built with {library['build_version']})" if library["build_version"] else ""
            lines.append(Line("software", library["name"], "ok", f"{version}{built}  {library['path']}"))
        hint = "look at LD_LIBRARY_PATH, LD_PRELOAD and pip list for a second copy"
        lines += [Line("software", "libraries", "warn", said, hint) for said in torch["findings"]]
    absent = [package for module, package in HOST_HALF.items() if not _importable(module)]
    if absent:
        hint = "pip install " + " ".join(absent)
        lines.append(Line("software", "host half", "warn", "without " + ", ".join(absent), hint))
    return lines


def torch_line(torch: Mapping[str, Any], vendor: str) -> Line:
    """torch with its build; a build that does not fit the GPUs is worth a warning."""
    built = (
        f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU only"
    )
    value = f"{torch['version']}, {built}, {torch['path_kind']}"
    wanted = {"nvidia": "cuda", "amd": "hip"}.get(vendor)
    if wanted and not torch[wanted]:
        hint = f"this torch was built for {built.split()[0]}: install the build for {vendor.upper()} GPUs"
        return Line("software", "torch", "warn", value + ", but there are GPUs", hint)
    if wanted and not torch["gpus"]:
        hint = "the driver may be too old for this build, or the container has no access to the devices"
        return Line("software", "torch", "warn", value + ", but it sees no GPU", hint)
    return Line("software", "torch", "ok", value)


# --------------------------------------------------------------------------------------------- backends


def backend_facts() -> tuple[list[Facts], list[Line]]:
    """Facts of every backend that is not hidden, and a line for each that cannot even be asked."""
    found, broken = [], []
    for name in registry.names():
        try:
            found.append(registry.load(name).facts)
        except CollectiveXError as error:
            broken.append(Line("backends", name, "missing", error.message, error.hint))
    return [facts for facts in found if not facts.hidden], broken


def backend_line(facts: Facts, torch: Mapping[str, Any]) -> tuple[Line, bool]:
    """Whether this backend could run here, and if not, what to do."""

    def missing(value: str, hint: str) -> tuple[Line, bool]:
        return Line("backends", facts.name, "missing", value, hint), False

    if "error" in torch:
        return missing("needs torch", "install torch first")
    here = devices(torch)
    usable = [device for device in facts.devices if device in here]
    if not usable:
        wants = " or ".join({"cuda": "an NVIDIA GPU", "hip": "an AMD GPU"}.get(d, d) for d in facts.devices)
        return missing(f"needs {wants} that torch sees", "run it on such a machine: cx plan --sku NAME")
    state, hint, what = "ok", None, facts.source.pin
    if facts.source.kind != "bundled":
        ready = prepared.read(prepared.folder(facts.name))
        installed = installed_version(facts) if ready is None else f"{ready.get('pin')}, prepared,"
        if installed is None:
            return missing(f"{facts.source.name} is not installed", how_to_get(facts))
        what = installed
        if ready is None and facts.source.kind == "package" and installed != facts.source.pin:
            state, hint = "warn", f"pinned is {facts.source.pin}: {facts.source.why}"
    unproven = [device for device in usable if facts.proven(device) == "contract-only"]
    label = f", contract-only on {', '.join(unproven)}: never yet run there" if unproven else ""
    return Line("backends", facts.name, state, f"{what} on {', '.join(usable)}{label}", hint), True


def devices(torch: Mapping[str, Any]) -> list[str]:
    """The kinds of device that torch can use here."""
    kinds = ["cpu"] if torch["gloo"] else []
    if torch["gpus"] and torch["nccl"]:
        kinds.append("hip" if torch["hip"] else "cuda")
    return kinds


def installed_version(facts: Facts) -> str | None:
    """Version of a backend's package, "found" for a program or module without one, None when it is absent."""
    name = facts.source.name.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".git")
    if name in PROGRAMS:
        return "found" if shutil.which(PROGRAMS[name]) else None
    if not _importable(MODULES.get(name, name.replace("-", "_"))):
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "found"


def prepared_lines(backends: Sequence[Facts]) -> Iterator[Line]:
    """Every library that `cx prepare` installed: its pin, what loads, where it is, how its check ended."""
    pins = {facts.name: facts.source.pin for facts in backends}
    for name, path, said in prepared.installed():
        check = said.get("check") or {"state": "unchecked", "said": "not made by `cx prepare`"}
        inside = path.parent != environment.libraries_dir()
        again = f"cx prepare --backend {name}{' --sku SKU' if inside else ''}"
        where = f"{path}, inside the image {path.parent.name}" if inside else str(path)
        value = f"{said.get('pin') or 'no pin'}, {check['state']}: {check['said']}; {where}"
        state, hint = "warn", None
        if name in pins and said.get("pin") not in (None, pins[name]):
            hint = f"pinned is {pins[name]}: {again}"
        elif check["state"] == prepared.UNTRIED:
            hint = f"`{again}` where the driver is tries it, without building it again"
        elif check["state"] == prepared.PASSED:
            state = "ok"
        yield Line("prepared", name, state, value, hint)


def how_to_get(facts: Facts) -> str:
    source = facts.source
    if facts.recipe is not None:
        return f"cx prepare --backend {facts.name}: {source.pin} of {source.name} ({source.why})"
    if source.kind == "package":
        return f"pip install {source.name}=={source.pin} ({source.why})"
    if source.kind == "git":
        return f"build {source.name} at {source.pin} ({source.why})"
    return f"run inside the image {source.name} {source.pin} ({source.why})"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


# ------------------------------------------------------------------------------------------------- text

_COLOURS = {"ok": "green", "warn": "yellow", "missing": "red"}


def text(report: Report) -> Iterator[tuple[str, str]]:
    """The report in lines of (state, text); hints and the link matrix stand below their line."""
    indent, section = " " * 11, ""
    for line in report.lines:
        if line.section != section:
            yield "", f"{'' if not section else chr(10)}{line.section}"
            section = line.section
        yield line.state, f"  {line.state:7}  {line.name:18}  {line.value}"
        if line.name == "links" and report.links:
            for row in report.links.matrix:
                yield "", indent + "".join(f"{cell:>6}" for cell in row)
        if line.hint:
            yield "", f"{indent}hint: {line.hint}"
    yield "", f"\nruns here: {', '.join(report.runnable) or 'no backend'}"


def _print(report: Report) -> None:
    """Coloured on a terminal when rich is there; never wrapped."""
    if not (sys.stdout.isatty() and _importable("rich")):
        print("\n".join(words for _, words in text(report)))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for state, words in text(report):
        shown = Text(words)
        if state:
            shown.stylize(_COLOURS[state], 2, 9)
        console.print(shown)
