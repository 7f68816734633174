"""The three formats: text for terminals, Markdown that stays Markdown, JSON that stays the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factory import collective_case, execution, moe_case, result, suite_results

from collectivex.runtime import summary, summary_json, wording
from collectivex.runtime.cli import main
from collectivex.runtime.records import Limit
from collectivex.runtime.summary import markdown, read_summary, text
from collectivex.runtime.summary_json import to_json
from collectivex.runtime.types import comparison_key

ROOT = Path(__file__).resolve().parents[2]
Golden = Callable[[str, str], None]
NASTY = (
    "a|b `c` <img src=x onerror=alert(1)> [l](http://x) *s* \x1b[31mred\x1b[0m \u202eltr\nnext | line &amp;"
)


def plain(found: summary.Summary) -> str:
    return "".join("".join(span for span, _ in line).rstrip() + "\n" for line in text(found))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Three runs of a varied suite in a folder, with a missing cell, a warning and a stray file."""
    documents = suite_results(runs=3)
    documents[0]["measurements"][0]["settled"] = False
    folder = execution(tmp_path / "out", documents, missing=["gone-12345678.r0"])
    (folder / "cells" / "stray.json").write_text('{"schema": "other"}')
    return folder


def test_the_text_form_is_as_reviewed(suite: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    """The whole text, byte for byte."""
    monkeypatch.chdir(suite)
    golden("summary/suite.txt", plain(read_summary(["."])))


def test_the_markdown_form_is_as_reviewed(
    suite: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    """The whole Markdown, byte for byte."""
    monkeypatch.chdir(suite)
    golden("summary/suite.md", "\n".join(markdown(read_summary(["."]))) + "\n")


def test_the_json_form_is_as_reviewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    """The whole document: whoever parses it may rely on it."""
    documents = [result(run=run, runs=3) for run in range(3)]
    documents += [result(moe_case(), warnings=["clocks"]), result(moe_case(256), status="failed")]
    monkeypatch.chdir(execution(tmp_path, documents))
    (tmp_path / "cells" / "stray.json").write_text("{}")
    golden("summary/small.json", json.dumps(_rounded(to_json(read_summary(["."]))), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Floats to 9 digits: the last bits of exp and log may differ between machines."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def test_the_json_form_has_the_keys_its_documentation_names(suite: Path) -> None:
    """Every key stands in the docstring of the module, which is the documentation."""

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            free = {"counts", "GBps", "knobs"}  # their keys are data
            if "bandwidth" in value:
                of_formulas = (value["bandwidth"] or {}).values()
                value = {**value, "bandwidth": list(of_formulas)}
            return set(value) | {k for name, v in value.items() if name not in free for k in keys(v)}
        return {key for inner in value for key in keys(inner)} if isinstance(value, list) else set()

    documented = set(re.findall(r"\w+", summary_json.__doc__ or ""))
    assert keys(to_json(read_summary([suite]))) - documented == set()


def test_json_on_stdout_is_one_document_and_nothing_else(
    suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Problems and hints go to stderr, data to stdout."""
    code = main(["summarize", str(suite), "--format", "json"])
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["gate"]["exit_code"] == code == 1
    assert "stray.json is not a CollectiveX result" in err


def test_every_number_of_every_format_is_the_same(suite: Path) -> None:
    """What the text and the Markdown show are the rounded numbers of the JSON."""
    found = read_summary([suite])
    first = to_json(found)["tables"][0]["lines"][0]["entries"][0]
    row = next(line for line in plain(found).splitlines() if " 1 KiB " in line)
    assert first["label"] in row
    assert f" {first['us']:.2f} " in row
    assert f" {first['p99_us']:.2f} " in row
    assert any(f"| {first['us']:.2f} |" in line for line in markdown(found))


def test_json_is_written_an_item_a_line_and_says_what_the_data_say(
    suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is that of the whole document, whichever encoder makes it."""
    main(["summarize", str(suite), "--format", "json"])
    out = capsys.readouterr().out
    expected = to_json(read_summary([suite]))
    assert json.loads(out) == json.loads(json.dumps(expected))
    assert sum(line.startswith('{"group": ') for line in out.splitlines()) == len(expected["tables"])


def only_entry(folder: Path, document: dict[str, Any], percentile: str = "p50") -> dict[str, Any]:
    """The JSON entry of the only line of the regime fresh."""
    found = to_json(read_summary([execution(folder, [document])], percentile, ["fresh"]))
    return found["tables"][0]["lines"][0]["entries"][0]


@pytest.mark.parametrize(("percentile", "needs"), [("p90", 36), ("p95", 72), ("p99", 368)])
def test_a_percentile_that_the_sample_cannot_bound_is_no_number(
    tmp_path: Path, percentile: str, needs: int
) -> None:
    """A dash in the tables, null and the reason in JSON: one sample less than it takes, and one more."""
    short = read_summary([execution(tmp_path / "a", [result(n=needs - 1)])], percentile)
    row = wording.cells(short.tables[0], short.tables[0].lines[0], short.tables[0].lines[0].entries[0], True)
    assert row[2] == "–"
    assert any(re.search(r" –( |$)", line) for line in plain(short).splitlines())
    entry = to_json(short)["tables"][0]["lines"][0]["entries"][0]
    assert (entry["us"], entry["interval"], entry["GBps"], entry["standing"]) == (None, None, None, "")
    assert entry["us_reason"] == f"{percentile} needs {needs} samples, has {needs - 1}"
    enough = only_entry(tmp_path / "b", result(n=needs), percentile)
    assert enough["us"] > 0
    assert enough["us_reason"] is None


def test_the_column_of_p99_has_a_dash_where_there_are_too_few_samples(tmp_path: Path) -> None:
    """Of 100 samples the maximum would stand there under another name."""
    found = read_summary([execution(tmp_path, [result(n=100)])], regimes=["fresh"])
    table = found.tables[0]
    shown = dict(
        zip(
            wording.header(table),
            wording.cells(table, table.lines[0], table.lines[0].entries[0], True),
            strict=True,
        )
    )
    assert shown["p99 µs"] == "–"
    assert shown["p50 µs"] != "–"
    entry = to_json(found)["tables"][0]["lines"][0]["entries"][0]
    assert (entry["p99_us"], entry["p99_reason"]) == (None, "p99 needs 368 samples, has 100")


def test_one_run_with_too_few_samples_leaves_no_percentile_of_the_case(tmp_path: Path) -> None:
    """Two runs with 512 samples do not lend theirs to a third with 100."""
    documents = [result(run=run, runs=3, n=n) for run, n in enumerate((512, 100, 512))]
    found = to_json(read_summary([execution(tmp_path, documents)], "p99", ["fresh"]))
    assert found["tables"][0]["lines"][0]["entries"][0]["us"] is None


def test_a_median_of_few_samples_stands_without_an_interval(tmp_path: Path) -> None:
    """It is the middle of what there is, and JSON says why nothing bounds it."""
    entry = only_entry(tmp_path, result(n=2, us=10.0))
    assert (entry["us"], entry["interval"]) == (10.0, None)
    assert "p50 needs 6 samples, has 2" in entry["interval_reason"]


def test_the_legend_says_what_a_dash_is_and_what_samples_of_a_chain_are(tmp_path: Path) -> None:
    """With the numbers that the statistics use; blocks only where a table has them."""
    folder = execution(tmp_path, [result()])
    fresh, chained = (
        wording.legend(read_summary([folder], regimes=[r]).tables) for r in ("fresh", "chained")
    )
    assert any(
        line.startswith("–: ") and "p90 needs 36, p95 needs 72, p99 needs 368" in line for line in fresh
    )
    assert not any("mean of a block" in line for line in fresh)
    assert any("mean of a block" in line for line in chained)


def test_bandwidth_is_told_per_rank_and_in_all_at_typical_mean_and_longest_time(tmp_path: Path) -> None:
    """1 MiB all_reduce of 4 ranks, p50 10 us; factory: mean 1.002 and maximum 1.08 times that. busbw is
    1.5 S over the time, of a rank; the aggregate is that of four."""
    entry = only_entry(tmp_path, result(us=10.0))
    per_rank, aggregate = entry["bandwidth"]["busbw"]["per_rank"], entry["bandwidth"]["busbw"]["aggregate"]
    at = 1.5 * (1 << 20) / 10 / 1e3
    assert per_rank == pytest.approx({"at_us": at, "at_mean": at / 1.002, "at_max": at / 1.08})
    assert aggregate == pytest.approx({name: 4 * value for name, value in per_rank.items()})
    assert entry["GBps"]["busbw"] == pytest.approx(at)
    assert (entry["mean_us"], entry["max_us"]) == pytest.approx((10.02, 10.8))


def test_a_formula_that_its_source_quotes_in_total_is_shared_out_over_the_ranks(tmp_path: Path) -> None:
    """FlashInfer adds up all ranks: its GB/s is the aggregate here, and a quarter of it a rank's."""
    entry = only_entry(tmp_path, result(moe_case(), us=100.0))
    flashinfer = entry["bandwidth"]["flashinfer"]
    assert flashinfer["aggregate"]["at_us"] == pytest.approx(entry["GBps"]["flashinfer"])
    assert flashinfer["per_rank"]["at_us"] == pytest.approx(entry["GBps"]["flashinfer"] / 4)
    remote = entry["bandwidth"]["remote"]
    assert remote["per_rank"]["at_us"] == pytest.approx(entry["GBps"]["remote"])


def test_minimum_and_spread_over_ranks_are_told(tmp_path: Path) -> None:
    """Beside the maximum that fresh quotes; factory: the minimum is 0.95 of it, the spread 0.05."""
    entry = only_entry(tmp_path, result(us=10.0))
    assert entry["over_ranks"] == pytest.approx({"min": 9.5, "spread": 0.5})


def test_one_clock_for_all_ranks_tells_nothing_over_ranks(tmp_path: Path) -> None:
    """An external program reduces over ranks itself: a spread of 0 would be a claim."""
    document = result()
    for one in document["measurements"]:
        one["regime"] = "loop"
        one["comparison_key"] = comparison_key(
            collective_case(), "loop", document["identity"]["topology_class"]
        )
    document["case"]["regimes"] = ["loop"]
    case = replace(collective_case(), regimes=("loop",))
    document["identity"].update(case_id=case.id, cell_id=f"{case.id}.r0")
    found = to_json(read_summary([execution(tmp_path, [document])]))
    assert found["tables"][0]["lines"][0]["entries"][0]["over_ranks"] == {"min": None, "spread": None}


@pytest.mark.parametrize(("percentile", "us"), [("mean", 10.02), ("max", 10.8)])
def test_tables_can_show_the_mean_and_the_maximum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], percentile: str, us: float
) -> None:
    """By the same option; bandwidths are then over that time, and within a run nothing bounds it."""
    folder = execution(tmp_path, [result(us=10.0)])
    assert main(["summarize", str(folder), "--percentile", percentile]) == 0
    assert f" {percentile} µs " in capsys.readouterr().out
    found = to_json(read_summary([folder], percentile, ["fresh"]))
    entry = found["tables"][0]["lines"][0]["entries"][0]
    assert found["percentile"] == percentile
    assert entry["us"] == pytest.approx(us)
    assert entry["GBps"]["algbw"] == pytest.approx((1 << 20) / us / 1e3)
    assert "of percentiles" in entry["interval_reason"]


def test_a_mean_over_three_runs_has_an_interval(tmp_path: Path) -> None:
    """Inference is over runs, whatever each run is reduced to."""
    documents = [result(run=run, runs=3, us=us) for run, us in enumerate((10.0, 10.1, 9.9))]
    found = to_json(read_summary([execution(tmp_path, documents)], "mean", ["fresh"]))
    entry = found["tables"][0]["lines"][0]["entries"][0]
    assert entry["inference"]
    assert entry["interval"][0] < entry["us"] < entry["interval"][1]


def rows_of(lines: list[str]) -> list[list[str]]:
    """The tables of a Markdown text as GitHub cuts them: at every pipe that is not escaped."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]


def test_every_markdown_table_is_rectangular(suite: Path) -> None:
    """GitHub drops cells beyond the header's and pads missing ones: neither may happen."""
    lines = list(markdown(read_summary([suite])))
    widths = set()
    for at, line in enumerate(lines):
        if set(line) <= set("|-: ") and line.startswith("|"):
            end = next(i for i in range(at, len(lines)) if not lines[i].startswith("|"))
            block = rows_of(lines[at - 1 : end])
            assert len({len(row) for row in block}) == 1
            assert lines[at - 2] == "", "a table needs an empty line before it"
            widths.add(len(block[0]))
    assert widths


def nasty_documents() -> list[dict[str, Any]]:
    """Foreign text in every free field that a summary shows."""
    evil = replace(collective_case(), backend=NASTY, variant=NASTY)
    moe = moe_case(backend="x")
    shape = replace(moe.shape, workload=NASTY)
    return [
        result(evil, warnings=[NASTY]),
        result(replace(moe, shape=shape), topology=NASTY),
        result(moe, status="failed", reason=NASTY),
    ]


def test_markdown_is_safe_against_what_results_contain(tmp_path: Path) -> None:
    """No pipe breaks a table, no tag or link gets through, no line is broken, no escape code is left."""
    lines = list(markdown(read_summary([execution(tmp_path, nasty_documents())])))
    whole = "\n".join(lines)
    assert not re.search(r"(?<!\\)[<>`]", re.sub(r"\*\*", "", whole))
    assert not re.search(r"(?<!\\)\[l", whole)
    assert not any(line.startswith("next") for line in lines)
    assert "\x1b" not in whole
    assert "\u202e" not in whole
    assert len({len(row) for row in rows_of(lines) if len(row) > 3}) == 1


def test_text_is_safe_against_what_results_contain(tmp_path: Path) -> None:
    """Control characters of foreign results never reach a terminal, and a reason stays on its line."""
    shown = plain(read_summary([execution(tmp_path, nasty_documents())]))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert not any(line.startswith("next") for line in shown.splitlines())


def test_text_is_plain_when_it_is_not_a_terminal(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pipes and files get no escape codes, and each line as long as it is."""
    main(["summarize", str(suite)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) > 80


def test_text_has_colour_on_a_terminal_unless_told_not_to(
    suite: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich decides; with NO_COLOR there is no colour left, and without its escapes the text is the same."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["summarize", str(suite)])
    colour = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(["summarize", str(suite)])
    without = capsys.readouterr().out
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", colour)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", without)
    bare = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", colour).splitlines()]
    assert bare == [line.rstrip() for line in plain(read_summary([suite])).splitlines()]


def test_every_cell_that_is_not_ok_is_listed(suite: Path) -> None:
    """All of them, in text and Markdown, runs of a case together."""
    found = read_summary([suite])
    for shown in (plain(found), "\n".join(markdown(found)).replace("\\", "")):
        for note in found.not_ok:
            for cell in wording.cell_list(note.cells):
                assert cell in shown
    assert "deepep-expand-timeout-" in plain(found)


def test_a_filter_by_regime_keeps_its_tables_only(suite: Path) -> None:
    """The counts stay those of everything requested."""
    found = read_summary([suite], regimes=["chained"])
    assert {table.group.regime for table in found.tables} == {"chained"}
    assert found.verdict == read_summary([suite]).verdict


def test_asking_for_a_percentile_shows_it(suite: Path) -> None:
    """p95 in the heading, once; p99 beside it."""
    found = read_summary([suite], percentile="p95")
    assert wording.header(found.tables[0])[2:5] == ["p95 µs", "95 % interval", "p99 µs"]
    assert wording.header(read_summary([suite], percentile="p99").tables[0]).count("p99 µs") == 1


def test_the_script_works_from_a_bare_checkout_and_anywhere(suite: Path, tmp_path: Path) -> None:
    """`python summarize.py DIR` without our package installed, from any folder, with the gate's exit code."""
    command = [sys.executable, "-S", str(ROOT / "summarize.py"), str(suite), "--format", "markdown"]
    paths = [path for path in sys.path if "site-packages" in path]
    environment = {"PYTHONPATH": ":".join(paths), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "\n".join(markdown(read_summary([suite]))) + "\n"


def test_the_script_explains_itself() -> None:
    """--help names the formats, and exits 0."""
    command = [sys.executable, str(ROOT / "summarize.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "markdown" in done.stdout


def test_a_table_without_limits_has_no_column_for_them(tmp_path: Path) -> None:
    """A CPU has no limit to be a share of, so nothing is left empty."""
    table = read_summary([execution(tmp_path, [result(limits=None)])]).tables[0]
    assert "of limit" not in wording.header(table)
    entry = table.lines[0].entries[0]
    assert len(wording.cells(table, table.lines[0], entry, True)) == len(wording.header(table))


def test_a_regime_that_an_ok_case_did_not_measure_is_said(tmp_path: Path) -> None:
    """A graph that was refused at one size is not shown as an empty success."""
    cases = [replace(collective_case(size=1 << p), regimes=("fresh", "chained")) for p in (10, 12)]
    documents = [result(case) for case in cases]
    documents[1]["measurements"].pop()
    table = read_summary([execution(tmp_path, documents)], regimes=["chained"]).tables[0]
    assert wording.cells(table, table.lines[1], table.lines[1].entries[0], True)[2] == "not measured"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (512, "512 B"), (1024, "1 KiB"), (3 << 19, "1.5 MiB"), (1 << 30, "1 GiB"), (1000, "1000 B")],
)
def test_sizes_are_said_in_binary_units(count: int, said: str) -> None:
    """1 KiB is 1024 bytes; what no unit divides is still exact to four digits."""
    assert wording.size(count) == said


@pytest.mark.parametrize(
    ("value", "said"), [(9.234, "9.23"), (12.06, "12.06"), (123.44, "123.4"), (4567.8, "4568")]
)
def test_times_have_the_digits_a_clock_can_give(value: float, said: str) -> None:
    """Two decimals below 100 us, none from 1000 us on."""
    assert wording.us(value) == said


def test_runs_of_one_case_are_listed_as_ranges() -> None:
    """r0 to r2 and r4 of one case on one line; another case on its own."""
    assert wording.cell_list(["a-1.r0", "a-1.r1", "b-2.r0", "a-1.r2", "a-1.r4", "odd"]) == [
        "a-1.r0-r2,r4",
        "b-2.r0",
        "odd",
    ]


def test_a_limit_says_where_it_comes_from() -> None:
    """A share of a limit is worth what its source is."""
    said = wording.limit_source(Limit("scale-up", 450.0, "datasheet", "the vendor's table"))
    assert said == "Limit 450 GB/s scale-up: datasheet, the vendor's table"
