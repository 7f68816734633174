"""`cx run` with real rank processes: whatever a library does, every cell ends as one record that says so.

One execution with a fault per cell is run once and looked at by many tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fault_cells import DEADLINE_S, processes, records, until, write_suite

from collectivex.runtime import validate
from collectivex.runtime.processes import worker_command

# In this order: an honest cell after every kind of end shows that the rest goes on.
CELLS = [
    "",
    "crash",
    "",
    "hang",
    "exit-without-result",
    "",
    "out-of-memory",
    "wrong-expert",
    "knob-ignored",
    "",
]


def cx(*arguments: str) -> list[str]:
    argv = worker_command()
    return [*argv[: argv.index("worker")], *arguments]


def run(suite: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    argv = cx("run", "--suite", suite, "--backend", "fake", "--ranks", "2", "--out", str(out), *more)
    return subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    done = run(write_suite(folder, CELLS), folder / "out")
    assert (folder / "out" / "manifest.json").exists(), done.stderr
    return folder / "out", done, dict(enumerate(records(folder / "out")))


def test_every_requested_cell_has_exactly_one_record(faulty):
    """Crashes, hangs and silent exits included."""
    out, done, found = faulty

    statuses = [found[i]["status"] for i in range(len(CELLS))]
    ended = {"": "ok", "crash": "failed", "hang": "timeout", "exit-without-result": "failed"}
    ended |= {"out-of-memory": "failed", "wrong-expert": "incorrect", "knob-ignored": "incorrect"}
    assert [ended[fault] for fault in CELLS] == statuses, done.stderr
    assert len(CELLS) == len(list((out / "cells").glob("*.json")))


def test_the_exit_code_says_that_some_cell_is_not_ok(faulty):
    """The same code as the gate's, and the reasons are on stdout."""
    _, done, _ = faulty

    assert 1 == done.returncode
    assert "ok 4 / 10" in done.stdout


def test_the_folder_is_valid_in_itself(faulty, capsys):
    """`cx validate` finds nothing wrong with what crashed cells left behind."""
    out, _, _ = faulty

    code = validate.command(argparse.Namespace(dirs=[str(out)], published=False))

    assert 0 == code, capsys.readouterr()


def test_a_known_clock_is_measured_exactly(faulty):
    """Dispatch 10 us, combine 20 us, on every rank: the whole path adds and loses nothing."""
    _, _, found = faulty

    medians = {(m["component"], m["regime"]): m[m["headline"]]["p50"] for m in found[0]["measurements"]}
    assert {
        ("dispatch", "fresh"): 10.0,
        ("combine", "fresh"): 20.0,
        ("roundtrip", "fresh"): 30.0,
        ("roundtrip", "chained"): 30.0,
        ("dispatch_floor", "chained"): 10.0,
        ("combine_floor", "chained"): 20.0,
    } == medians


def test_a_crash_names_the_signal_the_rank_and_where_it_was(faulty):
    """The record carries the stacks of the ranks."""
    _, _, found = faulty
    record = found[CELLS.index("crash")]

    assert re.search(r"rank 1 killed by SIGSEGV", record["reason"])
    assert "SIGSEGV" == record["failure"]["signal"]
    assert "Segmentation fault" in record["failure"]["ranks"][1]["stack"]


def test_a_hang_records_where_every_rank_was(faulty):
    """Phase and Python stack of each rank: the one that hangs and those that wait for it."""
    _, _, found = faulty
    record = found[CELLS.index("hang")]

    assert f"no result within the deadline of {DEADLINE_S} s" in record["reason"]
    assert ["rank 0", "rank 1"] == re.findall(r"rank \d", record["reason"])
    assert all("File" in rank["stack"] for rank in record["failure"]["ranks"])
    assert "_fake" in record["failure"]["ranks"][1]["stack"]


def test_an_exit_without_a_result_is_not_success(faulty):
    """Exit code 0 and nothing written is a failure with a reason."""
    _, _, found = faulty

    assert "without a result" in found[CELLS.index("exit-without-result")]["reason"]


def test_running_out_of_memory_says_so(faulty):
    """The library's own error is the reason."""
    _, _, found = faulty

    assert "OutOfMemoryError" in found[CELLS.index("out-of-memory")]["reason"]


def test_a_wrong_answer_publishes_no_latency(faulty):
    """Incorrect: the evidence and no number."""
    _, _, found = faulty
    record = found[CELLS.index("wrong-expert")]

    assert [] == record["measurements"]
    assert record["samples"] is None
    assert not record["correctness"]["passed"]


def test_a_knob_that_was_not_applied_makes_the_case_incorrect(faulty):
    """Both what was asked for and what was realised are in the record."""
    _, _, found = faulty
    record = found[CELLS.index("knob-ignored")]

    assert "asked for" in record["reason"]
    assert any(knob["requested"] != knob["realised"] for knob in record["knobs"].values())


def test_nothing_of_the_group_survives(faulty):
    """No rank, hung or waiting, is left behind."""
    out, _, _ = faulty

    assert [] == processes(out)


def test_no_record_tells_the_host_or_the_user(faulty):
    """Stacks and error texts are scrubbed."""
    out, _, _ = faulty
    text = "".join(path.read_text() for path in (out / "cells").glob("*.json"))

    assert os.uname().nodename not in text
    assert str(Path.home()) + "/" not in text
    assert str(Path(__file__).resolve().parent.parent.parent) not in text


def test_the_key_of_the_host_hashes_is_gone(faulty):
    """What could turn hashes back into names does not stay beside the logs."""
    out, _, _ = faulty

    assert not (out / "logs" / ".key").exists()


