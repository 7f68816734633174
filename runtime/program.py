"""External programs: start a process for the cells it can answer together, bound it, read it, write records.

The program owns its clock and its check; nothing it says is published unless all of it agrees (the backend's
`answers` decides). When a process dies or hangs, the case it was in is recorded and the others of its group
run again without it, as supervise.py does with ranks.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends.base import Answer, Ended, MissingLibrary, Program, Start
from . import document, environment, machine, provenance
from .document import Place
from .errors import InfraError
from .limits import beats_limit, may_reduce_in_network
from .scrub import scrub
from .supervise import GRACE_S, Ending, Shard, Watch
from .types import Case, Cell, Status
from .writing import write_bytes, write_json, write_samples

TERM_S = 2.0
POLL_S = 0.2
TAIL = 4000  # characters of a failed process's output that go into its records


@dataclass
class Site:
    """What running a shard needs to know of its execution. `env` is the pool's, set in every process."""

    out: Path
    place: Place
    positions: Mapping[str, int]
    key: str
    env: Mapping[str, str]
    described: dict[str, Any] = field(default_factory=dict)  # of the machine, once for the shard


@dataclass
class Run:
    """One process, from its start to its end, with what it left behind."""

    start: Start
    ended: Ended
    start_s: float
    clocks: dict[str, Any] = field(default_factory=dict)


def run_shard(program: Program, shard: Shard, site: Site, watch: Watch) -> None:
    """Run every cell of the shard to a record; see supervise.Watch for what it tells its caller.

    Raises KeyboardInterrupt after ending the process; cells without a record are the caller's to account for.
    """
    cells = {cell.case: cell for cell in shard.cells}
    todo = program.groups(list(cells))
    attempt = 0
    while todo:
        group = todo.pop(0)
        folder, attempt = _new_folder(site.out / "logs", shard.name, attempt)
        watch.progress("start", cells[group[0]].id)
        answered = _Group(program, site, watch, folder).run(group)
        if not answered:
            raise RuntimeError(f"{shard.backend} answered none of {len(group)} cases")
        for case, (answer, run) in answered.items():
            _record(cells[case], answer, run, program, site, watch)
        left = [case for case in group if case not in answered]
        todo = program.groups(left) + todo if left else todo


def _new_folder(logs: Path, name: str, attempt: int) -> tuple[Path, int]:
    """The next folder that is not there: an earlier execution's files (--resume) must not pass for ours."""
    while (folder := logs.resolve() / f"{name}.{attempt}").exists():
        attempt += 1
    folder.mkdir(parents=True)
    return folder, attempt + 1


@dataclass
class _Group:
    """The processes that answer one group of cases."""

    program: Program
    site: Site
    watch: Watch
    folder: Path

    def run(self, cases: Sequence[Case]) -> dict[Case, tuple[Answer, Run | None]]:
        """Answers with the run that the measurement is from, None where nothing could be started."""
        environ = self.environ()
        try:
            starts = self.program.starts(cases, str(self.folder), environ)
        except MissingLibrary as error:
            told = scrub(f"MissingLibrary: {error}")
            return {case: (Answer(Status.FAILED, told), None) for case in cases}
        run = self.one(starts[0], environ)
        answers = self.program.answers(run.start, run.ended)
        if len(answers) == len(cases) and any(a.status is Status.OK for a in answers.values()):
            for start in starts[1:]:
                more = self.one(start, environ)
                found = self.program.answers(more.start, more.ended)
                broke = next((a.reason for a in found.values() if a.status is not Status.OK), None)
                for case, answer in answers.items():
                    _add(answer, found.get(case) or Answer(Status.FAILED, broke))
        return {case: (answer, run) for case, answer in answers.items()}

    def environ(self) -> dict[str, str]:
        """What the processes inherit: ours and the pool's, without what would change the measurement."""
        whole = environment.child_environment(self.site.env)
        return {n: v for n, v in whole.items() if not n.startswith(self.program.withheld)}

    def one(self, start: Start, environ: Mapping[str, str]) -> Run:
        """Start it, wait for it, keep its output."""
        before = machine.clocks()
        process = Process(start, {**environ, **start.env}, self.folder / f"{start.name}.log")
        try:
            ended, start_s = process.wait(self.program, start.cases[0].deadline_s, self.watch.setup_s)
        except BaseException:
            if start.output is not None:
                Path(start.output).unlink(missing_ok=True)
            raise
        if start.output is not None and Path(start.output).exists():
            text = Path(start.output).read_text(errors="replace")
            ended = Ended(ended.returncode, ended.stdout, text, ended.timed_out)
            self.keep(Path(start.output), text)
        ranks = start.cases[0].ranks
        return Run(start, ended, start_s, {"before": before[:ranks], "after": machine.clocks()[:ranks]})

    def keep(self, path: Path, text: str) -> None:
        """Programs write their whole environment down: such a file stays only without it."""
        kept = self.program.keep(text)
        if kept is None:
            path.unlink()
        else:
            write_bytes(path, kept.encode())


