"""One group of rank processes from start to end: watch it, bound it, and say what became of every cell.

The worker writes the results of the cells that run to their end. Whatever ends otherwise (a crash, a hang, an
exit without a result, a group that never came up) is seen from here, and becomes a record with the evidence:
which ranks were where, their stacks, the end of what they printed. The remaining cells then run in a fresh
group, without the one that failed.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import heartbeat
from .scrub import scrub
from .types import Cell, Status

GRACE_S = 5.0  # after the deadline inside the ranks (their stacks) until the group is killed
STRAGGLER_S = 4.0  # after the first rank failed, for the others to fail too and leave their reason
POLL_S = 0.05
PORT_TAKEN = 97  # a worker's exit code: the rendezvous port was taken; try another
MAX_PORT_RETRIES = 3
MAX_STACK = 16_000


class Group(Protocol):
    """Rank processes that were started together; see launchers for the ways to start them."""

    def poll(self) -> dict[int, int | None]:
        """Exit code by rank: None while it runs, negative for a signal."""
        ...

    def dump_stacks(self) -> None:
        """Ask every living rank to write its stacks down (SIGUSR1)."""
        ...

    def kill(self) -> None:
        """End every process of the group and wait for it. Never touches any other process."""
        ...


@dataclass
class Shard:
    """Cells that share a group: one backend, one run, one environment."""

    name: str
    backend: str
    run: int
    cells: list[Cell]


@dataclass(frozen=True)
class Ending:
    """How a cell ended that has no result file of its own."""

    status: Status
    reason: str
    failure: dict[str, Any] | None = None


@dataclass
class Watch:
    """What supervising one shard needs from its caller.

    start      starts a group over these cells with logs in this folder
    has_result whether the cell's result file is there
    record     writes the record of a cell that has none
    progress   called with (event, cell id or "")
    """

    start: Callable[[Sequence[Cell], Path], Group]
    has_result: Callable[[Cell], bool]
    record: Callable[[Cell, Ending], None]
    progress: Callable[[str, str], None]
    setup_s: float = 600.0


def supervise(shard: Shard, logs: Path, watch: Watch) -> tuple[str, list[Cell]] | None:
    """Run every cell of the shard to a record. Returns the teardown crash, if there was one, and the cells of
    the group that it ended.

    Raises KeyboardInterrupt after killing the group; cells without a record are the caller's to account for.
    """
    remaining = list(shard.cells)
    attempt, port_retries = 0, 0
    while remaining:
        while (folder := logs / f"{shard.name}.{attempt}").exists():
            attempt += 1  # of an execution that is resumed: what it left is no answer of this group
        group = watch.start(remaining, folder)
        try:
            end = _watch(group, folder, remaining, watch)
        finally:
            group.kill()
        left = [cell for cell in remaining if not watch.has_result(cell)]
        if not left:
            crash = end.teardown()
            return None if crash is None else (crash, remaining)
        if end.port_taken and port_retries < MAX_PORT_RETRIES:
            port_retries += 1
            continue
        culprit = next((cell for cell in left if cell.id == end.cell), None)
        if culprit is None and len(left) < len(remaining):
            remaining = left  # it stopped between two cells, after some results: go on with the rest
            continue
        if culprit is None:
            # The group never came up. The next one would end the same way, so what is left ends here.
            for cell in left:
                _give_up(cell, end.ending(folder, len(end.codes)), watch)
            return None
        _give_up(culprit, end.ending(folder, len(end.codes)), watch)
        remaining = [cell for cell in left if cell is not culprit]
    return None


def _give_up(cell: Cell, ending: Ending, watch: Watch) -> None:
    """Record a cell that has no result of its own, and tell the status that stands in its record."""
    watch.record(cell, ending)
    watch.progress(str(ending.status), cell.id)


@dataclass
class GroupEnd:
    """The end of a group: exit codes by rank, the cell that was under way, and why we stopped watching."""

    codes: dict[int, int | None]
    cell: str | None
    timed_out: str | None = None
    done: bool = False

    @property
    def port_taken(self) -> bool:
        return PORT_TAKEN in self.codes.values()

    def teardown(self) -> str | None:
        """All results were written and yet a rank ended badly: worth saying, not worth the results."""
        bad = {rank: code for rank, code in self.codes.items() if code}
        if not bad:
            return None
        return "after all results were written, " + ", ".join(
            f"rank {r} {exit_text(c)}" for r, c in bad.items()
        )

    def ending(self, folder: Path, ranks: int) -> Ending:
        """Status, reason and evidence from what the ranks left behind."""
        beats = {rank: heartbeat.read(folder / f"rank{rank}.beat.json") or {} for rank in range(ranks)}
        errors = {r: e for r in range(ranks) if (e := heartbeat.read(folder / f"rank{r}.error.json"))}
        phases = {str(b.get("phase", "not started")) for b in beats.values()}
        evidence = {
            "phase": ", ".join(sorted(phases)) or None,
            "exit_code": next((c for c in self.codes.values() if c is not None and c > 0), None),
            "signal": next((_signal(c) for c in self.codes.values() if c is not None and c < 0), None),
            "ranks": [_rank_evidence(folder, rank, beats[rank], errors, self.codes) for rank in range(ranks)],
        }
        status, reason = self._reason(beats, errors)
        return Ending(status, reason, evidence)

    def _reason(self, beats: dict[int, Any], errors: dict[int, Any]) -> tuple[Status, str]:
        """The cause, not its echo: a rank that dies makes its peers fail in their next exchange with it."""
        if self.timed_out is not None:
            where = ", ".join(f"rank {r}: {b.get('phase', 'not started')}" for r, b in beats.items())
            return Status.TIMEOUT, f"{self.timed_out}; {where}"
        by_kind = {error["kind"]: error for error in reversed(errors.values())}
        if "infra" in by_kind:
            return Status.INFRA, _told(by_kind["infra"])
        if self.port_taken:
            return Status.INFRA, f"no free port for the rendezvous after {MAX_PORT_RETRIES} more tries"
        silent = {rank: code for rank, code in self.codes.items() if rank not in errors and code is not None}
        killed = {rank: code for rank, code in silent.items() if code < 0}
        for some in (killed, {} if {"setup", "case"} & by_kind.keys() else silent):
            bad = {rank: code for rank, code in some.items() if code or some is silent}
            if bad:
                what = ", ".join(f"rank {rank} {exit_text(code)}" for rank, code in bad.items())
                without = " without an error and without a result" if not any(bad.values()) else ""
                return Status.FAILED, f"{what}{without} in {beats[next(iter(bad))].get('phase', 'start')}"
        for kind in ("setup", "case", "teardown", "peer"):
            if kind in by_kind:
                return Status.FAILED, _told(by_kind[kind])
        return Status.FAILED, "the ranks exited without an error and without a result"


def _told(error: dict[str, Any]) -> str:
    """A rank's own words about how it failed."""
    said = f"{error['type']}: {error['message']}".strip().replace("\n", " ")
    return f"rank {error['rank']} in {error['phase']}: {scrub(said)[:1000]}"


