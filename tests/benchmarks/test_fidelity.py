"""Theirs beside ours: the right cell, its raw samples reduced as they reduce theirs, and their bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import factory
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fidelity  # noqa: E402
from vendor_conventions import BENCHES, BYTES, REDUCTIONS, SKEW, UNALIGNED, UNBOUNDED, Bench  # noqa: E402

from collectivex.runtime import matrix, sku, suite  # noqa: E402
from collectivex.runtime.errors import UserError  # noqa: E402
from collectivex.runtime.types import CONTRACT, Case  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures" / "vendor_bench"
LL = factory.moe_case(128, "fp8", backend="deepep_legacy", variant="ll", mode="low-latency", ranks=4)
# [ranks][samples]. Theirs: dispatch 32.2425, combine 57.67, the pair 97.12 us.
LL_US = {
    ("dispatch", "kernel"): [[33.0, 35.0], [34.0, 36.0], [35.0, 37.0], [36.0, 38.0]],  # rank means 34 to 37
    ("combine", "kernel"): [[57.67, 57.67]] * 4,
    ("roundtrip", "chained"): [[97.0, 99.0]] * 4,
}
DISPATCH, DISPATCH_LEAST, COMBINE, COMBINE_LEAST, PAIR = range(5)  # lines of that benchmark


def write_ours(
    folder: Path,
    cells: Mapping[Case, Mapping[tuple[str, str], list[list[float]]]],
    contract: str = CONTRACT,
    created_at: str = "2026-11-20T10:00:00Z",
) -> None:
    """An execution folder whose cells have these raw samples."""
    documents = []
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for case, series in cells.items():
        document = factory.result(case, n=2, contract=contract, execution=f"execution-{folder.name}")
        document["identity"]["created_at"] = created_at
        body: dict[str, Any] = {
            "schema": "collectivex.samples.v1",
            "cell_id": document["identity"]["cell_id"],
            "series": [
                {"component": component, "regime": regime, "trials": 1, "per_sample": 1, "per_rank_us": times}
                for (component, regime), times in series.items()
            ],
        }
        data = gzip.compress(json.dumps(body).encode(), mtime=0)
        sha = hashlib.sha256(data).hexdigest()
        (folder / "samples" / f"{sha}.json.gz").write_bytes(data)
        document["samples"] = {"file": f"samples/{sha}.json.gz", "sha256": sha}
        documents.append(document)
    factory.execution(folder, documents)


def put(folder: Path, *names: str) -> None:
    (folder / "theirs").mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(FIXTURES / f"{name}.txt", folder / "theirs")


def bench(name: str) -> Bench:
    return next(one for one in BENCHES if one.name == name)


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("mean of rank means", 30.0),  # (20 + 40) / 2
        ("least rank mean", 20.0),
        ("mean of min", 20.0),  # 10, 20, 30
        ("rank 0's mean", 20.0),
        ("mean of max", 40.0),  # 30, 30, 60
        ("median of max", 30.0),
    ],
)
def test_times_are_reduced_as_the_name_says(over: str, expected: float) -> None:
    """Rank 0: 10, 20, 30; rank 1: 30, 30, 60."""
    assert REDUCTIONS[over]([[10.0, 20.0, 30.0], [30.0, 30.0, 60.0]]) == expected


def test_their_bytes_are_counted_as_in_their_source() -> None:
    """T = 128, R = 2, K = 8: 1024 picks, 256 rows arrive, 128 rows and 512 picks go to the other rank."""
    bf16, fp8 = (
        factory.result(factory.moe_case(128, dtype, ranks=2, variant="ll", mode="low-latency"))
        for dtype in ("bf16", "fp8")
    )
    # low latency: hidden + hidden / 128 * 4 + 16 for each pick; combine 2 * hidden
    assert BYTES["low_latency"].per_rank(fp8, "dispatch") == [1024 * (7168 + 224 + 16)] * 2
    assert BYTES["low_latency"].per_rank(fp8, "combine") == [1024 * 14336] * 2
    # intranode: rows that arrive, fp8 as (1 + 4 / 128) / 2 of bf16
    assert BYTES["normal"].per_rank(fp8, "dispatch") == [256 * 14336 * (1 + 4 / 128) / 2] * 2
    # elastic: a row with 8 ids of 8 bytes and 8 weights of 4; combine without the ids
    assert BYTES["elastic"].per_rank(fp8, "dispatch") == [256 * (7168 + 224 + 64 + 32)] * 2
    assert BYTES["elastic"].per_rank(bf16, "combine") == [256 * (14336 + 32)] * 2
    assert BYTES["picks"].per_rank(bf16, "dispatch") == [1024 * 14336] * 2
    assert BYTES["flashinfer"].per_rank(bf16, "dispatch") == [128 * 14336 + 512 * 8] * 2
    assert BYTES["flashinfer"].per_rank(bf16, "combine") == [128 * 14336] * 2


def test_a_benchmark_is_set_beside_our_samples(tmp_path: Path) -> None:
    """Dispatch: (34 + 35 + 36 + 37) / 4 = 35.5 us, 34 by the least of each; 1024 fp8 rows over them."""
    put(tmp_path, "deepep_low_latency")
    write_ours(tmp_path / "ours" / "deepep_legacy", {LL: LL_US})
    found = fidelity.compare(tmp_path)
    assert found.problems == []
    dispatch, least, combine, _, pair = found.compared
    assert dispatch.theirs.us == pytest.approx(32.2425)
    assert (dispatch.ours.us, least.ours.us) == (35.5, 34.0)
    assert dispatch.ours.gbps == pytest.approx(1024 * 7408 / 35.5 / 1e3)
    assert dispatch.ratios[0] == pytest.approx(35.5 / 32.2425)
    assert pair.ours.us == 98.0
    assert pair.ours.gbps == pytest.approx(1024 * (7408 + 14336) / 98 / 1e3)
    assert (combine.within(), combine.why) == (True, "")
    assert dispatch.within() is False
    masked = "up to 10 of a rank's 1024 picks masked in theirs"
    assert dispatch.why == f"theirs flushes L2 before each call; {masked}"


def test_two_series_are_added_sample_by_sample(tmp_path: Path) -> None:
    """MSCCL++'s total: pairs of 31 + 32 and 33 + 36 us, bytes of both operations over their mean."""
    case = factory.moe_case(128, backend="nccl_ep", variant="expert-major", mode="low-latency", ranks=4)
    floors = {
        ("dispatch_floor", "chained"): [[31.0, 33.0]] * 4,
        ("combine_floor", "chained"): [[32.0, 36.0]] * 4,
    }
    put(tmp_path, "nccl_ep_latency")
    write_ours(tmp_path / "ours", {case: floors})
    (total,) = (one for one in fidelity.compare(tmp_path).compared if one.line.quantity == "total")
    assert total.ours.us == 66.0
    assert total.ours.gbps == pytest.approx(2 * 1024 * 14336 / 66 / 1e3)


