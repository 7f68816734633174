"""`cx plot DIR... --out OUT`: figures (PNG and SVG) under OUT/figures, and the report OUT/report.html."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime import wording
from ..runtime.errors import UserError
from ..runtime.summary import Summary, read_summary
from . import figures, plans, report, style

MAX_FIGURES = 120
_AGAIN = "a manifest says what was requested: fetch the folder again, or measure into a new one"


def command(args: argparse.Namespace) -> int:
    """Draw and say where the pictures lie. args: dirs, out. A red gate is shown, not returned.

    Raises UserError where there is nothing to draw: no execution can be read, or no cell has a number.
    """
    summary = read_summary(args.dirs)
    for problem in summary.problems:
        print(f"problem: {wording.clean(problem.path)} {wording.clean(problem.reason)}", file=sys.stderr)
    if not summary.executions:
        where = ", ".join(map(str, args.dirs))
        raise UserError(f"nothing to draw: no manifest in {where} can be read", _AGAIN)
    out = Path(args.out)
    drawn = draw(summary, out)
    page = out / "report.html"
    if not summary.tables:
        hint = f"{page} says of every cell how it ended"
        raise UserError("nothing to draw: no cell that was requested has a number", hint)
    if drawn:
        print(f"{len(drawn) // 2} figures, each as PNG and SVG, and the report:", file=sys.stderr)
        print(out / "figures")
    else:
        print("no figure: a line needs two sizes; the report has the tables:", file=sys.stderr)
    print(page)
    return 0


def draw(summary: Summary, out: Path) -> list[Path]:
    """Write figures and report; returns the figures. Raises UserError when `out` cannot be written."""
    planned = plans.plan(summary.tables, summary.executions)
    left_out = len(planned) - MAX_FIGURES
    if left_out > 0:
        print(f"{left_out} more figures are not drawn; plot fewer executions at once", file=sys.stderr)
    planned = planned[:MAX_FIGURES]
    drawn = figures.save_all(planned, _styles(summary), out / "figures")
    report.write(summary, planned, out / "figures", out / "report.html", max(left_out, 0))
    return drawn


def _styles(summary: Summary) -> dict[str, style.Style]:
    """One style for each way, over all figures."""
    entries = (entry for table in summary.tables for line in table.lines for entry in line.entries)
    return style.styles((entry.label, entry.way.backend) for entry in entries)


def draw_folders(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """The same from folders of results, for `cx run` and notebooks."""
    return draw(read_summary(folders), Path(out))
