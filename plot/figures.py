"""Drawing: time and bandwidth over size or tokens, one line per way, log axes, limits, intervals.

The same tables give the same bytes: no dates, no random ids, no settings of the user's.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime import wording
from ..runtime.reading import cores
from ..runtime.tables import Entry, Table
from ..runtime.types import Status
from ..runtime.writing import write_bytes
from . import style
from .plans import Plan, alike, caption, sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POOL_FROM = 8
WIDTH = 9.0  # inches; 900 px wide at DPI 100, the size a README shows
DPI = 160
DECODE_UP_TO, PREFILL_FROM = 512, 1024  # tokens per rank
BANDWIDTH = {"busbw": "bus bandwidth", "remote": "remote bandwidth"}


def save_all(plans: Sequence[Plan], styles: Mapping[str, style.Style], folder: Path) -> list[Path]:
    """Draw every plan and write NAME.png and NAME.svg of each; many are drawn by several processes."""
    processes = min(cores(), 8, len(plans))
    if len(plans) < POOL_FROM or processes < 2:
        return [path for one in plans for path in save(one, styles, folder)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(partial(save, styles=styles, folder=folder), plans)
        return [path for paths in drawn for path in paths]


def save(plan: Plan, styles: Mapping[str, style.Style], folder: Path) -> list[Path]:
    """Draw a plan and write NAME.png and NAME.svg."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, svg = io.BytesIO(), io.BytesIO()
    # From matplotlib's own defaults: a user's matplotlibrc does not change published figures.
    settings: dict[Any, Any] = {**_defaults(), **style.RC, "svg.hashsalt": plan.name}
    with matplotlib.rc_context(settings):
        figure = draw(plan, styles)
        FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
    paths = [folder / f"{plan.name}.png", folder / f"{plan.name}.svg"]
    write_bytes(paths[0], png.getvalue())
    write_bytes(paths[1], svg.getvalue())
    return paths


def _defaults() -> dict[str, Any]:
    import matplotlib

    return {name: value for name, value in matplotlib.rcParamsDefault.items() if "backend" not in name}


def draw(plan: Plan, styles: Mapping[str, style.Style]) -> Figure:
    """The figure: one row of panels for each component, time on the left, bandwidth on the right."""
    from matplotlib.figure import Figure

    alike(plan.tables)
    shown = _labels(plan.tables)
    said = [line for part in caption(plan.tables) for line in textwrap.wrap(part, 150)]
    heading = textwrap.wrap(plan.title, 88)
    columns = max(1, min(len(shown), int(104 / (max(map(len, shown)) + 8))))
    legend_rows = math.ceil(len(shown) / columns)
    top = 0.42 + 0.24 * len(heading) + 0.23 * legend_rows
    bottom = 0.62 + 0.17 * len(said)
    rows = len(plan.tables)
    height = top + bottom + 2.45 * rows + 0.72 * (rows - 1)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    panels = figure.subplots(rows, 2, squeeze=False)
    figure.subplots_adjust(
        left=0.068,
        right=0.972,
        top=1 - (top + 0.22) / height,
        bottom=bottom / height,
        wspace=0.15,
        hspace=0.34,
    )
    for row, table in zip(panels, plan.tables, strict=True):
        _panel(row[0], table, styles, _times)
        _panel(row[1], table, styles, _rates)
    for axes in panels[-1]:
        axes.set_xlabel("size S" if plan.tables[0].group.family == "collective" else "tokens per rank")
    x = 0.012
    figure.text(
        x, 1 - 0.1 / height, "\n".join(heading), va="top", fontsize=12, fontweight="bold", linespacing=1.3
    )
    below = 0.16 + 0.235 * len(heading)
    figure.text(x, 1 - below / height, plan.subtitle, va="top", fontsize=9.5, color=style.MUTED)
    figure.legend(
        handles=[_handle(label, styles[label]) for label in shown],
        loc="upper left",
        bbox_to_anchor=(x - 0.008, 1 - (below + 0.17) / height),
        ncols=columns,
        handlelength=3.4,
        columnspacing=1.8,
        borderpad=0.2,
    )
    figure.text(
        x, 0.1 / height, "\n".join(said), va="bottom", fontsize=8, color=style.MUTED, linespacing=1.35
    )
    return figure


def _handle(label: str, of: style.Style) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [], [], label=wording.clean(label), color=of.colour, marker=of.marker, linestyle=of.dash, markersize=5
    )


def _labels(tables: Sequence[Table]) -> list[str]:
    return sorted({e.label for t in tables for line in t.lines for e in line.entries if e.us is not None})


Series = list[tuple[float, float, float]]  # value, low, high; NaN where there is none
NOTHING = (math.nan, math.nan, math.nan)


