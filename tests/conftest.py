"""What every test has: skip rules of the markers, golden files, and hypothesis without a deadline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

GOLDEN = Path(__file__).parent / "golden"

# Where podman looks for the program behind --init.
_INIT = ("/usr/libexec/podman", "/usr/lib/podman", "/usr/bin")

# Two shared cores: a wall-clock deadline per example would fail for other people's load.
settings.register_profile("house", deadline=None)
settings.load_profile("house")


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "write the golden files instead of comparing"
    parser.addoption("--update-golden", action="store_true", help=what)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why."""
    why = {"gpu": _no_gpu, "slurm": _no_slurm, "podman": _no_podman, "browser": _no_browser}
    for name, reason in why.items():
        marked = [item for item in items if name in item.keywords]
        missing = reason() if marked else None
        if missing:
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=missing))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no GPU"


def _no_slurm() -> str | None:
    return None if os.geteuid() == 0 else "a real Slurm needs root"


def _no_podman() -> str | None:
    if os.geteuid() != 0:
        return "podman without root wants sub-ids and a systemd session of the user"
    missing = [name for name in ("podman", "runc") if not shutil.which(name)]
    if not any(Path(folder, "catatonit").exists() for folder in _INIT):
        missing.append("catatonit")
    return f"not installed: {', '.join(missing)}" if missing else None


def _no_browser() -> str | None:
    found = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    return None if found else "no Chromium is installed"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/<name>; with --update-golden, write it there."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no golden file {name}; make it with --update-golden and review it"
        assert text == path.read_text(encoding="utf-8"), f"{name} differs; if it should, use --update-golden"

    return compare
