"""A rank's pulse: always readable, and next to free for what is being measured."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from collectivex.runtime.heartbeat import Heartbeat, read


@pytest.fixture
def heart(tmp_path: Path) -> Iterator[Heartbeat]:
    made = Heartbeat(tmp_path / "logs", 3)
    yield made
    made.end()  # and what a process takes back only by ending
    faulthandler.unregister(signal.SIGUSR1)
    faulthandler.enable(sys.__stderr__)
    made._stack.close()


def test_a_beat_says_where_the_rank_is(heart: Heartbeat) -> None:
    """Its cell, phase and iteration, and when the next beat is due where that is not the cell's deadline."""
    heart.begin("cell-1", 60)
    heart.beat("chained roundtrip", 4, limit_s=9.5)
    said = {"rank": 3, "cell": "cell-1", "phase": "chained roundtrip", "iteration": 4, "limit_s": 9.5}
    assert read(heart.path) == said


@pytest.mark.parametrize("long", ["fresh " + "x" * 500, "graph " + "ü" * 3000])
def test_a_shorter_beat_leaves_nothing_of_a_longer_one(heart: Heartbeat, long: str) -> None:
    """Whether or not the longer one was within the room that is kept."""
    heart.beat(long, 0)
    told = read(heart.path)
    assert told is not None
    assert told["phase"] == long
    heart.beat("end", 1)
    assert read(heart.path) == {"rank": 3, "cell": None, "phase": "end", "iteration": 1}


def test_beats_go_into_the_one_file_that_is_there(heart: Heartbeat) -> None:
    """A new file in place of the old would be written to the disk at once, during the chain that follows."""
    before = heart.path.stat().st_ino
    for i in range(5):
        heart.beat("fresh dispatch", i)
    assert heart.path.stat().st_ino == before
    assert [p.name for p in heart.folder.glob("*beat*")] == ["rank3.beat.json"]


def test_who_reads_while_a_rank_beats_reads_whole_beats(heart: Heartbeat) -> None:
    """Of any length, in their order, and never half of one."""
    over = threading.Event()
    found = []

    def watch() -> None:
        while not over.is_set():
            found.append(read(heart.path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(3000):
        heart.beat("phase " + "y" * (i % 300), i)
    over.set()
    watcher.join()
    assert len(found) > 10
    iterations = [beat["iteration"] for beat in found if beat is not None]
    assert len(iterations) == len(found)
    assert iterations == sorted(iterations)


def test_what_is_no_beat_is_none(tmp_path: Path) -> None:
    """Cut short for good, or not there yet."""
    (tmp_path / "cut").write_text('{"rank": 3, "ph')
    assert read(tmp_path / "cut") is None
    assert read(tmp_path / "missing") is None
