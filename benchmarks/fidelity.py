"""Sets a vendor's own benchmark beside our measurement of the same library, in the vendor's convention.

    python benchmarks/fidelity.py FOLDER [--markdown]

    FOLDER/theirs/<name>.txt   what the benchmark printed, all ranks in one file (names: docs/fidelity.md)
    FOLDER/ours/               result folders of the same allocation, at any depth

Each line of the table reduces our raw samples as they reduce theirs: the regime that is nearest to their
loop, their reduction over ranks and iterations, their bytes. A ratio is ours over theirs.
Exit code: 0; 1 where a ratio outside 0.97 to 1.03 is not explained (see Compared.why), or where something
cannot be read or has no counterpart; 2 where there is nothing to compare.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from vendor_conventions import (  # noqa: E402
    BENCHES,
    BYTES,
    PARTS,
    REDUCTIONS,
    SKEW,
    UNALIGNED,
    UNBOUNDED,
    Bench,
    Line,
    PerRank,
)
from vendor_output import READERS, Output, Shape, Told  # noqa: E402

from collectivex.backends._tests_output import Unreadable  # noqa: E402
from collectivex.runtime import reading, recheck  # noqa: E402
from collectivex.runtime.bandwidth import Document  # noqa: E402
from collectivex.runtime.errors import UserError  # noqa: E402
from collectivex.runtime.records import Record, load  # noqa: E402
from collectivex.runtime.types import RESULT_SCHEMA, Case, Status  # noqa: E402

LOW, HIGH = 0.97, 1.03
LEAST, MOST = 0.75, 1.33  # as far as a known difference is taken for the reason without a second look

# ------------------------------------------------------------------------------------------------ comparing

NOT_EXPLAINED = "not explained"


class Compared(NamedTuple):
    """A line with both sides' numbers. Ratios are ours over theirs; None where they print no bandwidth.

    contract   of our result
    """

    bench: Bench
    line: Line
    theirs: Told
    ours: Told
    contract: str

    @property
    def ratios(self) -> tuple[float, float | None]:
        time = self.ours.us / self.theirs.us
        if self.theirs.gbps is None or self.ours.gbps is None:
            return time, None
        return time, self.ours.gbps / self.theirs.gbps

    def within(self, low: float = LOW, high: float = HIGH) -> bool:
        return all(low <= ratio <= high for ratio in self.ratios if ratio is not None)

    @property
    def why(self) -> str:
        """Nothing for a ratio within, else what is known; NOT_EXPLAINED in it where that is not enough."""
        if self.within():
            return ""
        known, shown = [self.line.differs], [self.line.shown]
        if self.line.regime == "kernel" and self.contract in UNALIGNED:
            known, shown = [SKEW[0], *known], [SKEW[1], *shown]
        text = "; ".join(filter(None, known))
        headings = ", ".join(dict.fromkeys(filter(None, shown)))
        text = f"{text} ({headings})" if headings else text
        if not text:
            return NOT_EXPLAINED
        enough = self.within(LEAST, MOST) or not UNBOUNDED.isdisjoint(shown)
        return text if enough else f"{text}; so far outside: {NOT_EXPLAINED}"


@dataclass
class Comparison:
    """What became of every benchmark: its lines, notes of its reader, and what could not be compared."""

    compared: list[Compared] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def unexplained(self) -> list[Compared]:
        return [one for one in self.compared if NOT_EXPLAINED in one.why]


def compare(folder: Path) -> Comparison:
    """Every benchmark in FOLDER/theirs against the results in FOLDER/ours. Raises UserError where the one or
    the other is missing."""
    theirs = sorted((folder / "theirs").glob("*.txt"))
    if not theirs:
        raise UserError(
            f"no outputs in {folder / 'theirs'}", "docs/fidelity.md says what to run and how to name it"
        )
    found = reading.read([folder / "ours"])
    measured = [record for record in found.records if record.status in (Status.OK, Status.IMPLAUSIBLE)]
    comparison = Comparison(problems=[f"{problem.path}: {problem.reason}" for problem in found.problems])
    known = {bench.name: bench for bench in BENCHES}
    for path in theirs:
        if path.stem not in known:
            comparison.problems.append(f"{path.name}: no benchmark goes by that name")
            continue
        _compare_bench(known[path.stem], path, measured, comparison)
    return comparison


def _compare_bench(bench: Bench, path: Path, measured: Sequence[Record], comparison: Comparison) -> None:
    output: Output | None = None
    for line in bench.lines:
        fitting = [(r.case, r) for r in measured if r.case is not None and line.ours.fits(r.case)]
        if not fitting:
            missing = f"{bench.name}, {line.quantity}: no result of ours for {line.ours}"
            if missing not in comparison.problems:
                comparison.problems.append(missing)
            continue
        case, record = _nearest(fitting)
        if output is None:
            shape = Shape(case.ranks, bench.tokens, bench.sms)
            try:
                output = READERS[bench.reader](path.read_text(encoding="utf-8", errors="replace"), shape)
            except Unreadable as problem:
                comparison.problems.append(f"{path.name}: {problem}")
                return
            comparison.notes += [f"{bench.name}: {note}" for note in output.notes]
        told = output.told.get(line.quantity)
        if told is None:
            comparison.problems.append(f"{path.name}: has no {line.quantity}")
            continue
        try:
            ours = _ours(record, line, bench.numerator)
            comparison.compared.append(Compared(bench, line, told, ours, record.contract))
        except UserError as problem:
            comparison.problems.append(f"{bench.name}, {line.quantity}: {problem.message}")


def _nearest(fitting: Sequence[tuple[Case, Record]]) -> tuple[Case, Record]:
    """Without knobs but those asked for; of several the last measured, which is nearest to theirs in time."""
    least = min(len(case.knobs) for case, _ in fitting)
    return max(
        ((case, record) for case, record in fitting if len(case.knobs) == least),
        key=lambda pair: load(Path(pair[1].path), "result", RESULT_SCHEMA)["identity"]["created_at"],
    )


def _ours(record: Record, line: Line, numerator: str) -> Told:
    """Our number in their convention, from the raw samples of one cell."""
    path = Path(record.path)
    document = load(path, "result", RESULT_SCHEMA)
    components = line.component.split(" + ")
    times = _sum([_series(document, path.parent.parent, name, line.regime) for name in components])
    us = REDUCTIONS[line.over](times)
    rule = BYTES[numerator]
    parts = [part for name in components for part in PARTS[name.removesuffix("_floor")]]
    moved = [rule.per_rank(document, part) for part in parts]
    per_rank = [sum(of_rank) for of_rank in zip(*moved, strict=True)]
    bytes_ = {"mean": statistics.fmean(per_rank), "total": sum(per_rank), "rank 0": per_rank[0]}[rule.of]
    return Told(us, bytes_ / us / 1e3)


def _sum(series: Sequence[PerRank]) -> PerRank:
    """Sample by sample: of operations in turns, the time from the first mark to the last."""
    return [[sum(each) for each in zip(*of_rank, strict=True)] for of_rank in zip(*series, strict=True)]


def _series(document: Document, folder: Path, component: str, regime: str) -> PerRank:
    reference = document["samples"]
    if reference is None:
        raise UserError(f"{document['identity']['cell_id']} names no samples")
    sidecar, problem = recheck.unpack(folder / reference["file"], reference["sha256"])
    if sidecar is None:
        raise UserError(f"{reference['file']} {problem}")
    for series in sidecar["series"]:
        if (series["component"], series["regime"]) == (component, regime):
            return series["per_rank_us"]
    raise UserError(f"{document['identity']['cell_id']} has no {component} in the regime {regime}")


# ------------------------------------------------------------------------------------------------- printing

HEADER = (
    "quantity",
    "ours: regime, reduction",
    "theirs µs",
    "ours µs",
    "ratio",
    "theirs GB/s",
    "ours GB/s",
    "ratio",
)


def cells(one: Compared) -> tuple[str, ...]:
    time, bandwidth = one.ratios
    several = len({(line.ours.backend, line.ours.variant) for line in one.bench.lines}) > 1
    which = f"{one.line.ours.variant or one.line.ours.backend} " if several else ""
    return (
        one.line.quantity,
        f"{which}{one.line.component} {one.line.regime}, {one.line.over}",
        f"{one.theirs.us:.2f}",
        f"{one.ours.us:.2f}",
        f"{time:.3f}",
        "" if one.theirs.gbps is None else f"{one.theirs.gbps:.1f}",
        "" if one.ours.gbps is None else f"{one.ours.gbps:.1f}",
        "" if bandwidth is None else f"{bandwidth:.3f}",
    )


def markdown(comparison: Comparison) -> Iterator[str]:
    """A table a benchmark, then notes and problems as lists."""
    for bench in dict.fromkeys(one.bench for one in comparison.compared):
        yield f"\n### `{bench.title}`\n"
        yield "| " + " | ".join([*HEADER, "why outside 0.97 to 1.03"]) + " |"
        yield "|---|---|" + "---:|" * 6 + "---|"
        for one in comparison.compared:
            if one.bench == bench:
                yield "| " + " | ".join([*cells(one), one.why]) + " |"
    for title, lines in (("Notes", comparison.notes), ("Not compared", comparison.problems)):
        if lines:
            yield f"\n{title}:\n"
            yield from (f"* {line}" for line in lines)


def plain(comparison: Comparison) -> Iterator[str]:
    """The same for a terminal."""
    rows: list[tuple[str, ...]] = [HEADER, *(cells(one) for one in comparison.compared)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    bench: Any = None
    for one, row in zip([None, *comparison.compared], rows, strict=True):
        if one is not None and one.bench is not bench:
            bench = one.bench
            yield f"{bench.title}"
        padded = [
            f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(padded) + (f"  {one.why}" if one is not None else "")
    yield from (f"note: {line}" for line in comparison.notes)
    yield from (f"not compared: {line}" for line in comparison.problems)


def main() -> int:
    parser = argparse.ArgumentParser(description="a vendor's benchmark beside our measurement")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--markdown", action="store_true", help="tables for docs/fidelity.md")
    args = parser.parse_args()
    try:
        comparison = compare(args.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join((markdown if args.markdown else plain)(comparison)).strip())
    return 1 if comparison.unexplained or comparison.problems else 0


if __name__ == "__main__":
    sys.exit(main())
