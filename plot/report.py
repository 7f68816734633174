"""The offline report: one HTML file with everything in it; it needs neither a network nor scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime import wording
from ..runtime.bandwidth import FORMULAS, Formula
from ..runtime.gate import Note
from ..runtime.records import Record
from ..runtime.summary import Summary, executions
from ..runtime.tables import Group, Table
from ..runtime.writing import write_bytes
from . import style
from .plans import Plan, slug

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = Path(__file__).resolve().parent / "report.html.j2"
_THEME = {style.INK: "--ink", style.MUTED: "--muted", style.GRID: "--grid", style.PAPER: "--paper"}


@dataclass(frozen=True)
class Section:
    """One group: its figure (inline SVG, or None) and its tables."""

    id: str
    group: Group
    figure: Markup | None
    file: str
    tables: Sequence[Table]
    backends: Sequence[str]


@dataclass(frozen=True)
class Ending:
    """Cells that did not end well for one reason, with what is known of where their ranks were."""

    note: Note
    cells: Sequence[str]
    failures: Sequence[tuple[str, Mapping[str, Any]]]


def write(summary: Summary, plans: Sequence[Plan], figures: Path, path: Path, left_out: int = 0) -> None:
    """Write the report. `figures` holds the SVG of every plan; `left_out` figures were not drawn."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    sections = _sections(summary, plans, figures)
    html = environment.get_template(TEMPLATE.name).render(
        summary=summary,
        executions=list(executions(summary)),
        sections=sections,
        contents=_contents(sections),
        backends=sorted({name for section in sections for name in section.backends}),
        families=sorted({section.group.family for section in sections}),
        regimes=list(dict.fromkeys(section.group.regime for section in sections)),
        endings=_endings(summary),
        provenance=_provenance(summary),
        formulas=_formulas(sections),
        legend=wording.legend(summary.tables),
        left_out=left_out,
        wording=wording,
    )
    write_bytes(path, html.encode())


def _sections(summary: Summary, plans: Sequence[Plan], figures: Path) -> list[Section]:
    drawn = {plan.tables[0].group: plan for plan in plans}
    groups: dict[Group, list[Table]] = {}
    for table in summary.tables:
        groups.setdefault(table.group, []).append(table)
    sections = []
    for index, (group, tables) in enumerate(groups.items(), start=1):
        plan = drawn.get(group)
        file = f"{plan.name}.svg" if plan else ""
        figure = inline((figures / file).read_text(encoding="utf-8"), f"f{index}") if plan else None
        backends = {entry.way.backend for t in tables for line in t.lines for entry in line.entries}
        sections.append(Section(f"g{index}-{slug(group)}", group, figure, file, tables, sorted(backends)))
    return sections


def _contents(sections: Sequence[Section]) -> list[tuple[str, list[Section]]]:
    """Sections by operation or workload, for the table of contents."""
    contents: dict[str, list[Section]] = {}
    for section in sections:
        contents.setdefault(section.group.name, []).append(section)
    return list(contents.items())


def inline(svg: str, prefix: str) -> Markup:
    """An SVG file as an element of a page: its ids made unique, its neutral colours those of the theme."""
    from markupsafe import Markup

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'<svg\b([^>]*?) width="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r'<svg\b([^>]*?) height="[^"]*"', r"<svg\1", svg, count=1)
    return Markup(svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1))


def _endings(summary: Summary) -> list[Ending]:
    failed = {record.cell_id: record for record in summary.reading.records if record.failure is not None}
    endings = []
    for note in summary.not_ok:
        records = [failed[cell] for cell in note.cells if cell in failed]
        endings.append(Ending(note, wording.cell_list(note.cells), [_failure(record) for record in records]))
    return endings


def _failure(record: Record) -> tuple[str, Mapping[str, Any]]:
    return record.cell_id, record.failure or {}


def _provenance(summary: Summary) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(execution, backend, facts) of the first measured cell of each backend of each execution."""
    found = sorted(summary.reading.provenance.items(), key=lambda item: item[0])
    names = [execution.name for execution in summary.executions]
    return [(names[index], backend, list(facts(document))) for (index, backend), document in found]


def facts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A nested document as (name, text) pairs; equal items of a list are counted, not repeated."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from facts(inner, f"{name} {key}".strip())
    elif isinstance(value, list):
        counts: dict[str, int] = {}
        for item in value:
            text = ", ".join(f"{key} {inner}" if key else inner for key, inner in facts(item))
            counts[text] = counts.get(text, 0) + 1
        for text, count in counts.items():
            yield name, f"{count} × {text}" if count > 1 else text
    elif value is not None:
        yield name, str(value)


def _formulas(sections: Sequence[Section]) -> list[Formula]:
    families = {section.group.family for section in sections}
    return [formula for formula in FORMULAS.values() if formula.family in families]
