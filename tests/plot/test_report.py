"""The report: complete without scripts, safe whatever the results say, nothing loaded from anywhere."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from factory import collective_case, execution, failure, moe_case, result

from collectivex.plot import command, report
from collectivex.runtime import wording
from collectivex.runtime.bandwidth import FORMULAS
from collectivex.runtime.cli import main
from collectivex.runtime.errors import UserError
from collectivex.runtime.summary import Summary, read_summary

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Ids, headings, links, text and table rows of a page; unbalanced tags are collected as errors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.headings: list[int] = []
        self.labels: list[str] = []
        self.errors: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.errors += [f"{tag} is not closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name == "aria-labelledby":
                self.labels.append(value or "")
            elif name == "href" and tag == "a":
                self.targets.append(value or "")
            elif name in ("src", "srcset", "data", "action") or (name == "href" and tag == "link"):
                self.loads.append(f"{tag} {name}={value}")
            elif name.startswith("on"):
                self.errors.append(f"{tag} has {name}")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.errors.append(f"unexpected </{tag}>")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            return
        self.words.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def page(folder: Path, documents: Sequence[dict[str, Any]], **manifest: Any) -> tuple[Page, str, Summary]:
    found = read_summary([execution(folder / "results", documents, **manifest)])
    command.draw(found, folder / "out")
    html = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return Page(html), html, found


@pytest.fixture(scope="module")
def suite(suite_report: Path) -> tuple[Page, str, Summary]:
    html = suite_report.read_text(encoding="utf-8")
    return Page(html), html, read_summary([suite_report.parent / "results"])


def test_the_page_is_well_formed(suite: tuple[Page, str, Summary]) -> None:
    """Every tag is closed in order, ids are unique, every anchor and label has its target."""
    parsed, _, _ = suite
    assert parsed.errors == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {target.removeprefix("#") for target in parsed.targets} <= set(parsed.ids)
    assert set(parsed.labels) <= set(parsed.ids)


def test_headings_go_down_one_level_at_a_time(suite: tuple[Page, str, Summary]) -> None:
    """One h1, and no level is skipped: that is how a screen reader walks through the page."""
    levels = suite[0].headings
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_nothing_is_loaded_from_anywhere(suite: tuple[Page, str, Summary]) -> None:
    """No source, no style sheet, no font, no URL in CSS; and a policy that forbids it."""
    parsed, html, _ = suite
    assert parsed.loads == []
    assert "@import" not in html
    assert {url for url in re.findall(r"url\(([^)]*)\)", html) if not url.startswith("#")} == set()
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "default-src 'none'" in html


def test_the_headline_is_the_gate_with_its_denominator(suite: tuple[Page, str, Summary]) -> None:
    """The first thing said is how many of how many, and the verdict."""
    parsed, _, found = suite
    start = parsed.text[:400]
    assert found.verdict.line in start
    assert "Gate not passed" in start
    assert f"(exit {found.verdict.exit_code})" in start


def test_the_tables_are_those_of_the_summary(suite: tuple[Page, str, Summary]) -> None:
    """Every row of every table, cell by cell, without running a script."""
    parsed, _, found = suite
    shown = [[" ".join(cell.split()) for cell in row] for row in parsed.rows]
    rows = 0
    for table in found.tables:
        assert wording.header(table) in shown
        for line in table.lines:
            for entry in line.entries:
                assert wording.cells(table, line, entry, True) in shown
                rows += 1
    assert rows > 40


def test_every_figure_is_in_the_page(suite: tuple[Page, str, Summary]) -> None:
    """One inline SVG for each group, its colours those of the theme."""
    _, html, found = suite
    assert html.count("<svg") == len({table.group for table in found.tables}) == 4
    assert "var(--ink)" in html
    for colour in report._THEME:
        assert colour not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)


def test_everything_not_ok_is_listed_with_its_reason_and_stacks(suite: tuple[Page, str, Summary]) -> None:
    """Each reason, each cell, and of the timeout where every rank was."""
    parsed, html, found = suite
    for note in found.not_ok:
        assert note.text in parsed.text
        for cell in wording.cell_list(note.cells):
            assert cell in parsed.text
    for rank in range(4):
        assert f"rank {rank}: fresh dispatch, iteration 7, alive" in parsed.text
    assert "line 88 in dispatch" in parsed.text
    assert re.search(r"<details>\s*<summary>Where the ranks of", html), "stacks are folded"


def test_provenance_warnings_and_formulas_are_there(suite: tuple[Page, str, Summary]) -> None:
    """Libraries, driver and clocks; what was warned of; the definition of every formula that applies."""
    parsed, _, _ = suite
    rows = {row[0]: row[1] for row in parsed.rows if len(row) == 2}
    assert rows["driver"] == "580.95.05"
    assert rows["gpus"].startswith("4 × name NVIDIA H200, arch sm_90")
    assert "sm_mhz 1980.0" in rows["clocks before"]
    assert "clocks were throttled (1 cell)" in parsed.text
    for formula in FORMULAS.values():
        assert formula.definition in parsed.text


def test_the_definition_list_covers_every_regime(suite: tuple[Page, str, Summary]) -> None:
    """A reader of any figure finds what its regime means."""
    for regime in ("fresh", "chained", "graph", "kernel"):
        assert f"<dt>{regime}</dt>" in suite[1]


def test_light_and_dark_have_contrast(suite: tuple[Page, str, Summary]) -> None:
    """Text colours against paper and page in both themes: at least 4.5 (WCAG 2.2 AA)."""
    blocks = re.findall(r":root \{(.*?)\}", suite[1], flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for text in ("ink", "muted", "link", "good", "bad", "warn"):
            for ground in ("paper", "page"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, contrast ratio."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_report_without_any_number_says_why(tmp_path: Path) -> None:
    """Zero ok cells: the page opens, with the reasons and the stacks."""
    document = result(status="timeout", reason="no answer in 60 s", failure=failure())
    parsed, html, _ = page(tmp_path, [document])
    assert parsed.errors == []
    assert "No cell has a number to show" in parsed.text
    assert "no answer in 60 s" in parsed.text
    assert "<svg" not in html


def test_a_green_report_says_so(tmp_path: Path) -> None:
    """Nothing to list is said in words too."""
    parsed, _, _ = page(tmp_path, [result()])
    assert "Gate passed: every requested cell is ok" in parsed.text
    assert "Every requested cell is ok." in parsed.text


def test_results_cannot_put_markup_into_the_page(tmp_path: Path) -> None:
    """Names, reasons, stacks and provenance from anywhere are text, in attributes and in figures too."""
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
    cases = [collective_case(size=1 << p, backend=evil, variant=evil) for p in (10, 12)]
    documents = [result(case, warnings=[evil], topology=evil) for case in cases]
    where = failure()
    where["ranks"][0]["stack"] = evil
    documents.append(result(moe_case(), status="timeout", reason=evil, failure=where))
    documents[0]["provenance"]["driver"] = evil
    parsed, html, _ = page(tmp_path, documents)
    assert parsed.errors == []
    assert parsed.loads == []
    assert html.count("<script>") == 1
    assert "<img" not in html


def test_an_inlined_figure_keeps_its_own_ids() -> None:
    """Ids and what refers to them get the same prefix; only the neutral colours become the theme's."""
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg width="648pt" height="10pt" viewBox="0 0 9 9" version="1.1">'
        '<metadata>x</metadata><defs><style type="text/css">*{}</style></defs>'
        '<g id="a" clip-path="url(#p1)" style="fill: #1b1f25; stroke: #0072b2"/><use xlink:href="#a"/></svg>'
    )
    assert report.inline(svg, "f1") == (
        '<svg aria-hidden="true" focusable="false" viewBox="0 0 9 9" version="1.1"><defs></defs>'
        '<g id="f1-a" clip-path="url(#f1-p1)" style="fill: var(--ink); stroke: #0072b2"/>'
        '<use xlink:href="#f1-a"/></svg>'
    )


