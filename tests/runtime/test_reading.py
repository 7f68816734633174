"""Reading results: everything requested becomes one record, everything odd one problem."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factory import EXECUTION, collective_case, execution, moe_case, result, suite_results
from hypothesis import given, settings
from hypothesis import strategies as st

from collectivex.runtime import reading
from collectivex.runtime.errors import UserError
from collectivex.runtime.reading import read
from collectivex.runtime.records import LARGEST_FILE
from collectivex.runtime.types import Cell, Status, case_to_json


def two_cells() -> list[dict[str, Any]]:
    return [result(collective_case(size=1 << power)) for power in (20, 21)]


def cell_file(folder: Path, index: int = 0) -> Path:
    return sorted((folder / "cells").iterdir())[index]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def only_problem(found: reading.Reading) -> reading.Problem:
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


def test_every_requested_cell_is_one_record_in_the_order_of_the_manifest(tmp_path: Path) -> None:
    """A whole varied execution reads without a problem, cell by cell."""
    documents = suite_results(runs=2)
    found = read([execution(tmp_path, documents)])
    assert found.problems == []
    assert [r.cell_id for r in found.records] == [d["identity"]["cell_id"] for d in documents]
    assert [str(r.status) for r in found.records] == [d["status"] for d in documents]
    assert found.executions[0].name == EXECUTION
    assert found.executions[0].requested == len(documents)


def test_a_row_keeps_the_headline_reduction(tmp_path: Path) -> None:
    """fresh quotes the max over ranks, the floors of the chain the min; other reductions are left out."""
    documents = [result(moe_case(), us={"dispatch": 50, "combine": 60, "roundtrip": 120, **FLOORS})]
    rows = read([execution(tmp_path, documents)]).records[0].rows
    got = {(row.regime, row.component): (row.headline, row.times[0]) for row in rows}
    assert got == {
        ("fresh", "dispatch"): ("max", 50),
        ("fresh", "combine"): ("max", 60),
        ("fresh", "roundtrip"): ("max", 120),
        ("chained", "roundtrip"): ("median", 120),
        ("chained", "dispatch_floor"): ("min", 40),
        ("chained", "combine_floor"): ("min", 45),
    }


FLOORS = {"dispatch_floor": 40, "combine_floor": 45}


def test_bandwidths_are_kept_per_microsecond_by_formula(tmp_path: Path) -> None:
    """1 MiB all_reduce on 4 ranks: algbw S, busbw 2(n-1)/n S = 1.5 S (nccl-tests PERFORMANCE.md)."""
    row = read([execution(tmp_path, [result(collective_case())])]).records[0].rows[0]
    assert row.us_GBps == pytest.approx({"algbw": 1048.576, "busbw": 1572.864})


def test_an_interval_the_sample_could_not_give_is_none(tmp_path: Path) -> None:
    """100 samples bound the median and p95, not p99."""
    row = read([execution(tmp_path, [result(n=100)])]).records[0].rows[0]
    assert [interval is None for interval in row.intervals] == [False, False, False, True]
    assert [time is None for time in row.times] == [False, False, False, True, False, False]
    assert row.nulls == {"p99": "p99 needs 368 samples, has 100"}


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_text(p.read_text()[:700]), "truncated"),
    "empty": (lambda p: p.write_text(""), "truncated"),
    "not text": (lambda p: p.write_bytes(b"\xff\xfe\x00" * 99), "not JSON"),
    "not an object": (lambda p: p.write_text("[1, 2]"), "not a CollectiveX result"),
    "foreign": (lambda p: p.write_text('{"version": 3, "nccl": []}'), "not a CollectiveX result"),
    "a manifest": (
        lambda p: p.write_text('{"schema": "collectivex.manifest.v1"}'),
        "not a CollectiveX result",
    ),
    "too deep": (lambda p: p.write_text("[" * 100_000), "too deeply"),
    "not a number": (lambda p: p.write_text('{"schema": NaN}'), "NaN"),
    "an unknown key": (lambda p: edit(p, lambda d: d.update(note="x")), "note: unknown key"),
    "ok without a check": (lambda p: edit(p, lambda d: d.update(correctness=None)), "correctness"),
    "failed with a number": (
        lambda p: edit(p, lambda d: d.update(status="failed", reason="x")),
        "measurements",
    ),
    "a newer schema": (
        lambda p: edit(p, lambda d: d.update(schema="collectivex.result.v2")),
        "newer CollectiveX",
    ),
    "a newer contract": (lambda p: edit(p, lambda d: d.update(contract="2099.1-1")), "newer CollectiveX"),
    "another cell": (lambda p: p.write_text(json.dumps(result(moe_case()))), "holds a record of"),
    "another execution": (
        lambda p: edit(p, lambda d: d["identity"].update(execution="x")),
        "belongs to execution x",
    ),
    "a changed case": (lambda p: edit(p, lambda d: d["case"]["shape"].update(bytes=7)), "was changed"),
    "a changed run": (lambda p: edit(p, lambda d: d["identity"].update(run=1)), "was changed"),
    "a changed key": (
        lambda p: edit(p, lambda d: d["measurements"][0].update(comparison_key="0" * 16)),
        "comparison key",
    ),
    "a changed place": (
        lambda p: edit(p, lambda d: d["identity"].update(topology_class="x")),
        "comparison key",
    ),
    "a negative time": (
        lambda p: edit(p, lambda d: d["measurements"][0]["max"].update(p50=-1)),
        "negative time",
    ),
    "an infinite time": (
        lambda p: p.write_text(re.sub(r'"p99": [\d.]+', '"p99": 1e999', p.read_text(), count=1)),
        'is not of type "number"',
    ),
    "a number without end": (
        lambda p: edit(p, lambda d: d["measurements"][0]["max"].update(p50=10**400)),
        "too large",
    ),
    "an interval without end": (
        lambda p: edit(p, lambda d: d["measurements"][0]["max"]["intervals"]["p50"].update(high=10**400)),
        "too large",
    ),
    "bytes without end": (lambda p: edit(p, lambda d: d["bytes"].update(size=10**400)), "too large"),
    "bytes of another family": (
        lambda p: edit(p, lambda d: d.update(bytes=result(moe_case())["bytes"])),
        "bytes",
    ),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
    "a dangling link": (lambda p: (p.unlink(), p.symlink_to("nowhere")), "not a regular file"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "not a regular file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_problem_and_its_cell_did_not_run(tmp_path: Path, name: str) -> None:
    """One bad file: one problem that says why, a not-run record in its place, all others read as ever."""
    spoil, why = BAD_FILES[name]
    folder = execution(tmp_path, two_cells())
    spoil(cell_file(folder))
    found = read([folder])
    assert why in only_problem(found).reason
    assert only_problem(found).path == str(cell_file(folder))
    bad, good = found.records
    assert (bad.status, bad.rows) == (Status.NOT_RUN, ())
    assert only_problem(found).reason in (bad.reason or "")
    assert good.status is Status.OK
    assert good.rows


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    """A sparse file of a terabyte costs a bounded read, not the machine's memory."""
    folder = execution(tmp_path, two_cells())
    with open(cell_file(folder), "wb") as file:
        file.truncate(LARGEST_FILE + (1 << 30))
    assert "larger than" in only_problem(read([folder])).reason


