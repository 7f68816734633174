"""Tables: only like numbers in a line, runs joined, and a rank only where there can be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factory import EXECUTION, collective_case, execution, moe_case, result
from hypothesis import given, settings
from hypothesis import strategies as st

from collectivex.runtime.reading import Execution, Reading, read
from collectivex.runtime.records import record
from collectivex.runtime.tables import Entry, Line, Table, tables
from collectivex.runtime.types import (
    COLLECTIVE_OPS,
    CONTRACT,
    DTYPES,
    MODES,
    REGIMES,
    Case,
    Collective,
    Moe,
    Routing,
    Status,
    case_from_json,
    comparison_key,
)


def reading(*documents: dict[str, Any]) -> Reading:
    """These results as if read from files, one execution for each name in them."""
    names = list(dict.fromkeys(document["identity"]["execution"] for document in documents))
    skus = {document["identity"]["execution"]: document["identity"]["sku"] for document in documents}
    executions = [Execution(name, name, "smoke", skus[name], CONTRACT, "", True, 1) for name in names]
    records = []
    for document in documents:
        identity = document["identity"]
        index = names.index(identity["execution"])
        records.append(record(document, index, identity["execution"], "x", identity["cell_id"]))
    return Reading(executions, records)


def runs(case: Case, values: Sequence[float], **fields: Any) -> list[dict[str, Any]]:
    return [result(case, run=run, runs=len(values), us=us, **fields) for run, us in enumerate(values)]


def fresh(documents: Sequence[dict[str, Any]], component: str = "call", percentile: str = "p50") -> Table:
    """The one table of a component in the regime fresh."""
    found = [t for t in tables(reading(*documents), percentile, ["fresh"]) if t.component == component]
    assert len(found) == 1
    return found[0]


def entries(documents: Sequence[dict[str, Any]]) -> dict[str, Entry]:
    """Label -> entry of the only line."""
    lines = fresh(documents).lines
    assert len(lines) == 1
    return {entry.label: entry for entry in lines[0].entries}


A, B, C = (collective_case(backend=name) for name in ("alpha", "beta", "gamma"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases from a space small enough that likeness and unlikeness both happen often."""
    family = draw(st.sampled_from(("collective", "moe")))
    mode = draw(st.sampled_from(MODES[family]))
    dtype = draw(st.sampled_from(DTYPES[family]))
    if family == "collective":
        shape: Collective | Moe = Collective(draw(st.sampled_from(COLLECTIVE_OPS[:2])), 1 << 20, dtype)
    else:
        routing = Routing(draw(st.sampled_from(Routing.KINDS)), seed=draw(st.integers(1, 2)))
        sizes = draw(st.sampled_from(((7168, 8, 256), (64, 2, 8))))
        shape = Moe("same-name", *sizes, 128, dtype, routing)
    backend, variant = draw(st.sampled_from(("alpha", "beta"))), draw(st.sampled_from(("", "x")))
    nodes = draw(st.integers(1, 2))
    return Case(backend, variant, mode, shape, 4, nodes, knobs=draw(st.sampled_from(((), (("k", 1),)))))


@settings(max_examples=60)
@given(
    chosen=st.lists(
        st.tuples(cases(), st.sampled_from(("nvlink", "xgmi"))),
        min_size=1,
        max_size=6,
        unique_by=lambda c: c[0].id,
    )
)
def test_unlike_keys_never_share_a_line(chosen: list[tuple[Case, str]]) -> None:
    """Whatever is mixed: all entries of a line have one comparison key, which each one's own case gives."""
    documents = [result(case, topology=topology) for case, topology in chosen]
    by_id = {d["identity"]["case_id"]: d for d in documents}
    seen = 0
    for table in tables(reading(*documents)):
        for line in table.lines:
            for entry in line.entries:
                document = by_id[entry.case_id]
                case = case_from_json(document["case"])
                place = document["identity"]["topology_class"]
                assert comparison_key(case, table.group.regime, place) == line.key
                seen += entry.us is not None
    assert seen == sum(len(document["measurements"]) for document in documents)


