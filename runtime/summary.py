"""`cx summarize DIR...`: results as text, GitHub Markdown or JSON, and the gate. stdout is the summary."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import gate, summary_json, wording
from .errors import UserError
from .reading import Execution, Problem, Reading, read
from .tables import Table, tables

FORMATS = ("text", "markdown", "json")
Span = tuple[str, str]  # text and its rich style
_STYLES = {"fastest": "bold green", "implausible, withheld": "yellow"}
_MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#~"})


@dataclass(frozen=True)
class Summary:
    """Everything that any of the formats, or the report, shows."""

    reading: Reading
    tables: Sequence[Table]
    verdict: gate.Verdict
    not_ok: Sequence[gate.Note]
    warnings: Sequence[gate.Note]
    percentile: str

    @property
    def executions(self) -> Sequence[Execution]:
        return self.reading.executions

    @property
    def problems(self) -> Sequence[Problem]:
        return sorted(self.reading.problems)


def command(args: argparse.Namespace) -> int:
    """Print the summary; the exit code is the gate's.

    args: dirs, format; and where the parser offers them, percentile ("p50", "mean"...) and regime (a list).
    """
    options = vars(args)
    summary = read_summary(args.dirs, options.get("percentile") or "p50", options.get("regime") or ())
    verdict = summary.verdict
    if args.format == "json":
        sys.stdout.writelines(f"{line}\n" for line in summary_json.lines(summary_json.to_json(summary)))
    elif args.format == "markdown":
        sys.stdout.writelines(f"{line}\n" for line in markdown(summary))
    else:
        _print_text(summary)
    sys.stdout.flush()
    for problem in summary.problems:
        print(f"problem: {wording.clean(problem.path)} {wording.clean(problem.reason)}", file=sys.stderr)
    if verdict.exit_code:
        print(f"gate: {verdict.because} (exit {verdict.exit_code})", file=sys.stderr)
    return verdict.exit_code


def summarise(reading: Reading, percentile: str = "p50", regimes: Sequence[str] = ()) -> Summary:
    """The summary of what was read. `regimes` filters the tables, never the gate."""
    return Summary(
        reading=reading,
        tables=tables(reading, percentile, regimes),
        verdict=gate.judge(reading),
        not_ok=gate.not_ok(reading.records),
        warnings=gate.warnings(reading.records),
        percentile=percentile,
    )


def read_summary(
    folders: Sequence[str | Path], percentile: str = "p50", regimes: Sequence[str] = ()
) -> Summary:
    """Read and summarise. Raises UserError when there is nothing at all."""
    summary = summarise(read(folders), percentile, regimes)
    if not summary.verdict.requested and not summary.problems:
        where = ", ".join(str(folder) for folder in folders)
        raise UserError(
            f"no results in {where}", "results are folders with a manifest.json; `cx run` writes them"
        )
    return summary


def _print_text(summary: Summary) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        sys.stdout.writelines("".join(span for span, _ in line).rstrip() + "\n" for line in text(summary))
        return
    for line in text(summary):
        console.print(Text.assemble(*line))


def text(summary: Summary) -> Iterator[list[Span]]:
    """The lines of the text form, as spans with a style each."""
    color = {0: "green", 3: "yellow"}.get(summary.verdict.exit_code, "red")
    yield [(summary.verdict.line, f"bold {color}")]
    for line in executions(summary):
        yield [(line, "")]
    group = None
    for table in summary.tables:
        if table.group != group:
            group = table.group
            yield []
            yield [(wording.clean(group.title), "bold")]
        yield [(f"  {wording.caption(table)}", "dim")]
        yield from _text_table(table)
    if summary.tables:
        yield []
        yield from ([(line, "dim")] for line in wording.legend(summary.tables))
    for title, notes in (("not ok", summary.not_ok), ("warnings", summary.warnings)):
        if notes:
            yield []
            yield [(title, "bold")]
        for note in notes:
            status = f"{note.status}: " if note.status else ""
            yield [
                (f"  {status}", "red"),
                (wording.clean(note.text), ""),
                (f"  [{_count(note)}]", "dim"),
            ]
            if note.status:
                yield from ([(f"    {cell}", "dim")] for cell in wording.cell_list(note.cells))
    if summary.problems:
        yield []
        yield [("problems", "bold red")]
        yield from ([(f"  {wording.clean(p.path)}: {wording.clean(p.reason)}", "")] for p in summary.problems)


def executions(summary: Summary) -> Iterator[str]:
    """What was read, a line each."""
    for execution in summary.executions:
        parts = [execution.name, execution.suite, execution.sku, f"{execution.requested} cells"]
        parts.append(f"contract {execution.contract}")
        if not execution.complete:
            parts.append("incomplete")
        yield " · ".join(wording.clean(part) for part in parts)


def _count(note: gate.Note) -> str:
    """How many cells; of a warning, whose cells are not all listed, also the first."""
    count = f"{len(note.cells)} cell{'' if len(note.cells) == 1 else 's'}"
    if note.status:
        return count
    return f"{count}: {wording.clean(note.cells[0])}{', …' if len(note.cells) > 1 else ''}"


def _text_table(table: Table) -> Iterator[list[Span]]:
    rows = [wording.header(table)]
    rows += [
        wording.cells(table, line, entry, first=index == 0)
        for line in table.lines
        for index, entry in enumerate(line.entries)
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {1, 3, len(widths) - 1}  # names, intervals and ranks; numbers are flush right
    for index, row in enumerate(rows):
        padded = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        style = "dim" if index == 0 else ""
        yield [
            ("    " + "  ".join(padded[:-1]) + "  ", style),
            (padded[-1].rstrip(), _STYLES.get(row[-1], style)),
        ]


def markdown(summary: Summary) -> Iterator[str]:
    """The lines of the Markdown form: GitHub's, safe against whatever the results contain."""
    yield "## CollectiveX results"
    yield ""
    mark = {0: "✅", 3: "⚠️"}.get(summary.verdict.exit_code, "❌")
    yield f"{mark} **{_safe(summary.verdict.line)}**"
    yield ""
    yield from (f"- {_safe(line)}" for line in executions(summary))
    group = None
    for table in summary.tables:
        if table.group != group:
            group = table.group
            yield ""
            yield f"### {_safe(group.title)}"
        yield ""
        yield _safe(wording.caption(table))
        yield ""
        yield from _markdown_table(table)
    if summary.tables:
        yield ""
        yield from (f"- {_safe(line)}" for line in wording.legend(summary.tables))
    for title, notes in (("Not ok", summary.not_ok), ("Warnings", summary.warnings)):
        if notes:
            yield ""
            yield f"### {title}"
            yield ""
        for note in notes:
            status = f"**{note.status}**: " if note.status else ""
            yield f"- {status}{_safe(note.text)} ({_safe(_count(note))})"
            if note.status:
                yield from (f"  - {_safe(cell)}" for cell in wording.cell_list(note.cells))
    if summary.problems:
        yield ""
        yield "### Problems"
        yield ""
        yield from (f"- {_safe(problem.path)}: {_safe(problem.reason)}" for problem in summary.problems)


def _markdown_table(table: Table) -> Iterator[str]:
    names = wording.header(table)
    left = {1, 3, len(names) - 1}
    yield _markdown_row(names)
    yield "|" + "|".join(" :-- " if column in left else " --: " for column in range(len(names))) + "|"
    for line in table.lines:
        for index, entry in enumerate(line.entries):
            row = [_safe(cell) for cell in wording.cells(table, line, entry, first=index == 0)]
            if entry.standing == "fastest":
                row[1] = f"**{row[1]}**"
            yield _markdown_row(row)


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _safe(value: str) -> str:
    return wording.clean(value).translate(_MARKDOWN).replace("&", "&amp;")