def test_an_older_contract_is_read(tmp_path: Path) -> None:
    """Old published results stay readable; their comparison keys keep them apart from new ones."""
    found = read([execution(tmp_path, [result(contract="2026.1-1")])])
    assert found.problems == []
    assert found.records[0].contract == "2026.1-1"


def test_a_cell_without_a_file_did_not_run(tmp_path: Path) -> None:
    """An absence is a record: not-run, with the reason that the manifest allows."""
    folder = execution(tmp_path, two_cells(), missing=["gone-12345678.r1"])
    record = read([folder]).records[-1]
    assert (record.cell_id, record.case_id, record.run) == ("gone-12345678.r1", "gone-12345678", 1)
    assert (record.status, record.reason) == (
        Status.NOT_RUN,
        "it left no record; the execution did not complete",
    )


def test_a_file_that_vanished_is_told_from_one_that_never_was(tmp_path: Path) -> None:
    """The manifest says ok and the record is gone: the reason names the contradiction."""
    folder = execution(tmp_path, two_cells())
    cell_file(folder).unlink()
    record = read([folder]).records[0]
    assert (record.status, record.reason) == (
        Status.NOT_RUN,
        "its record is missing, although the manifest says ok",
    )


def test_a_record_finished_after_the_manifest_was_written_counts(tmp_path: Path) -> None:
    """A crash between record and manifest loses nothing: `pending` with a file is what the file says."""
    document = result()
    folder = execution(tmp_path, [document])
    edit(folder / "manifest.json", lambda m: m["cells"][0].update(status="pending", file=None))
    found = read([folder])
    assert (found.problems, found.records[0].status) == ([], Status.OK)


