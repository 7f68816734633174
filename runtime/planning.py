"""`cx plan`: the matrix before anything runs, with what is unsupported and why."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import domains, matrix, registry, sku, suite
from .listing import table
from .matrix import Planned
from .suite import size_label
from .types import Case, Collective, case_to_json

PLAN_SCHEMA = "collectivex.plan.v1"


@dataclass(frozen=True)
class Plan:
    """One suite on one SKU."""

    suite: suite.Suite
    sku: sku.Sku
    cells: list[Planned]

    @property
    def totals(self) -> dict[str, int]:
        unsupported = sum(p.unsupported is not None for p in self.cells)
        return {"cells": len(self.cells), "to_run": len(self.cells) - unsupported, "unsupported": unsupported}

    @property
    def domains(self) -> list[int]:
        """For each rank the scale-up domain that the pool's file puts it in."""
        case = self.cells[0].cell.case
        return domains.stated(case.ranks, case.nodes, self.sku.nodes_per_domain)


def command(args: argparse.Namespace) -> int:
    """Print one plan in full, or the totals of several when --suite or --sku is left out."""
    suites = [args.suite] if args.suite else suite.names()
    skus = [args.sku] if args.sku else sku.names()
    plans = make(suites, skus, args.backend, args.ranks, args.nodes, args.runs)
    if args.format == "json":
        lines = to_lines(plans[0]) if args.suite and args.sku else _list_of(plans)
        sys.stdout.writelines(f"{line}\n" for line in lines)
    elif args.suite and args.sku:
        print(to_text(plans[0]))
    else:
        print(_overview(plans))
    return 0


