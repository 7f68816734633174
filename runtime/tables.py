"""From records to tables: which numbers stand side by side, joined over runs, ranked only where they can be.

A `Group` holds what differs in size (or tokens) only. In it, a `Table` is one component; a `Line` is one
comparison key; an `Entry` is one way of doing it (backend, variant, knobs). Lines are made from comparison
keys and from nothing else, so that unlike numbers cannot share one.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from . import stats
from .bandwidth import limit_share
from .reading import Reading
from .records import PERCENTILES, STATISTICS, Interval, Limit, Record, Row, key_of
from .types import CONTRACT, REGIMES, Case, Collective, Moe, Status

HEADLINE_FORMULA = {"collective": "busbw", "moe": "remote"}
FIRST = (
    "call",
    "roundtrip",
    "dispatch",
    "combine",
    "dispatch_floor",
    "combine_floor",
)  # the order of components; others follow by name
# The worst status of a case's runs stands for the case.
SEVERITY = ("incorrect", "implausible", "failed", "timeout", "infra", "not-run", "unsupported", "ok")


class Group(NamedTuple):
    """What all numbers of a group share. `name` is the operation or the workload."""

    family: str
    name: str
    shape: tuple[int, ...]  # MoE: hidden, top-k, experts
    dtype: str
    routing: str
    seed: int
    mode: str
    ranks: int
    nodes: int
    topology_class: str
    regime: str
    contract: str

    @property
    def title(self) -> str:
        """One line for people."""
        shape = f" ({'/'.join(map(str, self.shape))})" if self.shape else ""
        where = f"{self.ranks} ranks on {self.nodes} node{'s' if self.nodes > 1 else ''}"
        seed = f"seed {self.seed}" if self.seed > 1 else ""
        old = f"contract {self.contract}" if self.contract != CONTRACT else ""
        facts = (self.dtype, self.routing, seed, self.mode, self.regime, where, self.topology_class, old)
        return " · ".join([f"{self.name}{shape}", *filter(None, facts)])


class Way(NamedTuple):
    """One way of doing it: what may differ between entries of a line."""

    backend: str
    variant: str
    sku: str
    execution: str
    knobs: tuple[tuple[str, int | float | str], ...]


@dataclass
class Entry:
    """One case joined over its runs. Times in microseconds.

    us            median over runs of the run's percentile; None when nothing may be shown
    us_reason     why the sample of a run gives no such percentile, or None; `p99_reason` likewise
    interval      95 %; over runs when `inference`, else the envelope of what the iterations of each run say
    interval_reason   why there is none, or None
    p99_us, mean_us, max_us   medians over runs of the run's p99, mean and maximum
    over_ranks    "min" and "spread" over ranks, at the same percentile as `us`; None where untold
    us_GBps       formula name -> GB/s at one microsecond, as its source quotes it; `GBps` at `us`
    share         GB/s of the headline formula over `limit`
    standing      "fastest", "slower", "cannot rank", "withheld" (implausible), "alone"; "" without a number
    ratio         time over that of the fastest, where told apart from it
    label, standing and ratio are set when the entry is put on its line.
    """

    way: Way
    case_id: str
    status: Status
    reason: str | None
    runs: int
    measured_runs: int
    cells: tuple[str, ...]
    label: str = ""
    us: float | None = None
    us_reason: str | None = None
    interval: Interval | None = None
    interval_reason: str | None = None
    inference: bool = False
    p99_us: float | None = None
    p99_reason: str | None = None
    mean_us: float | None = None
    max_us: float | None = None
    over_ranks: Mapping[str, float | None] | None = None
    us_GBps: Mapping[str, float] | None = None
    GBps: Mapping[str, float] | None = None
    share: float | None = None
    limit: Limit | None = None
    contract_only: bool = False
    settled: bool = True
    standing: str = ""
    ratio: float | None = None


@dataclass(frozen=True)
class Line:
    """Everything measured under one comparison key: bytes of a collective or tokens per rank."""

    at: int
    key: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Table:
    """One component of a group, in one reduction over ranks; lines by rising size or tokens. `percentile` is
    one of `records.STATISTICS`: the mean and the maximum too."""

    group: Group
    component: str
    headline: str
    percentile: str
    lines: tuple[Line, ...]

    @property
    def formula(self) -> str:
        return HEADLINE_FORMULA[self.group.family]

    @property
    def limits(self) -> list[Limit]:
        entries = (entry for line in self.lines for entry in line.entries)
        return sorted({entry.limit for entry in entries if entry.limit is not None})


def tables(reading: Reading, percentile: str = "p50", regimes: Sequence[str] = ()) -> list[Table]:
    """Every table of these records; `regimes` keeps some only. Cases without any number are not in them.

    percentile   one of `records.STATISTICS`
    """
    wanted = regimes or REGIMES
    found: dict[tuple[Group, str, str], dict[tuple[int, str], list[Entry]]] = {}
    silent: dict[Group, list[tuple[int, str, Entry]]] = {}
    for runs in by_case(reading.records):
        first = next((record for record in runs if record.case is not None), None)
        if first is None or first.case is None:
            continue
        way = _way(first.case, first, reading)
        for regime in (r for r in first.case.regimes if r in wanted):
            group, at = _group(first.case, first, regime), _at(first.case)
            entries = list(_entries(runs, way, regime, percentile))
            for row, entry in entries:
                lines = found.setdefault((group, row.component, row.headline), {})
                lines.setdefault((at, row.key), []).append(entry)
            if not entries and first.contract == CONTRACT:
                silent.setdefault(group, []).append((at, _key(first.case, first, regime), _bare(runs, way)))
    made = []
    for (group, component, headline), lines in found.items():
        speaking = {entry.way for entries in lines.values() for entry in entries}
        for at, key, entry in silent.get(group, ()):
            if entry.way in speaking:
                lines.setdefault((at, key), []).append(replace(entry))
        made.append(_table(group, component, headline, percentile, lines))
    return sorted(made, key=_order)


def by_case(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each case of each execution, in the order of their runs."""
    cases: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        cases.setdefault((record.execution, record.case_id), []).append(record)
    return [sorted(runs, key=lambda record: record.run) for runs in cases.values()]


