"""`cx run` with an external program: whatever it does, every cell ends as one record that says so.

The binaries are fakes (tests/nccl_tests_fake.py); the pool claims four GPUs that nobody looks at.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fault_cells
import nccl_tests_bin as fakes
import program_pool
import pytest
from fault_cells import until

from collectivex.backends.base import Ended, Start
from collectivex.backends.nccl_tests import Backend
from collectivex.runtime import environment, matrix, preflight, program, summary, validate
from collectivex.runtime.errors import UserError
from collectivex.runtime.processes import worker_command
from collectivex.runtime.sku import load_sku
from collectivex.runtime.suite import FOLDER, load_suite
from collectivex.runtime.terminal import Follow, Process

SKU = """\
schema: collectivex.sku.v1
name: pool
title: four GPUs for a test
vendor: nvidia
arch: sm90
product: h200
gpus_per_node: 4
scale_up: {kind: nvlink4, domain: 4, links: 18, GBps: 450, source: datasheet}
scale_out: null
mechanism: process
image: null
env: {NCCL_NVLS_ENABLE: "0"}
refuse: []
limits: []
"""
SUITE = program_pool.suite("nccl_tests", "fresh, chained, graph")


def command(folder: Path) -> list[str]:
    """`cx run` with the suite and the pool in `folder`."""
    argv = worker_command()
    argv = [*argv[: argv.index("worker")], "run", "--suite", str(folder / "sweep.yaml")]
    return [*argv, "--sku", str(folder / "pool.yaml"), "--out", str(folder / "out")]


def documents(folder: Path) -> list[Path]:
    """What the program has written of its JSON documents, its environment in them."""
    return list((folder / "out" / "logs").glob("*/process*/*.json"))


def hanging(folder: Path, suite: str = SUITE) -> subprocess.Popen[str]:
    """`cx run`, once the program hangs with a document begun."""
    (folder / "pool.yaml").write_text(SKU)
    (folder / "sweep.yaml").write_text(suite.replace("deadline_s: 2", "deadline_s: 60"))
    plan = fakes.environ(fakes.install(folder / "bin"), fault="early-hang")
    process = subprocess.Popen(command(folder), env={**os.environ, **plan}, stderr=subprocess.PIPE, text=True)
    assert until(lambda: documents(folder), 30)
    return process


@pytest.fixture
def bench(tmp_path: Path):
    """Run the suite with fakes that behave like `plan` says; (exit code, records in order, stderr)."""
    (tmp_path / "pool.yaml").write_text(SKU)
    binaries = fakes.install(tmp_path / "bin")

    def run(*more: str, suite: str = SUITE, **plan: Any) -> tuple[int, list[dict], str]:
        (tmp_path / "sweep.yaml").write_text(suite)
        argv = [*command(tmp_path), *more]
        environ = {**os.environ, **fakes.environ(binaries, **plan), "XDG_STATE_HOME": str(tmp_path)}
        environ["NCCL_TESTS_SPLIT"] = "MOD 2"
        done = subprocess.run(argv, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert (tmp_path / "out" / "manifest.json").exists(), done.stderr
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        records = [json.loads((tmp_path / "out" / cell["file"]).read_text()) for cell in manifest["cells"]]
        return done.returncode, records, done.stderr

    return run


def valid(out: Path) -> bool:
    return validate.command(argparse.Namespace(dirs=[str(out)], published=False)) == 0


def test_an_honest_run_is_measured_checked_and_valid(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two processes for three sizes, regime `loop` instead of what is asked for, and nothing invented."""
    code, records, stderr = bench(record=str(tmp_path / "seen.jsonl"))

    assert code == 0, stderr
    assert [r["status"] for r in records] == ["ok"] * 3
    assert valid(tmp_path / "out"), capsys.readouterr().out
    first = records[0]
    assert first["case"]["regimes"] == ["loop"]
    by_name = {m["component"]: m for m in first["measurements"]}
    assert {m["regime"] for m in first["measurements"]} == {"loop"}
    call, each = by_name["call"], by_name["call_iteration"]
    assert (call["headline"], call["per_sample"], call["max"]["n"]) == ("max", 4, 2)
    assert (each["headline"], each["per_sample"], each["max"]["n"]) == ("max", 1, 8)
    assert call["max"]["p50"] == pytest.approx(10.010, abs=0.001)
    assert first["first_call_us"] is None
    assert first["correctness"]["checks"][0]["name"].startswith("nccl-tests' own check")
    sidecar = json.loads(gzip.decompress((tmp_path / "out" / first["samples"]["file"]).read_bytes()))
    assert [len(s["per_rank_us"]) for s in sidecar["series"]] == [1, 1]

    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 2
    assert all(s["env"]["NCCL_NVLS_ENABLE"] == "0" for s in seen)
    assert all("NCCL_TESTS_SPLIT" not in s["env"] for s in seen)


