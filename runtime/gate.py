"""The gate: did every requested cell end well, and if not, which did not and why.

0   every requested cell is ok or unsupported, and at least one is ok
1   a cell is incorrect, implausible, failed, timed out or did not run, or a file cannot be trusted
2   there is nothing to judge: no results, or nothing that was requested is supported
3   none of these, but the infrastructure failed some cell
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .reading import Reading
from .records import Record
from .types import Status

BAD = (Status.INCORRECT, Status.IMPLAUSIBLE, Status.FAILED, Status.TIMEOUT, Status.NOT_RUN)
SLOW_FIRST_CALL_US = 100_000.0
LAUNCH_BOUND = 1.2  # chained over graph: more than marks, first touches and the gaps between kernels make


@dataclass(frozen=True)
class Verdict:
    """counts: status -> cells, in the order of `Status`, those that occur. `because` is for people."""

    requested: int
    counts: dict[str, int]
    problems: int
    exit_code: int
    because: str

    @property
    def line(self) -> str:
        """`ok 40 / 46 requested · unsupported 4 · failed 2`."""
        parts = [f"ok {self.counts.get('ok', 0)} / {self.requested} requested"]
        parts += [f"{status} {count}" for status, count in self.counts.items() if status != "ok"]
        if self.problems:
            parts.append(f"problems {self.problems}")
        return " · ".join(parts)


@dataclass(frozen=True)
class Note:
    """Something said of several cells at once. `status` is None for a warning."""

    text: str
    cells: tuple[str, ...]
    status: Status | None = None


def judge(reading: Reading) -> Verdict:
    """The verdict over everything requested; the same whatever is shown and in whichever format."""
    found = Counter(record.status for record in reading.records)
    counts = {status.value: found[status] for status in Status if found[status]}
    code, because = _judge(found, len(reading.problems))
    return Verdict(len(reading.records), counts, len(reading.problems), code, because)


def _judge(found: Counter[Status], problems: int) -> tuple[int, str]:
    if problems:
        return 1, f"{problems} file{'s' if problems > 1 else ''} cannot be trusted"
    bad = [f"{found[status]} {status}" for status in BAD if found[status]]
    if bad:
        return 1, ", ".join(bad)
    if found[Status.INFRA]:
        return 3, f"{found[Status.INFRA]} infra"
    if not found:
        return 2, "no results"
    if not found[Status.OK]:
        return 2, "nothing that was requested is supported"
    return 0, "every requested cell is ok or unsupported"


def not_ok(records: Iterable[Record]) -> list[Note]:
    """Every cell that is not ok, those of one status and reason together, worst status first."""
    groups: dict[tuple[Status, str], list[str]] = {}
    for record in records:
        if record.status is not Status.OK:
            groups.setdefault((record.status, record.reason or ""), []).append(record.cell_id)
    order = list(Status)
    notes = [Note(reason, tuple(cells), status) for (status, reason), cells in groups.items()]
    return sorted(notes, key=lambda note: order.index(note.status or Status.OK))


def warnings(records: Sequence[Record]) -> list[Note]:
    """What a reader should know about cells that do have numbers, in short."""
    checks: tuple[Callable[[Record], Iterable[str]], ...] = (_unsettled, _stopped, _said)
    groups: dict[str, dict[str, None]] = {}
    for record in records:
        for check in checks:
            for text in check(record):
                groups.setdefault(text, {})[record.cell_id] = None
    notes = [Note(text, tuple(cells)) for text, cells in groups.items()]
    whole = (_outliers(records), _first_calls(records), _launch_bound(records))
    return [note for note in (*notes, *whole) if note is not None]


def _unsettled(record: Record) -> Iterable[str]:
    """The half-against-half check of the measurement, by regime and component."""
    return (
        f"not settled: {row.regime} {row.component} still drifted while it was measured"
        for row in record.rows
        if not row.settled
    )


def _stopped(record: Record) -> Iterable[str]:
    return (f"stopped early: {row.stop_reason}" for row in record.rows if row.stop_reason != "complete")


def _said(record: Record) -> Iterable[str]:
    yield from record.warnings
    if record.teardown:
        yield f"teardown: {record.teardown}"
    if record.contract_only and record.rows:
        yield f"contract-only: {record.backend} was never validated on its hardware"


def _outliers(records: Iterable[Record]) -> Note | None:
    flagged = [(record, row) for record in records for row in record.rows if row.outliers]
    if not flagged:
        return None
    record, row = max(flagged, key=lambda pair: pair[1].largest_outlier or 0.0)
    largest = f"the largest {row.largest_outlier:.4g} us in {record.cell_id} ({row.regime} {row.component})"
    samples = sum(row.outliers for _, row in flagged)
    cells = tuple(dict.fromkeys(record.cell_id for record, _ in flagged))
    return Note(f"outliers: {samples} samples flagged and kept, {largest}", cells)


def _first_calls(records: Iterable[Record]) -> Note | None:
    slow = [(r.first_call_us, r.cell_id) for r in records if (r.first_call_us or 0.0) > SLOW_FIRST_CALL_US]
    if not slow:
        return None
    longest, cell_id = max((us or 0.0, cell_id) for us, cell_id in slow)
    above = f"above {SLOW_FIRST_CALL_US / 1e3:g} ms"
    text = f"slow first call: {above}, the longest {longest / 1e3:.0f} ms in {cell_id}"
    return Note(text, tuple(cell_id for _, cell_id in slow))


def _launch_bound(records: Iterable[Record]) -> Note | None:
    """Cells whose chain takes longer launched call by call than replayed as a graph: their `chained` and
    `fresh` times are the host's, and tell nothing of the library until it is faster."""
    found = []
    for record in records:
        period = {(row.component, row.regime): row.times[0] for row in record.rows}
        for (component, regime), us in period.items():
            replayed = period.get((component, "graph"))
            if regime == "chained" and us and replayed and us > LAUNCH_BOUND * replayed:
                found.append((us / replayed, record.cell_id))
    if not found:
        return None
    most, cell_id = max(found)
    text = f"bound by the host: launched call by call {most:.3g} times as long as replayed in {cell_id}"
    return Note(f"{text}; above {LAUNCH_BOUND:g} in all of these", tuple(cell_id for _, cell_id in found))