def make(
    suites: Sequence[str],
    skus: Sequence[str],
    backends: Sequence[str] | None = None,
    ranks: int | None = None,
    nodes: int | None = None,
    runs: int | None = None,
) -> list[Plan]:
    """The plans of every suite on every SKU. Arguments as for `matrix.expand`."""
    loaded = [suite.load_suite(name) for name in suites]
    pools = [sku.load_sku(name).at(nodes or 1) for name in skus]
    return [Plan(s, k, matrix.expand(s, k, backends, ranks, nodes, runs)) for s in loaded for k in pools]


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as data: every cell with its case, in the order of measuring."""
    cells = [{**_place(p), "case": case_to_json(p.cell.case)} for p in plan.cells]
    return {**_head(plan), "cells": cells}


def to_lines(plan: Plan) -> Iterator[str]:
    """`to_json` as text, a line a cell. Pools share cases, and what is encoded once is not encoded again: all
    plans have some 70,000 cells of 17,000 cases."""
    yield json.dumps(_head(plan))[:-1] + ', "cells": ['
    for p in plan.cells:
        comma = "," if p is not plan.cells[-1] else ""
        yield f'{json.dumps(_place(p))[:-1]}, "case": {_encoded(p.cell.case)}}}{comma}'
    yield "]}"


def _list_of(plans: Sequence[Plan]) -> Iterator[str]:
    for index, plan in enumerate(plans):
        yield "," if index else "["
        yield from to_lines(plan)
    yield "]"


def _head(plan: Plan) -> dict[str, Any]:
    return {
        "schema": PLAN_SCHEMA,
        "suite": plan.suite.name,
        "sku": plan.sku.name,
        "topology_class": plan.sku.topology_class,
        "domains": plan.domains,
        "order": plan.suite.order,
        "totals": plan.totals,
    }


def _place(p: Planned) -> dict[str, Any]:
    """What is said of a cell beside its case."""
    return {
        "cell_id": p.cell.id,
        "run": p.cell.run,
        "position": p.position,
        "unsupported": p.unsupported,
    }


@lru_cache(maxsize=1 << 16)
def _encoded(case: Case) -> str:
    return json.dumps(case_to_json(case))


def to_text(plan: Plan) -> str:
    """The plan for people: one line for each ladder, then the totals."""
    first = plan.cells[0].cell.case
    runs = 1 + max(p.cell.run for p in plan.cells)
    head = f"suite {plan.suite.name} on {plan.sku.name} ({plan.sku.topology_class})"
    head += f": {first.ranks} ranks, {first.nodes} node{'s'[: first.nodes > 1]}"
    if first.nodes > 1:
        count = len(set(plan.domains))
        head += f" in {count} scale-up domain{'s'[: count > 1]}"
    head += f", {runs} run{'s'[: runs > 1]}, order {plan.suite.order}"
    columns = ["backend", "variant", "mode", "what", "dtype", "routing", "ladder", "regimes", "unsupported"]
    rows = _ladders([p for p in plan.cells if p.cell.run == 0])
    return f"{head}\n\n{table(columns, rows)}\n\n{_totals(plan, runs)}{_unproven(plan)}"


def _unproven(plan: Plan) -> str:
    """A line that names what has never run on such hardware, or nothing: what of a backend's variant has not
    stands after it in parentheses, unless it is all of it."""
    ways: dict[str, dict[tuple[str, str], bool]] = {}
    for case in (p.cell.case for p in plan.cells if not p.unsupported):
        facts = registry.load(case.backend).facts
        proven = facts.proven(plan.sku.device, facts.variant(case)) == "hardware"
        what = case.shape.op if isinstance(case.shape, Collective) else "exchange"
        ways.setdefault(f"{case.backend} {case.variant}".strip(), {})[what, case.mode] = proven
    names = []
    for name, of_variant in sorted(ways.items()):
        if not any(of_variant.values()):
            names.append(name)
        elif never := _never(of_variant):
            names.append(f"{name} ({', '.join(never)})")
    return f"\ncontract-only, never run on such hardware: {', '.join(names)}" if names else ""


def _never(ran: Mapping[tuple[str, str], bool]) -> list[str]:
    """What has not run, of (what, mode) -> whether it has: with its mode only if another of its modes has."""
    half = {what for (what, _), proven in ran.items() if proven}
    never = sorted(way for way, proven in ran.items() if not proven)
    return list(dict.fromkeys(f"{mode} {what}" if what in half else what for what, mode in never))


def _totals(plan: Plan, runs: int) -> str:
    totals = plan.totals
    text = f"{totals['cells']} cells: {totals['to_run']} to run, {totals['unsupported']} unsupported"
    return text if runs == 1 else f"{text} (over {runs} runs)"


def _ladders(cells: Iterable[Planned]) -> list[list[str]]:
    """Cells that differ only in size or tokens, as one row."""
    steps: dict[tuple[str, ...], list[int]] = {}
    for p in cells:
        case, shape = p.cell.case, p.cell.case.shape
        if isinstance(shape, Collective):
            what, routing, step = shape.op, "-", shape.bytes
        else:
            what, routing, step = shape.workload, shape.routing.label, shape.tokens
        regimes, reason = ", ".join(case.regimes), p.unsupported or "-"
        row = (case.backend, case.variant or "-", case.mode, what, shape.dtype, routing, case.family)
        steps.setdefault((*row, regimes, reason), []).append(step)
    return [
        [*row[:6], _ladder(row[6], sorted(values)), *row[7:]]
        for row, values in sorted(steps.items(), key=lambda item: (item[0], min(item[1])))
    ]


def _ladder(family: str, steps: list[int]) -> str:
    label = size_label if family == "collective" else str
    unit = "" if family == "collective" else "T="
    factor = steps[1] // steps[0] if len(steps) > 2 and steps[0] else 0
    if factor and all(later == factor * step for step, later in itertools.pairwise(steps)):
        return f"{unit}{label(steps[0])}..{label(steps[-1])} x{factor} ({len(steps)})"
    return unit + ",".join(map(label, steps))


def _overview(plans: Sequence[Plan]) -> str:
    rows = [
        [p.suite.name, p.sku.name, str(p.cells[0].cell.case.ranks), *map(str, p.totals.values())]
        for p in plans
    ]
    return table(["suite", "sku", "ranks", "cells", "to run", "unsupported"], rows)
