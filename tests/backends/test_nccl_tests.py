"""nccl-tests: what is asked of it, and that nothing it says is believed unless all of it agrees."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import nccl_tests_bin as fakes
import pytest

from collectivex.backends import nccl_tests
from collectivex.backends._tests_verdict import CHECK
from collectivex.backends.base import Answer, Ended, MissingLibrary, Program, Start
from collectivex.backends.nccl_tests import FACTS, OPS, Backend
from collectivex.runtime.bandwidth import all_to_all_v_bytes
from collectivex.runtime.types import MODES, Case, Collective, Sampling, Status

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "nccl_tests"
SAMPLING = Sampling(warmup_iterations=5, trials=2, iterations=4)


def case(op: str = "all_reduce", size: int = 4096, dtype: str = "float32", **fields: object) -> Case:
    told = {"mode": "out-of-place", "ranks": 4, "regimes": ("loop",), "sampling": SAMPLING, **fields}
    return Case("nccl_tests", "", shape=Collective(op, size, dtype), **told)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.install(tmp_path_factory.mktemp("nccl_tests"))


def run(start: Start, environ: dict[str, str]) -> Ended:
    done = subprocess.run(start.argv, env=environ, capture_output=True, text=True, timeout=60, check=False)
    output = Path(start.output or "/nowhere")
    text = output.read_text() if output.exists() else None
    return Ended(done.returncode, done.stdout + done.stderr, text)


@pytest.fixture
def measure(binaries: Path, tmp_path: Path) -> Callable[..., dict[Case, Answer]]:
    """Run the first process of a group of cases and hand back the answers."""

    def measured(
        cases: Sequence[Case], version: str = "2.19.6", process: int = 0, **plan: object
    ) -> dict[Case, Answer]:
        environ = fakes.environ(binaries, version, **plan)
        starts = Backend().starts(cases, str(tmp_path), environ)
        return Backend().answers(starts[process], run(starts[process], environ))

    return measured


SIZES = [case(size=size) for size in (1024, 4096, 16384)]


# --------------------------------------------------------------------------------------- what is asked


def test_it_is_a_program_and_refuses_what_it_cannot_prove() -> None:
    """In place, alltoall, alltoallv and sendrecv print N/A instead of a check; a share below 16 bytes is
    none; hypercube_perf skips ranks that are no power of two."""
    backend = Backend()
    assert isinstance(backend, Program)
    for op in OPS:
        assert backend.why_not(case(op)) is None
        reason = backend.why_not(case(op, mode="in-place"))
        assert (reason is not None) == (op in ("all_to_all", "all_to_all_v", "sendrecv")), reason
        whole = op in ("all_reduce", "broadcast", "reduce", "sendrecv")
        assert ("16 bytes" in str(backend.why_not(case(op, 63)))) == (not whole)
        assert backend.why_not(case(op, 64)) is None
    assert backend.why_not(case("hypercube", ranks=8)) is None
    assert "power of two of ranks, not on 6" in str(backend.why_not(case("hypercube", ranks=6)))
    assert "0 or 1" in str(backend.why_not(case(knobs=(("sweep", 2),))))
    assert "no float64" in str(backend.why_not(case(dtype="float64")))


def test_one_process_takes_a_geometric_series_of_one_operation() -> None:
    """-b -e -f can say no other; both placements come from the same process."""
    sizes = (1024, 4096, 16384, 20000, 65536)
    cases = [case(op, size) for op in ("reduce", "all_reduce") for size in sizes]
    cases.append(case("reduce", 4096, mode="in-place"))
    groups = Backend().groups(cases)
    assert sorted(map(id, cases)) == sorted(id(c) for group in groups for c in group)
    assert [[c.shape.bytes for c in g] for g in groups if g[0].shape.op == "reduce"] == [  # type: ignore[union-attr]
        [1024, 4096, 4096, 16384],
        [20000],
        [65536],
    ]


def test_other_sampling_is_another_process() -> None:
    """-n is of the whole process; so is the allocation that `sweep=0` takes out of the picture."""
    cases = [case(), case(size=16384, sampling=replace(SAMPLING, iterations=8))]
    assert len(Backend().groups(cases)) == 2
    alone = [case(size=size, knobs=(("sweep", 0),)) for size in (1024, 4096)]
    assert len(Backend().groups(alone)) == 2


@pytest.mark.parametrize("version", ["2.13.10", "2.17.3", "2.18.0", "2.19.6"])
def test_command_lines(
    version: str, binaries: Path, golden: Callable[[str, str], None], tmp_path: Path
) -> None:
    """Everything that a version offers is said, and nothing that it does not."""
    lines = []
    for group in (SIZES, [case("all_to_all", 1 << 20, "bfloat16", knobs=(("per_iteration", 0),))]):
        for start in Backend().starts(group, str(tmp_path), fakes.environ(binaries, version)):
            lines.append(" ".join(start.argv).replace(str(binaries), "BIN").replace(str(tmp_path), "LOGS"))
    assert not any(" -D " in line for line in lines)
    golden(f"nccl_tests/{version}.txt", "\n".join(lines) + "\n")


def test_command_lines_with_mpi(binaries: Path, golden: Callable[[str, str], None], tmp_path: Path) -> None:
    """One process per GPU: on one node mpirun starts them, and is told to hand NVLS off on; on several nodes
    srun has, and each does only its own part."""
    fakes.install(tmp_path / "bin", "_mpi")
    fakes.install(tmp_path / "plain")
    environ = fakes.environ(tmp_path / "bin") | {"NCCL_NVLS_ENABLE": "0", "NCCL_DEBUG": "INFO", "USER": "me"}
    environ["PATH"] = f"{tmp_path}/plain:{tmp_path}/bin:/usr/bin:/bin"
    asked = {"one node": case(knobs=(("mpi", 1),)), "two nodes": case(ranks=8, nodes=2)}
    lines = []
    for title, one in asked.items():
        for start in Backend().starts([one], str(tmp_path), environ):
            env = [f"  {name}={value}" for name, value in sorted(start.env.items())]
            lines += [f"# {title}", " ".join(start.argv), *env]
    golden("nccl_tests/mpi.txt", "\n".join(lines).replace(str(tmp_path), "TMP") + "\n")
    assert "no mpi=0 there" in str(Backend().why_not(case(ranks=8, nodes=2, knobs=(("mpi", 0),))))
    assert "no second one" in str(Backend().why_not(case(ranks=8, nodes=2, knobs=(("per_iteration", 1),))))


def test_a_prepared_binary_comes_before_one_on_path(tmp_path: Path, binaries: Path) -> None:
    """$CX_LIBRARIES/nccl_tests/bin, as `cx prepare` lays things out."""
    ours = fakes.install(tmp_path / "nccl_tests" / "bin")
    environ = fakes.environ(binaries) | {"CX_LIBRARIES": str(tmp_path)}
    assert nccl_tests.find("all_reduce_perf", False, environ) == str(ours / "all_reduce_perf")
    assert nccl_tests.find("all_reduce_perf", False, fakes.environ(binaries)).startswith(str(binaries))


def test_a_missing_binary_says_what_to_build(tmp_path: Path) -> None:
    """The pin, and where to put it."""
    with pytest.raises(
        MissingLibrary, match="build .*nccl-tests at v2.19.6, and put its build folder on PATH"
    ):
        Backend().starts(SIZES, str(tmp_path), {"PATH": str(tmp_path), "HOME": str(tmp_path)})


def test_a_program_that_older_versions_do_not_have_is_told_by_name(tmp_path: Path) -> None:
    """alltoallv_perf came between 2.18.0 and 2.19.0."""
    fakes.install(tmp_path / "old", programs=("all_reduce", "alltoall"))
    asked = [case("all_to_all_v")]
    with pytest.raises(MissingLibrary, match=r"alltoallv_perf is .*\(no version before 2\.19\.0 has it\)"):
        Backend().starts(asked, str(tmp_path), fakes.environ(tmp_path / "old"))
    fakes.install(tmp_path / "new")
    (start, _) = Backend().starts(asked, str(tmp_path), fakes.environ(tmp_path / "new"))
    assert start.argv[0].endswith("/alltoallv_perf")


def test_the_pattern_of_the_uneven_exchange_cannot_be_changed_from_outside() -> None:
    """A matrix file or another spread would be other bytes under the same name."""
    names = ("NCCL_TESTS_ALLTOALLV_SPREAD", "NCCL_TESTS_ALLTOALLV_MATRIX_FILE")
    assert all(name.startswith(Backend.withheld) for name in names)


def test_a_binary_that_cannot_be_loaded_says_why(binaries: Path, tmp_path: Path) -> None:
    """The loader's own words, and the remedy."""
    environ = fakes.environ(binaries, fault="no-library")
    with pytest.raises(MissingLibrary, match=r"libnccl\.so\.2.*LD_LIBRARY_PATH"):
        Backend().starts(SIZES, str(tmp_path), environ)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\necho loading; sleep 47 & wait", "cannot be run: loading / .* did not end within 0.5 s"),
        ("#!/no/such/interpreter", "does not print its usage: .*: No such file or directory"),
    ],
    ids=["hangs", "unstarted"],
)
def test_a_binary_that_gives_no_answer_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    """One that hangs in the driver, and one of another machine."""
    monkeypatch.setattr(nccl_tests, "ASK_TIMEOUT_S", 0.5)
    (tmp_path / "all_reduce_perf").write_text(text)
    (tmp_path / "all_reduce_perf").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    with pytest.raises(MissingLibrary, match=f"all_reduce_perf -h {said}"):
        Backend().starts(SIZES, str(tmp_path), environ)