def test_a_record_and_a_manifest_that_disagree_are_a_problem(tmp_path: Path) -> None:
    """Changing a status in one place is noticed; the record's own status is counted."""
    folder = execution(tmp_path, [result(status="failed")])
    edit(folder / "manifest.json", lambda m: m["cells"][0].update(status="ok"))
    found = read([folder])
    assert only_problem(found).reason == "says failed, its manifest says ok"
    assert found.records[0].status is Status.FAILED


def test_a_result_that_was_not_requested_is_a_problem(tmp_path: Path) -> None:
    """A stray file is not counted and not ignored."""
    folder = execution(tmp_path, two_cells())
    (folder / "cells" / "stray.json").write_text(json.dumps(result(moe_case())))
    found = read([folder])
    assert only_problem(found).reason.startswith("is not in the manifest")
    assert len(found.records) == 2


def test_a_second_record_of_one_cell_is_a_problem(tmp_path: Path) -> None:
    """Two files for one cell: the listed one counts, the other is named."""
    folder = execution(tmp_path, two_cells())
    first = cell_file(folder)
    (folder / "cells" / "again.json").write_text(first.read_text())
    found = read([folder])
    assert "is a second record of" in only_problem(found).reason
    assert [r.status for r in found.records] == [Status.OK, Status.OK]


def test_a_cell_that_is_listed_twice_is_counted_once(tmp_path: Path) -> None:
    """The denominator is not inflated by a repeated line in the manifest."""
    folder = execution(tmp_path, two_cells())
    edit(folder / "manifest.json", lambda m: m["cells"].append(m["cells"][0]))
    found = read([folder])
    assert "twice" in only_problem(found).reason
    assert len(found.records) == 2