def _watch(group: Group, folder: Path, cells: Sequence[Cell], watch: Watch) -> GroupEnd:
    """Poll until every rank is gone, one has failed, or a deadline has passed."""
    by_id = {cell.id: cell for cell in cells}
    untold = dict(by_id)
    current: str | None = None
    turn: tuple[str, int] | None = None
    since = time.monotonic()
    failed_at: float | None = None
    while True:
        codes = group.poll()
        now = time.monotonic()
        beat = _under_way(folder, len(codes))
        cell, limit_s = beat.get("cell"), beat.get("limit_s")
        if cell != current:
            if current in by_id:  # tell now, not when the whole group has ended
                # a program answers several cells at once, in its own order
                for name in list(untold) if turn is not None else [current]:
                    if watch.has_result(by_id[name]):
                        untold.pop(name, None)
            if cell is not None:
                watch.progress("start", cell)
            current, turn, since = cell, None, now
        if limit_s is not None and turn != (beat["phase"], beat["iteration"]):
            turn, since = (beat["phase"], beat["iteration"]), now
        if all(code is not None for code in codes.values()):
            return GroupEnd(codes, current)
        if any(codes.values()) and failed_at is None:
            failed_at = now
        if failed_at is not None and now - failed_at > STRAGGLER_S:
            group.dump_stacks()
            time.sleep(0.5)
            return GroupEnd(codes, current)
        if current is None and failed_at is None:
            limit, what = watch.setup_s, f"no cell started within {watch.setup_s:g} s"
        else:
            deadline = by_id[current].case.deadline_s if current in by_id else watch.setup_s
            deadline = deadline if limit_s is None else limit_s
            limit, what = deadline + GRACE_S, f"no result within the deadline of {deadline:g} s"
        if now - since > limit:
            group.dump_stacks()
            time.sleep(1.0)
            return GroupEnd(group.poll(), current, timed_out=what)
        time.sleep(POLL_S)


def _under_way(folder: Path, ranks: int) -> dict[str, Any]:
    """The beat of the first rank that says it is in a cell; empty while none is."""
    for rank in range(ranks):
        beat = heartbeat.read(folder / f"rank{rank}.beat.json")
        if beat and beat.get("cell"):
            return beat
    return {}


def _rank_evidence(folder: Path, rank: int, beat: dict, errors: dict, codes: dict) -> dict[str, Any]:
    error = errors.get(rank)
    return {
        "rank": rank,
        "phase": str(beat.get("phase", "not started")),
        "iteration": beat.get("iteration"),
        "alive": codes.get(rank) is None,
        "stack": scrub(error["traceback"]) if error else _tail(folder / f"rank{rank}.stack", MAX_STACK),
        "stderr": _tail(folder / f"rank{rank}.log", 2000),
    }


def _tail(path: Path, characters: int) -> str | None:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    return scrub(text[-characters:]) or None


def exit_text(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "still running"
    return f"killed by {_signal(code)}" if code < 0 else f"exited with {code}"


def _signal(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def write_cases(path: Path, document: dict[str, Any]) -> None:
    """The cases document of a group, next to its logs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1))
