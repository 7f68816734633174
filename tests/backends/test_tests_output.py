"""Reading nccl-tests: each recorded form gives the numbers that stand in it, and nothing else passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collectivex.backends import _tests_output as output
from collectivex.backends._tests_output import Timing, Unreadable

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "nccl_tests"


def fixture(name: str) -> str:
    return (FIXTURES / name).read_text()


def test_the_oldest_table_is_read_by_its_header() -> None:
    """2.13: no version line, no line that it has begun or concluded, "#wrong" one character narrower."""
    report = output.read_text(fixture("all_reduce-2.13.10.txt"))
    assert (report.version, report.nccl, report.program, report.ranks) == (None, None, None, 4)
    assert [row.size for row in report.rows] == [1024, 4096, 16384]
    row = report.rows[-1]
    assert (row.dtype, row.redop, row.root) == ("float", "sum", -1)
    assert row.at == {"out-of-place": Timing(20.12, 1.22, 0), "in-place": Timing(19.88, 1.24, 0)}
    assert (report.complete, report.out_of_bounds, report.passed) == (True, 0, True)
    assert report.settings["iters"] == 20
    assert report.settings["nGpus"] == 4


def test_timestamps_are_two_words_and_no_column_of_numbers() -> None:
    """-S adds a date and a time to each row; N/A is `not checked`, which is not `nothing wrong`."""
    report = output.read_text(fixture("alltoall-2.18.0-timestamps.txt"))
    assert [row.at["out-of-place"].us for row in report.rows] == [236.2, 415.7]
    assert [row.at["out-of-place"].wrong for row in report.rows] == [0, 0]
    assert [row.at["in-place"].wrong for row in report.rows] == [None, None]
    assert (report.version, report.headers, report.nccl) == ("2.18.0", "2.29.7", "2.28.9")
    assert report.unreadable == []


def test_per_iteration_columns_do_not_shift_the_second_placement() -> None:
    """-I adds four columns to each placement."""
    report = output.read_text(fixture("all_reduce-2.19.6-per-iter.txt"))
    (row,) = report.rows
    assert (row.at["out-of-place"].us, row.at["in-place"].us) == (26.20, 25.90)
    assert row.at["in-place"].busbw == 60.73
    assert report.document == "/somewhere/all_reduce.json.0"


def test_debug_lines_between_and_inside_rows_are_taken_out() -> None:
    """NCCL_DEBUG=INFO writes into stdout wherever it is, also after the first five words of a row."""
    report = output.read_text(fixture("all_gather-2.18.5-debug.txt"))
    assert [row.size for row in report.rows] == [1024, 2048]
    assert report.rows[0].root == -1
    assert report.rows[0].at["out-of-place"].us == 11.5
    assert report.errors == ["something that NCCL found worth a warning"]
    assert report.unreadable == []


def test_large_numbers_have_an_exponent() -> None:
    """#wrong is %g, and a time of more than seven digits is 1.2e+06."""
    report = output.read_text(fixture("reduce-2.19.6-wrong.txt"))
    assert report.rows[1].at["out-of-place"].wrong == 1_000_000
    assert report.rows[2].at["in-place"].us == 1.2e6
    assert (report.out_of_bounds, report.passed) == (1, False)


def test_an_error_in_the_middle_of_a_row_is_kept_and_the_row_is_not() -> None:
    """Host names and build folders do not go along."""
    report = output.read_text(fixture("all_reduce-2.19.6-nccl-error.txt"))
    assert [row.size for row in report.rows] == [1024]
    assert report.errors == ["Test NCCL failure common.cu:612 'unhandled system error / Call to bind failed'"]
    assert not report.complete


def test_a_table_that_is_cut_anywhere_is_not_complete() -> None:
    """Whatever the last line is, without the footer there is no result, and never an exception."""
    text = fixture("all_reduce-2.19.6-per-iter.txt")
    footer = text.index("# Out of bounds")
    for end in range(0, footer + len("# Out of bounds values : 0"), 37):
        assert not output.read_text(text[:end]).complete


def test_rows_are_counted_when_they_are_whole() -> None:
    """A row that is still being printed is not progress."""
    text = fixture("all_reduce-2.13.10.txt")
    second = text.index("        4096")
    assert output.rows_in(text[:second]) == 1
    assert output.rows_in(text[: second + 60]) == 1
    assert output.rows_in(text) == 3


def test_a_fork_with_a_column_more_is_read_by_name() -> None:
    """The order is the header's, not a count."""
    text = (
        "#  size count type redop root ctas time algbw busbw #wrong time algbw busbw #wrong\n"
        "   1024 256 float sum -1 16 10.0 0.10 0.15 0 11.0 0.09 0.14 0\n"
    )
    (row,) = output.read_text(text).rows
    assert row.at["out-of-place"] == Timing(10.0, 0.15, 0)


def test_a_row_with_another_number_of_words_is_reported() -> None:
    """Neither guessed at nor dropped in silence."""
    text = "# size count type redop root time algbw busbw #wrong\n 1024 256 float sum -1 10.0 0.1 0.1\n"
    report = output.read_text(text)
    assert report.rows == []
    assert report.unreadable == ["1024 256 float sum -1 10.0 0.1 0.1"]


