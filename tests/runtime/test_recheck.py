"""`cx validate` makes again what follows from the case or from the samples: no change of it passes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import factory
import honest
import pytest
from honest import Change, cell, rewrite, said

from collectivex.runtime import cli, counts, recheck, recount, routing, stats
from collectivex.runtime.bandwidth import moe_bytes
from collectivex.runtime.types import Case, Collective, Moe, Routing

COLLECTIVE, MOE = "all_reduce", "torch_dist-full"


@pytest.fixture(scope="module")
def unspoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once."""
    return honest.execution(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def folder(unspoilt: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(unspoilt, tmp_path / "execution"))


def series(data: dict[str, Any], regime: str) -> dict[str, Any]:
    return next(m for m in data["measurements"] if m["regime"] == regime)


def rows_times_100(data: dict[str, Any]) -> None:
    """In every rank, so that what is sent still arrives."""
    for rank in data["bytes"]["ranks"]:
        for rows in (rank["rows_sent"], rank["rows_received"]):
            rows["scale_up"] *= 100


def tokens_times_3(data: dict[str, Any]) -> None:
    for rank in data["bytes"]["ranks"]:
        rank["tokens"] *= 3


def not_settled(data: dict[str, Any]) -> None:
    m = series(data, "chained")
    m["settled"] = not m["settled"]


CHANGED: dict[str, tuple[str, Change, str]] = {
    "size": (COLLECTIVE, lambda d: d["bytes"].update(size=4), "bytes.size: its case gives 1048576, not 4"),
    "requested": (COLLECTIVE, lambda d: d["bytes"].update(requested=4), "bytes.requested: its case gives"),
    "rows": (MOE, rows_times_100, "bytes.ranks[0].rows_sent.scale_up: its case gives"),
    "tokens": (MOE, tokens_times_3, "bytes.ranks[3].tokens: its case gives 128, not 384"),
    "row bytes": (
        MOE,
        lambda d: d["bytes"]["row_bytes"].update(dispatch=7168),
        "bytes.row_bytes.dispatch: its case gives 14336, not 7168",
    ),
    "meta bytes": (MOE, lambda d: d["bytes"].update(meta_bytes=1), "bytes.meta_bytes: its case gives 64"),
    "hash": (MOE, lambda d: d["routing_proof"].update(hash="0" * 64), "routing_proof.hash: its case gives"),
    "distinct ranks": (
        MOE,
        lambda d: d["routing_proof"].update(mean_distinct_ranks=1.0),
        "routing_proof.mean_distinct_ranks: its case gives 3.5898",
    ),
    "load": (
        MOE,
        lambda d: d["routing_proof"].update(expert_load_max_over_mean=1.0),
        "routing_proof.expert_load_max_over_mean: its case gives",
    ),
    "unequal routing": (
        MOE,
        lambda d: d["routing_proof"].update(equal_across_ranks=False),
        "publishes a latency of ranks with different routing",
    ),
    "headline": (
        COLLECTIVE,
        lambda d: series(d, "fresh").update(headline="min"),
        "headline: fresh call quotes max, not min",
    ),
    "headline of a chain": (
        COLLECTIVE,
        lambda d: series(d, "chained").update(headline="max"),
        "headline: chained call quotes median, not max",
    ),
    "headline of a floor": (
        MOE,
        lambda d: d["measurements"][-1].update(headline="median"),
        "_floor quotes min, not median",
    ),
    "settled": (COLLECTIVE, not_settled, "measurements[1].settled: "),
    "drift": (
        COLLECTIVE,
        lambda d: series(d, "chained")["health"].update(settle_drift=0.5),
        "measurements[1].health.settle_drift: 0.5 published, the samples give ",
    ),
    "no drift": (COLLECTIVE, lambda d: series(d, "chained").update(health={}), "nothing, not settle_drift"),
    "cv": (COLLECTIVE, lambda d: series(d, "fresh")["max"].update(cv=0.5), "max.cv: 0.5 published"),
    "cv of the spread": (
        COLLECTIVE,
        lambda d: series(d, "fresh")["spread"].update(cv=None),
        "spread.cv: None published",
    ),
    "outliers": (
        COLLECTIVE,
        lambda d: series(d, "fresh")["max"]["outliers"].update(count=3),
        "max.outliers: {'count': 3",
    ),
    "stop reason": (
        COLLECTIVE,
        lambda d: series(d, "fresh").update(stop_reason="budget of 20 s reached"),
        "stop_reason: budget of 20 s reached, after 8 of 8 trials",
    ),
    "runs": (
        COLLECTIVE,
        lambda d: d["design"].update(runs=2),
        "its record says that there are 2 runs, not 1",
    ),
    "inference": (
        COLLECTIVE,
        lambda d: d["design"].update(inference="runs"),
        "design.inference: 1 runs give none, not runs",
    ),
    "implausible": (
        COLLECTIVE,
        lambda d: d.update(status="implausible", reason="too fast"),
        "status: implausible, though no limit is beaten",
    ),
    "plausible": (
        MOE,
        lambda d: d["limits"].append({**d["limits"][0], "name": "scale_up", "GBps": 0.01}),
        "status: ok, though fresh dispatch would carry",
    ),
    "no samples": (
        COLLECTIVE,
        lambda d: d.update(samples=None, status="implausible", reason="too fast"),
        "samples: none, and still there are measurements",
    ),
    "no bytes": (COLLECTIVE, lambda d: d.update(bytes=None), "bytes: none, and still there are measurements"),
    "no routing": (MOE, lambda d: d.update(routing_proof=None), "routing_proof: none, and still there are"),
    "domains": (
        MOE,
        lambda d: d.update(placement={"domains": [10**9] * 4, "source": "nvml"}),
        "placement.domains: number 1000000000 of 4 ranks",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_follows_from_case_or_samples_cannot_be_changed(folder: Path, name: str) -> None:
    """Each of these is valid by the schema and agrees with its sidecar's hash."""
    which, change, problem = CHANGED[name]
    assert said(folder) == []
    rewrite(cell(folder, which), change)
    found = said(folder)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (1 << 20, None),
        ((1 << 20) - 63, None),
        ((1 << 20) - 64, "is not what a program"),
        (1 << 21, "makes of"),
    ],
)
def test_a_program_may_round_the_share_of_each_rank_down(size: int, problem: str | None) -> None:
    """To 16 bytes on each of four ranks, never up."""
    case = factory.collective_case(backend="nccl_tests", regimes=("loop",))
    document = {"bytes": {"family": "collective", "size": size, "requested": 1 << 20}}
    found = list(recount.problems(document, case))
    assert [problem in line for line in found if problem] == ([True] if problem else [])
    assert bool(found) == bool(problem)


def test_an_operation_of_programs_only_has_no_bytes_of_ours() -> None:
    """A sentence, not a traceback."""
    case = Case("torch_dist", "", "out-of-place", Collective("hypercube", 64, "float32"), 4)
    document = {"bytes": {"family": "collective", "size": 64, "requested": 64}}
    assert list(recount.problems(document, case)) == ["bytes.size: no element counts for 'hypercube'"]


def exchange(shape: Moe) -> tuple[Case, dict[str, Any]]:
    """A case of four ranks in two domains, and the part of its result that follows from it."""
    case, domains = Case("torch_dist", "full", "normal", shape, 4, 2), [0, 0, 1, 1]
    table = routing.build(shape, 4)
    block = moe_bytes(shape, counts.count(table, shape, domains), [{"dispatch": 7}] * 4)
    proof = {"hash": table.hash, "equal_across_ranks": True, **counts.summary(table, shape, 4)}
    placement = {"domains": domains, "source": "sku"}
    return case, {
        "bytes": block,
        "routing_proof": proof,
        "placement": placement,
        "case": {},
        "measurements": [],
    }


def test_uneven_and_skewed_routing_over_domains_is_made_again() -> None:
    """With what the library said of the wire left as it is; another seed is noticed."""
    shape = Moe("any", 512, 4, 16, 64, "fp8", Routing("zipf", 1.2, 7, "linear"))
    case, document = exchange(shape)
    assert list(recount.problems(document, case)) == []
    other, _ = exchange(Moe("any", 512, 4, 16, 64, "fp8", Routing("zipf", 1.2, 8, "linear")))
    assert any("routing_proof.hash" in line for line in recount.problems(document, other))


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"experts": 15}, "cannot be divided over 4 ranks"), ({"routing": Routing("zipf", 1e308)}, "cannot be")],
)
def test_a_case_that_cannot_be_routed_is_named(change: dict[str, Any], problem: str) -> None:
    """Nobody measured that, and it is no traceback."""
    shape = Moe("any", 512, 4, 16, 64)
    _, document = exchange(shape)
    case = Case("torch_dist", "full", "normal", Moe(**{**vars(shape), **change}), 4, 2)
    (found,) = recount.problems(document, case)
    assert found.startswith("case.shape: cannot be routed: ")
    assert problem in found