def test_a_build_that_is_too_old_is_refused(binaries: Path, tmp_path: Path) -> None:
    """Before 2.13.4 the check column was a deviation, not a count."""
    with pytest.raises(MissingLibrary, match="too old: it has no -C"):
        Backend().starts(SIZES, str(tmp_path), fakes.environ(binaries, "2.10.0"))


# ---------------------------------------------------------------------------------- what is believed


VERSIONS = ("2.13.10", "2.17.3", "2.18.0", "2.19.6")


@pytest.mark.parametrize(
    ("op", "version"), [(op, v) for op in OPS for v in VERSIONS if op != "all_to_all_v" or v == "2.19.6"]
)
def test_an_honest_run_gives_its_own_numbers(op: str, version: str, measure: Callable) -> None:
    """10 us + 1 us for 100,000 bytes, a tenth more in the second cycle: one sample a cycle, of 4 calls. Of
    99,968 bytes the three parts of alltoallv are 16,656, 33,312 and 49,984."""
    asked = case(op, 100_000 // 64 * 64)
    answer = measure([asked], version)[asked]
    assert answer.status is Status.OK, answer.reason
    (series,) = answer.series
    size = 99_952 if op == "all_to_all_v" else 99_968
    expected = 10 + size / 1e5
    assert series.samples_us == pytest.approx([expected, expected * 1.1], abs=0.006)
    assert (series.component, series.regime, series.headline) == ("call", "loop", "max")
    assert (series.per_sample, series.trials) == (4, 2)
    assert answer.bytes == {"family": "collective", "size": size, "requested": 99_968}
    assert [(c.name, c.passed, c.calls) for c in answer.checks] == [(CHECK, True, 2)]
    told = ("2.28.9", "2.28.9") if version >= "2.18" else (None, None)
    assert answer.libraries["nccl"] == told or version == "2.17.3"


def test_the_sibling_process_gives_every_iteration(measure: Callable) -> None:
    """-I 1 of its own, so that its events are not in `call`: 4 iterations of each of 2 cycles."""
    (answer,) = measure([case(size=100_000)], process=1).values()
    (series,) = answer.series
    assert (series.component, series.per_sample, series.trials) == ("call_iteration", 1, 2)
    assert series.samples_us == pytest.approx([11, 12, 13, 14, 12.1, 13.1, 14.1, 15.1])


COLUMNS = "#       size         count      type   redop    root" + "     time   algbw   busbw  #wrong" * 2


def composed(program: str, *rows: str, bad: int = 0) -> str:
    """What a run on 4 GPUs would print. Composed by hand from the formats of 2.19.6 (src/util.cu:
    writeBenchmarkLinePreamble "%12li  %12li  %8s  %6s  %6s", writeBenchmarkLineBody "  %7s  %6s  %6s  %6g",
    or N/A), not recorded: every number of it is known."""
    head = ["# nccl-tests version 2.19.6 nccl-headers=22809 nccl-library=22809"]
    head += [f"# Collective test starting: {program}", COLUMNS]
    foot = f"# Out of bounds values : {bad} {'FAILED' if bad else 'OK'}"
    return "\n".join([*head, *rows, foot, f"# Collective test concluded: {program}", ""])


def judged(op: str, size: int, row: str, mode: str = "out-of-place") -> Answer:
    """The verdict on a composed run with one row."""
    asked = case(op, size, mode=mode)
    program = nccl_tests.PROGRAMS[op]
    start = Start("x", (asked,), (program, "-g", "4", "-n", "4", "-c", "1"))
    return Backend().answers(start, Ended(0, composed(program, row)))[asked]


# 1 MiB in 100 us is 10.49 GB/s, three quarters of it 7.86. What 4 ranks send of it unevenly: 6ths of 1048576
# are 174752, 349520 and 524288 in whole 16 bytes, together 1048560.
ROW = (
    "     {size}  {count:>12}     float  {redop:>6}  {root:>6}   100.00  {alg:>6}  {bus:>6}       0   {there}"
)
CHECKED, UNCHECKED = "100.00  {alg:>6}  {bus:>6}       0", "100.00  {alg:>6}  {bus:>6}     N/A"
PRINTED = {
    "sendrecv": ("262144", "sum", -1, 1048576, "10.49", "10.49", UNCHECKED),
    "gather": ("65536", "none", 0, 1048576, "10.49", "7.86", CHECKED),
    "scatter": ("65536", "none", 0, 1048576, "10.49", "7.86", CHECKED),
    "all_to_all_v": ("65536", "none", -1, 1048560, "10.49", "7.86", UNCHECKED),
    "hypercube": ("65536", "", -1, 1048576, "7.86", "7.86", CHECKED),
}


def printed(op: str, **changes: object) -> str:
    count, redop, root, size, alg, bus, there = PRINTED[op]
    said = {"count": count, "redop": redop, "root": root, "size": size, "alg": alg, "bus": bus, **changes}
    return ROW.format(there=there.format(**said), **said)


@pytest.mark.parametrize("op", PRINTED)
def test_what_each_program_prints_of_a_mebibyte_is_understood(op: str) -> None:
    """sendrecv prints the operation of -o, which it does not use; hypercube an empty one; gather and scatter
    their root. In place the check of two of them is N/A."""
    answer = judged(op, 1 << 20, printed(op))
    assert answer.status is Status.OK, answer.reason
    assert answer.series[0].samples_us == [100.0]
    assert answer.bytes == {"family": "collective", "size": PRINTED[op][3], "requested": 1 << 20}
    in_place = judged(op, 1 << 20, printed(op), mode="in-place")
    assert (in_place.status is Status.OK) == (PRINTED[op][-1] is CHECKED), in_place.reason


@pytest.mark.parametrize(
    ("op", "changes", "said"),
    [
        ("gather", {"root": -1}, "asked for root 0, gather_perf ran with -1"),
        ("scatter", {"root": 1}, "asked for root 0, scatter_perf ran with 1"),
        ("hypercube", {"root": 0}, "asked for root -1, hypercube_perf ran with 0"),
        ("hypercube", {"redop": "none"}, "asked for float , hypercube_perf ran float none"),
        ("sendrecv", {"redop": "none"}, "asked for float sum, sendrecv_perf ran float none"),
        ("gather", {"size": 1048512}, "asked for 1048576 bytes, gather_perf ran 1048512"),
        ("all_to_all_v", {"size": 1048576}, "asked for 1048576 bytes, alltoallv_perf ran 1048576"),
        ("all_to_all_v", {"size": 1048544}, "asked for 1048576 bytes, alltoallv_perf ran 1048544"),
        ("all_to_all_v", {"bus": "10.49"}, "time and busbw do not fit"),
        ("hypercube", {"bus": "10.49"}, "time and busbw do not fit"),
    ],
)
def test_what_none_of_them_prints_is_refused(op: str, changes: dict[str, object], said: str) -> None:
    """Another root, operation, size or bandwidth is another operation. The uneven exchange has one size."""
    answer = judged(op, 1 << 20, printed(op, **changes))
    assert answer.status in (Status.INCORRECT, Status.FAILED)
    assert said in str(answer.reason)


def test_the_uneven_exchange_is_the_one_that_the_program_generates(measure: Callable) -> None:
    """The fake has the formula of alltoallv.cu in doubles; ours is in integers. On 2 to 16 ranks."""
    for ranks in range(2, 17):
        asked = case("all_to_all_v", 1_000_000, ranks=ranks)
        answer = measure([asked])[asked]
        assert answer.status is Status.OK, answer.reason
        assert answer.bytes is not None
        assert answer.bytes["size"] == sum(all_to_all_v_bytes(1_000_000, 0, ranks)[0])


def test_every_operation_has_a_variant_of_its_own_placement() -> None:
    """With what its window holds, which differs for hypercube; results of all are published."""
    for op in OPS:
        for mode in MODES["collective"]:
            variant = FACTS.variant(case(op, mode=mode))
            assert variant is not None
            assert (variant.mode, op in variant.ops) == (mode, True)
            assert ("for each GPU" in variant.window["call"]) == (op == "hypercube")
            assert FACTS.proven("cuda", variant) == "hardware"


def test_hypercube_gets_a_thread_for_each_gpu(measure: Callable, binaries: Path, tmp_path: Path) -> None:
    """A thread with several GPUs puts all its steps into one group, and NCCL runs them at once. Over MPI each
    process has one GPU anyway; threads report the per-iteration times of the first only."""
    asked = case("hypercube", 1 << 20)
    assert measure([asked])[asked].status is Status.OK
    environ = fakes.environ(binaries, "2.19.6")
    starts = Backend().starts([asked], str(tmp_path), environ)
    assert [start.argv[1:5] for start in starts] == [("-t", "4", "-g", "1")]
    over_mpi = nccl_tests.arguments([asked], nccl_tests.NEEDED, 0, True, None)
    assert over_mpi[:4] == ["-t", "1", "-g", "1"]
    each = replace(asked, knobs=(("per_iteration", 1),))
    assert "per-iteration times of the first one only" in str(Backend().why_not(each))


def test_wrong_data_of_a_real_run_is_called_incorrect_with_how_much() -> None:
    """hypercube_perf on 4 x H200 with one thread for all: 15 million wrong elements, which the table prints
    as 1.52611e+07 and the document in full. They are one statement, not two that contradict each other."""
    sizes = (16384, 1 << 20, 1 << 26)
    modes = ("out-of-place", "in-place")
    cases = [case("hypercube", size, "bfloat16", mode=mode) for size in sizes for mode in modes]
    argv = ("hypercube_perf", *"-t 1 -g 4 -n 20 -N 2 -c 1".split())
    document = "/somewhere/hypercube-bfloat16-16384.json"
    start = Start("x", tuple(cases), argv, output=document)
    said, exact = (
        (FIXTURES / f"h200x4-hypercube-one-thread-wrong.{kind}").read_text() for kind in ("txt", "json")
    )
    answers = Backend().answers(start, Ended(7, said, exact))
    assert {answer.status for answer in answers.values()} == {Status.INCORRECT}
    assert answers[cases[-1]].reason == f"{CHECK}: 29891840 wrong elements in 67108864 bytes in-place"
    other = Backend().answers(start, Ended(7, said.replace("1.52611", "1.52612"), exact))
    assert "contradict each other" in str(other[cases[0]].reason)


def test_both_placements_of_a_sweep_are_told_apart(measure: Callable) -> None:
    """Each case gets the rows of its size and the columns of its placement."""
    cases = [*SIZES, case(size=4096, mode="in-place")]
    answers = measure(cases)
    assert {c: a.status for c, a in answers.items()} == dict.fromkeys(cases, Status.OK)
    assert [a.series[0].samples_us[0] for a in answers.values()] == pytest.approx(
        [10.01024, 10.04096, 10.16384, 10.04096]
    )
    assert {a.realised["sweep_maximum_bytes"] for a in answers.values()} == {16384}


def test_wrong_data_is_incorrect_and_only_where_it_was_wrong(measure: Callable) -> None:
    """The exit code 7 is explained by the row that failed; the other rows passed their own check."""
    answers = measure(SIZES, fault="wrong", at=4096)
    assert [a.status for a in answers.values()] == [Status.OK, Status.INCORRECT, Status.OK]
    wrong = answers[SIZES[1]]
    assert wrong.reason == f"{CHECK}: 10 wrong elements in 4096 bytes out-of-place"
    assert wrong.series == []
    assert "another size or placement" in answers[SIZES[0]].warnings[0]


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("footer-only", Status.INCORRECT, "footer and JSON document of all_reduce_perf contradict"),
        ("footer-only 2.13.10", Status.INCORRECT, "the footer counts 1 failed checks, the rows show 0"),
        ("failed-without-count 2.13.10", Status.INCORRECT, "the footer calls 0 failed checks FAILED"),
        ("wrong-exit-zero", Status.INCORRECT, "the footer counts 2 failed checks, the exit code is 0"),
        ("other-json", Status.FAILED, "table and JSON document of all_reduce_perf contradict"),
        ("cputime", Status.INCORRECT, "the time column is that of launching"),
        ("two-tables", Status.INCORRECT, "2 tables: several programs ran"),
        ("exit-seven", Status.FAILED, "exited with 7 although its checks passed"),
        ("wrong-dtype", Status.INCORRECT, "asked for bfloat16 sum, all_reduce_perf ran float sum"),
        ("ignored-iters", Status.INCORRECT, "iters: asked for 4, all_reduce_perf used 20"),
        ("one-rank", Status.INCORRECT, "asked for 4 ranks, all_reduce_perf ran with 1"),
        ("nan", Status.FAILED, "a time that is no time"),
        ("cut-json", Status.FAILED, "is cut short or no JSON"),
        ("no-footer", Status.FAILED, "without its footer"),
        ("few-gpus", Status.FAILED, "Invalid number of GPUs: 4 requested but only 1 were found."),
        (
            "early-nccl",
            Status.FAILED,
            r"exited with 3 (NCCL error) without its footer, before its table began",
        ),
    ],
)
def test_a_run_that_contradicts_itself_has_no_number(
    fault: str, status: Status, said: str, measure: Callable
) -> None:
    """Exit code, footer, check column, realised settings and completeness must all agree."""
    name, _, version = fault.partition(" ")
    cases = [case(size=size, dtype="bfloat16") for size in (1024, 4096)]
    answers = measure(cases, version or "2.19.6", fault=name, at=4096)
    assert set(answers) == set(cases)
    for answer in answers.values():
        assert answer.status is status, answer.reason
        assert said in str(answer.reason)
        assert answer.series == []


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("internal", Status.FAILED, "exited with 1 without"),
        (
            "cuda",
            Status.FAILED,
            "exited with 2 (CUDA error) without its footer, in 4096 bytes of cycle 1 of 2",
        ),
        ("nccl", Status.FAILED, "unhandled cuda error / NVLS multicast group failed"),
        ("timeout", Status.TIMEOUT, "Test timeout (5s)"),
        ("crash", Status.FAILED, "was killed by SIGSEGV"),
    ],
)
def test_an_end_within_the_table_is_laid_at_the_size_under_way(
    fault: str, status: Status, said: str, measure: Callable
) -> None:
    """The other sizes are left out of the answers: they run again without it."""
    answers = measure(SIZES, fault=fault, at=4096)
    assert list(answers) == [SIZES[1]]
    assert answers[SIZES[1]].status is status
    assert said in str(answers[SIZES[1]].reason)
    assert "myhost" not in str(answers[SIZES[1]].reason)


