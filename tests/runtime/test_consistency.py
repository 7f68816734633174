"""What every reader asks of a record: changed numbers, verdicts, names and samples are counted as broken."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factory import collective_case, execution, result, sidecar

from collectivex.runtime import summary
from collectivex.runtime.reading import Reading, read
from collectivex.runtime.types import Status


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cells, both ok."""
    return execution(tmp_path, [result(collective_case(size=1 << power)) for power in (20, 21)])


def cell_file(folder: Path) -> Path:
    return min((folder / "cells").iterdir())


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def why(found: Reading) -> str:
    """The one problem, of the one record that is not counted."""
    (problem,) = found.problems
    assert [r.status for r in found.records] == [Status.NOT_RUN, Status.OK]
    assert problem.reason in (found.records[0].reason or "")
    return problem.reason


def stats(document: dict[str, Any], reduction: str = "max") -> dict[str, Any]:
    return document["measurements"][0][reduction]


def fail_a_check(document: dict[str, Any]) -> None:
    document["correctness"]["checks"][0]["passed"] = False


def ignore_a_knob(document: dict[str, Any]) -> None:
    document["knobs"] = {"sms": {"requested": 24, "realised": 20}}


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a median below its minimum": (
        lambda d: stats(d).update(p50=1.0),
        "[0].max: percentiles are not in order",
    ),
    "a median outside its interval": (
        lambda d: stats(d).update(p50=stats(d)["min"]),
        "is not inside its interval",
    ),
    "a minimum over ranks above the maximum": (
        lambda d: d["measurements"][0].update(max=stats(d, "spread")),
        "the median above the maximum",
    ),
    "a mean outside": (lambda d: stats(d).update(mean=1.0), "max.mean: 1.0 is not between"),
    "a failed check": (fail_a_check, "says True, its checks say False"),
    "an ignored knob": (ignore_a_knob, "24 asked, 20 applied, and still ok"),
    "another sku": (
        lambda d: d["identity"].update(sku="b300"),
        "is of sku b300, its manifest of h200x4-nvlink",
    ),
    "another suite": (lambda d: d["identity"].update(suite="x"), "is of suite x, its manifest of smoke"),
    "another contract": (lambda d: d.update(contract="2026.1-1"), "comparison key"),
    "no samples": (
        lambda d: d.update(samples=None, status="implausible", reason="too fast"),
        "it names none",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_record_that_contradicts_itself_or_its_manifest_is_not_believed(folder: Path, name: str) -> None:
    """Valid by the schema, and still no number: the cell did not run as far as anybody can tell."""
    change, reason = CHANGED[name]
    edit(cell_file(folder), change)
    assert reason in why(read([folder]))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


SIDECARS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda p: p.unlink(), "cannot be read: No such file"),
    "truncated": (cut, "is truncated, or of another result"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read: Invalid argument"),
    "plain text": (lambda p: p.write_text("forty microseconds"), "is not gzip"),
    "of fewer samples": (lambda p: p.write_bytes(sidecar(10)), "is truncated, or of another result"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "is not a regular file"),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_a_number_without_its_raw_samples_is_not_believed(folder: Path, name: str) -> None:
    """Their file is looked at, without unpacking it."""
    spoil, reason = SIDECARS[name]
    spoil(folder / json.loads(cell_file(folder).read_text())["samples"]["file"])
    assert reason in why(read([folder]))


def test_samples_under_another_name_are_not_believed(folder: Path) -> None:
    """The name is the hash that `cx validate` checks."""
    edit(cell_file(folder), lambda d: d["samples"].update(sha256="0" * 64))
    assert "is not named by 000000" in why(read([folder]))


def test_an_older_contract_does_not_excuse_another_place(tmp_path: Path) -> None:
    """The comparison key is made with the contract that the result names."""
    folder = execution(tmp_path, [result(contract="2026.1-1")])
    edit(cell_file(folder), lambda d: d["identity"].update(topology_class="x"))
    (problem,) = read([folder]).problems
    assert "comparison key" in problem.reason


@pytest.mark.parametrize("form", summary.FORMATS)
def test_a_changed_number_turns_the_gate_red_in_every_format(
    folder: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 1, and the reason for people."""
    edit(cell_file(folder), lambda d: stats(d).update(p50=1.0))
    assert summary.command(argparse.Namespace(dirs=[folder], format=form)) == 1
    assert "percentiles are not in order between minimum and maximum" in capsys.readouterr().err
