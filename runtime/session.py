"""What a rank has for all of its cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.base import Library
from .device import Device
from .document import Place
from .measure import Bench
from .ranks import Ranks
from .types import Case


@dataclass
class Session:
    """One rank's view of the group: everything that cells share."""

    ranks: Ranks
    device: Device
    backend: Library
    place: Place
    align: Callable[[], None]
    beat: Callable[[str, int], None]
    key: str
    out: Path
    provenance: dict[str, Any]
    setup_seconds: dict[str, float]

    def bench(self, case: Case) -> Bench:
        return Bench(self.device, self.ranks, case.sampling, self.align, self.beat)
