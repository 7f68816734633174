"""The README's tables, from published results and nothing else: `python docs/readme_tables.py` writes them.

They stand between the marks below; a test fails where the README says something else than results/ does.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from collectivex.runtime.reading import Reading, read  # noqa: E402
from collectivex.runtime.records import Record  # noqa: E402
from collectivex.runtime.tables import Entry, tables  # noqa: E402
from collectivex.runtime.types import Case, Moe  # noqa: E402

FOLDER = ROOT / "results" / "2026-11-20-h200x4-nvlink-ep-core"
BEGIN, END = "<!-- {name}: written by docs/readme_tables.py -->", "<!-- end of {name} -->"
TOKENS = (1, 16, 128, 1024, 4096)
# name in the README: (regime, modes, tokens per rank)
TABLES = {
    "decode table": ("graph", ("low-latency",), TOKENS),
    "prefill table": ("chained", ("normal", "cached"), (128, 1024, 4096)),
}
Places = dict[tuple[str, str], dict[int, str]]


def shown(case: Case) -> bool:
    """bf16, uniform routing, equal tokens on every rank."""
    return (
        isinstance(case.shape, Moe) and case.shape.dtype == "bf16" and case.shape.routing.label == "uniform"
    )


def number(us: float) -> str:
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def place(entry: Entry) -> str:
    """`median [interval] · share of the limit`."""
    assert entry.us is not None
    interval = f" [{number(entry.interval[0])}, {number(entry.interval[1])}]" if entry.interval else ""
    share = f" · {100 * entry.share:.0f} %" if entry.share is not None else ""
    return f"{number(entry.us)}{interval}{share}"


def name(backend: str, variant: str) -> str:
    return f"{backend} {variant}".strip()


def without_number(records: list[Record], mode: str, places: Places) -> None:
    """Cells that were asked for and have no number in this regime: how they ended, or `no graph`."""
    for record in records:
        case = record.case
        if case is None or case.mode != mode or not shown(case) or not isinstance(case.shape, Moe):
            continue
        row = places.setdefault((mode, name(case.backend, case.variant)), {})
        row.setdefault(case.shape.tokens, "no graph" if record.status == "ok" else record.status.value)


def table(reading: Reading, regime: str, modes: tuple[str, ...], tokens: tuple[int, ...]) -> str:
    places: Places = {}
    for found in tables(reading, regimes=[regime]):
        group = found.group
        if found.component != "roundtrip" or group.mode not in modes:
            continue
        if group.dtype != "bf16" or group.routing != "uniform":
            continue
        for line in found.lines:
            for entry in (e for e in line.entries if e.us is not None):
                way = (group.mode, name(entry.way.backend, entry.way.variant))
                places.setdefault(way, {})[line.at] = place(entry)
    for mode in modes:
        without_number(reading.records, mode, places)
    rows = [
        [mode, way, *(at.get(count, "—") for count in tokens)]
        for (mode, way), at in sorted(places.items(), key=lambda item: (modes.index(item[0][0]), item[0][1]))
        if any(count in at for count in tokens)
    ]
    head = ["mode", "backend", *(f"T = {count}" for count in tokens)]
    if len(modes) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def written(text: str) -> str:
    """`text` with every table between its marks."""
    reading = read([FOLDER])
    for title, (regime, modes, tokens) in TABLES.items():
        begin, end = BEGIN.format(name=title), END.format(name=title)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        if not rest or end not in rest:
            raise SystemExit(f"README.md has no {begin} … {end}")
        text = f"{before}{begin}\n\n{table(reading, regime, modes, tokens)}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text()))