def test_sizes_left_out_for_want_of_memory_say_so(measure: Callable) -> None:
    """The others are complete and stand."""
    answers = measure(SIZES, fault="reduced", at=8192)
    assert [a.status for a in answers.values()] == [Status.OK, Status.OK, Status.FAILED]
    assert "lowered its largest size to 8192 bytes" in str(answers[SIZES[2]].reason)


def test_a_document_of_a_later_version_is_refused(measure: Callable) -> None:
    """Its fields may mean something else."""
    (answer,) = measure([case()], json=4).values()
    assert answer.status is Status.FAILED
    assert "file version 4" in str(answer.reason)


def test_a_usage_text_is_no_result(binaries: Path) -> None:
    """-h and an unknown option exit with 0."""
    start = Start("x", (case(),), ("all_reduce_perf", "-g", "4", "-n", "4", "-c", "1"))
    (answer,) = (
        Backend().answers(start, Ended(0, "USAGE: all_reduce_perf \n\t[-t,--nthreads <n>]\n")).values()
    )
    assert answer.status is Status.FAILED
    assert "exited with 0 without its footer and without a table" in str(answer.reason)


def recorded(name: str, op: str, sizes: Sequence[int], ranks: int, iterations: int = 20) -> dict[int, Answer]:
    cases = tuple(case(op, size, ranks=ranks) for size in sizes)
    argv = (f"{op}_perf", "-g", str(ranks), "-n", str(iterations), "-c", "1")
    ended = Ended(7 if "wrong" in name else 0, (FIXTURES / name).read_text())
    answers = Backend().answers(Start("x", cases, argv), ended)
    return {c.shape.bytes: answer for c, answer in answers.items()}  # type: ignore[union-attr]