def _add(answer: Answer, extra: Answer) -> None:
    """A further process of the same case: its series where it passed, its verdict where an answer was wrong,
    else only the news that it failed."""
    if answer.status is not Status.OK:
        return
    if extra.status is Status.OK:
        answer.series += extra.series
        answer.checks += extra.checks
        answer.warnings += [w for w in extra.warnings if w not in answer.warnings]
    elif extra.status is Status.INCORRECT:
        answer.status, answer.reason = extra.status, extra.reason
        answer.checks += extra.checks
    else:
        answer.warnings.append(
            f"a further process of this measurement ended without a result: {extra.reason}"
        )


class Process:
    """A process in a session of its own, on a pseudo-terminal: then it writes line by line, and what it had
    said before it hung or crashed is there. Everything goes to `log` as it comes."""

    def __init__(self, start: Start, environ: Mapping[str, str], log: Path):
        self.log = log
        self.began = time.monotonic()
        try:
            self.terminal, theirs = pty.openpty()
        except OSError as error:
            raise InfraError(f"no pseudo-terminal for {start.argv[0]}: {error.strerror}") from error
        _plain(theirs)
        try:
            self.process = subprocess.Popen(
                start.argv,
                env=dict(environ),
                cwd=log.parent,
                stdin=subprocess.DEVNULL,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
            )
        except OSError as error:
            os.close(self.terminal)
            raise InfraError(f"cannot start {Path(start.argv[0]).name}: {error.strerror}") from error
        finally:
            os.close(theirs)

    def wait(self, program: Program, deadline_s: float, setup_s: float) -> tuple[Ended, float]:
        """How it ended, and the seconds until its first piece of work was done. It is ended when the next
        piece does not come within the deadline of a case."""
        text, pieces, since, first = "", 0, self.began, None
        late = None
        try:
            with self.log.open("wb") as log:
                while True:
                    alive = self.process.poll() is None
                    data = self.read()
                    log.write(data)
                    log.flush()
                    text += data.decode(errors="replace")
                    now = time.monotonic()
                    if data and (done := program.progress(text)) > pieces:
                        pieces, since = done, now
                        first = first or now
                    limit = deadline_s if pieces else max(deadline_s, setup_s)
                    if not data and not alive:
                        break
                    if alive and now - since > limit + GRACE_S:
                        which = "further" if pieces else "first"
                        late = f"no {which} line of results within the deadline of {limit:g} s"
                        break
        finally:
            self.end()
        code = self.process.returncode
        return Ended(code, text, None, late), (first or time.monotonic()) - self.began

    def read(self) -> bytes:
        """What it printed meanwhile; empty after POLL_S without anything, and after its end."""
        ready, _, _ = select.select([self.terminal], [], [], POLL_S)
        if not ready:
            return b""
        try:
            return os.read(self.terminal, 1 << 16)
        except OSError:  # EIO: nobody holds the other end any more
            time.sleep(0.01)
            return b""

    def end(self) -> None:
        """SIGTERM to its session, SIGKILL to what is left of it, and wait."""
        for sig, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, sig)
            until = time.monotonic() + wait_s
            while time.monotonic() < until and self.process.poll() is None:
                time.sleep(0.02)
        os.close(self.terminal)


