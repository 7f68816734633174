"""The environment of a prepared library reaches its own ranks and nobody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from collectivex.runtime import environment, prepared
from collectivex.runtime.errors import UserError

DIGEST = "4f1c" * 16


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    monkeypatch.setenv("CX_LIBRARIES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/mine", ""]))
    return tmp_path


def write(folder: Path, **said: object) -> None:
    folder.mkdir(parents=True)
    (folder / prepared.FILE).write_text(json.dumps(said))


def test_search_paths_come_before_those_of_the_place_where_the_rank_starts(libraries) -> None:
    """Ours first, then what is there: in a container the image's, not the launcher's."""
    write(
        libraries / "deepep",
        prepend={"PYTHONPATH": ["/lib/deepep", "/lib/nccl"], "LD_LIBRARY_PATH": ["/lib/nccl/lib"]},
        set={"CUDA_HOME": "/cuda"},
    )
    found = prepared.variables("deepep")

    here = environment.child_environment(found)
    assert here["PYTHONPATH"] == os.pathsep.join(["/lib/deepep", "/lib/nccl", "/mine"])
    there = environment.child_environment(found, environ={"PYTHONPATH": "/image", "HOME": "/"})
    assert there == {
        "PYTHONPATH": os.pathsep.join(["/lib/deepep", "/lib/nccl", "/image"]),
        "LD_LIBRARY_PATH": "/lib/nccl/lib",
        "CUDA_HOME": "/cuda",
        "HOME": "/",
    }
    assert prepared.variables("uccl_ep") == {}


@pytest.mark.parametrize("text", ["", "[]", '{"prepend": {"PYTHONPATH": 3}}', '{"set": 1}'])
def test_a_broken_file_says_how_to_make_it_anew(libraries, text) -> None:
    """No traceback: the path and the command."""
    (libraries / "deepep").mkdir()
    (libraries / "deepep" / prepared.FILE).write_text(text)

    with pytest.raises(UserError, match=prepared.FILE) as caught:
        prepared.variables("deepep")
    assert "cx prepare --backend deepep" in str(caught.value.hint)


def test_each_image_and_architecture_has_a_folder_of_its_own(libraries) -> None:
    """By digest, however the image is named; a file without one counts by its name."""
    by_reference = prepared.of_image(f"docker.io/a/b@sha256:{DIGEST}", "x86_64", "sm90")
    assert by_reference == libraries / "4f1c4f1c4f1c4f1c.x86_64.sm90"
    assert prepared.of_image(f"/images/{DIGEST}.x86_64.sqsh", "x86_64", "sm90") == by_reference
    others = [("aarch64", "sm90"), ("x86_64", "sm100"), ("x86_64", None)]
    found = {prepared.of_image(f"a/b@sha256:{DIGEST}", *other) for other in others}
    assert len({*found, by_reference}) == 4
    assert prepared.of_image("/images/my image.sqsh", "x86_64", None).name == "my_image.x86_64"


def test_a_relative_folder_of_libraries_is_the_same_for_ranks_elsewhere(monkeypatch, tmp_path) -> None:
    """Ranks, containers and their search paths start in other folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CX_LIBRARIES", "mine")
    assert prepared.folder("deepep") == tmp_path / "mine" / "deepep"


def test_ranks_in_an_image_get_what_was_built_inside_it(libraries) -> None:
    """Not what was built for this machine's Python, and a program looks there too."""
    inside = libraries / "4f1c.x86_64"
    write(libraries / "deepep", set={"WHERE": "outside"})
    write(inside / "deepep", set={"WHERE": "inside"})

    assert prepared.variables("deepep")["WHERE"] == "outside"
    assert prepared.variables("deepep", inside) == {"CX_LIBRARIES": str(inside), "WHERE": "inside"}
    assert prepared.variables("uccl_ep", inside) == {"CX_LIBRARIES": str(inside)}


def test_everything_that_is_installed_is_found_and_nothing_else(libraries) -> None:
    """Of this machine and of images; not what is half built, nor what cannot be read."""
    write(libraries / ".deepep-1234", pin="1")
    (libraries / "deepep").symlink_to(".deepep-1234")
    write(libraries / "image" / ".uccl_ep-5678", pin="2")
    (libraries / "image" / "uccl_ep").symlink_to(".uccl_ep-5678")
    write(libraries / ".mori-9abc", pin="3")
    (libraries / "broken").mkdir()
    (libraries / "broken" / prepared.FILE).write_text("{")

    found = [(name, path, said["pin"]) for name, path, said in prepared.installed()]
    assert found == [
        ("deepep", libraries / "deepep", "1"),
        ("uccl_ep", libraries / "image" / "uccl_ep", "2"),
    ]
