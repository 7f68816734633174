"""Suites: what to run, as YAML. `load_suite` reads one; runtime/matrix.py makes cells of it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from . import yamlfile
from .errors import UserError, unknown
from .types import CODE_COLUMNS, DTYPE_BYTES, REGIMES, Collective, Moe, Routing, Sampling, Shape

FOLDER = yamlfile.ROOT / "suites"
WORKLOADS = FOLDER / "workloads.yaml"
FP8_BLOCK = 128  # values of a row that share one fp8 scale
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True)
class Workload:
    """A model's shape. `source` says where the numbers come from."""

    name: str
    hidden: int
    topk: int
    experts: int
    source: str


@dataclass(frozen=True)
class Group:
    """Axes whose product is measured. The axes of the other family are empty.

    key        where the group stands in its file ("groups[1]"), for messages
    regimes    what is asked for; what a variant or device cannot do is dropped in planning
    backends   the default selection, or None for every backend that is not hidden
    variants   a filter on variants by name, or None
    """

    key: str
    family: str
    modes: tuple[str, ...]
    dtypes: tuple[str, ...]
    regimes: tuple[str, ...]
    sampling: Sampling
    ops: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    workloads: tuple[Workload, ...] = ()
    tokens: tuple[int, ...] = ()
    routing: tuple[Routing, ...] = ()
    backends: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None
    knobs: tuple[tuple[str, int | float | str], ...] = ()

    def shapes(self) -> Iterator[Shape]:
        """Every shape, the size or token count running fastest."""
        for op, dtype, size in itertools.product(self.ops, self.dtypes, self.sizes):
            yield Collective(op, size, dtype)
        axes = itertools.product(self.workloads, self.dtypes, self.routing, self.tokens)
        for w, dtype, routing, tokens in axes:
            yield Moe(w.name, w.hidden, w.topk, w.experts, tokens, dtype, routing)


@dataclass(frozen=True)
class Suite:
    """What to run. `seed` draws the order when it is "shuffled"."""

    name: str
    description: str
    path: Path
    deadline_s: float
    groups: tuple[Group, ...]
    runs: int = 1
    order: str = "declared"
    seed: int = 0

    def refuse(self, key: str, problem: str) -> UserError:
        """The error for a mistake at `key` that only planning can see."""
        return UserError(f"{yamlfile.shown(self.path)}:{key}: {problem}")


@dataclass
class _Mistakes:
    """Collected while a file is read, so that a user sees all of them at once."""

    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, key: str, problem: str) -> None:
        self.found.append((key, problem))


def names() -> list[str]:
    """The suites that come with the project."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml") if p != WORKLOADS)


def load_suite(name_or_path: str) -> Suite:
    """A suite by name, or from a YAML file by path. Raises UserError for everything that is wrong in it."""
    path = locate(name_or_path, "suite", FOLDER, names())
    data = yamlfile.read(path, "suite")
    mistakes = _Mistakes()
    known = _own_workloads(data.get("workloads", {}), mistakes)
    base = _sampling(Sampling(), data)
    groups = tuple(_group(i, g, base, known, mistakes) for i, g in enumerate(data["groups"]))
    if path.stem != data["name"]:
        mistakes.add("name", f"{data['name']!r} is not the name of the file, {path.stem!r}")
    yamlfile.refuse(path, mistakes.found)
    optional = {key: data[key] for key in ("runs", "order", "seed") if key in data}
    return Suite(data["name"], data["description"], path, float(data["deadline_s"]), groups, **optional)


@cache
def load_workloads() -> Mapping[str, Workload]:
    """The shared shapes of suites/workloads.yaml, by name."""
    data = yamlfile.read(WORKLOADS, "workloads")
    mistakes = _Mistakes()
    made = {name: _workload(name, entry, mistakes) for name, entry in data["workloads"].items()}
    yamlfile.refuse(WORKLOADS, mistakes.found)
    return made


def locate(name_or_path: str, kind: str, folder: Path, have: list[str]) -> Path:
    """The file of a suite or SKU given by name or by path. Raises UserError when there is none."""
    if name_or_path in have:
        return folder / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"no {kind} file {name_or_path}", f"or one by name: {', '.join(have)}")
    raise unknown(kind, name_or_path, have)


def parse_size(value: int | str) -> int:
    """Bytes from 1024, "64B", "1KiB", "4MiB", "1GiB" (powers of 1024). Raises ValueError otherwise."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"(\d+) ?(B|KiB|MiB|GiB)", value)
    if not match:
        raise ValueError(f"{value!r} is not a size; write 1024, 1KiB or 4MiB")
    return int(match[1]) * _UNITS[match[2]]


