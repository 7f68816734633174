"""`--resume`: the records decide what is done, a manifest can be lost, and what is in the way is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from factory import EXECUTION, collective_case, execution, result

from collectivex.runtime.errors import UserError
from collectivex.runtime.manifest import Manifest
from collectivex.runtime.reading import read
from collectivex.runtime.types import Cell, Status

CELLS = [Cell(collective_case(size=1 << power)) for power in (20, 21, 22)]
OK = [Status.OK] * len(CELLS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished execution of three cells."""
    return execution(tmp_path / "out", [result(cell.case) for cell in CELLS])


def record(out: Path, index: int = 0) -> Path:
    return out / "cells" / f"{CELLS[index].id}.json"


def samples(out: Path, index: int = 0) -> Path:
    return out / json.loads(record(out, index).read_text())["samples"]["file"]


def resumed(out: Path, cells: list[Cell] = CELLS) -> Manifest:
    return Manifest.open(out, "smoke", "h200x4-nvlink", ["cx", "run"], cells, True)


def kept(out: Path) -> list[str]:
    """What was set aside, by name."""
    return sorted(path.name for path in (out / "logs" / "superseded").glob("*"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_finished_execution_is_left_as_it_is(out: Path) -> None:
    """Everything is done, nothing moves."""
    before = {path: path.read_bytes() for path in (*out.glob("cells/*"), *out.glob("samples/*"))}
    assert list(resumed(out).cells.values()) == OK
    assert before == {path: path.read_bytes() for path in before}
    assert kept(out) == []


SPOILT: dict[str, Callable[[Path], object]] = {
    "truncated": lambda out: cut(record(out)),
    "empty": lambda out: record(out).write_text(""),
    "changed": lambda out: edit(record(out), lambda d: d["measurements"][0]["max"].update(p50=1.0)),
    "of another execution": lambda out: edit(record(out), lambda d: d["identity"].update(execution="x")),
    "without its samples": lambda out: samples(out).unlink(),
    "with samples cut short": lambda out: cut(samples(out)),
    "a link to nowhere": lambda out: (record(out).unlink(), record(out).symlink_to("nowhere")),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_record_that_cannot_be_believed_runs_again_and_is_kept(
    out: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest's word is not enough; people are told why."""
    SPOILT[how](out)
    assert list(resumed(out).cells.values()) == [None, Status.OK, Status.OK]
    assert not record(out).exists()
    assert [name for name in kept(out) if name.startswith(CELLS[0].id)]
    assert "its cell runs again" in capsys.readouterr().err
    assert read([out]).problems == []


def test_a_record_that_is_gone_runs_again(out: Path) -> None:
    """Its samples belong to nothing then, and are kept beside the logs."""
    name = samples(out).name
    record(out).unlink()
    assert list(resumed(out).cells.values()) == [None, Status.OK, Status.OK]
    assert kept(out) == [name]


def test_a_record_newer_than_the_manifest_is_done(out: Path) -> None:
    """A crash between the two loses nothing."""
    edit(out / "manifest.json", lambda d: d["cells"][1].update(status="pending", file=None))
    assert list(resumed(out).cells.values()) == OK


BROKEN: dict[str, Callable[[Path], object]] = {
    "truncated": cut,
    "empty": lambda path: path.write_text(""),
    "null": lambda path: path.write_text("null"),
    "without its cells": lambda path: edit(path, lambda d: d.pop("cells")),
    "of an unknown status": lambda path: edit(path, lambda d: d["cells"][0].update(status="fine")),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_manifest_is_made_anew_from_the_plan_and_the_records(out: Path, how: str) -> None:
    """Under its own name, so that what was measured counts; a cell without a record is pending."""
    record(out, 2).unlink()
    samples_left = len(list((out / "samples").iterdir()))
    BROKEN[how](out / "manifest.json")
    there = (out / "manifest.json").exists()
    made = resumed(out)
    assert (made.execution, made.created_at) == (EXECUTION, "2026-11-20T10:15:00Z")
    assert list(made.cells.values()) == [Status.OK, Status.OK, None]
    assert len([name for name in kept(out) if name.startswith("manifest.")]) == there
    assert len(list((out / "samples").iterdir())) == samples_left - 1
    found = read([out])
    assert found.problems == []
    assert [r.status for r in found.records] == [Status.OK, Status.OK, Status.NOT_RUN]


def refused(out: Path, why: str, cells: list[Cell] = CELLS) -> None:
    """An error with a hint, and nothing was touched."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=why) as error:
        resumed(out, cells)
    assert error.value.hint
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_broken_manifest_without_a_record_is_refused(out: Path) -> None:
    """Nobody can say whose it is, and nothing would be gained."""
    for index in range(3):
        record(out, index).unlink()
    cut(out / "manifest.json")
    refused(out, "no record beside it says what was measured")


def test_a_broken_manifest_beside_records_of_another_plan_is_refused(out: Path) -> None:
    """A part of what was asked for then would make strays of the rest."""
    cut(out / "manifest.json")
    refused(out, "beside it is of another plan", CELLS[:2])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(schema="package.v1"), "is not a manifest that can be resumed"),
        (lambda d: d.update(contract="2020.01-1"), "was made under contract 2020.01-1"),
        (lambda d: d.update(suite="other"), "holds another plan"),
    ],
)
def test_a_manifest_of_something_else_is_refused(
    out: Path, change: Callable[[dict], object], why: str
) -> None:
    """Foreign, older, of another suite: it is whole, and not ours to make anew."""
    edit(out / "manifest.json", change)
    refused(out, why)


def test_records_of_another_contract_are_refused_with_a_broken_manifest(tmp_path: Path) -> None:
    """Two contracts are never mixed in one execution."""
    out = execution(tmp_path / "out", [result(cell.case, contract="2020.01-1") for cell in CELLS])
    cut(out / "manifest.json")
    refused(out, "was made under contract 2020.01-1")


def test_what_a_full_disk_left_behind_is_set_aside(out: Path) -> None:
    """Samples that no record names, and temporary files of the writer."""
    names = [f"{'0' * 64}.json.gz", ".manifest.json.abc.tmp", ".x.json.def.tmp", ".y.gz.ghi.tmp"]
    for folder, name in zip(("samples", ".", "cells", "samples"), names, strict=True):
        (out / folder / name).write_bytes(b"half")
    assert list(resumed(out).cells.values()) == OK
    assert kept(out) == sorted(names)
    assert len(list((out / "samples").iterdir())) == len(CELLS)


def test_without_resume_a_folder_that_lost_its_manifest_is_not_taken_for_empty(out: Path) -> None:
    """The hint says how to go on."""
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="already holds an execution") as error:
        Manifest.open(out, "smoke", "h200x4-nvlink", [], CELLS, False)
    assert "--resume" in str(error.value.hint)