def test_recorded_tables_pass_the_whole_verdict() -> None:
    """2.13 without a version, and one with debug lines in its rows, whose last error is a warning."""
    old = recorded("all_reduce-2.13.10.txt", "all_reduce", (1024, 4096, 16384), 4)
    assert [a.series[0].samples_us for a in old.values()] == [[18.21], [18.64], [20.12]]
    noisy = recorded("all_gather-2.18.5-debug.txt", "all_gather", (1024, 2048), 2)
    assert [a.status for a in noisy.values()] == [Status.OK, Status.OK]
    assert "found worth a warning" in noisy[1024].warnings[0]


def test_a_recorded_table_that_lacks_a_size_is_refused_whole() -> None:
    """Fewer rows than were asked for, without a word about memory."""
    answers = recorded("all_reduce-2.13.10.txt", "all_reduce", (1024, 4096, 16384, 65536), 4)
    assert {a.status for a in answers.values()} == {Status.FAILED}
    assert "3 of 4 rows" in str(answers[1024].reason)


def test_a_recorded_wrong_size_is_the_only_one_refused() -> None:
    """1e+06 wrong elements, FAILED once in the footer, exit code 7."""
    answers = recorded("reduce-2.19.6-wrong.txt", "reduce", (4 << 20, 64 << 20, 1 << 30), 4)
    assert [a.status for a in answers.values()] == [Status.OK, Status.INCORRECT, Status.OK]
    assert "1000000 wrong elements" in str(answers[64 << 20].reason)