@settings(max_examples=40)
@given(chosen=st.lists(cases(), min_size=2, max_size=6, unique_by=lambda c: c.id))
def test_one_key_is_one_line_of_one_component(chosen: list[Case]) -> None:
    """The other half: what may be compared does stand in the same line."""
    found: dict[tuple[str, str, str], int] = {}
    for table in tables(reading(*map(result, chosen))):
        for line in table.lines:
            at = (line.key, table.component, table.headline)
            found[at] = found.get(at, 0) + 1
    assert set(found.values()) == {1}


def test_the_contract_keeps_old_numbers_apart() -> None:
    """A number measured under another contract gets a table of its own, which says so."""
    old = result(A, execution="old", contract="2026.1-1")
    found = tables(reading(old, result(B, execution="new")), regimes=["fresh"])
    assert [table.group.contract for table in found] == ["2026.1-1", CONTRACT]
    assert "contract 2026.1-1" in found[0].group.title


def test_runs_of_a_case_become_their_median_with_an_interval_over_runs() -> None:
    """Run medians 10, 12, 11 by hand: median 11; logs have mean 2.395129, s 0.0911925, so with
    t(0.975, 2) = 4.303 the interval is exp(2.395129 -+ 4.303 * 0.0911925 / sqrt(3)) = [8.7458, 13.7589]."""
    entry = entries(runs(A, [10, 12, 11]))["alpha"]
    assert entry.us == 11
    assert entry.interval == pytest.approx((8.7458, 13.7589), rel=1e-4)
    assert (entry.inference, entry.runs, entry.measured_runs) == (True, 3, 3)
    assert entry.p99_us == pytest.approx(11 * 1.048)  # factory: p99 is 2.4 spreads of 2 % above p50


def test_an_even_number_of_runs_takes_the_middle_of_the_two_in_the_middle() -> None:
    """Four run medians: the mean of the second and third."""
    assert entries(runs(A, [10, 14, 11, 30]))["alpha"].us == 12.5


def test_below_three_runs_there_is_no_inference() -> None:
    """Two runs: the interval is what the iterations of each say, their envelope, and is labelled so."""
    entry = entries(runs(A, [10, 20]))["alpha"]
    low, high = entry.interval or (0, 0)
    assert not entry.inference
    assert 9.9 < low < 10
    assert 20 < high < 20.1


def test_another_percentile_is_joined_the_same_way() -> None:
    """p99 asked for: the median over runs of the run's p99 (factory: 1.048 p50)."""
    table = fresh(runs(A, [10, 12, 11]), percentile="p99")
    assert table.percentile == "p99"
    assert table.lines[0].entries[0].us == pytest.approx(11.528)


def test_bandwidth_and_share_follow_the_joined_time() -> None:
    """1 MiB all_reduce on 4 ranks in 11 us: busbw 1.5 * 1048576 / 11 / 1000 = 142.99 GB/s of 450."""
    entry = entries(runs(A, [10, 12, 11]))["alpha"]
    assert entry.GBps is not None
    assert entry.GBps["busbw"] == pytest.approx(142.988, rel=1e-4)
    assert entry.share == pytest.approx(0.31775, rel=1e-4)


def test_moe_bandwidth_is_remote_by_default() -> None:
    """128 tokens to each of 3 other ranks, 7168 bf16 values each, in 100 us: 128*3*14336/100/1000 GB/s."""
    table = fresh([result(moe_case(128), us=100.0)], "dispatch")
    entry = table.lines[0].entries[0]
    assert table.formula == "remote"
    assert (entry.GBps or {})["remote"] == pytest.approx(55.05, rel=1e-4)


def test_across_nodes_no_single_limit_holds() -> None:
    """Traffic on two kinds of link: no share of the scale-up limit is claimed."""
    table = fresh([result(replace(A, nodes=2))])
    assert (table.limits, table.lines[0].entries[0].share) == ([], None)


def test_across_nodes_of_one_nvlink_domain_the_scale_up_limit_holds() -> None:
    """All traffic is on one kind of link, whatever the number of nodes."""
    placement = {"domains": [0, 0, 0, 0], "source": "nvml"}
    table = fresh([result(replace(A, nodes=2), placement=placement)])
    assert table.lines[0].entries[0].limit is not None


def test_only_the_scale_up_limit_is_a_limit_of_the_wires() -> None:
    """A memory bandwidth among the limits does not become the denominator."""
    hbm = {"name": "hbm", "GBps": 4800.0, "kind": "datasheet", "source": "x"}
    table = fresh([result(A, limits=[hbm])])
    assert table.lines[0].entries[0].share is None


