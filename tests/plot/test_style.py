"""Ticks, limits and styles of figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

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


# Linear sRGB as seen (Machado, Oliveira and Fernandes 2009, severity 1.0).
MACHADO = {
    "typical": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanope": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranope": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
}


def oklab(colour: str, seen: str) -> list[float]:
    """A colour as seen, in OKLab (B. Ottosson, "A perceptual color space for image processing", 2020)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    rgb = [min(max(value, 0.0), 1.0) for value in times(MACHADO[seen], linear)]
    lms = ((0.41222, 0.53633, 0.05145), (0.21190, 0.68070, 0.10740), (0.08830, 0.28172, 0.62998))
    lab = ((0.21045, 0.79362, -0.00407), (1.97800, -2.42859, 0.45059), (0.02590, 0.78277, -0.80868))
    return times(lab, [value ** (1 / 3) for value in times(lms, rgb)])


def times(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


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


def ways(counts: Sequence[int]) -> list[tuple[str, str]]:
    """(label, backend): so many variants of each backend."""
    return [(f"b{b:02} v{v}", f"b{b:02}") for b, count in enumerate(counts) for v in range(count)]


def test_lines_of_a_full_figure_are_unmistakable() -> None:
    """Nine backends with up to four variants: a colour for each backend; of any two lines that share it both
    marker and dash differ, and of any two that share a dash the marker."""
    labels = ways([2, 2, 3, 3, 4, 3, 1, 3, 3])
    made = style.styles(labels)
    assert len(set(made.values())) == len(labels)
    assert len({made[label].colour for label, _ in labels}) == 9
    for (one, of_one), (other, of_other) in itertools.combinations(labels, 2):
        a, b = made[one], made[other]
        assert (a.colour == b.colour) == (of_one == of_other)
        if of_one == of_other:
            assert a.marker != b.marker
            assert a.dash != b.dash
        elif a.dash == b.dash:
            assert a.marker != b.marker


def test_few_lines_have_a_colour_each() -> None:
    """Variants of one backend alone are told apart by colour as well."""
    made = style.styles(ways([6, 3]))
    assert len({of.colour for of in made.values()}) == 9


def test_more_backends_than_colours_still_differ() -> None:
    """The eleventh has the colour of the first, and never its marker."""
    made = style.styles(ways([7] * 12))
    assert len(set(made.values())) == 84


def test_a_label_has_one_style_whatever_the_order() -> None:
    """The same backend looks the same in every figure of a report."""
    some = ways([2, 1])
    assert style.styles(some) == style.styles([*reversed(some), some[0]])


def test_colours_differ_as_everybody_sees_them() -> None:
    """To typical and to colour-blind eyes: no two of the ten are closer in OKLab than the closest two of the
    six by Okabe and Ito."""
    closest = {
        colours: min(
            math.dist(oklab(one, seen), oklab(other, seen))
            for seen in MACHADO
            for one, other in itertools.combinations(colours, 2)
        )
        for colours in (style.COLOURS, style.COLOURS[:6])
    }
    assert closest[style.COLOURS] >= closest[style.COLOURS[:6]]


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
