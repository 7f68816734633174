"""One report of a varied suite, drawn once for all tests that look at it."""

from __future__ import annotations

from pathlib import Path

import pytest
from factory import execution, suite_results

from collectivex.plot import command


@pytest.fixture(scope="session")
def suite_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a report.html; its results lie in results/ beside it."""
    folder = tmp_path_factory.mktemp("suite")
    documents = suite_results()
    documents[0]["warnings"] = ["clocks were throttled"]
    command.draw_folders([execution(folder / "results", documents, missing=["gone-12345678.r0"])], folder)
    return folder / "report.html"
