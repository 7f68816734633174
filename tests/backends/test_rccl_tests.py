"""rccl-tests: three generations of options, two forms of JSON, and nothing believed that is contradicted."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from collectivex.backends import rccl_tests
from collectivex.backends._tests_output import Unreadable
from collectivex.backends.base import Answer, Ended, MissingLibrary, Program, Start
from collectivex.backends.nccl_tests import OPS
from collectivex.backends.rccl_tests import FACTS, Backend
from collectivex.runtime.types import MODES, Case, Collective, Sampling, Status

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "rccl_tests"
SAMPLING = Sampling(warmup_iterations=5, trials=2, iterations=4)
GENERATIONS = ("2024", "2025", "2026")
OUTPUTS = {"2024": None, "2025": "all_reduce-2025.jsonl", "2026": "all_reduce-2026.json"}


def case(op: str = "all_reduce", size: int = 4096, dtype: str = "float32", **fields: Any) -> Case:
    told = {"mode": "out-of-place", "ranks": 4, "regimes": ("loop",), "sampling": SAMPLING, **fields}
    return Case("rccl_tests", "", shape=Collective(op, size, dtype), **told)


SIZES = [case(size=size) for size in (1024, 4096, 16384)] + [case(size=4096, mode="in-place")]


def text(name: str) -> str:
    return (FIXTURES / name).read_text()


def binary(folder: Path, usage: str, program: str = "all_reduce_perf") -> dict[str, str]:
    """An environment whose PATH has a program that prints this usage, and nothing else."""
    folder.mkdir(exist_ok=True)
    (folder / "usage.txt").write_text(usage + "\n")
    path = folder / program
    path.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done <"{folder}/usage.txt"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"PATH": str(folder), "HOME": str(folder)}


def start(tmp_path: Path, year: str, cases: list[Case] = SIZES) -> Start:
    environ = binary(tmp_path / year, text(f"help-{year}.txt"))
    (found,) = Backend().starts(cases, str(tmp_path), environ)
    return found


def answers(tmp_path: Path, year: str, **changes: Any) -> dict[Case, Answer]:
    output = OUTPUTS[year]
    ended = {"returncode": 0, "stdout": text(f"all_reduce-{year}.txt"), "output": output and text(output)}
    return Backend().answers(start(tmp_path, year), Ended(**{**ended, **changes}))


def said(found: Start) -> dict[str, str]:
    words = found.argv[1:]
    return dict(zip((w.removeprefix("-") for w in words[::2]), words[1::2], strict=True))


# --------------------------------------------------------------------------------------------- what is asked


def test_it_is_a_program_for_amd_that_has_never_run_there() -> None:
    """Labelled until it has; refused where its number would stand without proof."""
    assert isinstance(Backend(), Program)
    assert ("contract-only", ("hip",), ("loop",)) == (FACTS.proven("hip"), FACTS.devices, FACTS.regimes)
    for op in set(OPS) - {"all_to_all_v"}:
        assert Backend().why_not(case(op)) is None
        assert (Backend().why_not(case(op, mode="in-place")) is None) == (
            op not in ("all_to_all", "sendrecv")
        )
    for mode in MODES["collective"]:
        assert "a pattern of its own" in str(Backend().why_not(case("all_to_all_v", mode=mode)))
    said_of_size = str(Backend().why_not(case("all_gather", 63)))
    assert said_of_size.startswith("rccl-tests rounds each rank's share down to 16 bytes")
    assert "rccl_tests has the knob 'mpi' as 0 or 1, not 2" == Backend().why_not(case(knobs=(("mpi", 2),)))


@pytest.mark.parametrize("year", GENERATIONS)
def test_every_generation_gets_the_letters_that_mean_what_we_mean(tmp_path: Path, year: str) -> None:
    """Iterations, warm-up, check, operation, type and reduction over ranks are said to all of them."""
    found = said(start(tmp_path, year))

    wanted = {"g": "4", "b": "1024", "e": "16384", "f": "4", "n": "4", "w": "5", "c": "1", "o": "sum"}
    assert wanted.items() <= found.items()
    assert {"d": "float", "a": "3", "C": "0", "G": "0", "E": "0", "F": "0", "y": "0"}.items() <= found.items()
    assert ("2" if year != "2024" else None) == found.get("N")
    assert {"u", "O", "q", "Y", "s", "A", "D", "V", "X", "i"}.isdisjoint(found)


def test_the_letters_of_json_follow_their_names(tmp_path: Path) -> None:
    """-x is a file in one generation and the CTA policy in the next; 2024 has no JSON at all."""
    found = {year: said(start(tmp_path, year)) for year in GENERATIONS}

    assert {"J", "x", "Z"}.isdisjoint(found["2024"])
    assert str(tmp_path / "all_reduce-float32-1024.json") == found["2025"]["x"]
    assert ("json", None) == (found["2025"]["Z"], found["2025"].get("J"))
    assert found["2026"]["J"].endswith(".json")
    assert {"x", "Z"}.isdisjoint(found["2026"])


def test_a_letter_with_another_name_is_not_used(tmp_path: Path) -> None:
    """Before 2023 -y was the kind of memory: `-y 0` would have been an error, or worse."""
    usage = text("help-2024.txt").replace("-y,--stream_null <0/1>", "-y,--memory_type <coarse>")
    (found,) = Backend().starts(SIZES, str(tmp_path), binary(tmp_path / "old", usage))

    assert "y" not in said(found)


@pytest.mark.parametrize(
    ("usage", "reason"),
    [
        ("USAGE: all_reduce_perf [-t,--nthreads <n>] [-g,--ngpus <n>]", "of nccl-tests, not of rccl-tests"),
        ("", "does not print its usage: it says nothing"),
        (text("help-2024.txt").replace("-a,--average", "-a,--other"), "too old: it has no -a"),
    ],
)
def test_another_program_of_the_same_name_is_refused(tmp_path: Path, usage: str, reason: str) -> None:
    """The binaries of NVIDIA and AMD are called alike; only their usage tells them apart."""
    with pytest.raises(MissingLibrary, match=reason):
        Backend().starts(SIZES, str(tmp_path), binary(tmp_path / "bin", usage))


def test_a_missing_binary_says_what_to_build(tmp_path: Path) -> None:
    """Where to build it from, and at which commit."""
    with pytest.raises(MissingLibrary, match=r"build .*rocm-systems/projects/rccl-tests at 491c996"):
        Backend().starts(SIZES, str(tmp_path), {"PATH": str(tmp_path), "HOME": str(tmp_path)})


# ------------------------------------------------------------------------------------------- what is believed


@pytest.mark.parametrize("year", GENERATIONS)
def test_a_clean_run_answers_every_case(tmp_path: Path, year: str) -> None:
    """By hand: 12 us + 1 us for each 4096 bytes, 0.3 us more in the second cycle, in place 0.25 us less."""
    found = answers(tmp_path, year)

    assert {Status.OK} == {a.status for a in found.values()}, [a.reason for a in found.values()]
    cycles = 1 if year == "2024" else 2
    (series,) = found[SIZES[1]].series
    assert ("call", "loop", 4, cycles) == (
        series.component,
        series.regime,
        series.per_sample,
        len(series.samples_us),
    )
    assert [13.0, 13.3][:cycles] == pytest.approx(series.samples_us, abs=0.002)
    assert 12.75 == pytest.approx(found[SIZES[3]].series[0].samples_us[0], abs=0.002)
    assert all(c.passed and "rccl-tests' own check" in c.name for a in found.values() for c in a.checks)
    assert found[SIZES[0]].versions["rccl-tests"].startswith("develop:")
    assert ["rccl"] == list(found[SIZES[0]].libraries)


def test_the_later_array_of_json_objects_says_the_same(tmp_path: Path) -> None:
    """The reporter came to write one array with other keys: read alike."""
    found = answers(tmp_path, "2025", output=text("all_reduce-2025-array.json"))

    assert {Status.OK} == {a.status for a in found.values()}
    assert 12 == len(rccl_tests.read_lines(text("all_reduce-2025-array.json")))
    assert rccl_tests.read_lines(text("all_reduce-2025.jsonl"))[3]["inPlace"] == 1


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (text("all_reduce-2025.jsonl").replace('"#wrong": "0"', '"#wrong": "7"', 1), "contradict each other"),
        ("".join(text("all_reduce-2025.jsonl").splitlines(keepends=True)[:-1]), "contradict each other"),
        (text("all_reduce-2025.jsonl")[:-20], "cut short"),
        (text("all_reduce-2025-array.json")[:-3], "cut short"),
        ('{"other": 1}\n', "unknown form"),
    ],
)
def test_json_lines_that_do_not_bear_the_table_out_are_no_result(tmp_path, output: str, reason: str) -> None:
    """Two witnesses that disagree are none."""
    found = answers(tmp_path, "2025", output=output)

    assert {Status.FAILED} == {a.status for a in found.values()}
    assert all(reason in str(a.reason) for a in found.values())


def test_without_the_json_lines_the_table_stands_with_a_remark(tmp_path: Path) -> None:
    """The program may not have been able to open the file; the table is complete by its footer."""
    found = answers(tmp_path, "2025", output=None)

    assert {Status.OK} == {a.status for a in found.values()}
    assert all("no JSON lines" in a.warnings[-1] for a in found.values())


WRONG = text("all_reduce-2024.txt").replace(
    "  13.00    0.32    0.47      0", "  13.00    0.32    0.47     12"
)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"stdout": WRONG.replace("values : 0 OK", "values : 1 FAILED"), "returncode": 1}, Status.INCORRECT),
        ({"stdout": WRONG}, Status.INCORRECT),
        ({"stdout": text("all_reduce-2024.txt").split("# Out of")[0], "returncode": -9}, Status.FAILED),
        ({"stdout": text("help-2024.txt")}, Status.FAILED),
        ({"stdout": text("all_reduce-2024.txt").replace("float", " half")}, Status.INCORRECT),
        ({"stdout": text("all_reduce-2024.txt").replace("iters: 4", "iters: 20")}, Status.INCORRECT),
        ({"returncode": 3}, Status.FAILED),
        ({"timed_out": "no row within 60 s", "stdout": "", "returncode": -9}, Status.TIMEOUT),
    ],
)
def test_whatever_is_wrong_or_missing_is_no_number(tmp_path, changes: dict[str, Any], status: Status) -> None:
    """Wrong data, a footer that hides it, a cut table, a usage text, another type, other settings, a bad exit
    code, silence."""
    assert WRONG != text("all_reduce-2024.txt")
    found = answers(tmp_path, "2024", **changes)

    assert status in {a.status for a in found.values()}
    assert all(
        a.reason and "nccl-tests" not in a.reason.replace("rccl-tests", "")
        for a in found.values()
        if a.reason
    )
    assert not any(a.series for a in found.values() if a.status is not Status.OK)


def test_a_remark_without_end_of_line_hides_no_setting(tmp_path: Path) -> None:
    """On gfx942 the first line of the header is glued to a remark; its facts count all the same."""
    lines = text("all_reduce-2026.txt").splitlines(keepends=True)
    (settings,) = [line for line in lines if line.startswith("# nThread")]
    remark, _, first = lines[0].partition("#")
    glued = [remark + settings.replace("nGpus 4", "nGpus 8"), "#" + first, *lines[1:]]
    glued.remove(settings)

    found = answers(tmp_path, "2026", stdout="".join(glued))

    assert {Status.INCORRECT} == {a.status for a in found.values()}
    assert all("nGpus: asked for 4" in str(a.reason) for a in found.values())


def test_what_is_kept_has_nothing_private() -> None:
    """The document dumps the whole environment, the host and the process ids; lines hold none of it."""
    kept = Backend().keep(text("all_reduce-2026.json"))
    assert kept is not None
    assert not any(word in kept for word in ("hunter2", "somebody", "gpunode3", "9120"))
    lines = Backend().keep(text("all_reduce-2025.jsonl"))
    assert lines is not None
    assert 12 == len([json.loads(line) for line in lines.splitlines()])
    assert Backend().keep('{"size": 1') is None
    with pytest.raises(Unreadable):
        rccl_tests.read_lines('{"size": 1')


def test_sizes_of_one_series_share_a_process() -> None:
    """As its users run it: one sweep an operation and type."""
    assert [4] == [len(group) for group in Backend().groups(SIZES)]
