"""Files are whole or not there, and a disk that is full costs nothing that was already written."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os

import pytest

from collectivex.runtime.errors import InfraError, UserError
from collectivex.runtime.writing import set_aside, write_bytes, write_json, write_result, write_samples


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_left(tmp_path):
    """No temporary file stays beside it."""
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})

    assert {"x": 2} == json.loads((tmp_path / "a.json").read_text())
    assert ["a.json"] == os.listdir(tmp_path)


def test_a_full_disk_is_an_infrastructure_error_and_the_old_file_stays(tmp_path, monkeypatch):
    """The rename comes last: what was there before is still whole."""
    write_json(tmp_path / "a.json", {"x": 1})

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(InfraError, match="No space left") as caught:
        write_json(tmp_path / "a.json", {"x": 2})
    assert "--resume" in str(caught.value.hint)
    assert {"x": 1} == json.loads((tmp_path / "a.json").read_text())
    assert ["a.json"] == os.listdir(tmp_path)


def test_a_folder_that_is_a_file_is_the_users_to_change(tmp_path):
    """The error names the path and the option."""
    (tmp_path / "file").write_text("")

    with pytest.raises(UserError, match="cannot write") as caught:
        write_bytes(tmp_path / "file" / "a.json", b"")
    assert "--out" in str(caught.value.hint)


def test_nan_is_our_bug(tmp_path):
    """A number that is none must not reach a file."""
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})


def test_samples_are_named_by_what_is_in_the_file(tmp_path):
    """The name is the sha256 of the bytes, and the same samples give the same bytes."""
    series = [
        {"component": "op", "regime": "fresh", "trials": 1, "per_sample": 1, "per_rank_us": [[1.0, 2.0]]}
    ]

    reference = write_samples(tmp_path, "cell", series)
    again = write_samples(tmp_path, "cell", series)

    data = (tmp_path / reference["file"]).read_bytes()
    assert reference == again
    assert hashlib.sha256(data).hexdigest() == reference["sha256"]
    assert series == json.loads(gzip.decompress(data))["series"]


def test_samples_go_with_a_record_that_could_not_be_written(tmp_path):
    """Nothing would name them, and a full disk needs the room; samples of other cells stay."""
    kept = write_samples(tmp_path, "other", [])
    lost = write_samples(tmp_path, "cell", [])
    (tmp_path / "cells").write_text("in the way")

    with pytest.raises(UserError, match="cannot write"):
        write_result(tmp_path, "cell", {"samples": lost})

    assert [tmp_path / kept["file"]] == list((tmp_path / "samples").iterdir())


def test_what_is_set_aside_is_kept_beside_the_logs(tmp_path):
    """A record under the time it was written at, for there may be more of its name."""
    write_json(tmp_path / "cells" / "a.r0.json", {})
    os.utime(tmp_path / "cells" / "a.r0.json", (7, 7))
    lost = tmp_path / write_samples(tmp_path, "cell", [])["file"]

    set_aside(tmp_path, tmp_path / "cells" / "a.r0.json")
    set_aside(tmp_path, lost)

    assert {"a.r0.7.json", lost.name} == set(os.listdir(tmp_path / "logs" / "superseded"))
    assert [] == os.listdir(tmp_path / "cells")


def test_a_file_that_cannot_be_set_aside_is_the_users_to_change(tmp_path):
    """An error and a hint."""
    write_json(tmp_path / "a.json", {})
    (tmp_path / "logs").write_text("in the way")

    with pytest.raises(UserError, match="cannot write"):
        set_aside(tmp_path, tmp_path / "a.json")