def test_a_row_names_its_variant_where_one_output_stands_beside_two(tmp_path: Path) -> None:
    """MSCCL++ throughput: rows of ours that the library copies first, and rows combined where they came."""
    put(tmp_path, "mscclpp_throughput")
    floors = {(f"{part}_floor", "chained"): [[560.0]] * 4 for part in ("dispatch", "combine")}
    names = ("throughput-in-place", "throughput")
    cases = [factory.moe_case(4096, backend="mscclpp_ep", variant=name, mode="cached") for name in names]
    write_ours(tmp_path / "ours", dict.fromkeys(cases, floors))
    found = fidelity.compare(tmp_path)
    shown = [fidelity.cells(one)[1] for one in found.compared]
    assert [text.split()[0] for text in shown] == [names[0]] * 3 + [names[1]] * 3


def test_a_known_difference_does_not_explain_any_ratio(tmp_path: Path) -> None:
    """Dispatch takes 320 us in ours, ten times theirs: cold L2 is not the reason, and somebody must look."""
    put(tmp_path, "deepep_low_latency")
    write_ours(tmp_path / "ours", {LL: {**LL_US, ("dispatch", "kernel"): [[320.0]] * 4}})
    found = fidelity.compare(tmp_path)
    assert found.compared[DISPATCH].ratios[0] > 9.9
    assert found.compared[DISPATCH] in found.unexplained
    assert found.compared[DISPATCH].why.endswith("; so far outside: not explained")


def test_what_is_shown_somewhere_is_bounded_too(tmp_path: Path) -> None:
    """An event costs microseconds: a pair of 300 us is not explained by that heading."""
    put(tmp_path, "deepep_low_latency")
    write_ours(tmp_path / "ours", {LL: {**LL_US, ("roundtrip", "chained"): [[300.0]] * 4}})
    found = fidelity.compare(tmp_path)
    assert "(What an event costs); so far outside: not explained" in found.compared[PAIR].why


