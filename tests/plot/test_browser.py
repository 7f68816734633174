"""The report in a real browser: no console errors, no requests, and the scripts do what they offer."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser

# Runs after the page's own script: sorts the first table by p50, filters by backend, and says what is seen.
PROBE = """
<script>
(() => {
  const said = [];
  const table = document.querySelector("section.card table");
  const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent.trim());
  const buttons = table.tHead.querySelectorAll("button");
  buttons[2].click();
  said.push("up=" + column(2).join(","));
  buttons[2].click();
  said.push("down=" + column(2).join(","));
  buttons[0].click();
  said.push("sizes=" + column(0).join(","));
  const form = document.getElementById("filters");
  form.elements.backend.value = "symm_mem";
  form.dispatchEvent(new Event("change"));
  const cards = [...document.querySelectorAll("section.card[data-family]")];
  said.push("visible=" + cards.filter((card) => !card.hidden).length);
  said.push("rows=" + [...table.tBodies[0].rows].filter((r) => !r.hidden).length);
  said.push("shown=" + document.getElementById("shown").textContent);
  said.push("wide=" + (document.documentElement.scrollWidth > document.documentElement.clientWidth));
  document.title = said.join(";");
})();
</script>
"""


def browse(path: Path, home: Path, *options: str) -> tuple[str, str]:
    """The page's document after its scripts ran, and what the browser logged."""
    name = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
    ]
    fixed += [
        f"--user-data-dir={home}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=2000",
    ]
    command_line = [str(name), *fixed, *options, "--dump-dom", path.as_uri()]
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def test_the_report_opens_offline_without_errors_or_requests(suite_report: Path, tmp_path: Path) -> None:
    """Nothing on the console, where blocked loads and script errors go, and no resource but the page."""
    probe = tmp_path / "probe.html"
    count = "<script>document.title = performance.getEntriesByType('resource').length;</script>"
    probe.write_text(
        suite_report.read_text(encoding="utf-8").replace("</body>", f"{count}</body>"), encoding="utf-8"
    )
    document, log = browse(probe, tmp_path / "home")
    assert "CONSOLE" not in log
    assert "<title>0</title>" in document
    assert document.count("<svg") == 4


def test_an_error_on_the_console_would_be_noticed(tmp_path: Path) -> None:
    """Guards the test above: a broken script and a blocked image are caught by what it looks at."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<script>nothing.here()</script><img src="http://example.invalid/x.png">', encoding="utf-8"
    )
    _, log = browse(page, tmp_path / "home")
    assert "CONSOLE" in log


def test_sorting_and_filtering_work(suite_report: Path, tmp_path: Path) -> None:
    """By time up and down, back by size, one backend only; and the page is not wider than the window."""
    probe = tmp_path / "probe.html"
    probe.write_text(
        suite_report.read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>"), encoding="utf-8"
    )
    document, _ = browse(probe, tmp_path / "home", "--window-size=1000,900")
    match = re.search(r"<title>(.*?)</title>", document)
    assert match, document[:500]
    said = dict(part.split("=", 1) for part in match.group(1).split(";"))
    times = [float(value) for value in said["up"].split(",")]
    assert times == sorted(times)
    assert [float(value) for value in said["down"].split(",")] == times[::-1]
    assert said["sizes"].split(",") == [
        size for size in ("1 KiB", "64 KiB", "4 MiB", "256 MiB") for _ in range(2)
    ]
    assert said["visible"] == "2"
    assert said["rows"] == "4"
    assert said["shown"] == "2 of 4 sections"
    assert said["wide"] == "false"