def test_the_fastest_is_marked_when_it_can_be_told_apart() -> None:
    """Disjoint run-level intervals: fastest, and how many times slower the others are."""
    found = entries(runs(A, [10, 10.1, 9.9]) + runs(B, [20, 20.1, 19.9]) + runs(C, [30, 30.1, 29.9]))
    assert {label: entry.standing for label, entry in found.items()} == {
        "alpha": "fastest",
        "beta": "slower",
        "gamma": "slower",
    }
    assert found["beta"].ratio == pytest.approx(2.0)
    assert found["gamma"].ratio == pytest.approx(3.0)


def test_overlapping_intervals_are_not_ranked() -> None:
    """10 to 12 against 11 to 13: neither is called faster, however the medians lie."""
    found = entries(runs(A, [10, 11, 12]) + runs(B, [11, 12, 13]))
    assert {entry.standing for entry in found.values()} == {"cannot rank"}
    assert {entry.ratio for entry in found.values()} == {None}


def test_two_leaders_cannot_be_ranked_and_a_straggler_still_is_slower() -> None:
    """What overlaps the smallest cannot be ranked against it; what does not, can."""
    found = entries(runs(A, [10, 10.2, 9.9]) + runs(B, [10.1, 10, 10.2]) + runs(C, [50, 51, 49]))
    assert [found[label].standing for label in ("alpha", "beta", "gamma")] == ["cannot rank"] * 2 + ["slower"]


def test_without_inference_nothing_is_ranked() -> None:
    """Even a factor of ten: two runs of each say nothing about the third."""
    found = entries(runs(A, [10, 10]) + runs(B, [100, 100]))
    assert {entry.standing for entry in found.values()} == {"cannot rank"}


def test_one_entry_without_inference_spoils_the_ranking_of_its_line() -> None:
    """Three runs against one: the one cannot be placed, so nobody is first."""
    found = entries(runs(A, [10, 10.1, 9.9]) + runs(B, [100]))
    assert {entry.standing for entry in found.values()} == {"cannot rank"}


def test_a_single_entry_has_nobody_to_be_faster_than() -> None:
    """No medal in a race of one."""
    assert entries(runs(A, [10, 10.1, 9.9]))["alpha"].standing == "alone"


def test_what_beats_a_physical_limit_is_withheld_from_ranking() -> None:
    """An implausible number is shown, is never fastest, and does not stop others from being ranked."""
    too_fast = runs(A, [1, 1.01, 0.99], status="implausible")
    found = entries(too_fast + runs(B, [10, 10.1, 9.9]) + runs(C, [20, 20.1, 19.9]))
    assert [found[label].standing for label in ("alpha", "beta", "gamma")] == [
        "withheld",
        "fastest",
        "slower",
    ]
    assert found["alpha"].us == 1
    assert found["gamma"].ratio == pytest.approx(2.0)


def test_one_implausible_run_withholds_the_case() -> None:
    """The worst run stands for the case."""
    documents = runs(A, [10, 10.1, 9.9])
    documents[1] = result(A, run=1, status="implausible", us=1.0)
    assert entries(documents + runs(B, [20, 20.1, 19.9]))["alpha"].standing == "withheld"


def test_a_case_that_was_wrong_once_shows_no_number() -> None:
    """Two right runs and a wrong one: the output was not proven right, so there is no latency."""
    wrong = [*runs(A, [10, 10]), result(A, run=2, status="incorrect")]
    other_size = runs(replace(A, shape=replace(A.shape, bytes=1 << 21)), [11, 11, 11])
    table = fresh(wrong + other_size)
    entry = table.lines[0].entries[0]
    assert (entry.us, entry.status, entry.GBps) == (None, Status.INCORRECT, None)


def test_a_case_that_failed_once_keeps_the_numbers_it_has() -> None:
    """Two of three runs: the number of those two, without inference, and the count says so."""
    entry = entries([*runs(A, [10, 12]), result(A, run=2, status="timeout")])["alpha"]
    assert (entry.us, entry.measured_runs, entry.runs, entry.status) == (11, 2, 3, Status.TIMEOUT)
    assert not entry.inference


