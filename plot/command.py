"""`cx plot DIR... --out OUT`: figures (PNG and SVG) under OUT/figures, and the report OUT/report.html."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runtime.summary import Summary, read_summary
from . import figures, plans, report, style

MAX_FIGURES = 120


def command(args: argparse.Namespace) -> int:
    """Draw and say where the pictures lie. args: dirs, out. A red gate is shown, not returned."""
    summary = read_summary(args.dirs)
    out = Path(args.out)
    drawn = draw(summary, out)
    print(f"{len(drawn) // 2} figures, each as PNG and SVG, and the report:", file=sys.stderr)
    print(out / "figures")
    print(out / "report.html")
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
    return style.styles(entry.label for entry in entries)


def draw_folders(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """The same from folders of results, for `cx run` and notebooks."""
    return draw(read_summary(folders), Path(out))
