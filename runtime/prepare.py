"""`cx prepare`: install backends' libraries where the ranks of a pool will run.

Without a pool, or with one of processes, that is this Python. For a pool that starts its ranks in containers
the libraries are built inside its image, and lie in a folder of that image alone; what works there is the
command `install` (install.py), started as ranks are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..backends.base import Facts
from . import environment, install, registry
from .errors import UserError
from .install import Place


def command(args: argparse.Namespace) -> int:
    wanted = []
    for name in dict.fromkeys(args.backend):
        facts = registry.load(name).facts
        if facts.source.kind == "bundled":
            print(f"{name}: nothing to install, it is {facts.source.name}, {facts.source.pin}")
        else:
            install.recipe_of(facts)
            wanted.append(facts)
    if args.sku is None:
        return here(wanted, None, args.force)
    from .site import load_pool
    from .sku import load_sku

    sku = load_sku(args.sku)
    pool = load_pool(args.site, sku)
    for facts in wanted:
        if sku.device not in facts.devices:
            devices = " or ".join(facts.devices)
            raise UserError(f"{facts.name} is for {devices}, {sku.name} has {sku.device}")
    if sku.mechanism == "process":
        return here(wanted, sku.arch, args.force)
    from .prepare_inside import Inside

    return Inside(sku, pool, args.force).install(wanted) if wanted else 0


def here(wanted: Sequence[Facts], arch: str | None, force: bool) -> int:
    """Into the folder of this machine, with this Python."""
    for facts in wanted:
        place = Place(environment.libraries_dir(), arch, force=force)
        print(install.told(facts.name, install.prepare(facts, place)))
    return 0
