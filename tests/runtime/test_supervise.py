"""Supervising, with scripted groups: who is blamed, what is tried again, what is not."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from collectivex.runtime import environment
from collectivex.runtime.launched import RankEnvironment
from collectivex.runtime.processes import worker_command
from collectivex.runtime.supervise import MAX_PORT_RETRIES, PORT_TAKEN, Shard, Watch, supervise
from collectivex.runtime.types import CASES_SCHEMA, CONTRACT, Case, Cell, Collective, Status

CELLS = [
    Cell(Case("fake", "", "out-of-place", Collective("all_reduce", size, "float32"), 2))
    for size in (4, 8, 16)
]


class Scripted:
    """A group that has already ended: exit codes by rank, and what the ranks left in their folder."""

    def __init__(self, folder: Path, codes: dict[int, int], cell: str | None, errors: dict[int, dict]):
        self.codes, self.killed = codes, False
        folder.mkdir(parents=True)
        for rank in codes:
            beat = {"rank": rank, "cell": cell, "phase": "fresh call", "iteration": 3}
            (folder / f"rank{rank}.beat.json").write_text(json.dumps(beat))
        for rank, error in errors.items():
            said = {"rank": rank, "cell": cell, "phase": "fresh call", "iteration": 3, "traceback": "File x"}
            (folder / f"rank{rank}.error.json").write_text(json.dumps(said | error))

    def poll(self):
        return dict(self.codes)

    def dump_stacks(self):
        return None

    def kill(self):
        self.killed = True


class World:
    """Starts scripted groups in order; remembers who was started with what and what was recorded."""

    def __init__(self, *script):
        self.script, self.started, self.groups = list(script), [], []
        self.results: set[str] = set()
        self.records: dict[str, tuple[Status, str]] = {}
        self.told: dict[str, str] = {}

    def start(self, cells, folder):
        finished, codes, cell, errors = self.script[len(self.started)]
        self.started.append([c.id for c in cells])
        self.results |= {CELLS[i].id for i in finished}
        self.groups.append(Scripted(folder, codes, CELLS[cell].id if cell is not None else None, errors))
        return self.groups[-1]

    def run(self, tmp_path):
        def record(cell, ending):
            self.records[cell.id] = ending.status, ending.reason

        def tell(event, cell):
            self.told[cell] = event

        watch = Watch(self.start, lambda c: c.id in self.results, record, tell)
        shard = Shard("fake.r0", "fake", 0, list(CELLS))
        return supervise(shard, tmp_path / "logs", watch)


def error(kind: str, name: str, message: str) -> dict:
    return {"kind": kind, "type": name, "message": message}


FULL = error("infra", "InfraError", "disk full")
OWN = error("case", "ValueError", "no such row")
GLOO = error("peer", "RuntimeError", "[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_a_clean_run_needs_one_group(tmp_path) -> None:
    """Three results, exit 0: nothing to record, nothing to tell."""
    world = World(([0, 1, 2], {0: 0, 1: 0}, None, {}))

    assert world.run(tmp_path) is None
    assert ({}, 1) == (world.records, len(world.started))
    assert world.groups[0].killed


def test_the_cell_that_crashed_is_left_out_of_the_next_group(tmp_path) -> None:
    """The rest goes on in fresh processes."""
    world = World(([0], {0: 1, 1: -11}, 1, {0: GLOO}), ([2], {0: 0, 1: 0}, None, {}))

    world.run(tmp_path)

    assert [[c.id for c in CELLS], [CELLS[2].id]] == world.started
    assert (Status.FAILED, "rank 1 killed by SIGSEGV in fresh call") == world.records[CELLS[1].id]


@pytest.mark.parametrize(
    ("codes", "errors", "status", "reason"),
    [
        ({0: 1, 1: 1}, {0: GLOO, 1: OWN}, Status.FAILED, "ValueError: no such row"),
        ({0: 1, 1: 11}, {0: GLOO}, Status.FAILED, "rank 1 exited with 11"),
        ({0: 1, 1: 0}, {0: GLOO}, Status.FAILED, "rank 1 exited with 0 without an error and without a"),
        ({0: 3, 1: 1}, {0: FULL, 1: GLOO}, Status.INFRA, "disk full"),
        ({0: 1, 1: 1}, {0: GLOO, 1: GLOO}, Status.FAILED, "Connection closed by peer"),
    ],
)  # fmt: skip
def test_the_cause_is_told_and_not_its_echo(tmp_path, codes, errors, status, reason) -> None:
    """A rank whose peer is gone fails too; the record names the one that was first."""
    world = World(([0, 2], codes, 1, errors))

    world.run(tmp_path)

    found_status, found_reason = world.records[CELLS[1].id]
    assert status == found_status
    assert reason in found_reason
    assert str(status) == world.told[CELLS[1].id]


def test_a_group_that_never_came_up_is_not_tried_again_for_every_cell(tmp_path) -> None:
    """A library that is not there is not there the next time either."""
    missing = error("setup", "MissingLibrary", "deep_ep is not installed")
    world = World(([], {0: 2, 1: 2}, None, {0: missing, 1: missing}))

    world.run(tmp_path)

    assert 1 == len(world.started)
    assert {c.id for c in CELLS} == set(world.records)
    assert all("deep_ep is not installed" in reason for _, reason in world.records.values())
    assert {c.id: "failed" for c in CELLS} == world.told


def test_a_taken_port_is_tried_again_a_few_times(tmp_path) -> None:
    """The port was free when it was chosen; somebody was quicker."""
    world = World(([], {0: PORT_TAKEN, 1: 3}, None, {}), ([0, 1, 2], {0: 0, 1: 0}, None, {}))
    world.run(tmp_path / "once")
    assert {} == world.records

    world = World(*[([], {0: PORT_TAKEN, 1: 3}, None, {})] * (MAX_PORT_RETRIES + 1))
    world.run(tmp_path / "always")
    assert {Status.INFRA} == {status for status, _ in world.records.values()}
    assert {"infra"} == set(world.told.values())


def test_a_crash_in_teardown_stands_apart_from_the_results(tmp_path) -> None:
    """All results were written: they stay, and the crash is told beside them."""
    world = World(([0, 1, 2], {0: 0, 1: -6}, None, {}))

    told = world.run(tmp_path)

    assert {} == world.records
    assert ("after all results were written, rank 1 killed by SIGABRT", list(CELLS)) == told


def test_a_crash_in_teardown_is_that_of_the_cells_of_its_group(tmp_path) -> None:
    """A group before it ended well, or otherwise: its cells have nothing to do with it."""
    world = World(([0], {0: 0, 1: -11}, 1, {}), ([2], {0: 0, 1: -6}, None, {}))

    told = world.run(tmp_path)

    assert [CELLS[1].id] == list(world.records)
    assert told is not None
    assert [CELLS[2]] == told[1]


def test_a_worker_that_finds_its_port_taken_says_so_by_its_exit_code(tmp_path) -> None:
    """A real worker on an occupied port: exit 97, no traceback, nothing measured."""
    (tmp_path / "key").write_text("k")
    place = {
        "execution": "e",
        "allocation": "a",
        "suite": "s",
        "sku": "local",
        "topology_class": "t",
        "limits": [],
    }
    cases = {"schema": CASES_SCHEMA, "contract": CONTRACT, "backend": "fake", "device": "cpu", "place": place}
    cases |= {"key_file": str(tmp_path / "key"), "cells": []}
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        where = RankEnvironment(0, 1, 0, 1, "127.0.0.1", sock.getsockname()[1], "test")
        argv = worker_command("--cases", str(tmp_path / "logs" / "cases.json"), "--out", str(tmp_path))
        env = environment.child_environment({}, where)
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=120)

    assert PORT_TAKEN == done.returncode, done.stderr
    assert "Traceback" not in done.stderr


class Beating:
    """A group whose rank 0 beats as `beats` say, one at each look; after them it `ends`, or goes on."""

    def __init__(self, folder: Path, beats: list[dict], ends: bool):
        folder.mkdir(parents=True)
        self.path, self.beats, self.ends = folder / "rank0.beat.json", list(beats), ends

    def poll(self):
        if self.beats:
            self.path.write_text(json.dumps({"rank": 0, "phase": "sweep", **self.beats.pop(0)}))
            return {0: None}
        return {0: 0 if self.ends else None}

    def dump_stacks(self):
        return None

    def kill(self):
        return None


def watched(tmp_path, beats: list[dict], ends: bool, deadline_s: float) -> tuple[dict, list[tuple[str, str]]]:
    """Records and progress of a group over CELLS; the last result is there from the start."""
    cells = [Cell(cell.case.with_deadline(deadline_s)) for cell in CELLS]
    asked, records = [], {}

    def has_result(cell):
        asked.append(cell.id)
        return cell.id == cells[2].id

    watch = Watch(
        lambda remaining, folder: Beating(folder, beats, ends),
        has_result,
        lambda cell, ending: records.setdefault(cell.id, ending),
        lambda event, cell: asked.append(event),
    )
    supervise(Shard("fake.r0", "fake", 0, cells), tmp_path, watch)
    return records, asked


def test_a_beat_with_a_limit_of_its_own_moves_the_deadline(tmp_path, monkeypatch) -> None:
    """An external program answers several cells at once: each line that it prints starts the clock again."""
    monkeypatch.setattr("collectivex.runtime.supervise.GRACE_S", 0.0)
    monkeypatch.setattr("collectivex.runtime.supervise.POLL_S", 0.05)
    lines = [{"cell": CELLS[0].id, "iteration": i // 4, "limit_s": 0.3} for i in range(16)]

    records, _ = watched(tmp_path / "alive", lines, True, 0.3)
    assert all(ending.status is Status.FAILED for ending in records.values()), "it ended without results"

    records, told = watched(tmp_path / "mute", [lines[0]] * 16, True, 99)
    ending = records[CELLS[0].id]
    assert ending.status is Status.TIMEOUT
    assert "timeout" in told
    assert "no result within the deadline of 0.3 s" in ending.reason


def test_results_of_other_cells_are_told_while_a_program_goes_on(tmp_path) -> None:
    """In whatever order it answered them; a rank's own cells come one after the other."""
    beats = [{"cell": CELLS[0].id, "iteration": 0, "limit_s": 9}, {"cell": None, "iteration": 1}]
    beats += [{"cell": CELLS[1].id, "iteration": 1, "limit_s": 9}]
    _, asked = watched(tmp_path, beats, True, 9)
    between = asked[asked.index("start") + 1 : asked.index("start", asked.index("start") + 1)]
    assert CELLS[2].id in between
