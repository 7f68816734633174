"""Before ranks are started as processes of this machine: what they need is here. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from ..backends.base import Program
from . import detect, machine, registry
from .errors import UserError
from .matrix import Planned
from .sku import Sku

_HERE = "cx doctor says what is here; --sku local measures with it"


def require_torch(planned: Sequence[Planned]) -> None:
    """Ranks run in this interpreter, so torch must be importable in it. External programs do without."""
    if _ranks(planned) and find_spec("torch") is None:
        raise UserError(
            f"torch is not installed for {sys.executable}",
            "use the Python that has it, or `pip install torch`; `make bench` does it for you",
        )


def require_gpus(sku: Sku, planned: Sequence[Planned]) -> None:
    """This machine has the GPUs that the SKU says, one for each rank. Raises UserError otherwise: numbers of
    other GPUs would stand under this pool's name and be held against its limits. External programs count
    theirs themselves."""
    if sku.device == "cpu":
        return
    ranks, names = _ranks(planned), detect.machine().gpus
    if len(names) < ranks:  # a second opinion: the vendor's own tool
        names = max(names, tuple(str(gpu["name"]) for gpu in machine.gpus()), key=len)
    if len(names) < ranks:
        need = f"{ranks} ranks of SKU {sku.name!r} need {ranks} GPUs"
        raise UserError(f"{need}; this machine has {len(names) or 'none'}", _HERE)
    vendor = detect.machine().vendor
    wanted = {"nvidia": sku.product, "amd": sku.arch}[sku.vendor]
    others = {name for name in names if vendor != sku.vendor or (wanted and wanted not in detect.slug(name))}
    if others:
        here = ", ".join(sorted(others))
        raise UserError(
            f"the GPUs of SKU {sku.name!r} are {wanted or sku.vendor}; this machine has {here}", _HERE
        )


def _ranks(planned: Sequence[Planned]) -> int:
    """How many processes of ours the largest of the cells that can run has; 0 where all are programs."""
    cases = [p.cell.case for p in planned if p.unsupported is None]
    return max((c.ranks for c in cases if not isinstance(registry.load(c.backend), Program)), default=0)
