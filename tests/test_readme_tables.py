"""The README's tables are those of the published results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "docs" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_published_numbers_and_no_others(script: ModuleType):
    """`python docs/readme_tables.py` would change nothing."""
    readme = (ROOT / "README.md").read_text()

    assert readme == script.written(readme)


def test_a_number_changed_by_hand_is_noticed(script: ModuleType):
    """The check above can fail."""
    readme = (ROOT / "README.md").read_text()
    at = readme.index("| symm_mem one-sided |")
    changed = readme[:at] + readme[at:].replace("[", "[1", 1)

    assert changed != script.written(changed)


def test_a_readme_without_the_marks_is_refused(script: ModuleType):
    """No table is written where nobody asked for one."""
    with pytest.raises(SystemExit, match="decode table"):
        script.written("# CollectiveX")