def test_launch_times_are_told_apart() -> None:
    """-C 1 prints another quantity in the same place."""
    text = "# size count type redop root cputime algbw busbw #wrong\n 8 2 float sum -1 1.0 0.1 0.1 0\n"
    assert output.read_text(text).cputime


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("all_reduce-2.17.3.json", ()),
        ("all_reduce-2.19.2-per-iter.json", (24.1, 25.0, 25.4, 29.5)),
        ("all_reduce-2.19.6-per-iter.json", (24.1, 25.0, 25.4, 29.5)),
    ],
)
def test_every_version_of_the_document_is_read(name: str, each: tuple[float, ...]) -> None:
    """1 has no per-iteration times, and a misspelt key; 2 has them; 3 can skip some in its summary."""
    report = output.read_json(fixture(name))
    (row,) = report.rows
    assert row.at["out-of-place"] == Timing(26.2, 60.03297709, 0, each)
    assert (row.size, row.root, report.nccl) == (1048576, -1, "2.28.9")
    assert (report.program, report.out_of_bounds, report.passed) == ("all_reduce_perf", 0, True)
    assert report.settings["iters"] == 4
    assert report.errors == []


def test_a_document_that_is_cut_short_is_unreadable() -> None:
    """An early failure leaves one behind, and a full disk any part of one."""
    text = fixture("all_reduce-2.19.6-per-iter.json")
    for end in range(0, len(text) - 3, 101):
        with pytest.raises(Unreadable):
            output.read_json(text[:end])


@pytest.mark.parametrize("version", [0, 4, "3", None])
def test_a_document_of_an_unknown_version_is_refused(version: object) -> None:
    """What a later version means by a name is not known."""
    found = json.loads(fixture("all_reduce-2.19.6-per-iter.json")) | {"version": version}
    with pytest.raises(Unreadable, match="file version"):
        output.read_json(json.dumps(found))


def test_a_document_closed_after_an_early_failure_is_unreadable() -> None:
    """Newer versions close the brackets when they fail: valid JSON without a footer."""
    found = json.loads(fixture("all_reduce-2.19.6-per-iter.json"))
    del found["out_of_bounds"]
    with pytest.raises(Unreadable, match="footer"):
        output.read_json(json.dumps(found))


def test_nan_is_a_string_in_the_document() -> None:
    """It is read as what it is; the verdict refuses it."""
    found = json.loads(fixture("all_reduce-2.17.3.json"))
    found["results"][0]["in_place"]["time"] = "nan"
    timing = output.read_json(json.dumps(found)).rows[0].at["in-place"]
    assert timing.us != timing.us


def test_what_is_kept_of_a_document_names_nobody() -> None:
    """The program writes down its whole environment, its host and its folder."""
    kept = output.without_private(fixture("all_reduce-2.19.6-per-iter.json"))
    assert "hunter2" not in kept
    assert "somebody" not in kept
    assert "gpunode7" not in kept
    assert json.loads(kept)["args"][0] == "all_reduce_perf"
    assert output.read_json(kept).rows == output.read_json(fixture("all_reduce-2.19.6-per-iter.json")).rows


def test_a_document_that_cannot_be_cleaned_is_not_kept() -> None:
    """The environment may be in the part that is there."""
    with pytest.raises(Unreadable):
        output.without_private(fixture("all_reduce-2.19.6-per-iter.json")[:900])


def test_output_of_a_real_run_on_four_gpus_is_read_whole() -> None:
    """2.19.6 on 4 x H200, four cycles of two sizes; the host's name and process ids were replaced."""
    report = output.read_text(fixture("h200x4-all_reduce-cycles.txt"))
    document = output.read_json(fixture("h200x4-all_reduce-cycles.json"))
    assert [row.size for row in report.rows] == [4096, 262144] * 4
    assert [row.size for row in document.rows] == [row.size for row in report.rows]
    assert (report.version, report.nccl, report.headers) == ("2.19.6", "2.28.9", "2.28.9")
    assert (report.ranks, report.complete, report.passed, report.unreadable) == (4, True, True, [])
    for told, exact in zip(report.rows, document.rows, strict=True):
        assert told.at["out-of-place"].us == pytest.approx(exact.at["out-of-place"].us, abs=0.006)


def test_a_real_run_that_was_killed_is_not_complete() -> None:
    """Three whole rows, no footer: recorded from a run whose time was up."""
    report = output.read_text(fixture("h200x4-all_reduce-per-iter-killed.txt"))
    assert len(report.rows) == 3
    assert not report.complete
    assert not report.passed


def test_the_library_that_was_loaded_is_told() -> None:
    """Version and times of a real run with NCCL 2.30.7 on 4 x H200."""
    report = output.read_text(fixture("h200x4-all_reduce-nccl-2.30.7.txt"))
    assert (report.nccl, report.headers) == ("2.30.7", "2.30.7")
    assert [row.at["in-place"].us for row in report.rows] == [27.43, 64.26, 322.13]
    assert report.passed