def test_time_and_bandwidth_must_fit() -> None:
    """A column that was taken for another one does not."""
    text = (FIXTURES / "all_reduce-2.13.10.txt").read_text().replace("   18.21    0.06 ", "    1.82    0.06 ")
    cases = tuple(case(size=size) for size in (1024, 4096, 16384))
    start = Start("x", cases, ("all_reduce_perf", "-g", "4", "-n", "20", "-c", "1"))
    answers = Backend().answers(start, Ended(0, text))
    assert [a.status for a in answers.values()] == [Status.FAILED, Status.OK, Status.OK]
    assert "time and busbw do not fit" in str(answers[cases[0]].reason)


def test_only_a_document_that_can_be_cleaned_is_kept() -> None:
    """The runner writes back what `keep` gives."""
    text = (FIXTURES / "all_reduce-2.19.6-per-iter.json").read_text()
    kept = Backend().keep(text)
    assert kept is not None
    assert "env" not in json.loads(kept)
    assert Backend().keep(text[:500]) is None


@pytest.mark.parametrize("fault", ["one-rank", "two-tables"])
def test_a_build_without_mpi_is_a_failure_with_a_hint(fault: str, binaries: Path, tmp_path: Path) -> None:
    """On two nodes each process prints a table of its own GPU; under mpirun they print into one output."""
    one = case(ranks=2, nodes=2)
    environ = fakes.environ(binaries, fault=fault)
    (start,) = Backend().starts([one], str(tmp_path), environ)
    (answer,) = Backend().answers(start, run(start, environ)).values()
    assert answer.status is Status.FAILED
    assert "was built without MPI: each process ran alone; build it with MPI=1" in str(answer.reason)
