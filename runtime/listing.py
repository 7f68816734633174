"""`cx list`: what there is to choose from. Also the plain text tables of `cx plan`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ..backends.base import Variant
from . import declared, registry, sku, suite
from .errors import unknown
from .types import REGIMES

KINDS = ("backends", "suites", "skus", "workloads")
_MORE = "cx list backends NAME: what each timed window contains, layouts, how combine adds up, knobs, limits"


def command(args: argparse.Namespace) -> int:
    """Print one list, or the rows of some names, as an aligned table or as JSON. args: what, names, format.

    Of backends JSON has everything that they declare; so has the text for names, where the table has no room.
    """
    rows = _some(args.what, _LISTS[args.what](), args.names)
    backends = [registry.load(row["backend"]) for row in rows] if args.what == "backends" else []
    if args.format == "json":
        more = [declared.to_json(backend) for backend in backends] or [{}] * len(rows)
        print(json.dumps([{**row, **facts} for row, facts in zip(rows, more, strict=True)], indent=1))
    elif backends and args.names:
        print("\n\n\n".join(map(declared.to_text, backends)))
    else:
        print(table(list(rows[0]), [[_cell(v) for v in row.values()] for row in rows]) if rows else "none")
        if backends:
            print(f"\n{_MORE}")
    return 0


def _some(what: str, rows: list[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of these names in their order, or all. Raises UserError for a name that is not there."""
    by_name = {next(iter(row.values())): row for row in rows}
    for name in names:
        if name not in by_name:
            raise unknown(what.removesuffix("s"), name, by_name)
    return [by_name[name] for name in names] or rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart, never cut: the last column takes what it needs."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, rule, *rows)
    )


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _backends() -> list[dict[str, Any]]:
    rows = []
    for name in registry.visible():
        facts = registry.load(name).facts
        ways = Counter((v.family, v.mode, v.name) for v in facts.variants)
        variants = [_variant(v, ways[v.family, v.mode, v.name] > 1) for v in facts.variants]
        rows.append(
            {
                "backend": name,
                "validated": list(facts.validated) or "contract-only",
                "runs on": list(facts.devices),
                "modes/variants": variants,
                "dtypes": list(dict.fromkeys(d for v in facts.variants for d in v.dtypes)),
                "source": f"{facts.source.kind} {facts.source.name}",
                "pin": facts.source.pin,
            }
        )
    return rows


def _variant(variant: Variant, by_operation: bool) -> str:
    """`by_operation`: others share its name, and differ by what they do."""
    name = f"{variant.mode}/{variant.name}" if variant.name else variant.mode
    if by_operation:
        name += f" [{' '.join(variant.ops)}]"
    if variant.validated is None:
        return name
    return f"{name} ({', '.join(variant.validated) or 'contract-only'})"


def _suites() -> list[dict[str, Any]]:
    rows = []
    for name in suite.names():
        loaded = suite.load_suite(name)
        regimes = {r for group in loaded.groups for r in group.regimes}
        rows.append(
            {
                "suite": name,
                "shapes x modes": sum(len(list(g.shapes())) * len(g.modes) for g in loaded.groups),
                "runs": loaded.runs,
                "order": loaded.order,
                "regimes": [r for r in REGIMES if r in regimes],
                "description": loaded.description,
            }
        )
    return rows


def _skus() -> list[dict[str, Any]]:
    rows = []
    for name in sku.names():
        loaded = sku.load_sku(name)
        link = loaded.scale_up
        rows.append(
            {
                "sku": name,
                "vendor": loaded.vendor,
                "GPUs/node": loaded.gpus_per_node,
                "scale-up": f"{link.kind} {link.GBps:g} GB/s" if link else None,
                "mechanism": loaded.mechanism,
                "topology class": loaded.topology_class,
                "title": loaded.title,
            }
        )
    return rows


def _workloads() -> list[dict[str, Any]]:
    return [
        {"workload": w.name, "hidden": w.hidden, "topk": w.topk, "experts": w.experts, "source": w.source}
        for w in suite.load_workloads().values()
    ]


_LISTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "backends": _backends,
    "suites": _suites,
    "skus": _skus,
    "workloads": _workloads,
}
