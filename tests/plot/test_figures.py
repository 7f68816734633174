"""Figures: like with like, in units people read, the same bytes every time."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factory import collective_case, execution, moe_case, result

from collectivex.plot import figures, plans, style
from collectivex.plot.plans import Plan
from collectivex.runtime.summary import Summary, read_summary
from collectivex.runtime.types import Case, Routing

SIZES = (1 << 10, 1 << 14, 1 << 20)


def summary(folder: Path, documents: Sequence[dict[str, Any]]) -> Summary:
    return read_summary([execution(folder, documents)])


def plan_of(found: Summary) -> list[Plan]:
    return plans.plan(found.tables, found.executions)


def sweep(case: Case | None = None, **fields: Any) -> list[dict[str, Any]]:
    """One collective over three sizes."""
    case = case or collective_case()
    return [result(replace(case, shape=replace(case.shape, bytes=size)), **fields) for size in SIZES]


def ladder(*tokens: int, **fields: Any) -> list[dict[str, Any]]:
    return [result(moe_case(t), **fields) for t in tokens]


def drawn(found: Summary, regime: str = "fresh") -> Any:
    """The matplotlib figure of the only group of a regime."""
    (plan,) = [plan for plan in plan_of(found) if plan.tables[0].group.regime == regime]
    entries = (e for t in plan.tables for line in t.lines for e in line.entries)
    return figures.draw(plan, style.styles((e.label, e.way.backend) for e in entries))


def texts(figure: Any) -> str:
    """All text in a figure, on one line."""
    found = figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    return " ".join(" ".join(text.get_text() for text in found).split())


UNLIKE = {
    "operation": sweep(collective_case("broadcast")),
    "dtype": sweep(collective_case(dtype="bfloat16")),
    "mode": sweep(collective_case(mode="in-place")),
    "ranks": sweep(collective_case(ranks=2)),
    "nodes": sweep(collective_case(nodes=2)),
    "topology": sweep(collective_case(variant="v"), topology="xgmi"),
}


@pytest.mark.parametrize("fact", UNLIKE)
def test_unlike_keys_are_never_on_one_axis(tmp_path: Path, fact: str) -> None:
    """Each fact of the comparison key that differs makes figures of its own."""
    found = summary(tmp_path, sweep() + UNLIKE[fact])
    made = plan_of(found)
    assert len(made) == 4  # two groups, fresh and chained
    assert len({plan.name for plan in made}) == 4
    for plan in made:
        assert len({table.group for table in plan.tables}) == 1


def test_routings_and_workloads_get_figures_of_their_own(tmp_path: Path) -> None:
    """Seed, skew and shape of an exchange are part of its key."""
    documents = ladder(1, 2)
    for routing in (Routing("zipf", 1.0), Routing(seed=2), Routing(spread="one-empty")):
        documents += [result(moe_case(t, routing=routing)) for t in (1, 2)]
    smaller = [replace(moe_case(t), shape=replace(moe_case(t).shape, hidden=64)) for t in (1, 2)]
    documents += map(result, smaller)
    made = plan_of(summary(tmp_path, documents))
    assert len(made) == 10
    assert len({plan.name for plan in made}) == 10


def test_drawing_refuses_tables_of_unlike_groups(tmp_path: Path) -> None:
    """Even when somebody plans it: the code that draws does not."""
    one, other, *_ = plan_of(summary(tmp_path, sweep() + UNLIKE["dtype"]))
    mixed = replace(one, tables=(*one.tables, *other.tables))
    with pytest.raises(ValueError, match="2 groups cannot share a figure"):
        figures.draw(mixed, {})


def test_drawing_refuses_two_keys_at_one_size(tmp_path: Path) -> None:
    """The same facts under two keys would be two contracts: not on one axis."""
    (plan, _) = plan_of(summary(tmp_path, sweep()))
    table = plan.tables[0]
    other = replace(table.lines[0], key="0" * 16)
    forged = replace(plan, tables=(replace(table, lines=(*table.lines, other)),))
    with pytest.raises(ValueError, match="two comparison keys"):
        figures.draw(forged, {})


def test_a_single_size_makes_no_figure(tmp_path: Path) -> None:
    """There is no line through one point; the table has it."""
    assert plan_of(summary(tmp_path, [result()])) == []


def test_nothing_measured_makes_no_figure(tmp_path: Path) -> None:
    """Zero ok cells: no plan, no error."""
    assert plan_of(summary(tmp_path, sweep(status="failed"))) == []


def test_axes_are_logarithmic_with_units(tmp_path: Path) -> None:
    """Time in µs and bandwidth in GB/s over a size whose ticks are in binary units."""
    figure = drawn(summary(tmp_path, sweep()))
    time, rate = figure.axes
    assert {time.get_xscale(), time.get_yscale(), rate.get_yscale()} == {"log"}
    assert time.get_title(loc="left").endswith("µs")
    assert rate.get_title(loc="left").endswith("GB/s")
    assert [t.get_text() for t in time.get_xticklabels()] == ["1 KiB", "16 KiB", "1 MiB"]
    assert time.get_xlabel() == "size S"


def test_tokens_are_marked_as_decode_and_prefill(tmp_path: Path) -> None:
    """Where the ladder spans both, the border between 512 and 1024 is drawn."""
    figure = drawn(summary(tmp_path, ladder(1, 64, 512, 1024, 4096)))
    assert figure.axes[-1].get_xlabel() == "tokens per rank"
    assert "decode" in texts(figure)
    borders = [line.get_xdata()[0] for line in figure.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert any(math.isclose(at, math.sqrt(512 * 1024)) for at in borders)


def test_a_decode_ladder_has_no_border(tmp_path: Path) -> None:
    """Nothing to separate, nothing drawn."""
    assert "prefill" not in texts(drawn(summary(tmp_path, ladder(1, 64, 512))))


def test_each_component_has_its_own_panels(tmp_path: Path) -> None:
    """Round trip, dispatch and combine: time and bandwidth each."""
    figure = drawn(summary(tmp_path, ladder(1, 64)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        f"{component}: {what}"
        for component in ("roundtrip", "dispatch", "combine")
        for what in ("p50 time, µs", "remote bandwidth, GB/s")
    ]


def test_the_limit_is_drawn_with_its_source(tmp_path: Path) -> None:
    """A line at 450 GB/s in the bandwidth panel only; the caption says where the 450 are from."""
    figure = drawn(summary(tmp_path, sweep()))
    time, rate = figure.axes
    assert [line.get_ydata()[0] for line in rate.lines if len(set(line.get_ydata())) == 1] == [450.0]
    assert "450 GB/s scale-up" in texts(rate)
    assert "450" not in texts(time)
    assert "datasheet, NVIDIA H200 datasheet" in texts(figure)


def test_without_a_limit_none_is_drawn(tmp_path: Path) -> None:
    """A CPU has no datasheet."""
    assert "Limit" not in texts(drawn(summary(tmp_path, sweep(limits=None))))


def through(axes: Any) -> list[Any]:
    """The lines through sizes, without the caps of their bars."""
    return [
        line
        for line in axes.lines
        if len(line.get_xdata()) == len(SIZES) and line.get_marker() in style.MARKERS
    ]


def points(axes: Any) -> list[tuple[float, float]]:
    """What the lines through sizes go through."""
    return [(x, y) for line in through(axes) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_points_are_the_numbers_of_the_tables(tmp_path: Path) -> None:
    """What is drawn is what is written."""
    found = summary(tmp_path, sweep())
    table = next(t for t in found.tables if t.group.regime == "fresh")
    time, rate = drawn(found).axes
    assert points(time) == [(line.at, line.entries[0].us) for line in table.lines]
    assert points(rate) == [(line.at, (line.entries[0].GBps or {})["busbw"]) for line in table.lines]


def test_intervals_of_bandwidth_are_those_of_time_turned_over(tmp_path: Path) -> None:
    """bytes / high .. bytes / low: 10 to 12 us round 11 is 11/12 to 11/10 of the bandwidth."""
    documents = [d for run, us in enumerate((10.0, 11.0, 12.0)) for d in sweep(run=run, runs=3, us=us)]
    found = summary(tmp_path, documents)
    entry = found.tables[0].lines[0].entries[0]
    low, high = entry.interval or (0, 0)
    rate, worst, best = figures._rates(found.tables[0], entry)
    assert (worst / rate, best / rate) == pytest.approx((11 / high, 11 / low))


def test_intervals_are_bars_at_the_sizes_that_were_measured(tmp_path: Path) -> None:
    """A band between two sizes would claim what nobody measured: nothing is filled, and the bars stand at the
    points, from end to end of their intervals."""
    found = summary(tmp_path, sweep())
    time = drawn(found).axes[0]
    (bars,) = time.collections
    line = next(t for t in found.tables if t.group.regime == "fresh").lines[0]
    first = bars.get_segments()[0]
    assert len(bars.get_segments()) == len(SIZES)
    assert [x for x, _ in first] == [line.at, line.at]
    assert tuple(y for _, y in first) == pytest.approx(line.entries[0].interval)


def test_a_failed_size_leaves_a_gap(tmp_path: Path) -> None:
    """No line is drawn across a size that has no number."""
    a, b, c = sweep()
    others = sweep(collective_case(backend="other"))
    b = result(collective_case(size=SIZES[1]), status="failed")
    time = drawn(summary(tmp_path, [a, b, c, *others])).axes[0]
    gaps = [[math.isnan(y) for y in line.get_ydata()] for line in through(time)]
    assert sorted(gaps) == [[False, False, False], [False, True, False]]


def test_implausible_points_are_hollow_and_not_connected(tmp_path: Path) -> None:
    """Shown, and plainly set apart from what is ranked."""
    a, b, _ = sweep()
    bad = result(collective_case(size=SIZES[2]), status="implausible", us=0.5)
    figure = drawn(summary(tmp_path, [a, b, bad]))
    lines = through(figure.axes[0])
    hollow = [line for line in lines if line.get_markerfacecolor() == style.PAPER]
    assert [line.get_linestyle() for line in hollow] == ["None"]
    (solid,) = [line for line in lines if line not in hollow]
    assert [math.isnan(y) for y in solid.get_ydata()] == [False, False, True]
    assert "Hollow: implausible" in texts(figure)


def test_the_title_says_what_and_the_subtitle_where_and_when(tmp_path: Path) -> None:
    """A picture that is passed on alone still says what it shows."""
    said = texts(drawn(summary(tmp_path, sweep())))
    for fact in (
        "all_reduce",
        "float32",
        "out-of-place",
        "4 ranks",
        "h200x4-nvlink",
        "2026-11-20",
        "contract",
    ):
        assert fact in said
    assert "fresh: each call from a drained device" in said
    assert "no inference" in said


def test_the_caption_says_where_samples_are_means_of_blocks(tmp_path: Path) -> None:
    """In a chain a percentile is over blocks, from a drained device over calls."""
    found = summary(tmp_path, sweep())
    assert "means of blocks of calls" in texts(drawn(found, "chained"))
    assert "means of blocks" not in texts(drawn(found))


def test_zero_tokens_and_zero_times_do_not_break_a_log_axis(tmp_path: Path) -> None:
    """A rank may have nothing to send, and a coarse clock may read 0: neither has a place on the axis."""
    documents = [*ladder(0, 1, 64), result(moe_case(256), us=0.0)]
    figure = drawn(summary(tmp_path, documents))
    assert figure.axes[0].get_xlim()[0] > 0
    figure.canvas.draw()


def test_a_flat_line_and_a_component_with_one_size_are_drawn(tmp_path: Path) -> None:
    """Equal times have no range of their own; one point has no width."""
    documents = ladder(1, 64, us=10.0)
    documents[1]["measurements"] = [m for m in documents[1]["measurements"] if m["component"] != "combine"]
    drawn(summary(tmp_path, documents)).canvas.draw()


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    """No date, no random id: regenerated figures do not differ."""
    found = summary(tmp_path / "results", sweep())
    looks = style.styles([("torch_dist", "torch_dist")])
    made = []
    for name in ("a", "b"):
        paths = figures.save_all(plan_of(found), looks, tmp_path / name)
        made.append({path.name: path.read_bytes() for path in paths})
    assert made[0] == made[1]
    assert len(made[0]) == 4


def test_a_matplotlibrc_of_the_user_changes_nothing(tmp_path: Path) -> None:
    """Published figures do not depend on who draws them."""
    import matplotlib

    (plan, _) = plan_of(summary(tmp_path / "results", sweep()))
    looks = style.styles([("torch_dist", "torch_dist")])
    figures.save(plan, looks, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "xtick.major.size": 20}):
        figures.save(plan, looks, tmp_path / "b")
    for ending in ("png", "svg"):
        name = f"{plan.name}.{ending}"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_several_processes_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool changes the speed and nothing else."""
    found = summary(tmp_path / "results", sweep())
    looks = style.styles([("torch_dist", "torch_dist")])
    alone = figures.save_all(plan_of(found), looks, tmp_path / "a")
    monkeypatch.setattr(figures, "POOL_FROM", 1)
    monkeypatch.setattr(figures, "cores", lambda: 2)
    pooled = figures.save_all(plan_of(found), looks, tmp_path / "b")
    assert [path.read_bytes() for path in alone] == [path.read_bytes() for path in pooled]


