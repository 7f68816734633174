"""Staging: what the nodes need goes there, and every result comes back or is missed aloud."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collectivex.runtime import provenance, staging
from collectivex.runtime.errors import InfraError
from collectivex.runtime.staging import Stage


def staged(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path / "stage")
    stage.fill(tmp_path / "none")
    (stage.out / "cells").mkdir(parents=True)
    (stage.out / "cells" / "a.r0.json").write_text("{}")
    cells = [{"cell_id": "a.r0", "status": "ok", "file": "cells/a.r0.json"}]
    cells += [{"cell_id": "b.r0", "status": "pending", "file": None}]
    (stage.out / "manifest.json").write_text(json.dumps({"cells": cells}))
    return stage


def test_the_stage_runs_like_the_checkout(tmp_path: Path) -> None:
    """All code folders, private to the user, with the commit they come from."""
    stage = staged(tmp_path)
    assert {p.name for p in stage.root.iterdir()} - {"REVISION"} == set(staging.CODE)
    assert stage.folder.stat().st_mode & 0o777 == 0o700
    assert (stage.root / "suites" / "smoke.yaml").is_file()


def test_what_is_staged_is_what_a_commit_must_agree_with() -> None:
    """A copy calls itself clean by the folders that provenance looks at; others in it would go unseen."""
    assert staging.CODE is provenance.CODE


def test_results_are_counted_when_they_are_back(tmp_path: Path) -> None:
    """Cells with a file, not files."""
    assert staged(tmp_path).bring_back(tmp_path / "out") == 1
    assert (tmp_path / "out" / "cells" / "a.r0.json").read_text() == "{}"


def test_a_result_that_does_not_come_back_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that swallows errors would give a shorter table and a green run."""
    stage = staged(tmp_path)
    monkeypatch.setattr(staging.shutil, "copytree", lambda *a, **k: None)
    with pytest.raises(InfraError, match="1 of 1 results did not come back"):
        stage.bring_back(tmp_path / "out")
    assert stage.out.is_dir(), "what was measured stays where it is"


def test_a_truncated_copy_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are compared, not names."""
    stage = staged(tmp_path)
    real = staging.shutil.copytree

    def short(*arguments: object, **more: object) -> None:
        real(*arguments, **more)  # type: ignore[arg-type]
        (tmp_path / "out" / "cells" / "a.r0.json").write_text("{")

    monkeypatch.setattr(staging.shutil, "copytree", short)
    with pytest.raises(InfraError, match="did not come back"):
        stage.bring_back(tmp_path / "out")


def test_a_resumed_folder_is_staged_too(tmp_path: Path) -> None:
    """Otherwise --resume would measure everything again."""
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    (out / "cells" / "old.json").write_text("{}")
    stage = Stage(tmp_path / "stage")
    stage.fill(out)
    assert (stage.out / "cells" / "old.json").is_file()


def test_a_stage_that_cannot_be_made_is_the_machines_fault(tmp_path: Path) -> None:
    """Exit code 3, and records."""
    (tmp_path / "stage").write_text("a file")
    with pytest.raises(InfraError, match="staging failed"):
        Stage(tmp_path / "stage").fill(tmp_path / "out")