def test_a_file_outside_the_folder_is_not_followed(tmp_path: Path) -> None:
    """A manifest cannot make us read elsewhere: its cell counts as missing."""
    folder = execution(tmp_path / "a", [result()])
    (tmp_path / "secret.json").write_text(cell_file(folder).read_text())
    edit(folder / "manifest.json", lambda m: m["cells"][0].update(file="../secret.json"))
    found = read([folder])
    assert found.records[0].status is Status.NOT_RUN


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: p.write_text("{"), "truncated"),
        (lambda p: edit(p, lambda m: m.update(schema="collectivex.manifest.v7")), "newer CollectiveX"),
        (lambda p: edit(p, lambda m: m.update(cells="all")), "does not follow the schema: cells"),
        (lambda p: edit(p, lambda m: m.update(schema="other")), "not a CollectiveX manifest"),
    ],
)
def test_a_bad_manifest_is_a_problem_and_other_executions_are_read(
    tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    """Without its manifest nobody knows what was requested: nothing of that execution is counted, and each
    record is named."""
    bad = execution(tmp_path / "bad", [result(execution="bad")])
    execution(tmp_path / "good", [result(execution="good")])
    spoil(bad / "manifest.json")
    found = read([tmp_path])
    problem, orphan = found.problems
    assert why in problem.reason
    assert (orphan.path, "is an orphan" in orphan.reason) == (str(cell_file(bad)), True)
    assert [e.name for e in found.executions] == ["good"]
    assert len(found.records) == 1


def test_cells_without_a_manifest_are_a_problem(tmp_path: Path) -> None:
    """Results that nothing speaks for are not silently left out, and the hint says how to count them."""
    folder = execution(tmp_path / "a", [result()])
    (folder / "manifest.json").unlink()
    found = read([tmp_path])
    problem, orphan = found.problems
    assert (problem.path, orphan.path) == (str(folder / "cells"), str(cell_file(folder)))
    assert "--resume, makes it anew" in problem.reason
    assert found.records == []


def test_executions_are_found_at_any_depth_and_read_once(tmp_path: Path) -> None:
    """results/ holds many; naming a folder and its parent reads it once."""
    one = execution(tmp_path / "results" / "2026" / "one", [result(execution="one")])
    execution(tmp_path / "results" / "two", [result(execution="two")])
    found = read([tmp_path / "results", one, tmp_path / "results" / "two"])
    assert found.problems == []
    assert sorted(e.name for e in found.executions) == ["one", "two"]
    assert len(found.records) == 2


def test_a_copy_of_an_execution_is_left_out(tmp_path: Path) -> None:
    """The same cells twice would look like two runs."""
    execution(tmp_path / "a", [result()])
    execution(tmp_path / "b", [result()])
    found = read([tmp_path])
    assert "already read" in only_problem(found).reason
    assert len(found.records) == 1


def test_what_a_crashed_writer_left_is_ignored(tmp_path: Path) -> None:
    """Temporary names of the atomic writer are no results."""
    folder = execution(tmp_path, [result()])
    (folder / "cells" / ".x.json.abc.tmp").write_text("{")
    (folder / "cells" / ".half.json").write_text("{")
    assert read([folder]).problems == []


def test_a_folder_that_is_not_there_is_the_users_error(tmp_path: Path) -> None:
    """Exit 2 with the name, not an empty table."""
    with pytest.raises(UserError, match="no folder"):
        read([tmp_path / "nowhere"])


def test_a_file_or_the_inside_of_an_execution_is_the_users_error(tmp_path: Path) -> None:
    """The hint names the folder to give instead."""
    folder = execution(tmp_path / "a", [result()])
    with pytest.raises(UserError, match="is not a folder") as error:
        read([folder / "manifest.json"])
    assert str(folder) in str(error.value.hint)
    with pytest.raises(UserError, match="inside an execution") as error:
        read([folder / "cells"])
    assert str(folder) in str(error.value.hint)


def test_provenance_is_kept_once_for_each_backend(tmp_path: Path) -> None:
    """Memory grows with backends, not with cells; the first measured cell speaks."""
    documents = suite_results()
    found = read([execution(tmp_path, documents)])
    assert set(found.provenance) == {(0, "torch_dist"), (0, "symm_mem")}
    assert found.provenance[0, "torch_dist"]["driver"] == "580.95.05"


def test_several_processes_read_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool changes the speed and nothing else."""
    folder = execution(tmp_path, suite_results())
    cell_file(folder, 3).write_text("{")
    alone = read([folder])
    monkeypatch.setattr(reading, "POOL_FROM", 2)
    monkeypatch.setattr(reading, "CHUNK", 7)
    pooled = read([folder], processes=2)
    assert pooled == alone
    assert len(alone.problems) == 1


@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_to_a_file_stops_the_reading(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever bytes are cut or overwritten: a record or a problem, and the other cell as ever."""
    folder = execution(tmp_path_factory.mktemp("x"), two_cells())
    path = cell_file(folder)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content)))
    new = data.draw(st.binary(max_size=40))
    cut = data.draw(st.integers(0, 400))
    content[at : at + cut] = new
    path.write_bytes(bytes(content))
    found = read([folder])
    assert len(found.records) == 2
    assert found.records[1].status is Status.OK
    assert found.problems or found.records[0].status is Status.OK


def test_the_factory_writes_what_the_types_say(tmp_path: Path) -> None:
    """Guards the other tests: the made-up documents are valid and name their cells as `Cell` does."""
    case = moe_case(tokens=16)
    document = result(case, run=2)
    assert document["identity"]["cell_id"] == Cell(case, 2).id
    assert document["case"] == case_to_json(case)
    assert read([execution(tmp_path, [document])]).problems == []