def test_routing_beyond_this_machine_is_said_and_not_tried() -> None:
    """A hostile number of tokens costs nothing; an honest one is a note."""
    shape = Moe("any", 512, 4, 16, 64)
    _, document = exchange(shape)
    case = Case("torch_dist", "full", "normal", Moe("any", 512, 4, 16, 1 << 40), 4, 2)
    assert list(recount.problems(document, case)) == []
    assert "that size" in (recount.untold(document, case) or "")


def test_without_torch_a_note_says_what_was_taken_on_trust(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest is checked as ever; the exit code is that of the rest."""
    monkeypatch.setattr(recount, "find_spec", lambda name: None)
    assert cli.main(["validate", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("note: routing is not made again without torch")
    assert err.count("note: ") == 1


def test_rounded_samples_do_not_outvote_the_measured_ones() -> None:
    """A vote that hangs on the last digit may go either way; a clear one may not."""
    steps = [100.0] * 8 + [102.0] * 8  # exactly 2 %: settled, and half a nanosecond from not being so
    entry = {"regime": "chained", "settled": False, "health": {}}
    assert list(recheck._settling(entry, [steps])) == []
    assert list(recheck._settling({**entry, "settled": True}, [steps])) == []
    assert abs(stats.unsettled_us(steps)) < recheck.VOTE_US
    apart = [100.0] * 8 + [110.0] * 8
    assert list(recheck._settling({**entry, "settled": True}, [apart])) != []
    assert list(recheck._settling({**entry, "settled": False}, [apart])) == []


def test_a_program_that_knows_one_cycle_only_is_complete() -> None:
    """nccl-tests without -N: fewer trials than were asked for, and not because time ran out."""
    case = factory.collective_case(backend="nccl_tests", regimes=("loop",))
    entry = {"component": "call", "regime": "loop", "headline": "max", "health": {}, "trials": 1}
    assert list(recheck._sampling({**entry, "stop_reason": "complete"}, case)) == []
    assert list(recheck._sampling({**entry, "regime": "fresh", "stop_reason": "complete"}, case)) != []
