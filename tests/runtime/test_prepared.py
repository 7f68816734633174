"""The environment of a prepared library reaches its own ranks and nobody else's."""

from __future__ import annotations

import json
import os

import pytest

from collectivex.runtime import prepared
from collectivex.runtime.errors import UserError


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/mine", ""]))
    return tmp_path


def test_search_paths_come_before_the_inherited_ones(libraries) -> None:
    """Ours first, then what was there; variables that are set are set."""
    (libraries / "deepep").mkdir()
    said = {"prepend": {"PYTHONPATH": ["/lib/deepep", "/lib/nccl"]}, "set": {"CUDA_HOME": "/cuda"}}
    (libraries / "deepep" / prepared.FILE).write_text(json.dumps(said))

    found = prepared.variables("deepep")

    assert {
        "PYTHONPATH": os.pathsep.join(["/lib/deepep", "/lib/nccl", "/mine"]),
        "CUDA_HOME": "/cuda",
    } == found
    assert {} == prepared.variables("uccl_ep")


@pytest.mark.parametrize("text", ["", "[]", '{"prepend": {"PYTHONPATH": 3}}', '{"set": 1}'])
def test_a_broken_file_says_how_to_make_it_anew(libraries, text) -> None:
    """No traceback: the path and the command."""
    (libraries / "deepep").mkdir()
    (libraries / "deepep" / prepared.FILE).write_text(text)

    with pytest.raises(UserError, match=prepared.FILE) as caught:
        prepared.variables("deepep")
    assert "cx prepare --backend deepep" in str(caught.value.hint)