def test_ranks_aligned_too_early_explain_kernel_times_of_that_contract_only(tmp_path: Path) -> None:
    """Contract 2026.11-2 did it; the same numbers of today's contract would be a riddle."""
    put(tmp_path, "deepep_low_latency")
    late = {**LL_US, ("combine", "kernel"): [[58.0, 1700.0]] * 4}
    for contract, explained in ((UNALIGNED[-1], True), (CONTRACT, False)):
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        write_ours(tmp_path / "ours", {LL: late}, contract)
        found = fidelity.compare(tmp_path)
        assert (found.compared[COMBINE] not in found.unexplained) is explained, contract
        assert (SKEW[1] in found.compared[COMBINE].why) is explained, contract
    assert CONTRACT not in UNALIGNED


def test_the_last_measured_of_two_cells_is_taken(tmp_path: Path) -> None:
    """The whole suite ran first, this case again beside their benchmark."""
    put(tmp_path, "deepep_low_latency")
    slow = {name: [[9000.0]] * 4 for name in LL_US}
    write_ours(tmp_path / "ours" / "all", {LL: slow}, created_at="2026-11-20T09:00:00Z")
    write_ours(tmp_path / "ours" / "beside", {LL: LL_US}, created_at="2026-11-20T10:00:00Z")
    write_ours(tmp_path / "ours" / "zero", {LL: slow}, created_at="2026-11-20T08:00:00Z")
    assert fidelity.compare(tmp_path).compared[DISPATCH].ours.us == 35.5


def test_the_cell_with_no_other_knob_is_taken(tmp_path: Path) -> None:
    """The same case with num_sms=8 is measured too, later; DeepEP's row asks for no knob."""
    case = factory.moe_case(4096, "fp8", backend="deepep", variant="plain", mode="cached", ranks=4)
    series = {("dispatch", "kernel"): [[352.0]] * 4, ("combine", "kernel"): [[626.0]] * 4}
    slow = {name: [[9000.0]] * 4 for name in series}
    put(tmp_path, "deepep_elastic")
    write_ours(tmp_path / "ours" / "a", {case: series})
    later = "2026-11-20T12:00:00Z"
    write_ours(tmp_path / "ours" / "b", {replace(case, knobs=(("num_sms", 8),)): slow}, created_at=later)
    found = fidelity.compare(tmp_path)
    assert [one.ours.us for one in found.compared] == [352.0, 626.0]
    assert len(found.problems) == 3  # dispatch, expanded, reduced: no result of ours
    assert "deepep plain normal, T = 4096, fp8" in found.problems[0]


def test_twenty_sms_are_not_set_beside_twenty_four(tmp_path: Path) -> None:
    """DeepEP's bench asks for 24; our default is a case of its own."""
    case = factory.moe_case(4096, backend="deepep_legacy", variant="cached", mode="cached", ranks=4)
    ours = {("dispatch_floor", "chained"): [[816.0], [900.0], [900.0], [900.0]]}
    put(tmp_path, "deepep_intranode")
    write_ours(tmp_path / "ours", {case: ours})
    assert fidelity.compare(tmp_path).compared == []
    with_knob = replace(case, knobs=(("num_sms", 24),))
    shutil.rmtree(tmp_path / "ours")
    write_ours(tmp_path / "ours", {with_knob: ours})
    (one,) = fidelity.compare(tmp_path).compared
    assert (one.line.quantity, one.ours.us) == ("bf16 dispatch", 816.0)  # rank 0's


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    """A cut output, a name that nobody knows, a series that was not measured, a sidecar that was changed."""
    put(tmp_path, "deepep_low_latency")
    write_ours(tmp_path / "ours", {LL: {name: LL_US[name] for name in list(LL_US)[:2]}})
    (tmp_path / "theirs" / "other.txt").write_text("hello\n")
    found = fidelity.compare(tmp_path)
    assert len(found.compared) == 4
    assert any("other.txt: no benchmark goes by that name" in problem for problem in found.problems)
    assert any("has no roundtrip in the regime chained" in problem for problem in found.problems)
    (sidecar,) = (tmp_path / "ours" / "samples").glob("*.gz")
    sidecar.write_bytes(gzip.compress(b"{}".ljust(600)))  # of its length
    assert any("was changed" in problem for problem in fidelity.compare(tmp_path).problems)
    output = tmp_path / "theirs" / "deepep_low_latency.txt"
    output.write_text(output.read_text()[:300])
    found = fidelity.compare(tmp_path)
    assert found.compared == []
    assert any(
        "deepep_low_latency.txt: has the lines of 1 ranks of 4" in problem for problem in found.problems
    )


