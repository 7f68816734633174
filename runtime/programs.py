"""External programs, where a rank would stand: the runner of this node, or one of several that run together.

Standard library only: the image needs no torch.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backends.base import Program
from .document import Place
from .heartbeat import Heartbeat
from .launched import RankEnvironment
from .program import Runner
from .program_record import Site
from .together import Together
from .types import Cell, case_from_json

TOLD_TO_END = 143


def run(
    program: Program, cases: Mapping[str, Any], where: RankEnvironment, heart: Heartbeat, out: Path
) -> int:
    """Every cell of a cases document to a record. Returns the exit code of this runner.

    Raises SystemExit when told to end (SIGTERM), after ending the process; cells without a record are then
    the supervisor's to account for.
    """
    signal.signal(signal.SIGTERM, _told_to_end)
    cells = [Cell(case_from_json(c["case"]), c["run"]) for c in cases["cells"]]
    positions = {cell.id: c["position"] for cell, c in zip(cells, cases["cells"], strict=True)}
    place = Place.told(cases["place"])
    site = Site(out, place, positions, Path(cases["key_file"]).read_text(), cases.get("image"))
    by_case = {cell.case: cell for cell in cells}
    if where.nodes == 1:
        Runner(program, site, heart, by_case).run()
        return 0
    together = Together(program, site, heart, by_case)
    return together.lead(where.world_size) if where.rank == 0 else together.follow()


def _told_to_end(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(TOLD_TO_END)