def test_an_svg_is_well_formed_and_its_text_is_text(tmp_path: Path) -> None:
    """Whatever the backend is called; and the file can be searched for it."""
    name = "a<b>&\"'$x$ \x1b\u202e"
    found = summary(tmp_path / "results", sweep(collective_case(backend=name)))
    plan = plan_of(found)[0]
    (path, svg) = figures.save(plan, style.styles([(name, name)]), tmp_path / "out")
    text = svg.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert "a&lt;b&gt;&amp;" in text
    assert "$x$" in text
    assert "\x1b" not in text
    assert not re.search(r"<dc:date>", text)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_names_of_files_are_safe_and_tell(tmp_path: Path) -> None:
    """Slug, no separators: a workload cannot write elsewhere."""
    case = moe_case()
    evil = [replace(case, shape=replace(case.shape, workload="x/../../y z", tokens=t)) for t in (1, 2)]
    name = plan_of(summary(tmp_path, list(map(result, evil))))[0].name
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
    assert name.startswith("x-..-..-y-z-bf16-uniform-normal-fresh-n1r4-h200-nvlink")


def test_names_that_collide_are_told_apart(tmp_path: Path) -> None:
    """Two groups never overwrite each other's figure."""
    documents = []
    for hidden in (64, 128):
        shapes = [replace(moe_case(t).shape, hidden=hidden) for t in (1, 2)]
        documents += [result(replace(moe_case(), shape=shape)) for shape in shapes]
    names = [plan.name for plan in plan_of(summary(tmp_path, documents))]
    assert len(set(names)) == 4
