"""`cx run`: plan, start rank processes here, account for every requested cell, summarise.

The order of things is the flow of the design: load, expand, record what is unsupported, then shard by shard
(one backend, one run, one fresh group of processes) until every cell has exactly one record.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..backends.base import Program
from . import document, environment, matrix, prepared, program_record, registry
from .document import Place
from .errors import CollectiveXError, InfraError, UserError
from .fabric import by_rank, fallen_back
from .heartbeat import read
from .manifest import Manifest
from .matrix import Planned
from .mechanism import Mechanism, Processes, Work, allowed_s, processes
from .preflight import require_gpus, require_torch
from .progress import Progress
from .scrub import scrub
from .sku import Sku, load_sku
from .starting import LauncherProcesses
from .suite import Suite, load_suite
from .supervise import Ending, Group, Shard, Watch, supervise
from .types import CASES_SCHEMA, CONTRACT, Cell, Status, case_to_json
from .writing import set_aside, write_bytes, write_json

# Ended by themselves: --resume does not run these again.
COMPLETED = {Status.OK, Status.INCORRECT, Status.IMPLAUSIBLE, Status.UNSUPPORTED}


def command(args: argparse.Namespace) -> int:
    suite, sku, planned = plan(args)
    if args.dry_run:
        for item in planned:
            print(item.cell.id, f"unsupported: {item.unsupported}" if item.unsupported else "run", sep="\t")
        return 0
    if sku.mechanism != "process":
        hint = f"use `cx launch` with the same options, or launchers/launch_{sku.name}.sh"
        raise UserError(f"the ranks of SKU {sku.name!r} are not processes of this machine", hint)
    require_torch(planned)
    require_gpus(sku, planned)
    out = Path(args.out or default_folder(suite.name))
    manifest = Manifest.open(
        out, suite.name, sku.name, told(sys.argv[1:]), [p.cell for p in planned], args.resume
    )
    mechanism = Processes() if sku.start == "ranker" else LauncherProcesses(sku.start)
    execution = Execution(
        suite, sku, planned, out, manifest, Progress(len(planned)), args.fail_fast, mechanism=mechanism
    )
    try:
        with terminated_like_interrupted():
            execution.run()
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept; run again with --resume to go on", file=sys.stderr)
        execution.conclude(Status.NOT_RUN, "interrupted")
    except CollectiveXError as error:
        execution.conclude(Status.NOT_RUN, f"stopped: {error.message}")
        raise
    return report(out)


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM (from `timeout`, a scheduler, a service manager) and SIGHUP (a terminal that closes) end a run
    as Ctrl-C does: accounted for."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plan(args: argparse.Namespace) -> tuple[Suite, Sku, list[Planned]]:
    """The requested cells, from the command line. Raises UserError for everything that is wrong in it."""
    suite, sku = load_suite(args.suite), load_sku(args.sku)
    planned = matrix.expand(suite, sku, args.backend or None, args.ranks, args.nodes, args.runs)
    pool = sku.at(args.nodes or 1)
    if args.ranks is None and (ranks := matrix.default_ranks(suite, pool)) < pool.default_ranks:
        many = f"{ranks} ranks, not {pool.default_ranks}: so many share out the experts evenly"
        print(f"{many} (--ranks says otherwise)", file=sys.stderr)
    if args.deadline is not None:
        planned = [
            replace(p, cell=Cell(p.cell.case.with_deadline(args.deadline), p.cell.run)) for p in planned
        ]
    if args.only:
        planned = [p for p in planned if any(part in p.cell.id for part in args.only)]
        if not planned:
            raise UserError(
                f"no cell of {suite.name} matches {', '.join(args.only)}", "see `cx run --dry-run`"
            )
    return suite, pool, planned


def default_folder(suite: str) -> Path:
    return Path("out") / f"{suite}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


@dataclass
class Execution:
    """One `cx run`: the plan, the folder it fills, and the account of every cell."""

    suite: Suite
    sku: Sku
    planned: Sequence[Planned]
    out: Path
    manifest: Manifest
    progress: Progress
    fail_fast: bool = False
    mechanism: Mechanism = field(default_factory=Processes)
    settings: Mapping[str, str] = field(default_factory=dict)  # of the network, set in every rank

    def __post_init__(self) -> None:
        self.key_file = self.out / "logs" / ".key"
        self.place = Place(
            execution=self.manifest.execution,
            allocation=allocation(self.manifest.execution),
            suite=self.suite.name,
            sku=self.sku.name,
            topology_class=self.sku.topology_class,
            device=self.sku.device,
            runs=1 + max(p.cell.run for p in self.planned),
            order=self.suite.order,
            limits=tuple(self.sku.all_limits()),
            nodes_per_domain=self.sku.nodes_per_domain,
        )
        self.positions = {p.cell.id: p.position for p in self.planned}
        self.failed: set[str] = set()  # ids of cells that this execution has tried in vain

    def run(self) -> None:
        """Every shard in turn. Host names are hashed with a key that lies beside the logs only meanwhile."""
        write_bytes(self.key_file, environment.user_key().encode(), mode=0o600)
        try:
            self.run_shards()
        finally:
            self.key_file.unlink(missing_ok=True)
            with contextlib.suppress(CollectiveXError):
                self.manifest.save()

    def run_shards(self) -> None:
        for item in self.planned:
            if item.unsupported is not None and not self.done(item.cell):
                self.record(item.cell, Ending(Status.UNSUPPORTED, item.unsupported))
        for shard in self.shards():
            for cell in shard.cells:
                self.set_aside(cell)
            self.progress.shard(shard.backend, shard.run, len(shard.cells))
            self.mechanism.check("before", self.health_folder(shard, "before"), self.per_node(shard))
            earlier = set(self.rank_logs(shard))
            watch = Watch(self.starter(shard), self.has_result, self.record, self.progress.event)
            try:
                crash = supervise(shard, self.out / "logs", watch)
            finally:
                self.clean(shard)
            if crash is not None:
                self.note_teardown(shard, *crash)
            self.look_after(shard, sorted(set(self.rank_logs(shard)) - earlier))
            if self.fail_fast and not all(self.manifest.is_good(cell.id) for cell in shard.cells):
                self.account(Status.NOT_RUN, "an earlier cell failed and --fail-fast was given")
                return

    def shards(self) -> list[Shard]:
        """One backend and run each, in the planned order."""
        shards: dict[tuple[int, str], Shard] = {}
        for item in self.planned:
            cell = item.cell
            if item.unsupported is not None or self.done(cell):
                continue
            name = f"{cell.case.backend}.r{cell.run}"
            shard = shards.setdefault(
                (cell.run, cell.case.backend), Shard(name, cell.case.backend, cell.run, [])
            )
            shard.cells.append(cell)
        return list(shards.values())

    def environ(self, name: str) -> dict[str, str]:
        """What pool, network, prepared library and backend set in every process that we start."""
        facts = registry.load(name).facts
        own = {
            **self.sku.env,
            **self.settings,
            **prepared.variables(name, self.mechanism.libraries),
            **facts.env,
        }
        return environment.for_elsewhere(own)

    def starter(self, shard: Shard) -> Any:
        """How supervise starts a group over cells of this shard."""
        case = shard.cells[0].case
        env, size = self.environ(shard.backend), processes(case)
        launched = not isinstance(registry.load(shard.backend), Program)
        if launched:
            # Ranks share the cores: with torch's default every rank would take them all.
            env.setdefault("OMP_NUM_THREADS", str(max(1, min(8, (os.cpu_count() or 1) // size))))

        def start(cells: Sequence[Cell], folder: Path) -> Group:
            seconds = allowed_s([cell.case for cell in cells])
            document = self.cases_document(shard.backend, cells)
            path = folder / "cases.json"
            work = Work(path, document, self.out, size, case.nodes, env, seconds, launched)
            return self.mechanism.group(work)

        return start

    def cases_document(self, backend: str, cells: Sequence[Cell]) -> dict[str, Any]:
        return {
            "schema": CASES_SCHEMA,
            "contract": CONTRACT,
            "backend": backend,
            "device": "cpu" if self.sku.device == "cpu" else "gpu",
            "key_file": str(self.key_file.resolve()),
            "place": asdict(self.place),
            "image": dict(self.mechanism.image) if self.mechanism.image else None,
            "cells": [
                {"case": case_to_json(cell.case), "run": cell.run, "position": self.positions[cell.id]}
                for cell in cells
            ],
        }

    def path(self, cell: Cell) -> Path:
        return self.out / "cells" / f"{cell.id}.json"

    def done(self, cell: Cell) -> bool:
        """Whether an earlier execution into this folder (--resume) left a completed record (resuming.py), or
        this one has tried it: a node that has to be replaced gives a library no second try."""
        return cell.id in self.failed or self.manifest.status(cell.id) in COMPLETED

    def set_aside(self, cell: Cell) -> None:
        """A record that --resume is about to replace is kept beside the logs."""
        if self.path(cell).exists():
            set_aside(self.out, self.path(cell))

    def has_result(self, cell: Cell) -> bool:
        """Whether the worker wrote this cell's result; if so it is now in the manifest."""
        result = read(self.path(cell))
        if result is None or result["identity"]["execution"] != self.place.execution:
            return False
        if self.manifest.status(cell.id) != Status(result["status"]):
            self.manifest.set(cell.id, Status(result["status"]))
            self.progress.event(result["status"], cell.id)
        return True

    def record(self, cell: Cell, ending: Ending) -> None:
        """Write the record of a cell that has no result of its own."""
        facts = registry.load(cell.case.backend).facts
        result = document.empty(
            cell, self.place, ending.status, ending.reason, self.positions[cell.id], facts
        )
        result["failure"] = ending.failure
        write_json(self.path(cell), result)
        self.manifest.set(cell.id, ending.status)
        if ending.status in (Status.FAILED, Status.TIMEOUT):
            self.failed.add(cell.id)

    def conclude(self, status: Status, reason: str) -> None:
        """`account` at an early end, whose own reason counts: a full disk takes no more records."""
        with contextlib.suppress(CollectiveXError):
            self.account(status, reason)

    def account(self, status: Status, reason: str) -> None:
        """Every cell that has no record gets one."""
        for item in self.planned:
            if not self.done(item.cell) and not self.has_result(item.cell):
                self.record(item.cell, Ending(status, reason))
        self.manifest.save()

    def per_node(self, shard: Shard) -> int:
        case = shard.cells[0].case
        return case.ranks // case.nodes

    def health_folder(self, shard: Shard, when: str) -> Path:
        """A new one each time; reports of an earlier attempt are no answer."""
        return self.out / "logs" / f"{shard.name}.health-{when}-{time.time_ns() // 1_000_000}"

    def rank_logs(self, shard: Shard) -> list[Path]:
        """What ranks and the processes of programs printed."""
        logs, name = self.out / "logs", shard.name
        return sorted([*logs.glob(f"{name}.*/rank*.log"), *logs.glob(f"{name}.*/process*/*.log")])

    def clean(self, shard: Shard) -> None:
        """What a program wrote of its environment is still there where its runner was killed."""
        backend = registry.load(shard.backend)
        if isinstance(backend, Program):
            for path in (self.out / "logs").glob(f"{shard.name}.*/process*/*.json"):
                program_record.keep(backend, path)

    def look_after(self, shard: Shard, logs: Sequence[Path]) -> None:
        """What was measured on a node that is unhealthy now, or over another network than the pool's, is no
        number to publish: those cells become `infra`."""
        nodes = shard.cells[0].case.nodes
        fallen = fallen_back(self.sku.fabric(), nodes, by_rank(logs))
        if fallen is not None:
            self.withhold(shard, fallen)
        try:
            self.mechanism.check("after", self.health_folder(shard, "after"), self.per_node(shard))
        except InfraError as error:  # a node that cannot be asked is no better than one that is unfit
            self.withhold(shard, error.message)
            raise

    def withhold(self, shard: Shard, reason: str) -> None:
        """What the shard ran becomes `infra`, wrong answers and crashes too: they may be the node's. What the
        cells said is kept beside the logs."""
        ran = (Status.OK, Status.INCORRECT, Status.IMPLAUSIBLE, Status.FAILED, Status.TIMEOUT)
        for cell in shard.cells:
            if self.manifest.status(cell.id) in ran:
                self.failed.discard(cell.id)
                samples = json.loads(self.path(cell).read_text())["samples"]
                self.set_aside(cell)
                if samples is not None:
                    set_aside(self.out, self.out / samples["file"])
                self.record(cell, Ending(Status.INFRA, scrub(reason)))
                self.progress.event("infra", cell.id)

    def note_teardown(self, shard: Shard, crash: str, cells: Sequence[Cell]) -> None:
        """A crash after all results of a group were written stands apart from them."""
        print(f"warning: {shard.name}: {crash}", file=sys.stderr)
        for cell in cells:
            path = self.path(cell)
            result = json.loads(path.read_text())
            if result["teardown"] is None and result["measurements"]:
                result["teardown"] = crash
                write_json(path, result)


def report(out: Path) -> int:
    """Print the summary table and say where everything lies; the exit code is the gate's."""
    from . import summary

    code = summary.command(argparse.Namespace(dirs=[str(out)], format="text"))
    print(f"results: {out}", file=sys.stderr)
    print(f"next: cx plot {out} --out {out}", file=sys.stderr)
    return code


def told(argv: Sequence[str]) -> list[str]:
    """The command line as a manifest may tell it: paths by their last part, nothing private."""
    return [scrub(Path(word).name if word.startswith("/") else word) for word in argv]


def allocation(execution: str) -> str:
    """What results of one allocation share: the scheduler's job, or without one this execution."""
    job = (environment.scheduler_facts() or {}).get("job_id")
    return execution if job is None else f"slurm-{job}"