def size_label(size: int) -> str:
    """The shortest exact form: 1024 -> "1KiB", 1000 -> "1000B"."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return f"{size}B"


def _own_workloads(entries: Mapping[str, Any], mistakes: _Mistakes) -> Mapping[str, Workload]:
    shared = load_workloads()
    for name in entries.keys() & shared.keys():
        mistakes.add(f"workloads.{name}", f"is already a shape of {yamlfile.shown(WORKLOADS)}")
    return {**shared, **{name: _workload(name, entry, mistakes) for name, entry in entries.items()}}


def _workload(name: str, entry: Mapping[str, Any], mistakes: _Mistakes) -> Workload:
    made = Workload(name, **entry)
    if made.topk > made.experts:
        mistakes.add(f"workloads.{name}.topk", f"{made.topk} of {made.experts} experts cannot be picked")
    if made.hidden < CODE_COLUMNS:
        problem = f"{made.hidden} is below {CODE_COLUMNS}, the columns in which the oracle codes a row"
        mistakes.add(f"workloads.{name}.hidden", problem)
    return made


def _group(
    index: int, data: Mapping[str, Any], base: Sampling, known: Mapping[str, Workload], mistakes: _Mistakes
) -> Group:
    key = f"groups[{index}]"
    asked = {"fresh", "chained", *data.get("regimes", ())}
    lists = ("ops", "backends", "variants")
    axes: dict[str, Any] = {name: tuple(data[name]) for name in lists if name in data}
    if data["family"] == "collective":
        axes["sizes"] = _ladder(f"{key}.sizes", data["sizes"], mistakes)
        _refuse_parts(key, axes["sizes"], data["dtypes"], mistakes)
    else:
        axes["tokens"] = _ladder(f"{key}.tokens", data["tokens"], mistakes)
        axes["workloads"] = _pick_workloads(key, data, known, mistakes)
        axes["routing"] = _routing(key, data.get("routing", [{"kind": "uniform"}]), mistakes)
    return Group(
        key=key,
        family=data["family"],
        modes=tuple(data["modes"]),
        dtypes=tuple(data["dtypes"]),
        regimes=tuple(r for r in REGIMES if r in asked),
        sampling=_sampling(base, data),
        knobs=tuple(sorted(data.get("knobs", {}).items())),
        **axes,
    )


def _sampling(base: Sampling, data: Mapping[str, Any]) -> Sampling:
    """`base` with the overrides of a suite or group. Seconds become floats: 1 and 1.0 are the same case."""
    given = data.get("sampling", {})
    return replace(base, **{k: float(v) if k in ("warmup_s", "budget_s") else v for k, v in given.items()})


def _ladder(key: str, data: list[int | str] | Mapping[str, Any], mistakes: _Mistakes) -> tuple[int, ...]:
    """The listed values, or the geometric ladder of {from, to, factor}; both ends belong to it."""
    if isinstance(data, list):
        values = [parse_size(value) for value in data]
        for i, value in enumerate(values):
            if value in values[:i]:
                mistakes.add(f"{key}[{i}]", f"{data[i]!r} is there twice")
        return tuple(values)
    value, high, factor = parse_size(data["from"]), parse_size(data["to"]), data["factor"]
    if value == 0:
        mistakes.add(f"{key}.from", "a ladder cannot start at 0")
        return ()
    steps = []
    while value <= high:
        steps.append(value)
        value *= factor
    if not steps or steps[-1] != high:
        mistakes.add(f"{key}.to", f"{data['to']!r} is not {data['from']!r} times a power of {factor}")
    return tuple(steps)


def _refuse_parts(key: str, sizes: Iterable[int], dtypes: Iterable[str], mistakes: _Mistakes) -> None:
    """A buffer has whole elements: 3 bytes of float32 would be measured as something else."""
    for dtype, size in itertools.product(dtypes, sizes):
        if size % DTYPE_BYTES[dtype]:
            mistakes.add(f"{key}.sizes", f"{size} bytes are no whole number of {dtype} elements")


def _pick_workloads(
    key: str, data: Mapping[str, Any], known: Mapping[str, Workload], mistakes: _Mistakes
) -> tuple[Workload, ...]:
    picked = []
    for i, name in enumerate(data["workloads"]):
        here = f"{key}.workloads[{i}]"
        if name not in known:
            mistakes.add(here, unknown("workload", name, known).message)
            continue
        picked.append(known[name])
        if "fp8" in data["dtypes"] and known[name].hidden % FP8_BLOCK:
            problem = f"rows of {known[name].hidden} values have no whole fp8 blocks of {FP8_BLOCK}"
            mistakes.add(here, problem)
    return tuple(picked)


def _routing(key: str, entries: list[Mapping[str, Any]], mistakes: _Mistakes) -> tuple[Routing, ...]:
    made = []
    for i, entry in enumerate(entries):
        if entry["kind"] != "zipf" and "skew" in entry:
            mistakes.add(f"{key}.routing[{i}].skew", f"{entry['kind']} routing has no skew; zipf has")
        made.append(Routing(**{**entry, "skew": float(entry.get("skew", 0.0))}))
    return tuple(made)
