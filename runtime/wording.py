"""Numbers and tables as people read them; the same strings in the terminal, in Markdown and in the report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from . import stats
from .records import Interval, Limit
from .tables import Entry, Group, Line, Table
from .types import PROGRAM_REGIMES, Status

REDUCTION = {"max": "max over ranks", "median": "median over ranks", "min": "min over ranks"}
NONE = "–"
OF_BLOCKS = ("chained", "graph", *PROGRAM_REGIMES)
_BLOCKS = (
    "chained, graph: a sample of a call or roundtrip is the mean of a block of calls, so its percentiles are "
    "over blocks, which dilute a single slow call; loop: of the program's loop. Tails of single calls: fresh."
)
_NEEDS = ", ".join(f"p{percent} needs {stats.smallest_n(percent)}" for percent in (90, 95, 99))
LEGEND = (
    "Time: reduced over ranks in each iteration; then a percentile over iterations, the median over runs.",
    "a – b: 95 % interval of the typical run. (a – b) no-inference: fewer than 3 runs; what the iterations "
    "of a run say, which says nothing about the next run.",
    "fastest: told apart from all others of its row. N×: time over that of the fastest. cannot rank: the "
    "intervals overlap, or no-inference.",
    f"{NONE}: the samples of a run are too few to bound that percentile ({_NEEDS}). A median stands all the "
    "same.",
    "~ not settled. contract-only: never validated on its hardware. withheld: beats a physical limit.",
)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


def clean(text: str) -> str:
    """One line without control characters: results may come from anywhere, and terminals obey escapes."""
    return _UNSAFE.sub(" ", text).strip()


def us(value: float) -> str:
    """Microseconds, no finer than clocks here are: 9.23, 12.01, 123.4, 4567."""
    return f"{value:.{_digits(value)}f}"


def interval(entry: Entry) -> str:
    if entry.us is None:
        return ""
    if entry.interval is None:
        return "none" if entry.inference else "none; no-inference"
    low, high = _same_digits(entry.interval, entry.us)
    return f"{low} – {high}" if entry.inference else f"({low} – {high}) no-inference"


def _same_digits(bounds: Interval, value: float) -> tuple[str, str]:
    digits = _digits(value)
    return f"{bounds[0]:.{digits}f}", f"{bounds[1]:.{digits}f}"


def _digits(value: float) -> int:
    return 2 if value < 100 else 1 if value < 1000 else 0


def GBps(value: float) -> str:
    """GB/s with three digits: 0.0123, 1.23, 12.3, 123."""
    if value < 1:
        return f"{value:.3g}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share * 100:.1f} %" if share < 0.1 else f"{share * 100:.0f} %"


def size(count: int) -> str:
    """Bytes in the unit that divides them: 512 B, 1 KiB, 24 MiB; otherwise to four digits."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):.4g} {unit}"
    return f"{count} B"


def at(group: Group, line: Line) -> str:
    return size(line.at) if group.family == "collective" else str(line.at)


def limit(of: Limit) -> str:
    return f"{of.GBps:g} GB/s {clean(of.name)}"


def limit_source(of: Limit) -> str:
    return f"Limit {limit(of)}: {of.kind}, {clean(of.source)}"


def caption(table: Table) -> str:
    """What one table shows."""
    parts = [f"{table.component}, {REDUCTION[table.headline]}"]
    parts += [f"limit {limit(of)}" for of in table.limits]
    return " · ".join(parts)


def legend(tables: Iterable[Table]) -> list[str]:
    """How to read the tables, and where their limits come from."""
    tables = list(tables)
    blocks = [_BLOCKS] if any(table.group.regime in OF_BLOCKS for table in tables) else []
    return [*LEGEND, *blocks, *map(limit_source, sorted({of for table in tables for of in table.limits}))]


def header(table: Table) -> list[str]:
    ladder = "size" if table.group.family == "collective" else "T per rank"
    percentiles = [f"{table.percentile} µs", "95 % interval"]
    if table.percentile != "p99":
        percentiles.append("p99 µs")
    share = ["of limit"] if table.limits else []
    return [ladder, "backend", *percentiles, f"{table.formula} GB/s", *share, "runs", "standing"]


def cells(table: Table, line: Line, entry: Entry, first: bool) -> list[str]:
    """One row of strings, as many as `header` has. The size stands in the first row of a line only."""
    name = clean(entry.label) + (" (contract-only)" if entry.contract_only else "")
    start = [at(table.group, line) if first else "", name]
    if entry.us is None:
        row = [*start, _no_number(entry)]
        return row + [""] * (len(header(table)) - len(row) - 2) + [_runs(entry), ""]
    numbers = [us(entry.us) + ("" if entry.settled else " ~"), interval(entry)]
    if table.percentile != "p99":
        numbers.append(us(entry.p99_us) if entry.p99_us is not None else NONE)
    rate = (entry.GBps or {}).get(table.formula)
    numbers.append(GBps(rate) if rate is not None else "")
    if table.limits:
        numbers.append(percent(entry.share) if entry.share is not None else "")
    return [*start, *numbers, _runs(entry), standing(entry)]


def _no_number(entry: Entry) -> str:
    if entry.us_reason is not None:
        return NONE
    return "not measured" if entry.status is Status.OK else str(entry.status)


def _runs(entry: Entry) -> str:
    bad = "" if entry.status in (Status.OK, Status.IMPLAUSIBLE) or entry.us is None else f" {entry.status}"
    return f"{entry.measured_runs}/{entry.runs}{bad}"


def standing(entry: Entry) -> str:
    if entry.standing == "slower":
        return f"{entry.ratio:.2f}×"
    return {"alone": "", "withheld": "implausible, withheld"}.get(entry.standing, entry.standing)


def cell_list(cells: Iterable[str]) -> list[str]:
    """Cell ids with the runs of one case together: `CASE.r0`, `CASE.r0-r4`."""
    runs: dict[str, list[int]] = {}
    for cell in cells:
        case, _, run = cell.rpartition(".r")
        if run.isdecimal():
            runs.setdefault(case, []).append(int(run))
        else:
            runs.setdefault(cell, [])
    lists = (f"{case}.{_ranges(sorted(numbers))}" if numbers else case for case, numbers in runs.items())
    return [clean(text) for text in lists]


def _ranges(numbers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"r{p[0]}" if len(p) == 1 else f"r{p[0]}-r{p[-1]}" for p in parts)