def interrupted(tmp_path, number) -> list[str]:
    """The command of a run that got a signal in its second cell, after it left valid files and said what did
    not run."""
    out = tmp_path / "out"
    suite = write_suite(tmp_path, ["", "slow", ""], deadline=60)
    argv = cx("run", "--suite", suite, "--backend", "fake", "--ranks", "2", "--out", str(out))
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert until(lambda: list((out / "cells").glob("tiny-t1-*.json")), 60)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)

    assert 1 == process.returncode, stderr
    assert ["ok", "not-run", "not-run"] == [record["status"] for record in records(out)]
    assert "--resume" in stderr
    assert [] == processes(out)
    return argv


def test_sigterm_ends_a_run_as_ctrl_c_does(tmp_path):
    """As a scheduler ends it."""
    interrupted(tmp_path, signal.SIGTERM)


def test_a_resumed_run_runs_just_what_did_not(tmp_path):
    """After Ctrl-C; what was measured stays as it is."""
    out, argv = tmp_path / "out", interrupted(tmp_path, signal.SIGINT)
    kept = next((out / "cells").glob("tiny-t1-*.json")).read_text()

    resumed = subprocess.run(
        [*argv, "--resume", "--deadline", "1"], capture_output=True, text=True, check=False
    )

    assert ["ok", "timeout", "ok"] == [record["status"] for record in records(out)], resumed.stderr
    assert kept == next((out / "cells").glob("tiny-t1-*.json")).read_text()


def valid(out: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether `cx validate` finds nothing wrong, which would be shown with the failing test."""
    code = validate.command(argparse.Namespace(dirs=[str(out)], published=False))
    print(capsys.readouterr())
    return code == 0


def test_records_that_were_spoilt_after_a_run_are_measured_again(tmp_path, capsys):
    """Cut short and deleted: --resume runs these and no other, and all is well."""
    out, suite = tmp_path / "out", write_suite(tmp_path, ["", "", ""])
    assert 0 == run(suite, out).returncode
    first, second, third = ((out / cell["file"]) for cell in manifest(out)["cells"])
    os.truncate(first, 700)
    second.unlink()
    before = third.read_bytes()

    done = run(suite, out, "--resume")

    assert 0 == done.returncode, done.stderr
    assert "ok 3 / 3" in done.stdout
    assert f"warning: {first} is not JSON, or truncated" in done.stderr
    assert before == third.read_bytes()
    assert valid(out, capsys)


def test_a_run_whose_manifest_was_spoilt_counts_again_after_resume(tmp_path, capsys):
    """Nothing is measured again; before, the summary names what nobody speaks for."""
    out, suite = tmp_path / "out", write_suite(tmp_path, ["", ""])
    assert 0 == run(suite, out).returncode
    before = {path: path.read_bytes() for path in (out / "cells").iterdir()}
    execution = manifest(out)["execution"]
    os.truncate(out / "manifest.json", 300)

    told = subprocess.run(cx("summarize", str(out)), capture_output=True, text=True, check=False)
    done = run(suite, out, "--resume")

    assert (1, 2) == (told.returncode, told.stderr.count("is an orphan"))
    assert "with --resume, makes it anew" in told.stderr
    assert 0 == done.returncode, done.stderr
    assert "ok 2 / 2" in done.stdout
    assert before == {path: path.read_bytes() for path in (out / "cells").iterdir()}
    assert execution == manifest(out)["execution"]
    assert valid(out, capsys)


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())


def test_a_folder_with_other_files_is_refused_before_anything_starts(tmp_path):
    """Nothing of the user's is mixed with ours."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")

    done = run(write_suite(tmp_path, [""]), tmp_path / "out")

    assert 2 == done.returncode
    assert re.search("error: .*not ours\nhint: ", done.stderr)
    assert ["thesis.tex"] == os.listdir(tmp_path / "out")


def test_a_missing_library_ends_all_its_cells_with_the_reason(tmp_path):
    """Set-up that fails is not tried again for every cell."""
    suite = write_suite(tmp_path, ["missing-library", ""])

    done = run(suite, tmp_path / "out")

    first, second = records(tmp_path / "out")
    assert "MissingLibrary" in first["reason"]
    assert "ok" == second["status"], done.stderr


def test_without_torch_the_error_says_how_to_get_it(tmp_path):
    """No traceback, exit code 2."""
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'torch' else find(name, package)\n"
    )
    argv = cx(
        "run", "--suite", write_suite(tmp_path, [""]), "--backend", "fake", "--out", str(tmp_path / "o")
    )

    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(block)}
    )

    assert 2 == done.returncode
    assert done.stderr.startswith("error: torch is not installed")
    assert "Traceback" not in done.stderr
    assert sys.executable in done.stderr


def test_a_full_disk_stops_the_run_and_keeps_what_was_measured(tmp_path, capsys):
    """Exit 3 with a hint; every file that is there is whole, and with more room --resume ends well."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        suite = write_suite(tmp_path, [""] * 8)
        done = run(suite, small / "out")
        cells = [json.loads(path.read_text()) for path in (small / "out" / "cells").glob("*.json")]
        named = {cell["samples"]["file"] for cell in cells if cell["samples"]}
        left = {f"samples/{path.name}" for path in (small / "out" / "samples").glob("*")}
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        resumed = run(suite, small / "out", "--resume")
        whole = valid(small / "out", capsys)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)

    assert 3 == done.returncode, done.stderr
    assert re.search("error: cannot write .*No space left on device\nhint: .*--resume", done.stderr)
    assert "Traceback" not in done.stderr
    assert {"ok"} <= {cell["status"] for cell in cells}
    assert named == left
    assert 0 == resumed.returncode, resumed.stderr
    assert whole