def _times(table: Table, entry: Entry) -> tuple[float, float, float]:
    if not entry.us:
        return NOTHING
    low, high = entry.interval or (entry.us, entry.us)
    return entry.us, low if low > 0 else entry.us, high  # a log axis has no place for 0


def _rates(table: Table, entry: Entry) -> tuple[float, float, float]:
    """Bandwidth is bytes over time: a long time is a low bandwidth."""
    rate = (entry.GBps or {}).get(table.formula)
    us, low, high = _times(table, entry)
    return (rate, rate * us / high, rate * us / low) if rate else NOTHING


def _panel(axes: Axes, table: Table, styles: Mapping[str, style.Style], value: Any) -> None:
    points = sizes(table)
    seen: list[float] = []
    for label in _labels([table]) if points else ():
        series, withheld = _series(table, label, points, value)
        _line(axes, points, series, styles[label], hollow=False)
        _line(axes, points, withheld, styles[label], hollow=True)
        seen += [v for triple in (*series, *withheld) for v in triple if v > 0]
    times = value is _times
    if not seen:
        axes.set_visible(False)
        return
    limits = [] if times else table.limits
    for limit in limits:
        axes.axhline(limit.GBps, color=style.MUTED, linewidth=1, linestyle=(0, (6, 3)))
        where = axes.get_yaxis_transform()
        text = wording.limit(limit)
        axes.text(0.01, limit.GBps * 0.93, text, transform=where, va="top", fontsize=8.5, color=style.MUTED)
    what = f"{table.percentile} time, µs" if times else f"{BANDWIDTH[table.formula]}, GB/s"
    name = f"{table.component.replace('_', ' ')}: {what}"
    axes.set_title(name, loc="left", fontsize=9.5, fontweight="bold", pad=7)
    _scale(axes, table, points, [*seen, *(limit.GBps for limit in limits)])
    if table.group.family == "moe":
        _boundary(axes, points)


def _series(table: Table, label: str, points: Sequence[int], value: Any) -> tuple[Series, Series]:
    """The line of one label, and apart from it what is implausible. A gap stays a gap."""
    found = {line.at: e for line in table.lines for e in line.entries if e.label == label}
    series, withheld = [], []
    for point in points:
        entry = found.get(point)
        triple = value(table, entry) if entry is not None else NOTHING
        bad = entry is not None and entry.status is Status.IMPLAUSIBLE
        series.append(NOTHING if bad else triple)
        withheld.append(triple if bad else NOTHING)
    return series, withheld


def _line(axes: Axes, points: Sequence[int], series: Series, of: style.Style, hollow: bool) -> None:
    middle, low, high = (list(column) for column in zip(*series, strict=True))
    if not any(v > 0 for v in middle):
        return
    errors = [
        [m - a for m, a in zip(middle, low, strict=True)],
        [b - m for m, b in zip(middle, high, strict=True)],
    ]
    clipped = [[max(e, 0.0) for e in side] for side in errors]
    axes.errorbar(
        points, middle, yerr=clipped, fmt="none", ecolor=of.colour, elinewidth=1.3, capsize=2.5, zorder=2
    )
    axes.plot(
        points,
        middle,
        color=of.colour,
        linestyle="none" if hollow else of.dash,
        linewidth=1.7,
        marker=of.marker,
        markersize=5,
        markerfacecolor=style.PAPER if hollow else of.colour,
        markeredgecolor=of.colour if hollow else style.PAPER,
        markeredgewidth=1.2 if hollow else 0.5,
        zorder=3,
    )


def _scale(axes: Axes, table: Table, points: Sequence[int], seen: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    margin = max((points[-1] / points[0]) ** 0.03, 1.1)
    axes.set_xlim(points[0] / margin, points[-1] * margin)
    low, high = style.log_limits(seen)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(style.log_ticks(low, high)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: style.plain(value)))
    collective = table.group.family == "collective"
    labels = [wording.size(point) if collective else str(point) for point in points]
    chosen = style.spaced(points, labels, width=50)
    axes.xaxis.set_major_locator(FixedLocator([points[index] for index in chosen]))
    axes.set_xticklabels([labels[index] for index in chosen])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())


def _boundary(axes: Axes, points: Sequence[int]) -> None:
    """Where decode batches end and prefill chunks begin."""
    if points[0] > DECODE_UP_TO or points[-1] < PREFILL_FROM:
        return
    at = math.sqrt(DECODE_UP_TO * PREFILL_FROM)
    axes.axvline(at, color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
    where = axes.get_xaxis_transform()
    look: dict[str, Any] = {"transform": where, "va": "bottom", "fontsize": 8.5, "color": style.MUTED}
    axes.text(at / 1.12, 0.015, "decode", ha="right", **look)
    axes.text(at * 1.12, 0.015, "prefill", ha="left", **look)
