"""A library built by `cx prepare` inside an image of the real podman, and ranks of that image that use it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fault_cells
import pytest
from podman_host import PodmanHost, podman_host

from collectivex.runtime import prepared
from collectivex.runtime.provenance import CODE
from collectivex.runtime.yamlfile import ROOT

pytestmark = pytest.mark.podman

PROJECT = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
PROJECT += '[project]\nname = "tinycomm"\nversion = "1.2"\n[tool.setuptools]\npy-modules = ["tinycomm"]\n'
# A library that remembers which Python installed it: the image's says CX_IN_IMAGE.
SETUP = """\
import os, setuptools
open("tinycomm.py", "a").write(f"built_in_image = {os.environ.get('CX_IN_IMAGE')!r}\\n")
setuptools.setup()
"""
# A backend that is the fake one, but for a library that it needs.
BACKEND = '''\
"""The fake with a library."""

from dataclasses import replace

from . import fake
from .base import MissingLibrary, Recipe, Source

FACTS = replace(
    fake.FACTS,
    name="tiny",
    source=Source("git", "{url}", "{pin}", "the one that was tested"),
    recipe=Recipe(git="{url}", needs=("git",), modules=("tinycomm",), versions={{"tinycomm": "1.2"}}),
)


class Backend(fake.Backend):
    facts = FACTS

    def setup(self, context):
        try:
            import tinycomm
        except ImportError as error:
            raise MissingLibrary("tinycomm is not there: `cx prepare --backend tiny`") from error
        self.library = tinycomm
        super().setup(context)

    def versions(self):
        return {{"number": str(self.library.number), "built_in_image": str(self.library.built_in_image)}}
'''


@pytest.fixture(scope="module")
def host() -> Iterator[PodmanHost]:
    with podman_host() as found:
        yield found


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """URL, on this machine, and commit of a library; the newest commit is another one."""
    source, bare = tmp_path / "upstream", tmp_path / "served" / "tinycomm.git"
    source.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "init", "-q", str(source)], check=True)
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "setup.py").write_text(SETUP)
    for number in (1, 2):
        (source / "tinycomm.py").write_text(f"number = {number}\n")
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", f"{number}"], check=True)
    first = subprocess.run([*git, "rev-parse", "HEAD~1"], check=True, capture_output=True, text=True)
    subprocess.run(["git", "clone", "-q", "--bare", str(source), str(bare)], check=True)
    subprocess.run(["git", "-C", str(bare), "update-server-info"], check=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing: pytest's output is for tests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(bare.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/tinycomm.git", first.stdout.strip()
    server.shutdown()
    server.server_close()
    thread.join()


class Checkout:
    """A copy of ours with one backend more, a pool that says podman, and folders of its own."""

    def __init__(self, host: PodmanHost, folder: Path, url: str, pin: str):
        self.folder, self.root, self.libraries = folder, folder / "checkout", folder / "libraries"
        for name in CODE:
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "backends" / "tiny.py").write_text(BACKEND.format(url=url, pin=pin))
        self.pool = host.write_pool(folder)
        suite = Path(fault_cells.write_suite(folder, [""], 20))
        suite.write_text(suite.read_text().replace("backends: [fake]", "backends: [tiny]"))
        self.env = {**host.env, "CX_LIBRARIES": str(self.libraries), "OMP_NUM_THREADS": "1"}
        self.env.pop("SLURM_JOB_ID", None)
        self.suite = suite

    def cx(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "collectivex", *words, "--backend", "tiny", "--sku", str(self.pool)]
        return subprocess.run(
            argv, cwd=self.root, env=self.env, capture_output=True, text=True, check=False, timeout=300
        )

    def run(self, out: Path) -> dict:
        """The record of the one cell."""
        self.done = self.cx("launch", "--suite", str(self.suite), "--ranks", "2", "--out", str(out))
        (record,) = fault_cells.records(out)
        return record


def test_ranks_in_the_image_use_what_was_built_inside_it(
    host: PodmanHost, upstream: tuple[str, str], tmp_path: Path
) -> None:
    """Before, the library is missing; afterwards its pinned commit, built by the image's Python, is what the
    ranks load, from a folder of this image that they cannot write."""
    checkout = Checkout(host, tmp_path, *upstream)
    before = checkout.run(tmp_path / "before")
    assert before["status"] != "ok"
    assert "cx prepare --backend tiny" in before["reason"]

    done = checkout.cx("prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    digest = host.digest.removeprefix("sha256:")[:16]
    folder = checkout.libraries / f"{digest}.x86_64" / "tiny"
    assert f"tiny: {folder} (passed: tinycomm 1.2)" in done.stdout
    assert prepared.read(folder)["commit"] == upstream[1]

    after = checkout.run(tmp_path / "after")
    assert after["status"] == "ok", checkout.done.stderr + str(after["reason"])
    assert after["provenance"]["backend"]["versions"] == {"number": "1", "built_in_image": "1"}
    launcher = next((tmp_path / "after").glob("logs/tiny.r0.0/launcher.log")).read_text()
    assert f"--volume={folder.parent}:{folder.parent}:ro" in launcher
    assert host.containers() == []


def test_what_cannot_be_installed_inside_ends_with_its_reason(
    host: PodmanHost, upstream: tuple[str, str], tmp_path: Path
) -> None:
    """The words of git inside the container, exit code 3, the log beside the libraries, no half library."""
    checkout = Checkout(host, tmp_path, upstream[0], "0" * 40)
    done = checkout.cx("prepare")

    (folder,) = checkout.libraries.iterdir()
    assert done.returncode == 3, done.stdout + done.stderr
    assert "error: tiny: git failed (128): fatal: " in done.stderr
    assert "error: tiny was not installed in there (exit code 3)" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["tiny.prepare.log"]
    assert host.containers() == []