def test_a_missing_run_is_counted(tmp_path: Path) -> None:
    """A run whose record is gone still belongs to its case."""
    documents = runs(A, [10, 12])
    folder = execution(tmp_path, documents, missing=[f"{A.id}.r2"])
    entry = tables(read([folder]), regimes=["fresh"])[0].lines[0].entries[0]
    assert (entry.measured_runs, entry.runs, entry.status) == (2, 3, Status.NOT_RUN)


def test_an_unsupported_size_is_shown_where_its_column_has_numbers() -> None:
    """A reader sees that the size was asked for; a backend with no number at all stays out of the table."""
    large = replace(A, shape=replace(A.shape, bytes=1 << 30))
    table = fresh([result(A), result(large, status="unsupported"), result(B, status="unsupported")])
    assert [[(e.label, str(e.status)) for e in line.entries] for line in table.lines] == [
        [("alpha", "ok")],
        [("alpha", "unsupported")],
    ]


def test_a_size_that_nobody_in_the_table_tried_makes_no_line() -> None:
    """A backend without any number brings no empty line either."""
    large = replace(B, shape=replace(B.shape, bytes=1 << 30))
    assert [line.at for line in fresh([result(A), result(large, status="unsupported")]).lines] == [1 << 20]


def test_a_size_without_a_number_has_its_own_label_in_each_table() -> None:
    """Two tables of a group name their columns apart: the entry without a number follows each."""
    sizes = [moe_case(t) for t in (1, 2)]
    found = tables(reading(result(sizes[0]), result(sizes[1], status="failed")), regimes=["fresh"])
    silent = [table.lines[1].entries[0] for table in found]
    assert [entry.label for entry in silent] == ["torch_dist full"] * 3
    assert len({id(entry) for entry in silent}) == 3


def test_lines_rise_with_size() -> None:
    """The ladder is in order whatever the order of the files."""
    found = fresh([result(collective_case(size=1 << power)) for power in (20, 10, 15)])
    assert [line.at for line in found.lines] == [1 << 10, 1 << 15, 1 << 20]


@pytest.mark.parametrize(
    ("one", "other", "labels"),
    [
        ({}, {"variant": "x"}, ["alpha", "alpha x"]),
        ({"knobs": (("sms", 8),)}, {"knobs": (("sms", 24),)}, ["alpha sms=24", "alpha sms=8"]),
    ],
)
def test_labels_say_what_differs_and_no_more(
    one: dict[str, Any], other: dict[str, Any], labels: list[str]
) -> None:
    """Backend and variant, and knobs only where they tell two entries apart."""
    assert sorted(entries([result(replace(A, **one)), result(replace(A, **other))])) == labels


def test_two_executions_of_one_case_are_not_runs_of_each_other() -> None:
    """Another allocation: a second entry under its own name, never a pooled median."""
    found = entries([result(A, us=10.0), result(A, us=20.0, execution="later")])
    assert {label: entry.us for label, entry in found.items()} == {
        f"alpha {EXECUTION}": 10.0,
        "alpha later": 20.0,
    }


def test_two_samplings_of_one_case_are_told_apart() -> None:
    """Same way, same key, other sampling: both are there, each under its case's digits."""
    more = replace(A, sampling=replace(A.sampling, trials=99))
    assert sorted(entries([result(A), result(more)])) == sorted(
        f"alpha #{case.id[-8:]}" for case in (A, more)
    )


def test_regimes_stay_in_tables_of_their_own() -> None:
    """fresh before chained, and each regime's headline reduction with it."""
    found = tables(reading(result(moe_case())))
    order = [(t.group.regime, t.component, t.headline) for t in found]
    assert order == [
        ("fresh", "roundtrip", "max"),
        ("fresh", "dispatch", "max"),
        ("fresh", "combine", "max"),
        ("chained", "roundtrip", "median"),
        ("chained", "dispatch_floor", "min"),
        ("chained", "combine_floor", "min"),
    ]
    assert REGIMES.index("fresh") < REGIMES.index("chained")


def test_a_contract_only_backend_is_labelled() -> None:
    """A number from a code path never validated on its hardware says so."""
    entry = entries([result(A, backend={"validated": "contract-only"})])["alpha"]
    assert entry.contract_only


def test_a_time_of_zero_has_no_bandwidth() -> None:
    """A clock too coarse for the call gives a zero, not a division by it."""
    line: Line = fresh([result(A, us=0.0)]).lines[0]
    assert (line.entries[0].us, line.entries[0].GBps) == (0.0, {})