def test_a_cell_that_is_not_ok_is_no_counterpart(tmp_path: Path) -> None:
    """No number without a passed check, here neither."""
    put(tmp_path, "deepep_low_latency")
    factory.execution(tmp_path / "ours", [factory.result(LL, status="incorrect")])
    found = fidelity.compare(tmp_path)
    assert found.compared == []
    assert ["no result of ours" in problem for problem in found.problems] == [True] * 3  # three quantities


def test_without_outputs_there_is_nothing_to_compare(tmp_path: Path) -> None:
    """A user error with what to do."""
    with pytest.raises(UserError, match="no outputs in"):
        fidelity.compare(tmp_path)


def test_the_exit_code_tells_of_unexplained_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ratio outside with a known difference is 0, without one 1, and nothing to compare 2."""
    monkeypatch.setattr(sys, "argv", ["fidelity.py", str(tmp_path)])
    assert fidelity.main() == 2
    assert "error: no outputs in" in capsys.readouterr().err
    put(tmp_path, "deepep_low_latency")
    write_ours(tmp_path / "ours", {LL: LL_US})
    assert fidelity.main() == 0
    printed = capsys.readouterr().out
    assert "DeepEP tests/legacy/test_low_latency.py" in printed
    assert "not explained" not in printed
    silent = bench("deepep_low_latency")
    silent = silent._replace(lines=tuple(line._replace(differs="", shown="") for line in silent.lines))
    monkeypatch.setattr(fidelity, "BENCHES", (silent,))
    assert fidelity.main() == 1
    assert "not explained" in capsys.readouterr().out


def test_the_markdown_table_has_a_reason_only_where_it_needs_one(tmp_path: Path) -> None:
    """Combine is within 0.97 to 1.03 in time and bandwidth; dispatch is not."""
    put(tmp_path, "deepep_low_latency", "deepep_intranode")
    write_ours(tmp_path / "ours", {LL: LL_US})
    lines = list(fidelity.markdown(fidelity.compare(tmp_path)))
    dispatch, _ = (line for line in lines if line.startswith("| dispatch |"))
    combine, _ = (line for line in lines if line.startswith("| combine |"))
    expected = (
        "| combine | combine kernel, mean of rank means | 57.67 | 57.67 | 1.000 | 252.1 | 254.6 | 1.010 |  |"
    )
    assert combine == expected
    assert dispatch.endswith(
        "theirs flushes L2 before each call; up to 10 of a rank's 1024 picks masked in theirs |"
    )
    assert "### `DeepEP tests/legacy/test_low_latency.py`" in "\n".join(lines)
    assert "Not compared" in "\n".join(lines)


@pytest.fixture(scope="module")
def planned() -> list[Case]:
    """What `cx run --suite fidelity` measures on four GPUs."""
    cells = matrix.expand(suite.load_suite("fidelity"), sku.load_sku("h200x4-nvlink"))
    assert [one.unsupported for one in cells if one.unsupported] == []
    return [one.cell.case for one in cells]


@pytest.mark.parametrize("one", BENCHES, ids=lambda one: one.name)
def test_every_counterpart_is_measured_by_the_suite(one: Bench, planned: list[Case]) -> None:
    """One cell for each line, in the regime that the line asks for, and a reduction that exists."""
    for line in one.lines:
        (case,) = (case for case in planned if line.ours.fits(case))
        assert line.regime in case.regimes, line
        assert line.over in REDUCTIONS


def test_the_suite_measures_nothing_else(planned: list[Case]) -> None:
    """Every cell of it is compared with something."""
    lines = [line for one in BENCHES for line in one.lines]
    assert [case.id for case in planned if not any(line.ours.fits(case) for line in lines)] == []


def test_every_benchmark_is_explained() -> None:
    """docs/fidelity.md names the file of each output and the script that prints it."""
    text = (ROOT / "docs" / "fidelity.md").read_text()
    for one in BENCHES:
        assert f"`{one.name}.txt`" in text, one.name
        assert one.title.split(" --")[0].split()[-1] in text, one.title


def test_what_a_line_refers_to_is_a_heading() -> None:
    """docs/fidelity.md has the section that shows how much a difference makes, also what makes any ratio."""
    headings = [
        line.lstrip("# ")
        for line in (ROOT / "docs" / "fidelity.md").read_text().splitlines()
        if "#" in line[:1]
    ]
    shown = {line.shown for one in BENCHES for line in one.lines if line.shown}
    assert shown | UNBOUNDED <= set(headings)