def worst(runs: Iterable[Record]) -> Record:
    return min(runs, key=lambda record: SEVERITY.index(record.status))


def _group(case: Case, record: Record, regime: str) -> Group:
    shape = case.shape
    where = (case.mode, case.ranks, case.nodes, record.topology_class, regime, record.contract)
    if isinstance(shape, Collective):
        return Group("collective", shape.op, (), shape.dtype, "", 0, *where)
    sizes = (shape.hidden, shape.topk, shape.experts)
    return Group("moe", shape.workload, sizes, shape.dtype, shape.routing.label, shape.routing.seed, *where)


def _key(case: Case, record: Record, regime: str) -> str:
    return key_of(case.shape, case.mode, case.ranks, case.nodes, regime, record.topology_class)


def _at(case: Case) -> int:
    return case.shape.tokens if isinstance(case.shape, Moe) else case.shape.bytes


def _way(case: Case, record: Record, reading: Reading) -> Way:
    execution = reading.executions[record.execution]
    return Way(case.backend, case.variant, execution.sku, execution.name, case.knobs)


def _bare(runs: Sequence[Record], way: Way) -> Entry:
    """An entry that shows no number: how the worst of its runs ended."""
    bad = worst(runs)
    cells = tuple(record.cell_id for record in runs)
    return Entry(way, bad.case_id, bad.status, bad.reason, len(runs), 0, cells)


def _entries(runs: Sequence[Record], way: Way, regime: str, percentile: str) -> Iterator[tuple[Row, Entry]]:
    """Each component that these runs measured in a regime. A case that was wrong once shows no number."""
    measured = next((record for record in runs if record.rows), None)
    if measured is None or measured.case is None or any(r.status is Status.INCORRECT for r in runs):
        return
    rows: dict[tuple[str, str, str], list[Row]] = {}
    for record in runs:
        for row in record.rows:
            if row.regime == regime:
                rows.setdefault((row.component, row.headline, row.key), []).append(row)
    limit = wire_limit(measured)
    formula = HEADLINE_FORMULA[measured.case.family]
    for of_runs in rows.values():
        entry = _bare(runs, way)
        entry.contract_only = measured.contract_only
        _join(entry, of_runs, percentile, limit, formula)
        yield of_runs[0], entry


def _join(entry: Entry, rows: Sequence[Row], percentile: str, limit: Limit | None, formula: str) -> None:
    """One number from the runs of one case: the median of the run percentiles, and how sure that is."""
    entry.measured_runs = len(rows)
    entry.settled = all(row.settled for row in rows)
    entry.us_GBps = rows[0].us_GBps
    entry.p99_us, entry.p99_reason = _typical(rows, "p99")
    entry.mean_us, entry.max_us = _typical(rows, "mean")[0], _typical(rows, "max")[0]
    entry.us, entry.us_reason = _typical(rows, percentile)
    if entry.us is None:
        return
    which = STATISTICS.index(percentile)
    entry.over_ranks = {
        "min": _middle(row.least[which] for row in rows),
        "spread": _middle(row.spread[which] for row in rows),
    }
    _bound(entry, rows, percentile)
    entry.GBps = {name: rate / entry.us for name, rate in entry.us_GBps.items()} if entry.us > 0 else {}
    if limit is not None and formula in entry.GBps:
        entry.limit = limit
        entry.share = limit_share(entry.GBps[formula], limit.GBps)


