"""Images: a tag becomes a digest, and one import a whole file, or nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from collectivex.runtime import images
from collectivex.runtime.commands import Done
from collectivex.runtime.errors import InfraError, UserError

DIGEST = "sha256:" + "a" * 64
FINE, LISTED = Done(0), Done(0, "squashfs-root\nsquashfs-root/usr\nsquashfs-root/usr/bin\n")


def registry(digest: str = DIGEST) -> Any:
    """A registry that wants an anonymous token first, as Docker Hub does."""

    def ask(url: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if "token" in url:
            return 200, {}, json.dumps({"token": "t"}).encode()
        if headers.get("Authorization") != "Bearer t":
            return 401, {"www-authenticate": 'Bearer realm="https://auth/token",service="s"'}, b""
        return 200, {"docker-content-digest": digest}, b""

    return ask


class Node:
    """Runs enroot and unsquashfs: writes what is asked for, and fails as told."""

    def __init__(self, imports: Sequence[Done] = (FINE,), listing: Done = LISTED):
        self.imports, self.listing, self.asked = list(imports), listing, []  # type: ignore[var-annotated]

    def __call__(self, argv: Sequence[str], timeout_s: float = 60, env: Any = None) -> Done:
        self.asked.append(list(argv))
        if "enroot" in argv:
            done = self.imports.pop(0)
            target = next(a for a in argv if a.startswith("--output=")).partition("=")[2]
            Path(target).write_text("squash" if done.code == 0 else "half")
            return done
        return self.listing


def ensure(
    folder: Path, node: Node, ask: Any = None, say: images.Say = lambda s: None, **more: Any
) -> tuple[Path, str]:
    reference = images.parse("lmsysorg/sglang:v1")
    return images.ensure(reference, "aarch64", folder, say, execute=node, ask=ask or registry(), **more)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ubuntu:24.04", "docker.io/library/ubuntu:24.04"),
        ("lmsysorg/sglang:v0.5", "docker.io/lmsysorg/sglang:v0.5"),
        ("nvcr.io/nvidia/pytorch:25.01-py3", "nvcr.io/nvidia/pytorch:25.01-py3"),
        ("nvcr.io#nvidia/pytorch:25.01-py3", "nvcr.io/nvidia/pytorch:25.01-py3"),
        ("localhost:5000/a:b", "localhost:5000/a:b"),
        (f"a/b:c@{DIGEST}", "docker.io/a/b:c"),
    ],
)
def test_references_are_read_as_docker_and_pyxis_write_them(text: str, name: str) -> None:
    """Both spellings of a registry."""
    assert images.parse(text).name == name


@pytest.mark.parametrize("text", ["ubuntu", f"ubuntu@{DIGEST}", "a/b:c@sha256:12", "localhost:5000/a"])
def test_a_reference_without_a_tag_is_refused(text: str) -> None:
    """A bare digest makes the importer ask for a password and wait."""
    with pytest.raises(UserError):
        images.parse(text)


def test_an_import_is_by_tag_and_for_the_pools_architecture(tmp_path: Path) -> None:
    """The file is named by digest and architecture, readable for all, and nothing else stays."""
    node = Node()
    path, digest = ensure(tmp_path, node)

    assert digest == DIGEST
    assert path.name == "a" * 64 + ".aarch64.sqsh"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == [path.name]
    assert "--arch=arm64" in node.asked[0]
    assert node.asked[0][-1] == "docker://docker.io#lmsysorg/sglang:v1"


def test_an_image_that_is_there_is_not_imported_again(tmp_path: Path) -> None:
    """Once per digest and architecture."""
    ensure(tmp_path, Node())
    again = Node(imports=())
    ensure(tmp_path, again)
    assert again.asked == []


def test_a_failed_import_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    """Three tries, then the importer's own words; no half file under the final name or any other."""
    node = Node(imports=[Done(1, err="[ERROR] URL returned error code: 401")] * 3)
    with pytest.raises(InfraError, match="401"):
        ensure(tmp_path, node)
    assert os.listdir(tmp_path) == []


def test_every_try_to_import_is_told_with_its_last_words(tmp_path: Path) -> None:
    """What the importer says is kept from the terminal, so it stands where it failed and in the error."""
    late = "enroot did not end within 3600 s"
    endings = [Done(1, err="[ERROR] first"), Done(1, err="[ERROR] second")]
    endings.append(Done(124, err=f"[INFO] Authenticating\n[INFO] Downloading 3 of 9\n{late}"))
    told: list[str] = []
    with pytest.raises(InfraError) as failed:
        ensure(tmp_path, Node(imports=endings), say=told.append)
    assert [line for line in told if "failed" in line] == [f"image: that failed: {e.said}" for e in endings]
    assert f"Downloading 3 of 9 / {late}" in failed.value.message
    assert "above" not in str(failed.value)


def test_a_damaged_image_is_not_kept(tmp_path: Path) -> None:
    """Importers have been seen to end with 0 on a full disk."""
    for listing in (Done(1, err="FATAL ERROR: failed to read"), Done(0, "")):
        with pytest.raises(InfraError):
            ensure(tmp_path, Node(listing=listing))
        assert os.listdir(tmp_path) == []


def test_a_pinned_tag_that_moved_is_refused(tmp_path: Path) -> None:
    """The reference's digest is what was reviewed."""
    reference = images.parse(f"a/b:c@sha256:{'b' * 64}")
    with pytest.raises(InfraError, match="has moved"):
        images.resolve(reference, registry())


def test_a_tag_that_moves_during_the_import_is_refused(tmp_path: Path) -> None:
    """The file would carry a digest that it is not."""
    answers = iter([DIGEST, "sha256:" + "c" * 64])

    def ask(url: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        return 200, {"docker-content-digest": next(answers)}, b""

    with pytest.raises(InfraError, match="moved while"):
        ensure(tmp_path, Node(), ask)
    assert os.listdir(tmp_path) == []


def test_an_import_can_run_on_a_compute_node(tmp_path: Path) -> None:
    """Verification too: the login node may not have the tools."""
    node = Node()
    ensure(tmp_path, node, before=["srun", "-n1"])
    assert [argv[:3] for argv in node.asked] == [["srun", "-n1", "enroot"], ["srun", "-n1", "unsquashfs"]]


def test_a_lock_of_the_dead_is_taken_over_and_of_the_living_respected(tmp_path: Path) -> None:
    """The holder touches its lock; who does not is gone."""
    lock, said = tmp_path / "lock", []
    lock.write_text("somebody")
    old = time.time() - 100
    os.utime(lock, (old, old))
    with images.locked(lock, said.append, stale_s=5):
        assert "shows no life" in said[0]
        with (
            pytest.raises(InfraError, match="not free"),
            images.locked(lock, said.append, stale_s=5, wait_s=0.2),
        ):
            pass
        assert lock.exists()
    assert os.listdir(tmp_path) == []


def test_a_holder_keeps_its_lock_alive(tmp_path: Path) -> None:
    """However long an import takes."""
    lock = tmp_path / "lock"
    with images.locked(lock, lambda s: None, stale_s=0.6):
        before = lock.stat().st_mtime
        time.sleep(0.4)
        assert lock.stat().st_mtime > before
