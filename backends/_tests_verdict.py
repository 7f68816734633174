"""Whether a run of nccl-tests (or rccl-tests) can be believed, and what it then says of each case.

Exit code, footer, check column, realised settings and completeness must all agree. What does not is named:
`incorrect` where an answer was wrong or something else was measured than was asked for, `failed` where there
is no answer, `timeout` where it did not come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..runtime import stats, supervise
from ..runtime.bandwidth import ALIGN, bus_factor, collective_counts
from ..runtime.types import Case, Check, Collective, Series, Status
from ._tests_output import Report, Row, Unreadable, read_json, read_text
from .base import Answer, Ended, Start

CHECK = "nccl-tests' own check of one separate untimed call"
# What stands in the column redop, in every version: sendrecv has no operation, and prints that of -o.
REDOPS = {**dict.fromkeys(("all_reduce", "reduce_scatter", "reduce", "sendrecv"), "sum"), "hypercube": ""}
ROOTED = ("broadcast", "reduce", "gather", "scatter")
EXITS = {2: "CUDA error", 3: "NCCL error", 4: "timeout", 127: "not started", 255: "it refused an option"}
# busbw is printed with two decimals beside a time of two to seven digits, or of two with an exponent.
BUSBW_RELATIVE, BUSBW_ABSOLUTE = 0.06, 0.02


@dataclass(frozen=True)
class Sweep:
    """What one start was asked to do, as its command line says: `sizes` rising, each printed once a cycle;
    `threads` of each process, with `gpus` each."""

    cases: tuple[Case, ...]
    sizes: tuple[int, ...]
    program: str
    dtype: str
    iterations: int
    cycles: int
    checks: int
    each: bool
    threads: int
    gpus: int
    document: str | None

    @classmethod
    def of(cls, start: Start, programs: Mapping[str, str], dtypes: Mapping[str, str]) -> Sweep:
        said = dict(zip(start.argv, start.argv[1:], strict=False))
        shape = start.cases[0].shape
        assert isinstance(shape, Collective)
        return cls(
            cases=start.cases,
            sizes=tuple(sorted({_size(case) for case in start.cases})),
            program=programs[shape.op],
            dtype=dtypes[shape.dtype],
            iterations=int(said["-n"]),
            cycles=int(said.get("-N", "1")),
            checks=int(said["-c"]),
            each=said.get("-I") == "1",
            threads=int(said.get("-t", "1")),
            gpus=int(said["-g"]),
            document=start.output,
        )

    @property
    def op(self) -> str:
        shape = self.cases[0].shape
        assert isinstance(shape, Collective)
        return shape.op

    @property
    def ranks(self) -> int:
        return self.cases[0].ranks

    @property
    def workers(self) -> int:
        """Threads of all processes, with `gpus` each."""
        return self.ranks // self.gpus

    @property
    def processes(self) -> int:
        return self.workers // self.threads

    def all(self, status: Status, reason: str) -> dict[Case, Answer]:
        return {case: Answer(status, reason) for case in self.cases}


def _size(case: Case) -> int:
    assert isinstance(case.shape, Collective)
    return case.shape.bytes


def judge(sweep: Sweep, ended: Ended) -> dict[Case, Answer]:
    """See base.Program.answers."""
    report = read_text(ended.stdout)
    if ended.timed_out is not None or not report.complete:
        return _broken(sweep, report, ended)
    if sweep.processes > 1 and (report.tables > 1 or report.ranks == sweep.ranks // sweep.processes):
        told = f"{sweep.program} was built without MPI: each process ran alone; build it with MPI=1"
        return sweep.all(Status.FAILED, told)
    rows, warnings, problem = _rows(sweep, report, ended)
    if problem is None:
        problem = _other_than_asked(sweep, report) or _contradiction(sweep, report, rows, ended.returncode)
    if problem is not None:
        return sweep.all(*problem)
    sizes = [size for size in sweep.sizes if report.reduced is None or size <= report.reduced]
    if not sizes or len(rows) != len(sizes) * sweep.cycles:
        told = f"{sweep.program} printed {len(rows)} of {len(sweep.sizes) * sweep.cycles} rows"
        return sweep.all(Status.FAILED, f"{told}{_because(report)}")
    answers = {}
    for case in sweep.cases:
        if _size(case) in sizes:
            mine = rows[sizes.index(_size(case)) :: len(sizes)]
            answers[case] = _answer(sweep, case, mine, report, sizes[-1], warnings)
        else:
            lowered = f"{sweep.program} lowered its largest size to {report.reduced} bytes for want of memory"
            answers[case] = Answer(Status.FAILED, lowered)
    return answers


# ----------------------------------------------------------------------------------- runs without a footer


def _broken(sweep: Sweep, report: Report, ended: Ended) -> dict[Case, Answer]:
    """Within the table the size under way is at fault and the others run again; before it, and after it, the
    whole run is."""
    late = ended.timed_out is not None or ended.returncode == 4
    status = Status.TIMEOUT if late else Status.FAILED
    how = ended.timed_out or f"{sweep.program} {exit_text(ended.returncode)} without its footer"
    done = len(report.rows)
    if not report.table:
        where = " and without a table" if ended.returncode == 0 and not late else ", before its table began"
        return sweep.all(status, f"{how}{where}{_because(report)}")
    if done >= len(sweep.sizes) * sweep.cycles:
        return sweep.all(status, f"{how}, after its whole table{_because(report)}")
    size, cycle = sweep.sizes[done % len(sweep.sizes)], done // len(sweep.sizes) + 1
    reason = f"{how}, in {size} bytes of cycle {cycle} of {sweep.cycles}{_because(report)}"
    return {case: Answer(status, reason) for case in sweep.cases if _size(case) == size}


def exit_text(code: int) -> str:
    """How a process ended, in words. Codes above 4 mean different things in different versions."""
    ended = supervise.exit_text(code)
    return f"was {ended}" if code < 0 else ended + (f" ({EXITS[code]})" if code in EXITS else "")


def _because(report: Report) -> str:
    return f": {'; '.join(dict.fromkeys(report.errors))[:600]}" if report.errors else ""


# ------------------------------------------------------------------------------------- runs with a footer

Problem = tuple[Status, str]


def _rows(sweep: Sweep, report: Report, ended: Ended) -> tuple[list[Row], list[str], Problem | None]:
    """The rows to use: of the JSON document where there is one; those of the text must then be the same."""
    warnings = [f"NCCL's last error, which it did not stop for: {error}" for error in report.errors]
    unreadable = f"{len(report.unreadable)} lines of its table cannot be read: {report.unreadable[:1]}"
    if ended.output is None:
        if sweep.each:
            return [], [], (Status.FAILED, f"{sweep.program} wrote no JSON document{_because(report)}")
        if report.unreadable:
            return [], [], (Status.FAILED, unreadable)
        if sweep.document:
            warnings.append(
                "no JSON document was written: times are those of the table, of three or four digits"
            )
        return report.rows, warnings, None
    if report.document is not None and report.document != sweep.document:
        elsewhere = f"{sweep.program} wrote its JSON document to another file than it was asked to"
        return [], [], (Status.FAILED, elsewhere)
    try:
        document = read_json(ended.output)
    except Unreadable as error:
        return [], [], (Status.FAILED, f"the JSON document of {sweep.program} {error}")
    if report.unreadable:
        warnings.append(unreadable)
    elif [row.facts for row in report.rows] != [row.facts for row in document.rows]:
        return [], [], (Status.FAILED, f"table and JSON document of {sweep.program} contradict each other")
    if document.out_of_bounds != report.out_of_bounds or document.passed != report.passed:
        return (
            [],
            [],
            (Status.INCORRECT, f"footer and JSON document of {sweep.program} contradict each other"),
        )
    if document.settings.get("iters") != sweep.iterations:
        return (
            [],
            [],
            (Status.INCORRECT, f"asked for {sweep.iterations} iterations, not for those of the JSON"),
        )
    report.cputime |= document.cputime
    return document.rows, warnings, None


def _other_than_asked(sweep: Sweep, report: Report) -> Problem | None:
    """What was realised against what was asked for: an unknown -d, for one, silently falls back to float."""
    if report.tables != 1:
        return (
            Status.INCORRECT,
            f"{report.tables} tables: several programs ran instead of one of several ranks",
        )
    for name in (report.program, report.concluded):
        if name is not None and name.removesuffix("_mpi") != sweep.program:
            return Status.INCORRECT, f"asked for {sweep.program}, {name} ran"
    if report.ranks is not None and report.ranks != sweep.ranks:
        return Status.INCORRECT, f"asked for {sweep.ranks} ranks, {sweep.program} ran with {report.ranks}"
    if report.cputime:
        return Status.INCORRECT, "the time column is that of launching (-C), not of the operation"
    asked = {"nThread": sweep.threads, "nGpus": sweep.gpus}
    asked |= {"iters": sweep.iterations, "validation": sweep.checks, "agg iters": 1, "graph": 0}
    for name, value in asked.items():
        if report.settings.get(name, value) != value:
            return (
                Status.INCORRECT,
                f"{name}: asked for {value}, {sweep.program} used {report.settings[name]}",
            )
    return None


def _contradiction(sweep: Sweep, report: Report, rows: Sequence[Row], returncode: int) -> Problem | None:
    """The footer and the exit code against the check column."""
    bad = sum(1 for row in rows for timing in row.at.values() if timing.wrong)
    count, passed = report.out_of_bounds, report.passed
    assert count is not None
    if passed != (count == 0):
        return Status.INCORRECT, f"the footer calls {count} failed checks {'OK' if passed else 'FAILED'}"
    # A thread counts once for each placement of a row that failed on its GPUs; with MPI every process does.
    if not bad <= count <= bad * sweep.workers:
        return Status.INCORRECT, f"the footer counts {count} failed checks, the rows show {bad}"
    if returncode != 0 and not count:
        told = f"{sweep.program} {exit_text(returncode)} although its checks passed{_because(report)}"
        return Status.FAILED, told
    if returncode == 0 and count:
        return Status.INCORRECT, f"the footer counts {count} failed checks, the exit code is 0"
    return None


def _answer(
    sweep: Sweep, case: Case, rows: Sequence[Row], report: Report, largest: int, warnings: Sequence[str]
) -> Answer:
    """One case from its rows, one of each cycle."""
    answer = Answer(warnings=list(warnings))
    answer.libraries = {"nccl": (report.nccl, report.headers)}
    answer.versions = {"nccl-tests": report.version or "before 2.17.4, which does not say"}
    answer.realised = {**dict(case.knobs), "sweep_maximum_bytes": largest}
    size = rows[0].size
    answer.bytes = {"family": "collective", "size": size, "requested": _size(case)}
    wrong = [_row_problem(sweep, case, row) for row in rows]
    first = next((problem for problem in wrong if problem), None)
    if first is not None:
        return replace(answer, status=first[0], reason=first[1])
    timings = [row.at[case.mode] for row in rows]
    elements = sum(timing.wrong or 0 for timing in timings)
    detail = f"{elements} wrong elements in {_size(case)} bytes {case.mode}" if elements else None
    answer.checks = [Check(CHECK, "after", not elements, sweep.checks * sweep.cycles, detail)]
    if elements:
        return replace(answer, status=Status.INCORRECT, reason=f"{CHECK}: {detail}")
    if report.out_of_bounds:
        answer.warnings.append("another size or placement of the same process gave wrong data")
    if size != _size(case):
        answer.warnings.append(f"{size} of the {_size(case)} bytes asked for: shares are rounded to 16 bytes")
    if sweep.each:
        each = [us for timing in timings for us in timing.each_us]
        answer.series = [_series("call_iteration", each, 1, sweep.cycles)]
    else:
        answer.series = [_series("call", [t.us for t in timings], sweep.iterations, sweep.cycles)]
    return answer


def _series(component: str, samples: list[float], per_sample: int, cycles: int) -> Series:
    settled = stats.settled(samples)
    return Series(component, "loop", "max", samples, per_sample, cycles, settled)


def _row_problem(sweep: Sweep, case: Case, row: Row) -> Problem | None:
    """What makes a row of this case's place not its row."""
    asked = _size(case)
    redop, root = REDOPS.get(sweep.op, "none"), 0 if sweep.op in ROOTED else -1
    if row.dtype != sweep.dtype or row.redop != redop:
        realised = f"{sweep.program} ran {row.dtype} {row.redop}"
        return Status.INCORRECT, f"asked for {sweep.dtype} {redop}, {realised}"
    if row.root != root:
        return Status.INCORRECT, f"asked for root {root}, {sweep.program} ran with {row.root}"
    if not _is_size(sweep, asked, row.size):
        return Status.INCORRECT, f"asked for {asked} bytes, {sweep.program} ran {row.size}"
    timing = row.at.get(case.mode)
    if timing is None or timing.wrong is None:
        return Status.INCORRECT, f"{sweep.program} did not check {asked} bytes {case.mode}"
    if timing.wrong:
        return None
    times = timing.each_us if sweep.each else (timing.us,)
    if len(times) != (sweep.iterations if sweep.each else 1):
        return Status.FAILED, f"{len(times)} iterations of {sweep.iterations} are in the JSON document"
    if not all(math.isfinite(us) and us > 0 for us in (*times, timing.us)):
        return Status.FAILED, f"{asked} bytes {case.mode}: a time that is no time: {[*times, timing.us][:3]}"
    expected = row.size * bus_factor(sweep.op, sweep.ranks) / timing.us / 1e3
    if not math.isclose(timing.busbw, expected, rel_tol=BUSBW_RELATIVE, abs_tol=BUSBW_ABSOLUTE):
        told = f"time and busbw do not fit: {timing.us:g} us give {expected:.2f} GB/s, not {timing.busbw:g}"
        return Status.FAILED, f"{asked} bytes {case.mode}: {told}"
    return None


def _is_size(sweep: Sweep, asked: int, size: int) -> bool:
    """Whether a row's size is what the program makes of S: of an uneven exchange exactly what its parts add
    up to; elsewhere older versions rounded the share of a rank to elements, newer ones to 16 bytes."""
    if sweep.op == "all_to_all_v":
        shape = sweep.cases[0].shape
        return size == collective_counts(sweep.op, asked, shape.dtype, sweep.ranks)[2]
    return asked - ALIGN * sweep.ranks < size <= asked and size > 0
