"""Which figures there are, what each is called and what it says of itself.

A figure shows one group of tables, and a group shares everything but the size: `alike` refuses anything else,
so that unlike numbers are never on one axis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..runtime import wording
from ..runtime.reading import Execution
from ..runtime.tables import Group, Table
from ..runtime.types import CONTRACT, Status, digest

REGIME = {
    "fresh": "each call from a drained device",
    "chained": "calls back to back",
    "graph": "a captured chain replayed",
    "kernel": "time in kernels, from the profiler",
    "loop": "an external program's own loop and clock",
}


@dataclass(frozen=True)
class Plan:
    """One figure to draw. `name` is its file name without an ending."""

    name: str
    title: str
    subtitle: str
    tables: tuple[Table, ...]


def plan(tables: Sequence[Table], executions: Sequence[Execution]) -> list[Plan]:
    """One plan for each group that has at least two sizes to draw a line through."""
    groups: dict[Group, list[Table]] = {}
    for table in tables:
        groups.setdefault(table.group, []).append(table)
    plans: dict[str, Plan] = {}
    for group, members in groups.items():
        if max(len(sizes(table)) for table in members) < 2:
            continue
        name = slug(group)
        if name in plans:
            name += f"-{digest(list(group))[:6]}"
        said = (wording.clean(title(group)), wording.clean(subtitle(members, executions)))
        plans[name] = Plan(name, *said, tuple(members))
    return list(plans.values())


def slug(group: Group) -> str:
    """A file name that says what the figure shows."""
    seed = f"seed{group.seed}" if group.seed > 1 else ""
    contract = f"contract-{group.contract}" if group.contract != CONTRACT else ""
    where = (f"n{group.nodes}r{group.ranks}", group.topology_class)
    parts = (group.name, group.dtype, group.routing, seed, group.mode, group.regime, *where, contract)
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(filter(None, parts))).strip(".-")[:150]


def title(group: Group) -> str:
    """What is measured, in one line."""
    where = f"{group.ranks} ranks" + (f" on {group.nodes} nodes" if group.nodes > 1 else "")
    if group.family == "collective":
        return f"{group.name}: {group.dtype}, {group.mode}, {where}"
    seed = f" (seed {group.seed})" if group.seed > 1 else ""
    return (
        f"{group.name} expert exchange: {group.dtype}, {group.routing} routing{seed}, {group.mode}, {where}"
    )


def subtitle(tables: Sequence[Table], executions: Sequence[Execution]) -> str:
    """How, where, when and under which contract."""
    group = tables[0].group
    names = {entry.way.execution for table in tables for line in table.lines for entry in line.entries}
    used = [execution for execution in executions if execution.name in names]
    skus = ", ".join(sorted({execution.sku for execution in used}))
    dates = sorted({execution.created_at[:10] for execution in used})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else ""
    how = f"{group.regime}: {REGIME[group.regime]}"
    parts = (how, f"{skus} ({group.topology_class})", when, f"contract {group.contract}")
    return " · ".join(filter(None, parts))


def alike(tables: Sequence[Table]) -> None:
    """Raise ValueError unless all tables are of one group and no size stands for two comparison keys."""
    groups = {table.group for table in tables}
    if len(groups) != 1:
        raise ValueError(f"{len(groups)} groups cannot share a figure")
    keys: dict[int, str] = {}
    for table in tables:
        for line in table.lines:
            if keys.setdefault(line.at, line.key) != line.key:
                raise ValueError(f"two comparison keys at {line.at} cannot share an axis")


def sizes(table: Table) -> list[int]:
    """Sizes with a number, those that a log axis can show."""
    return [line.at for line in table.lines if line.at > 0 and any(e.us for e in line.entries)]


def caption(tables: Sequence[Table]) -> list[str]:
    """What the points and bars are, and where the limits come from."""
    entries = [e for table in tables for line in table.lines for e in line.entries if e.us is not None]
    runs = sorted({entry.measured_runs for entry in entries})
    count = f"{runs[0]}" if runs[0] == runs[-1] else f"{runs[0]} to {runs[-1]}"
    if all(entry.inference for entry in entries):
        sure = f"95 % interval of the typical run, from {count} runs"
    else:
        sure = (
            f"95 % interval within a run ({count} run{'' if count == '1' else 's'}: no inference on the next)"
        )
    points = f"Points: {tables[0].percentile} over iterations ({_reductions(tables)}), median over runs."
    if tables[0].group.regime in wording.OF_BLOCKS:
        points += " Samples of a call or roundtrip are means of blocks of calls."
    points += f" Bars: {sure}."
    if any(entry.status is Status.IMPLAUSIBLE for entry in entries):
        points += " Hollow: implausible, withheld from ranking."
    limits = sorted({limit for table in tables for limit in table.limits})
    return [points, *(f"{wording.limit_source(limit)}." for limit in limits)]


def _reductions(tables: Sequence[Table]) -> str:
    if len({table.headline for table in tables}) == 1:
        return wording.REDUCTION[tables[0].headline]
    return ", ".join(
        f"{table.component.replace('_', ' ')}: {wording.REDUCTION[table.headline]}" for table in tables
    )
