"""External programs: the runner. It stands where a rank stands, in the container or on the node, starts
processes for the cells they can answer together, bounds them, reads them, and writes the records.

The program owns its clock and its check; nothing it says is published unless all of it agrees (the backend's
`answers` decides). When a process dies or hangs, the case it was in is recorded and the others of its group
run again without it, as supervise.py does with ranks.

On one node there is one runner, and its program drives all GPUs of the node. On several there is one for each
GPU, whose processes are one MPI program; see together.py. Standard library only: the image needs no torch.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import Answer, Ended, MissingLibrary, Program, Start
from . import environment, machine, program_record
from .heartbeat import Heartbeat
from .program_record import Run, Site
from .scrub import scrub
from .supervise import GRACE_S, Watch
from .terminal import Follow, Process
from .types import Case, Cell, Status

SLACK_S = 4 * GRACE_S  # the supervisor's deadline comes after ours, which has to end the process first


@dataclass
class Runner:
    """What runs the cells of one cases document."""

    program: Program
    site: Site
    heart: Heartbeat
    cells: dict[Case, Cell]

    def run(self) -> None:
        todo = self.program.groups(list(self.cells))
        attempt = 0
        while todo:
            group = [self.cells[case] for case in todo.pop(0)]
            folder = self.heart.folder / f"process{attempt}"
            folder.mkdir()
            attempt += 1
            self.heart.cell = group[0].id
            answered = self.measure(group, folder)
            self.write(group, answered)
            self.heart.end()
            left = [cell.case for cell in group if cell.case not in answered]
            todo = self.program.groups(left) + todo if left else todo

    def measure(self, cells: Sequence[Cell], folder: Path) -> dict[Case, tuple[Answer, Run | None]]:
        """Answers with the run that the measurement is from, None where nothing could be started."""
        environ = self.environ()
        try:
            starts = self.starts(cells, folder, environ)
        except MissingLibrary as error:
            return missing(cells, error)
        with self.process(starts[0], environ, folder) as process:
            run, answers = self.one(starts[0], environ, process)
        if len(answers) == len(cells) and any(a.status is Status.OK for a in answers.values()):
            for start in starts[1:]:
                with self.process(start, environ, folder) as process:
                    _, found = self.one(start, environ, process)
                broke = next((a.reason for a in found.values() if a.status is not Status.OK), None)
                for case, answer in answers.items():
                    _add(answer, found.get(case) or Answer(Status.FAILED, broke))
        return {case: (answer, run) for case, answer in answers.items()}

    def write(self, cells: Sequence[Cell], answered: Mapping[Case, tuple[Answer, Run | None]]) -> None:
        if not answered:
            raise RuntimeError(f"{self.program.facts.name} answered none of {len(cells)} cases")
        for cell in cells:
            if cell.case in answered:
                answer, run = answered[cell.case]
                program_record.write(cell, answer, run, self.program, self.site)

    def environ(self) -> dict[str, str]:
        """What the processes inherit: ours, without what would change the measurement, and without what says
        that we are a rank: an MPI build would look for the others."""
        return self.allowed(environment.without_ranks())

    def allowed(self, environ: Mapping[str, str]) -> dict[str, str]:
        return {name: v for name, v in environ.items() if not name.startswith(self.program.withheld)}

    def starts(self, cells: Sequence[Cell], folder: Path, environ: Mapping[str, str]) -> list[Start]:
        self.heart.beat("looking for the program", 0, limit_s=Watch.setup_s)
        return self.program.starts([cell.case for cell in cells], str(folder.resolve()), environ)

    def process(self, start: Start, environ: Mapping[str, str], folder: Path) -> Process:
        return Process(start, {**environ, **start.env}, folder / f"{start.name}.log")

    def one(
        self, start: Start, environ: Mapping[str, str], process: Process
    ) -> tuple[Run, dict[Case, Answer]]:
        """Wait for a process, keep its output, judge it. One that is late is the caller's to end."""
        before = machine.clocks()
        follow = Follow(self.program.progress, lambda *heard: self.heard(start, *heard))
        output = Path(start.output) if start.output is not None else None
        try:
            ended, start_s = process.wait(follow, start.cases[0].deadline_s, Watch.setup_s)
        except BaseException:
            if output is not None:
                output.unlink(missing_ok=True)
            raise
        if output is not None and output.exists():
            text = output.read_text(errors="replace")
            ended = Ended(ended.returncode, ended.stdout, text, ended.timed_out)
            program_record.keep(self.program, output)
        gpus = start.cases[0].ranks // start.cases[0].nodes
        clocks = {"before": before[:gpus], "after": machine.clocks()[:gpus]}
        run = Run(start, ended, start_s, environ, clocks)
        return run, self.program.answers(start, ended)

    def heard(self, start: Start, pieces: int, limit_s: float, text: str) -> None:
        """The case under way is the one that would be blamed if the process ended now."""
        blamed = self.program.answers(start, Ended(-signal.SIGKILL, text))
        self.heart.cell = self.cells[next(iter(blamed))].id
        self.heart.beat(start.name, pieces, limit_s=limit_s + SLACK_S)


def missing(cells: Sequence[Cell], error: MissingLibrary) -> dict[Case, tuple[Answer, Run | None]]:
    told = scrub(f"MissingLibrary: {error}")
    return {cell.case: (Answer(Status.FAILED, told), None) for cell in cells}


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
