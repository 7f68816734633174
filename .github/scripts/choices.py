"""Writes what the dispatch form of sweep.yml offers, from what the repository has; --check only compares.

sku      machine pools with a file and a launcher; without `local`, which the push smoke runs
suite    every suite
backend  all (what the suite chooses), or one that is not hidden
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from collectivex.runtime import registry, sku, suite

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "sweep.yml"


def choices() -> dict[str, list[str]]:
    launchers = {p.stem.removeprefix("launch_") for p in (ROOT / "launchers").glob("launch_*.sh")}
    return {
        "sku": sorted(launchers & set(sku.names()) - {"local"}),
        "suite": sorted(suite.names()),
        "backend": ["all", *sorted(registry.visible())],
    }


def written(text: str) -> str:
    """The workflow with its lists replaced: the lines between `# begin NAME` and `# end NAME`."""
    for name, values in choices().items():
        pattern = rf"(?P<indent>[ ]*)# begin {name}\n.*?(?P<end>[ ]*# end {name}\n)"

        def lines(match: re.Match[str], name: str = name, values: list[str] = values) -> str:
            indent = match["indent"]
            return f"{indent}# begin {name}\n" + "".join(f"{indent}- {v}\n" for v in values) + match["end"]

        text, found = re.subn(pattern, lines, text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(
                f"error: sweep.yml has {found} lists between `# begin {name}` and `# end {name}`"
            )
    return text


def main(arguments: list[str]) -> int:
    text = WORKFLOW.read_text(encoding="utf-8")
    new = written(text)
    if arguments == ["--check"]:
        if new != text:
            print("error: sweep.yml does not offer what the repository has", file=sys.stderr)
            print("hint: python .github/scripts/choices.py", file=sys.stderr)
        return int(new != text)
    WORKFLOW.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
