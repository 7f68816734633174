"""`cx sweep`: one launcher call per shard: a SKU, a suite, and a backend that has work there."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import planning
from .commands import shown
from .errors import UserError
from .sku import Sku
from .yamlfile import ROOT

LAUNCHERS = ROOT / "launchers"


def command(args: argparse.Namespace) -> int:
    """Print the calls, one a line, for a shell, `xargs` or a CI matrix."""
    plans = planning.make(args.suite, args.sku, args.backend, args.ranks, args.nodes, args.runs)
    more = []
    for option in ("ranks", "nodes", "runs"):
        value = getattr(args, option)
        more += [f"--{option}", str(value)] if value is not None else []
    for plan in plans:
        to_run = [p.cell.case.backend for p in plan.cells if p.unsupported is None]
        for backend in dict.fromkeys(to_run):
            out = str(Path(args.out) / f"{plan.sku.name}-{plan.suite.name}-{backend}")
            print(
                shown(
                    [
                        str(launcher(plan.sku)),
                        "--suite",
                        plan.suite.name,
                        "--backend",
                        backend,
                        *more,
                        "--out",
                        out,
                    ]
                )
            )
    return 0


def launcher(sku: Sku) -> Path:
    """The script of a pool, relative to the checkout. Raises UserError for a SKU that has none."""
    path = LAUNCHERS / f"launch_{sku.name}.sh"
    if not path.is_file():
        raise UserError(f"SKU {sku.name!r} has no launchers/{path.name}", "see CONTRIBUTING.md, Add a SKU")
    return path.relative_to(ROOT)