def _plain(terminal: int) -> None:
    """Newlines as they are written."""
    attributes = termios.tcgetattr(terminal)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)


# ---------------------------------------------------------------------------------------------- records


def _record(cell: Cell, answer: Answer, run: Run | None, program: Program, site: Site, watch: Watch) -> None:
    """The one record of a cell."""
    if answer.status in (Status.OK, Status.INCORRECT) and run is not None:
        result = result_of(cell, answer, run, program, site)
        write_json(site.out / "cells" / f"{cell.id}.json", result)
        watch.has_result(cell)
        return
    assert answer.reason is not None
    watch.record(cell, Ending(answer.status, scrub(answer.reason), run and failure(run)))
    watch.progress(str(answer.status), cell.id)


def failure(run: Run) -> dict[str, Any]:
    """The evidence: exit code or signal, and the end of what was printed."""
    code = run.ended.returncode
    named = signal.Signals(-code).name if -code in list(signal.Signals) else None
    process = {
        "rank": 0,
        "phase": run.start.name,
        "iteration": None,
        "alive": run.ended.timed_out is not None,
        "stack": None,
        "stderr": scrub(run.ended.stdout[-TAIL:]) or None,
    }
    return {
        "phase": run.start.name,
        "exit_code": code if code >= 0 else None,
        "signal": named,
        "ranks": [process],
    }


def result_of(cell: Cell, answer: Answer, run: Run, program: Program, site: Site) -> dict[str, Any]:
    """The result of a cell whose process ran to its end: measured, or found to be wrong."""
    place, case = site.place, cell.case
    position = site.positions[cell.id]
    result = document.empty(cell, place, answer.status, answer.reason, position, program.facts)
    result["correctness"] = document.correctness(answer.checks)
    result["bytes"] = answer.bytes
    result["timing_split"] = {"start_s": round(run.start_s, 4)}
    result["provenance"] = _provenance(answer, run, program, site)
    result["warnings"] = [scrub(warning) for warning in answer.warnings]
    result["warnings"] += provenance.findings({"clocks": run.clocks})
    asked = dict(case.knobs)
    result["knobs"] = {
        name: {"requested": asked.get(name), "realised": answer.realised.get(name)}
        for name in {**asked, **answer.realised}
    }
    unlike = [n for n, k in result["knobs"].items() if k["requested"] not in (None, k["realised"])]
    if answer.status is Status.OK and (unlike or not result["correctness"]["passed"]):
        why = f"{unlike[0]}: was not applied as asked" if unlike else "nothing was checked"
        result["status"], result["reason"] = str(Status.INCORRECT), why
    if result["status"] != str(Status.OK):
        return result
    result["measurements"] = [
        document.measurement(case, place.topology_class, series, [series.samples_us])
        for series in answer.series
    ]
    reason = beats_limit(result, may_reduce_in_network(result["provenance"]["environment"]))
    if reason is not None:
        result["status"], result["reason"] = str(Status.IMPLAUSIBLE), reason
    entries = [document.sidecar_entry(series, [series.samples_us]) for series in answer.series]
    result["samples"] = write_samples(site.out, cell.id, entries)
    return result


def _provenance(answer: Answer, run: Run, program: Program, site: Site) -> dict[str, Any]:
    """The machine as this process sees it; libraries and settings as the program had them, not we."""
    if not site.described:
        site.described.update(provenance.describe(program.facts, {}, site.key))
    found = dict(site.described)
    found["backend"] = {**found["backend"], "versions": dict(answer.versions)}
    found["hosts"] = [found["host"]] * run.start.cases[0].ranks if run.start.cases[0].nodes == 1 else []
    found["torch"] = found["cuda"] = found["rocm"] = None
    found["libraries"] = [
        {"name": name, "version": version, "build_version": built, "path": None}
        for name, (version, built) in answer.libraries.items()
    ]
    environ = {**environment.child_environment(site.env), **run.start.env}
    found["environment"] = environment.communication_settings(site.key, environ)
    return {**found, "clocks": run.clocks}
