"""The gate: which results are good enough, and the same answer in every format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from factory import collective_case, execution, failure, measurement, moe_case, result

from collectivex.runtime import gate, summary
from collectivex.runtime.cli import main
from collectivex.runtime.errors import UserError
from collectivex.runtime.reading import Problem, Reading, read
from collectivex.runtime.types import Status


def cells(*statuses: str) -> list[dict[str, Any]]:
    """One cell for each status, of different sizes."""
    return [result(collective_case(size=1 << (10 + i)), status=status) for i, status in enumerate(statuses)]


CODES = [
    (("ok",), 0),
    (("ok", "unsupported"), 0),
    (("ok", "ok", "incorrect"), 1),
    (("ok", "implausible"), 1),
    (("ok", "failed"), 1),
    (("ok", "timeout"), 1),
    (("ok", "not-run"), 1),
    (("ok", "infra"), 3),
    (("infra",), 3),
    (("unsupported", "infra"), 3),
    (("ok", "infra", "failed"), 1),
    (("unsupported", "failed"), 1),
    (("unsupported",), 2),
]


@pytest.mark.parametrize("form", summary.FORMATS)
@pytest.mark.parametrize(("statuses", "code"), CODES)
def test_the_exit_code_is_the_same_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], statuses: tuple[str, ...], code: int, form: str
) -> None:
    """0 good, 1 bad, 2 nothing supported, 3 only infrastructure: whichever format is asked for."""
    folder = execution(tmp_path, cells(*statuses))
    assert summary.command(argparse.Namespace(dirs=[folder], format=form)) == code
    out, err = capsys.readouterr()
    assert out
    assert ("gate:" in err) == (code != 0)


@pytest.mark.parametrize("form", summary.FORMATS)
def test_a_missing_record_turns_the_gate_red_in_every_format(tmp_path: Path, form: str) -> None:
    """An absence is never green."""
    folder = execution(tmp_path, cells("ok"), missing=["gone-12345678.r0"])
    assert summary.command(argparse.Namespace(dirs=[folder], format=form)) == 1


@pytest.mark.parametrize("form", summary.FORMATS)
def test_a_stray_file_turns_the_gate_red_in_every_format(tmp_path: Path, form: str) -> None:
    """A problem is enough, although every requested cell is ok."""
    folder = execution(tmp_path, cells("ok"))
    (folder / "cells" / "stray.json").write_text("{")
    assert summary.command(argparse.Namespace(dirs=[folder], format=form)) == 1


@pytest.mark.parametrize("form", summary.FORMATS)
def test_an_empty_folder_is_the_users_error_in_every_format(tmp_path: Path, form: str) -> None:
    """Exit 2 and nothing on stdout: no results is not a green result."""
    with pytest.raises(UserError, match="no results") as error:
        summary.command(argparse.Namespace(dirs=[tmp_path], format=form))
    assert error.value.exit_code == 2
    assert main(["summarize", str(tmp_path), "--format", form]) == 2
    assert main(["summarize", str(tmp_path / "nowhere"), "--format", form]) == 2


def test_an_execution_that_asked_for_nothing_has_no_results(tmp_path: Path) -> None:
    """A manifest without cells is as empty as no manifest."""
    with pytest.raises(UserError, match="no results"):
        summary.read_summary([execution(tmp_path, [])])


def test_a_filter_of_the_tables_does_not_filter_the_gate(tmp_path: Path) -> None:
    """Looking at one regime cannot hide what failed in another."""
    folder = execution(tmp_path, cells("ok", "failed"))
    asked = argparse.Namespace(dirs=[folder], format="json", regime=["graph"], percentile="p99")
    assert summary.command(asked) == 1


def test_every_status_is_counted_with_the_denominator(tmp_path: Path) -> None:
    """ok over requested first, then the others by status; the sum is the denominator."""
    found = read([execution(tmp_path, cells("ok", "ok", "failed", "unsupported", "ok"), missing=["x-1.r0"])])
    verdict = gate.judge(found)
    assert verdict.line == "ok 3 / 6 requested · failed 1 · unsupported 1 · not-run 1"
    assert sum(verdict.counts.values()) == verdict.requested


def test_problems_are_counted_apart() -> None:
    """They are files, not cells."""
    verdict = gate.judge(Reading(problems=[Problem("a", "b")]))
    assert (verdict.line, verdict.exit_code) == ("ok 0 / 0 requested · problems 1", 1)


def test_cells_that_ended_alike_are_listed_together(tmp_path: Path) -> None:
    """All of them, grouped by status and reason, worst status first."""
    documents = cells("ok", "unsupported", "failed", "unsupported", "incorrect")
    documents[1]["reason"] = documents[3]["reason"] = "no such operation"
    notes = gate.not_ok(read([execution(tmp_path, documents)]).records)
    assert [(n.status, len(n.cells)) for n in notes] == [
        (Status.INCORRECT, 1),
        (Status.FAILED, 1),
        (Status.UNSUPPORTED, 2),
    ]
    listed = {cell for note in notes for cell in note.cells}
    assert listed == {d["identity"]["cell_id"] for d in documents if d["status"] != "ok"}


def warnings_of(tmp_path: Path, *documents: dict[str, Any]) -> list[str]:
    return [note.text for note in gate.warnings(read([execution(tmp_path, documents)]).records)]


def test_a_quiet_execution_has_no_warnings(tmp_path: Path) -> None:
    """Warnings that are always there are read by nobody."""
    assert warnings_of(tmp_path, result(), result(moe_case())) == []


def test_what_did_not_settle_is_said(tmp_path: Path) -> None:
    """By regime and component, so that one drifting series is not blamed on all."""
    document = result()
    document["measurements"][1]["settled"] = False
    assert warnings_of(tmp_path, document) == [
        "not settled: chained call still drifted while it was measured"
    ]


def test_an_early_stop_is_said(tmp_path: Path) -> None:
    """A budget that ran out leaves fewer samples than asked for."""
    document = result()
    document["measurements"][0]["stop_reason"] = "budget of 20 s reached"
    assert warnings_of(tmp_path, document) == ["stopped early: budget of 20 s reached"]


def test_outliers_are_counted_and_the_largest_named(tmp_path: Path) -> None:
    """Kept in the numbers, and said: 3 samples in all, the largest 5000 us in the second cell."""
    documents = cells("ok", "ok")
    for document, largest, count in zip(documents, (90.0, 5000.0), (1, 2), strict=True):
        document["measurements"][0]["max"]["outliers"] = {"count": count, "largest": largest, "indices": [0]}
    (text,) = warnings_of(tmp_path, *documents)
    assert text.startswith("outliers: 3 samples flagged and kept, the largest 5000 us in all_reduce-2048B")


def test_a_slow_first_call_is_said(tmp_path: Path) -> None:
    """214 ms before the first result matters to whoever starts an engine (NVIDIA/nccl#1487)."""
    (text,) = warnings_of(
        tmp_path, result(first_call_us=214_000.0), result(moe_case(), first_call_us=99_000.0)
    )
    assert text.startswith("slow first call: above 100 ms, the longest 214 ms in all_reduce")


def test_a_chain_that_waits_for_the_host_is_said(tmp_path: Path) -> None:
    """16.4 us launched call by call against 4.1 in a graph is the host's time, 1.19 times is not yet."""
    slow, near = collective_case(), collective_case(size=1 << 21)
    documents = []
    for case, chained in ((slow, 16.4), (near, 4.879)):
        document = result(case)
        periods = {"chained": chained, "graph": 4.1}
        document["measurements"] = [measurement(case, "call", r, us, "median") for r, us in periods.items()]
        documents.append(document)
    (note,) = gate.warnings(read([execution(tmp_path, documents)]).records)
    assert "4 times as long as replayed in all_reduce-1048576B" in note.text
    assert note.cells == (documents[0]["identity"]["cell_id"],)


def test_what_the_worker_warned_of_is_passed_on(tmp_path: Path) -> None:
    """The same words once for all cells, with the cells."""
    documents = cells("ok", "ok")
    for document in documents:
        document["warnings"] = ["clocks were throttled"]
    (note,) = gate.warnings(read([execution(tmp_path, documents)]).records)
    assert (note.text, len(note.cells)) == ("clocks were throttled", 2)


def test_a_teardown_crash_and_contract_only_are_said(tmp_path: Path) -> None:
    """Neither changes the number, both belong beside it."""
    document = result(teardown="signal SIGSEGV", backend={"validated": "contract-only"})
    assert warnings_of(tmp_path, document) == [
        "teardown: signal SIGSEGV",
        "contract-only: torch_dist was never validated on its hardware",
    ]


def test_a_failed_cell_keeps_where_its_ranks_were(tmp_path: Path) -> None:
    """The report folds the stacks out; reading must not drop them."""
    found = read([execution(tmp_path, [result(status="timeout", failure=failure())])])
    assert found.problems == []
    assert (found.records[0].failure or {})["ranks"][2]["iteration"] == 7
