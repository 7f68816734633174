"""`cx list backends NAME`: everything that a backend declares about itself, for people and as data."""

from __future__ import annotations

import contextlib
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..backends import base
from ..backends.base import Facts, Library, Program, Variant
from . import matrix, sku, suite
from .errors import UserError
from .types import Case

WIDTH = 100
_LAYOUTS = {
    "token-rank": "one row per token and destination rank, with its local experts",
    "token-expert": "one row per token and local expert",
}
_MODELS = {
    "rank-sum": "over distinct ranks; the weights are applied with the experts, outside the window",
    "expert-sum": "over valid experts; the weights are applied with the experts, outside the window",
    "weighted-sum": "over valid experts, each times its weight, inside the window",
}
_CASTS = {
    "final": "float32 sums, rounded to bf16 once",
    "rank-partials": "the sum of each rank is rounded to bf16 before it is sent, and the whole again",
    "node-partials": "the sum of each node is rounded to bf16 before it is sent, and the whole again",
}


def to_json(backend: Library | Program) -> dict[str, Any]:
    """The declared facts as data: what `list backends` adds to the columns of its table."""
    facts = backend.facts
    return {
        "title": facts.title,
        "why this pin": facts.source.why,
        "index dtype": facts.index_dtype,
        "knobs": list(facts.knobs),
        "environment": dict(facts.env),
        "own regimes": list(facts.regimes),
        "variants": [_variant_json(facts, variant) for variant in facts.variants],
        "limits": limits(backend),
    }


def _variant_json(facts: Facts, variant: Variant) -> dict[str, Any]:
    moe = variant.family == "moe"
    return {
        "family": variant.family,
        "mode": variant.mode,
        "variant": variant.name,
        "operations": list(variant.ops),
        "dtypes": list(variant.dtypes),
        "window": dict(variant.window),
        "receive layout": variant.layout if moe else None,
        "combine model": variant.combine if moe else None,
        "casts": variant.casts if moe else None,
        "in place": variant.in_place,
        "paired": variant.paired,
        "graph safe": variant.graph_safe,
        "validated": list(_validated(facts, variant)),
    }


def _validated(facts: Facts, variant: Variant) -> tuple[str, ...]:
    return facts.validated if variant.validated is None else variant.validated


def limits(backend: Library | Program) -> list[str]:
    """Why it refuses cases of the suites, beyond what its variants say: asked of it, for one node and two."""
    asked = (backend.why_not(case) for case in _asked(backend) if base.why_not(backend.facts, case) is None)
    return list(dict.fromkeys(reason for reason in asked if reason is not None))


def _asked(backend: Library | Program) -> Iterator[Case]:
    pools = {pool.default_ranks: pool for pool in (sku.load_sku(name).at(1) for name in sku.names())}
    for name, pool in itertools.product(suite.names(), pools.values()):
        with contextlib.suppress(UserError):  # experts that cannot be divided over the GPUs of this machine
            for planned in matrix.expand(suite.load_suite(name), pool, [backend.facts.name], runs=1):
                case = planned.cell.case
                yield case
                yield replace(case, nodes=2, ranks=2 * case.ranks)


def to_text(backend: Library | Program) -> str:
    """The declared facts for people: of the backend, of each of its variants, and what it refuses."""
    facts = backend.facts
    source = f"{facts.source.kind} {facts.source.name} {facts.source.pin}"
    parts = [f"{facts.name}: {facts.title}", _listed(_of_backend(facts, source))]
    for variant in facts.variants:
        name = f"{variant.mode}/{variant.name}" if variant.name else variant.mode
        parts.append(f"{name}: {', '.join(variant.dtypes)}\n{_listed(_of_variant(facts, variant))}")
    said = limits(backend) or ["nothing but what its variants do not have"]
    parts.append("refuses, of the cases of our suites\n" + "\n".join(_wrapped(one, "  ", 4) for one in said))
    return "\n\n".join(parts)


def _of_backend(facts: Facts, source: str) -> Iterator[tuple[str, str]]:
    yield "source", source
    yield "this pin", facts.source.why
    yield "runs on", ", ".join(facts.devices)
    yield "validated on", ", ".join(facts.validated) or "contract-only: nothing yet"
    if "moe" in facts.families:
        yield "expert ids", facts.index_dtype
    yield "knobs", ", ".join(facts.knobs) or "none"
    if facts.env:
        yield "environment", ", ".join(f"{name}={value}" for name, value in facts.env.items())
    if facts.regimes:
        yield "regimes", f"{', '.join(facts.regimes)} only: its own clock"


def _of_variant(facts: Facts, variant: Variant) -> Iterator[tuple[str, str]]:
    if variant.ops:
        yield "operations", ", ".join(variant.ops)
    yield from ((f"window of {component}", what) for component, what in variant.window.items())
    if variant.family == "moe":
        yield "receive layout", f"{variant.layout}: {_LAYOUTS[variant.layout]}"
        yield "combine model", f"{variant.combine}: {_MODELS[variant.combine]}"
        yield "casts", f"{variant.casts}: {_CASTS[variant.casts]}"
    if variant.in_place:
        yield "in place", "combine takes its rows where dispatch puts them"
    if variant.paired:
        yield "paired", "dispatch and combine go in turns only"
    yield "graph safe", "yes" if variant.graph_safe else "no"
    if variant.validated is not None:
        yield "validated on", ", ".join(_validated(facts, variant)) or "contract-only: nothing yet"


def _listed(facts: Iterator[tuple[str, str]]) -> str:
    """Aligned names, and texts that are wrapped beside them."""
    found = list(facts)
    width = max(len(name) for name, _ in found)
    return "\n".join(_wrapped(said, f"  {name.ljust(width)}  ", width + 4) for name, said in found)


def _wrapped(text: str, start: str, indent: int) -> str:
    """Lines that break at spaces only: names and pins stay whole."""
    whole = textwrap.TextWrapper(WIDTH, start, " " * indent, break_long_words=False, break_on_hyphens=False)
    return whole.fill(text)