def _typical(rows: Sequence[Row], percentile: str) -> tuple[float | None, str | None]:
    """The median over runs, or None and why the sample of one of them gives no such percentile."""
    us = _middle(row.times[STATISTICS.index(percentile)] for row in rows)
    if us is not None:
        return us, None
    return None, next(row.nulls[percentile] for row in rows if percentile in row.nulls)


def _middle(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else statistics.median(value for value in known if value is not None)


def _bound(entry: Entry, rows: Sequence[Row], percentile: str) -> None:
    """The interval of an entry that has a number: over runs, else what the iterations of its runs say."""
    values = (row.times[STATISTICS.index(percentile)] for row in rows)
    over_runs = stats.run_interval([value for value in values if value is not None])
    entry.inference = "low" in over_runs
    if entry.inference:
        entry.interval = (over_runs["low"], over_runs["high"])
        return
    reasons = [row.nulls[percentile] for row in rows if percentile in row.nulls]
    if percentile not in PERCENTILES:
        reasons = ["an interval within a run is of percentiles"]
    if reasons:
        entry.interval_reason = f"{over_runs['null']}; {reasons[0]}"
        return
    within = [interval for row in rows if (interval := row.intervals[PERCENTILES.index(percentile)])]
    entry.interval = (min(low for low, _ in within), max(high for _, high in within))


def wire_limit(record: Record) -> Limit | None:
    """The limit of the links that carry the traffic: scale-up within a domain, also where that spans nodes.
    Across domains the traffic is on two kinds of link and no single limit holds."""
    if record.case is None or record.domains > 1:
        return None
    up = [limit for limit in record.limits if limit.name.replace("_", "-") == "scale-up" and limit.GBps > 0]
    return min(up, key=lambda limit: limit.GBps) if up else None


def _table(
    group: Group, component: str, headline: str, percentile: str, lines: Mapping[tuple[int, str], list[Entry]]
) -> Table:
    names = _names({entry.way for entries in lines.values() for entry in entries})
    made = []
    for (at, key), entries in sorted(lines.items()):
        for entry in entries:
            same = sum(other.way == entry.way for other in entries)  # they differ in sampling only
            entry.label = names[entry.way] + (f" #{entry.case_id[-8:]}" if same > 1 else "")
        entries.sort(key=lambda entry: entry.label)
        rank(entries)
        made.append(Line(at, key, tuple(entries)))
    return Table(group, component, headline, percentile, tuple(made))


def _names(ways: Iterable[Way]) -> dict[Way, str]:
    """Backend and variant, and of the rest only what is needed to tell them apart."""
    names = {way: way.backend + (f" {way.variant}" if way.variant else "") for way in sorted(ways, key=str)}
    more: tuple[Callable[[Way], str], ...] = (
        lambda way: way.sku,
        lambda way: " ".join(f"{name}={value}" for name, value in way.knobs),
        lambda way: way.execution,
    )
    for fact in more:
        for name in {name for name, count in Counter(names.values()).items() if count > 1}:
            same = [way for way in names if names[way] == name]
            if len({fact(way) for way in same}) > 1:
                names.update({way: f"{name} {fact(way)}".rstrip() for way in same})
    return names


def rank(entries: Sequence[Entry]) -> None:
    """Say of each entry of one line how it stands.

    The smallest time is "fastest" only when its run-level interval lies wholly below those of all others.
    Otherwise it and whatever overlaps it cannot be ranked; without run-level intervals nothing can.
    """
    numbers = [(e.us, e) for e in entries if e.us is not None and e.status is not Status.IMPLAUSIBLE]
    if not numbers:
        best_us, best = 0.0, None
    else:
        best_us, best = min(numbers, key=lambda number: number[0])
    sure = all(entry.inference for _, entry in numbers)
    clear = 0
    for us, entry in numbers:
        entry.standing = "alone" if len(numbers) == 1 else "cannot rank"
        if sure and best is not None and _below(best.interval, entry.interval):
            entry.standing, entry.ratio = "slower", us / best_us
            clear += 1
    if best is not None and clear and clear == len(numbers) - 1:
        best.standing, best.ratio = "fastest", 1.0
    for entry in entries:
        if entry.us is not None and entry.status is Status.IMPLAUSIBLE:
            entry.standing = "withheld"


def _below(one: Interval | None, other: Interval | None) -> bool:
    return one is not None and other is not None and one[1] < other[0]


def _order(table: Table) -> tuple[object, ...]:
    first = FIRST.index(table.component) if table.component in FIRST else len(FIRST)
    regime = REGIMES.index(table.group.regime)
    return (table.group._replace(regime=""), regime, first, table.component, table.headline)
