"""How figures look: colours that colour-blind readers can tell apart, markers, ticks people can read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# The report replaces these four by its theme's colours, so nothing else in a figure may use them.
INK, MUTED, GRID, PAPER = "#1b1f25", "#59626d", "#dde1e6", "#fefefe"

# Okabe and Ito, "Color Universal Design" (2008), without yellow and black, which a theme swallows; and four
# more, as far from these and each other, also as colour-blind readers see them (Machado et al., 2009).
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#bb2288", "#8855ee", "#99bb99", "#cc1133"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", "*", ">", "p")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (3, 1.2, 0.9, 1.2)))

RC: Mapping[str, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",  # text stays text: small files that can be searched and follow the theme
}


class Style(NamedTuple):
    colour: str
    marker: str
    dash: Any


def styles(ways: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """One style a label, the same in every figure. ways: (label, backend).

    Where the colours suffice each label has its own, else each backend. The labels of a backend differ in
    marker and dash, and those of different backends that share a dash in marker.
    """
    ordered = sorted({(backend, label) for label, backend in ways})
    backends = sorted({backend for backend, _ in ordered})
    made: dict[str, Style] = {}
    for index, (backend, label) in enumerate(ordered):
        of_backend = backends.index(backend)
        nth = sum(other == backend for other, _ in ordered[:index])
        colour = COLOURS[(index if len(ordered) <= len(COLOURS) else of_backend) % len(COLOURS)]
        # 5 shares no factor with the number of markers: a backend comes round after all of them.
        marker = MARKERS[(of_backend + 5 * nth) % len(MARKERS)]
        made[label] = Style(colour, marker, DASHES[nth % len(DASHES)])
    return made


def log_limits(values: Iterable[float]) -> tuple[float, float]:
    """Limits of a log axis: the values of 1, 2, 5 times a power of ten that enclose all of `values`."""
    values = list(values)
    low, high = min(values) / 1.08, max(values) * 1.08
    return _nearest_125(low, below=True), _nearest_125(high, below=False)


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten from `low` to `high`; only the powers when there would be more than 8."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    inside = [tick for tick in fine if low * 0.999 <= tick <= high * 1.001]
    if len(inside) <= 8:
        return inside
    return [tick for tick in (10.0**power for power in powers) if low * 0.999 <= tick <= high * 1.001]


def plain(value: float) -> str:
    """A tick as people write it: 0.05, 20, 1,000."""
    return f"{value:,.0f}" if value >= 1 else f"{value:.10f}".rstrip("0")


def spaced(points: Sequence[int], labels: Sequence[str], width: float) -> list[int]:
    """Which of the rising `points` of a log axis get their label, so that none touch; returns indices.

    Every n-th when the points are evenly spaced, else whatever has its own space, from the left.
    width   of the axis, in characters
    """
    if len(points) < 2:
        return list(range(len(points)))
    octaves = [math.log2(point / points[0]) for point in points]
    at = [octave * width / octaves[-1] for octave in octaves]

    def fits(one: int, other: int) -> bool:
        return at[other] - at[one] >= (len(labels[one]) + len(labels[other])) / 2 + 1.6

    steps = [b - a for a, b in zip(octaves, octaves[1:], strict=False)]
    if max(steps) - min(steps) < 0.1:
        for stride in range(1, len(points)):
            chosen = list(range(0, len(points), stride))
            if all(fits(a, b) for a, b in zip(chosen, chosen[1:], strict=False)):
                return chosen
    chosen = [0]
    for index in range(1, len(points)):
        if fits(chosen[-1], index):
            chosen.append(index)
    return chosen


def _nearest_125(value: float, below: bool) -> float:
    power = math.floor(math.log10(value))
    steps = [digit * 10.0**p for p in (power, power + 1) for digit in (1, 2, 5)]
    if below:
        return max(step for step in steps if step <= value)
    return min(step for step in steps if step >= value)