def test_facts_of_nested_documents_are_counted_not_repeated() -> None:
    """Four equal GPUs are one line; nulls are left out."""
    nested = {
        "gpus": [{"name": "x", "sms": 1}] * 4 + [{"name": "y", "sms": None}],
        "rocm": None,
        "a": {"b": 2},
    }
    assert list(report.facts(nested)) == [("gpus", "4 × name x, sms 1"), ("gpus", "name y"), ("a b", "2")]


def test_the_command_says_where_the_pictures_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two paths on stdout, how many figures on stderr; a red gate does not stop the drawing."""
    folder = execution(tmp_path / "results", [*_two_sizes(), result(moe_case(), status="failed")])
    out = tmp_path / "o ut"
    assert main(["plot", str(folder), "--out", str(out)]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == [str(out / "figures"), str(out / "report.html")]
    assert "2 figures" in stderr
    assert len(list((out / "figures").glob("*.png"))) == len(list((out / "figures").glob("*.svg"))) == 2


def test_a_manifest_that_cannot_be_read_leaves_nothing_to_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that names the file, exit 2, and no path of something that was not written."""
    folder = execution(tmp_path / "results", _two_sizes())
    whole = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(whole[: len(whole) // 2])
    assert main(["plot", str(folder), "--out", str(tmp_path / "out")]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert f"problem: {folder / 'manifest.json'} is not JSON, or truncated" in stderr
    assert f"error: nothing to draw: no manifest in {folder} can be read" in stderr
    assert "hint: " in stderr
    assert not (tmp_path / "out").exists()


def test_cells_without_a_number_leave_nothing_to_draw_and_a_report_of_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2; the hint names the report, which tells how every cell ended."""
    folder = execution(tmp_path / "results", [result(status="failed", reason="the disk is full")])
    assert main(["plot", str(folder), "--out", str(tmp_path / "out")]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "error: nothing to draw: no cell that was requested has a number" in stderr
    assert f"hint: {tmp_path / 'out' / 'report.html'} says" in stderr
    assert "the disk is full" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_one_size_makes_a_report_and_no_folder_of_figures_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no line through one point: what is printed is what was written."""
    folder = execution(tmp_path / "results", [result()])
    assert main(["plot", str(folder), "--out", str(tmp_path / "out")]) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout.splitlines() == [str(tmp_path / "out" / "report.html")]
    assert "no figure: a line needs two sizes" in stderr
    assert not (tmp_path / "out" / "figures").exists()


def _two_sizes() -> list[dict[str, Any]]:
    return [result(collective_case(size=1 << p)) for p in (10, 12)]


def test_plotting_into_the_execution_folder_leaves_its_results_readable(tmp_path: Path) -> None:
    """Figures lie beside the cells and are no results."""
    folder = execution(tmp_path, _two_sizes())
    command.draw_folders([folder], folder)
    assert read_summary([folder]).verdict.exit_code == 0


def test_drawing_twice_gives_the_same_report(tmp_path: Path) -> None:
    """Regenerating a published report makes no difference to review."""
    folder = execution(tmp_path / "results", _two_sizes())
    pages = []
    for name in ("a", "b"):
        command.draw_folders([folder], tmp_path / name)
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_no_results_and_no_place_to_write_are_the_users_errors(tmp_path: Path) -> None:
    """Exit 2 with a sentence, not a traceback."""
    with pytest.raises(UserError, match="no results"):
        command.command(argparse.Namespace(dirs=[tmp_path], out=str(tmp_path / "out")))
    folder = execution(tmp_path / "results", _two_sizes())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        command.command(argparse.Namespace(dirs=[folder], out=str(tmp_path / "file" / "out")))


def test_too_many_figures_are_cut_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cap is announced on stderr and in the report; the tables are all there."""
    monkeypatch.setattr(command, "MAX_FIGURES", 1)
    documents = _two_sizes() + [result(collective_case("broadcast", 1 << p)) for p in (10, 12)]
    parsed, html, found = page(tmp_path, documents)
    assert html.count("<svg") == 1
    assert "3 figures were not drawn" in parsed.text
    assert "3 more figures are not drawn" in capsys.readouterr().err
    assert html.count('<section class="card" id=') == len({t.group for t in found.tables}) == 4