def test_the_suite_of_every_program_is_one_process_for_each_and_dtype(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Eleven programs, two dtypes: 22 processes for 114 cells, each of them read, checked and valid."""
    text = (FOLDER / "nccl-tests.yaml").read_text().replace("name: nccl-tests", "name: sweep")
    programs = text.partition("  - family: collective\n    backends: [torch_dist]")[0]

    code, records, stderr = bench(suite=programs, record=str(tmp_path / "seen.jsonl"))

    assert code == 0, stderr
    assert ["ok"] * (11 * 2 * 3 + 8 * 2 * 3) == [r["status"] for r in records]
    assert valid(tmp_path / "out"), capsys.readouterr().out
    seen = [json.loads(line)["program"] for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert {f"{name}_perf": 2 for name in fakes.PROGRAMS} == Counter(seen)
    assert {"hardware"} == {r["backend"]["validated"] for r in records}


def test_versions_come_from_the_program(bench: Any, tmp_path: Path) -> None:
    """Not from our own process, which has no NCCL and whose torch it does not use."""
    _, records, _ = bench()
    provenance = records[0]["provenance"]
    nccl = {"name": "nccl", "version": "2.28.9", "build_version": "2.28.9", "path": None}
    assert provenance["libraries"] == [nccl]
    assert provenance["backend"]["versions"] == {"nccl-tests": "2.19.6"}
    assert provenance["torch"] is None
    assert provenance["environment"]["NCCL_NVLS_ENABLE"] == "0"


def test_what_is_kept_of_its_output_holds_no_environment(bench: Any, tmp_path: Path) -> None:
    """nccl-tests writes all of it into its JSON document."""
    bench()
    kept = list((tmp_path / "out" / "logs").glob("*/process*/*.json"))
    assert len(kept) == 2
    assert all("CX_FAKE" not in path.read_text() for path in kept)
    assert not any("env" in json.loads(path.read_text()) for path in kept)


def test_its_numbers_have_tables_of_their_own(bench: Any, tmp_path: Path, capsys: Any) -> None:
    """Never beside `fresh` or `chained`: another regime is another comparison key."""
    bench()
    summary.command(argparse.Namespace(dirs=[str(tmp_path / "out")], format="text"))
    out = capsys.readouterr().out
    assert "· loop ·" in out
    assert "· fresh ·" not in out
    assert "· chained ·" not in out


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("crash", "failed", "killed by SIGSEGV without its footer, in 4096 bytes of cycle 1 of 2"),
        ("nccl", "failed", "exited with 3 (NCCL error)"),
        ("timeout", "timeout", "exited with 4 (timeout)"),
        ("wrong", "incorrect", "10 wrong elements in 4096 bytes"),
    ],
)
def test_one_bad_size_does_not_cost_the_others_their_results(
    fault: str, status: str, said: str, bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """They run again without it."""
    code, records, stderr = bench(fault=fault, at=4096)

    assert code == 1, stderr
    assert [r["status"] for r in records] == ["ok", status, "ok"], stderr
    assert said in records[1]["reason"]
    assert records[1]["measurements"] == []
    assert valid(tmp_path / "out"), capsys.readouterr().out


def test_a_hang_is_ended_at_the_deadline_of_a_case(bench: Any, tmp_path: Path) -> None:
    """The evidence is what it had printed; nothing of it is left running."""
    began = time.monotonic()
    _, records, stderr = bench(fault="hang", at=4096)

    assert [r["status"] for r in records] == ["ok", "timeout", "ok"], stderr
    assert "no further line of results within the deadline of 2 s" in records[1]["reason"]
    assert "# Using devices" in records[1]["failure"]["ranks"][0]["stderr"]
    assert time.monotonic() - began < 60
    assert fault_cells.processes(tmp_path) == []


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"fault": "no-library"}, "libnccl.so.2"),
        ({"version": "2.10.0"}, "too old"),
        ({"fault": "few-gpus"}, "Invalid number of GPUs: 4 requested but only 1 were found."),
        ({"fault": "early-nccl"}, "before its table began"),
        ({"fault": "no-footer"}, "without its footer"),
        ({"fault": "cut-json"}, "is cut short or no JSON"),
        ({"fault": "exit-seven"}, "exited with 7 although its checks passed"),
    ],
)
def test_a_run_without_results_fails_every_cell_with_its_reason(
    plan: dict, said: str, bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Once, not once for each size; a document that cannot be cleaned of the environment is not kept."""
    code, records, stderr = bench(**plan)

    assert code == 1, stderr
    assert [r["status"] for r in records] == ["failed"] * 3
    assert all(said in r["reason"] for r in records), records[0]["reason"]
    assert valid(tmp_path / "out"), capsys.readouterr().out
    assert not any("CX_FAKE" in p.read_text() for p in (tmp_path / "out" / "logs").rglob("*.json"))


def test_a_missing_binary_names_the_remedy(bench: Any, tmp_path: Path) -> None:
    """MissingLibrary, as for a library that is not installed."""
    for path in (tmp_path / "bin").iterdir():
        path.unlink()
    code, records, _ = bench()
    assert code == 1
    assert all("MissingLibrary: all_reduce_perf is neither in" in r["reason"] for r in records)
    assert all("put its build folder on PATH" in r["reason"] for r in records)


def test_old_versions_are_read_from_their_table(bench: Any) -> None:
    """No JSON, no per-iteration times, no version of anything."""
    code, records, stderr = bench(version="2.13.10")
    assert code == 0, stderr
    assert [m["component"] for m in records[0]["measurements"]] == ["call"]
    assert records[0]["provenance"]["libraries"][0]["version"] is None


def test_a_resumed_run_does_not_read_the_files_of_the_one_before(bench: Any, tmp_path: Path) -> None:
    """Its logs lie in the same folder; what failed runs again, what ended stays."""
    bench(fault="crash", at=4096)
    code, records, stderr = bench("--resume")
    assert code == 0, stderr
    assert [r["status"] for r in records] == ["ok"] * 3


def test_a_number_above_the_link_is_implausible(bench: Any, tmp_path: Path) -> None:
    """64 MiB in 681 us and 749 us are 148 GB/s of busbw and 134: not over a link of 45 GB/s with NVLS off."""
    (tmp_path / "pool.yaml").write_text(SKU.replace("GBps: 450", "GBps: 45"))
    code, records, _ = bench(suite=SUITE.replace("[1KiB, 4KiB, 16KiB]", "[64MiB]"))
    assert code == 1
    assert records[0]["status"] == "implausible"
    assert "loop call would carry 148 GB/s over a link of 45 GB/s" in records[0]["reason"]


def test_a_sibling_process_that_ends_early_costs_only_its_own_series(bench: Any) -> None:
    """The measurement stands, and says what is missing."""
    code, records, stderr = bench(fault=None, each_fault="crash", at=4096)
    assert code == 0, stderr
    assert [[m["component"] for m in r["measurements"]] for r in records] == [["call"]] * 3
    assert all("further process" in r["warnings"][0] and "SIGSEGV" in r["warnings"][0] for r in records)


def test_a_sibling_process_with_wrong_data_takes_the_number_with_it(bench: Any) -> None:
    """It is the same operation: one wrong answer is enough."""
    _, records, _ = bench(fault=None, each_fault="wrong", at=4096)
    assert [r["status"] for r in records] == ["ok", "incorrect", "ok"]
    assert records[1]["samples"] is None


def test_an_interrupted_run_leaves_no_process_and_no_environment(tmp_path: Path) -> None:
    """Ctrl-C during a hang: not-run, and the half-written document is gone."""
    process = hanging(tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)

    assert "--resume" in stderr
    records = [json.loads(p.read_text()) for p in (tmp_path / "out" / "cells").glob("*.json")]
    assert [r["status"] for r in records] == ["not-run"] * 3
    assert not documents(tmp_path)
    assert fault_cells.processes(tmp_path) == []


def test_every_multicast_switch_of_the_pool_reaches_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off in the four spellings, and nothing of NCCL_TESTS_* beside it, nor of its runner's rank."""
    for name in ("NCCL_TESTS_SPLIT", "PMIX_RANK", "SLURM_PROCID", "RANK"):
        monkeypatch.setenv(name, "1")
    for name, value in load_sku("h200x4-nvlink").env.items():
        monkeypatch.setenv(name, value)
    environ = program.Runner(Backend(), None, None, {}).environ()  # type: ignore[arg-type]
    assert set(environment.multicast_settings(environ).values()) == {"off"}
    assert not [name for name in environ if name.startswith(("NCCL_TESTS_", "PMIX", "SLURM", "RANK"))]


def test_a_machine_without_gpus_says_that_it_needs_some() -> None:
    """Planned as unsupported, on any laptop."""
    suite, local = load_suite("smoke"), load_sku("local")
    if local.device != "cpu":
        pytest.skip("this machine has GPUs")
    reasons = {p.unsupported for p in matrix.expand(suite, local, ["nccl_tests"])}
    assert "nccl_tests runs on cuda; local has cpu" in reasons
    assert None not in reasons


def test_what_a_process_said_before_it_was_killed_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe would hold it back until the program's buffer is full; a terminal has every line."""
    monkeypatch.setattr("collectivex.runtime.terminal.GRACE_S", 1.5)
    binaries = fakes.install(tmp_path / "bin")
    environ = fakes.environ(binaries, fault="early-hang")
    suite = tmp_path / "sweep.yaml"
    suite.write_text(SUITE)
    (tmp_path / "pool.yaml").write_text(SKU)
    cells = [p.cell for p in matrix.expand(load_suite(str(suite)), load_sku(str(tmp_path / "pool.yaml")))]
    (start, _) = Backend().starts([cell.case for cell in cells], str(tmp_path), environ)
    assert isinstance(start, Start)

    follow = Follow(Backend().progress)
    with Process(start, environ, tmp_path / "log") as process:
        ended, _ = process.wait(follow, 0.5, 0.5)

    assert isinstance(ended, Ended)
    assert ended.timed_out == "no first line of results within the deadline of 0.5 s"
    assert "# Using devices\n#  Rank  0" in ended.stdout
    assert (tmp_path / "log").read_text() == ended.stdout
    statuses = {a.status.value for a in Backend().answers(start, ended).values()}
    assert statuses == {"timeout"}


def test_the_image_needs_neither_torch_nor_packages_of_ours(bench: Any, tmp_path: Path) -> None:
    """An image of ROCm with rccl-tests has a Python and nothing else."""
    for name in ("torch", "yaml", "jsonschema_rs", "numpy"):
        (tmp_path / "poor").mkdir(exist_ok=True)
        (tmp_path / "poor" / f"{name}.py").write_text(f"raise ImportError('{name} is not in this image')")
    text = SKU.replace("env: {", f'env: {{PYTHONPATH: "{tmp_path / "poor"}", ')
    (tmp_path / "pool.yaml").write_text(text)
    code, records, stderr = bench()
    assert code == 0, stderr + str([r["reason"] for r in records])


def test_a_program_needs_no_launcher_of_ranks(bench: Any, tmp_path: Path) -> None:
    """`start: torchrun` is for ranks; one process on the node is started without torch."""
    (tmp_path / "pool.yaml").write_text(SKU + "start: torchrun\n")
    code, _, stderr = bench()
    assert code == 0, stderr
    assert not list((tmp_path / "out" / "logs").glob("*/launcher.log"))


def test_this_python_needs_no_torch_for_programs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks do need it."""
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    cells = matrix.expand(load_suite("smoke"), load_sku("h200x4-nvlink"), ["nccl_tests"])
    preflight.require_torch(cells)
    with pytest.raises(UserError, match="torch is not installed"):
        preflight.require_torch(matrix.expand(load_suite("smoke"), load_sku("h200x4-nvlink"), ["torch_dist"]))


def test_killed_outright_no_program_goes_on(tmp_path: Path) -> None:
    """SIGKILL for `cx run`: the kernel ends its runner, and with that the program."""
    process = hanging(tmp_path)
    assert len(fault_cells.processes(tmp_path / "out")) >= 3, "cx, the runner and the program"
    process.kill()
    process.communicate()
    assert until(lambda: not fault_cells.processes(tmp_path / "out"), 20)


def test_a_runner_that_is_killed_leaves_no_environment_behind(tmp_path: Path) -> None:
    """As by a container's memory limit, or srun: the record says so, and the host half cleans up."""
    process = hanging(tmp_path, SUITE.replace("[1KiB, 4KiB, 16KiB]", "[1KiB]"))
    cases = str(tmp_path / "out" / "logs" / "nccl_tests.r0.0" / "cases.json").encode()
    lines = {p.parent.name: p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()}
    (runner,) = [int(pid) for pid, line in lines.items() if cases in line]
    os.kill(runner, signal.SIGKILL)
    process.communicate(timeout=30)

    (record,) = [json.loads(p.read_text()) for p in (tmp_path / "out" / "cells").glob("*.json")]
    assert record["status"] == "failed"
    assert "rank 0 killed by SIGKILL in all_reduce-float32-1024" in record["reason"]
    assert "# Using devices" in record["failure"]["ranks"][0]["stderr"]
    assert not documents(tmp_path)
