"""Ticks, limits and styles of figures."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectivex.plot import style

positive = st.floats(1e-6, 1e9)


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2, definition of relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@given(st.lists(positive, min_size=1, max_size=9))
def test_limits_enclose_all_values_at_round_numbers(values: list[float]) -> None:
    """Whatever is drawn is inside, and both ends are 1, 2 or 5 times a power of ten, so both have a tick."""
    low, high = style.log_limits(values)
    assert low < min(values) <= max(values) < high
    for end in (low, high):
        mantissa = end / 10 ** math.floor(math.log10(end) + 1e-9)
        assert any(math.isclose(mantissa, digit, rel_tol=1e-6) for digit in (1, 2, 5, 10))


@given(positive, st.floats(1.0, 1e6))
def test_there_are_always_two_ticks_and_never_a_crowd(low: float, ratio: float) -> None:
    """From a flat line to six decades the axis stays readable."""
    limits = style.log_limits([low, low * ratio])
    ticks = style.log_ticks(*limits)
    assert 2 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert limits[0] * 0.99 <= ticks[0]
    assert ticks[-1] <= limits[1] * 1.01


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.05, "0.05"), (0.5, "0.5"), (1, "1"), (20, "20"), (1000, "1,000"), (5e6, "5,000,000")],
)
def test_ticks_are_plain_numbers(value: float, said: str) -> None:
    """No powers, no exponents."""
    assert style.plain(value) == said


def test_evenly_spaced_sizes_keep_an_even_stride() -> None:
    """Powers of two that do not all fit are labelled every n-th, not at random."""
    points = [1 << p for p in range(14)]
    chosen = style.spaced(points, [str(p) for p in points], width=50)
    assert len({b - a for a, b in zip(chosen, chosen[1:], strict=False)}) == 1


@given(st.lists(st.integers(1, 1 << 30), min_size=1, max_size=30, unique=True), st.integers(20, 90))
def test_labels_of_sizes_never_touch(points: list[int], width: int) -> None:
    """Half of each of two neighbours' characters fits between their centres."""
    points = sorted(points)
    labels = [str(point) for point in points]
    chosen = style.spaced(points, labels, width)
    assert chosen[0] == 0
    whole = math.log2(points[-1] / points[0]) or 1.0
    for a, b in zip(chosen, chosen[1:], strict=False):
        gap = math.log2(points[b] / points[a]) / whole * width
        assert gap >= (len(labels[a]) + len(labels[b])) / 2


def test_styles_differ_by_more_than_colour() -> None:
    """18 labels: no two look alike, and neighbours in colour have another marker."""
    made = style.styles(f"label {i}" for i in range(18))
    assert len({(s.colour, s.dash) for s in made.values()}) == 18
    first_six = list(made.values())[:6]
    assert len({s.marker for s in first_six}) == len({s.colour for s in first_six}) == 6


def test_a_label_has_one_style_whatever_the_order() -> None:
    """The same backend looks the same in every figure of a report."""
    assert style.styles(["b", "a", "c"]) == style.styles(["c", "b", "a", "a"])


@pytest.mark.parametrize("colour", [style.INK, style.MUTED])
def test_text_has_contrast(colour: str) -> None:
    """WCAG 2.2 AA asks for 4.5 for text."""
    assert contrast(colour, style.PAPER) >= 4.5


@pytest.mark.parametrize("colour", style.COLOURS)
def test_lines_stand_out_from_light_and_dark_paper(colour: str) -> None:
    """The lightest line against white and the darkest against the report's dark paper keep a difference; the
    marker and the table carry the rest."""
    assert contrast(colour, style.PAPER) >= 2.0
    assert contrast(colour, "#171b21") >= 3.0
