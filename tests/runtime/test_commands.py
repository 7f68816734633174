"""Other people's programs: none waits for ever, and none outlives its time."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from collectivex.runtime import commands
from collectivex.runtime.commands import Done, run


def ended(file: Path, within_s: float = 5.0) -> bool:
    """Whether the process whose id stands in this file goes within that time."""
    status = Path("/proc", file.read_text().strip(), "status")
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if "State:\tZ" in status.read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_a_program_that_is_not_there_is_said() -> None:
    """Done, not an exception: the caller decides what a failure means."""
    assert run(["/no/such/program"]) == Done(127, err="/no/such/program: No such file or directory")


def test_a_command_cannot_wait_for_a_password() -> None:
    """Nothing to read from, and no terminal to open."""
    done = run(["sh", "-c", "cat; exec 3</dev/tty && echo asked"], timeout_s=20)
    assert done.code != 0
    assert "asked" not in done.out


def test_a_command_that_takes_too_long_is_ended() -> None:
    """A hanging scheduler must not hang us."""
    assert run(["sleep", "30"], timeout_s=0.2).code == 124


def test_what_a_command_has_started_ends_with_it(tmp_path: Path) -> None:
    """Importers of images and launchers of steps are scripts: what works is a child of what we started."""
    run(["sh", "-c", f"sleep 47 & echo $! > {tmp_path}/pid; wait"], timeout_s=0.5)
    assert ended(tmp_path / "pid")


def test_what_does_not_end_when_asked_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a child that holds on to nothing of ours."""
    monkeypatch.setattr(commands, "END_S", 0.2)
    deaf = f"(trap '' TERM; exec >/dev/null 2>&1; sleep 47) & echo $! > {tmp_path}/pid; wait"
    assert run(["sh", "-c", deaf], timeout_s=0.5).code == 124
    assert ended(tmp_path / "pid")


def test_what_was_said_before_the_time_ran_out_is_kept() -> None:
    """The reason for a hang is in there, and that time ran out comes last."""
    late = "sh did not end within 0.5 s"
    done = run(["sh", "-c", "echo out; echo why >&2; sleep 47 & wait"], timeout_s=0.5)
    assert done == Done(124, "out\n", f"why\n{late}")
    assert done.said == f"out / why / {late}"
    assert run(["sh", "-c", "printf half >&2; sleep 47"], timeout_s=0.5).said == f"half / {late}"


def test_what_has_left_the_group_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A daemon of its own session that holds our pipes: what was said is told all the same."""
    monkeypatch.setattr(commands, "END_S", 0.2)
    began = time.monotonic()
    left = f"echo here; setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 47' & sleep 47"
    done = run(["sh", "-c", left], timeout_s=0.5)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert (done.code, done.out) == (124, "here\n")
    assert time.monotonic() - began < 10


def test_an_interrupt_ends_what_was_started(tmp_path: Path) -> None:
    """A command has a session of its own: the terminal's interrupt reaches us only."""
    timer = threading.Timer(0.5, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", f"sleep 47 & echo $! > {tmp_path}/pid; wait"], timeout_s=30)
    timer.join()
    assert ended(tmp_path / "pid")


def test_a_command_runs_where_it_is_told(tmp_path: Path) -> None:
    """A folder that is not there is named, not the program."""
    assert run(["pwd", "-P"], cwd=tmp_path).out.strip() == str(tmp_path.resolve())
    assert run(["pwd"], cwd=tmp_path / "none") == Done(127, err=f"{tmp_path}/none: No such file or directory")
