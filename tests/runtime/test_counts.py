"""Counts: what a routing sends where, by hand, by brute force, and in the form of the schema."""

import json
from pathlib import Path

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectivex.runtime import counts, routing
from collectivex.runtime.bandwidth import moe_bytes
from collectivex.runtime.types import Moe, Routing

SCHEMA = json.loads((Path(__file__).parents[2] / "schema" / "result.v1.json").read_text())
# 8 experts on 4 ranks (two each) on 2 nodes: rank 0 owns 0 1, rank 1 2 3 | rank 2 4 5, rank 3 6 7.
SHAPE = Moe("w", 64, topk=3, experts=8, tokens=2)
PICKS = [
    [[0, 1, 2], [4, 5, 7]],  # to ranks 0 0 1, then 2 2 3
    [[3, -1, 6], [2, 3, 0]],  # to ranks 1 - 3, then 1 1 0
    [],
    [[-1, -1, -1]],
]


def test_counts_of_a_small_routing_are_those_counted_by_hand() -> None:
    """Selections, unique rows and unique node rows of four ranks on two nodes, worked out on paper."""
    found = counts.count(PICKS, SHAPE, [0, 0, 1, 1])

    none = {"self": 0, "scale_up": 0, "scale_out": 0}
    assert found == [
        {
            "tokens": 2,
            "selections": 6,
            "rows_sent": {"self": 1, "scale_up": 1, "scale_out": 2},
            "rows_received": {"self": 1, "scale_up": 1, "scale_out": 0},
            "selections_sent": {"self": 2, "scale_up": 1, "scale_out": 3},
            "selections_received": {"self": 2, "scale_up": 1, "scale_out": 0},
            "node_rows_sent": {"own": 1, "other": 1},
        },
        {
            "tokens": 2,
            "selections": 5,
            "rows_sent": {"self": 2, "scale_up": 1, "scale_out": 1},
            "rows_received": {"self": 2, "scale_up": 1, "scale_out": 0},
            "selections_sent": {"self": 3, "scale_up": 1, "scale_out": 1},
            "selections_received": {"self": 3, "scale_up": 1, "scale_out": 0},
            "node_rows_sent": {"own": 2, "other": 1},
        },
        {
            "tokens": 0,
            "selections": 0,
            "rows_sent": none,
            "rows_received": {"self": 0, "scale_up": 0, "scale_out": 1},
            "selections_sent": none,
            "selections_received": {"self": 0, "scale_up": 0, "scale_out": 2},
            "node_rows_sent": {"own": 0, "other": 0},
        },
        {
            "tokens": 1,
            "selections": 0,
            "rows_sent": none,
            "rows_received": {"self": 0, "scale_up": 0, "scale_out": 2},
            "selections_sent": none,
            "selections_received": {"self": 0, "scale_up": 0, "scale_out": 2},
            "node_rows_sent": {"own": 0, "other": 0},
        },
    ]


def test_traffic_between_trays_of_one_nvlink_domain_is_scale_up() -> None:
    """The same routing where NVLink joins both nodes: what went to the other node is scale-up now, nothing is
    scale-out, and a token goes to one domain at most: two rows of rank 0, two of rank 1."""
    found = counts.count(PICKS, SHAPE, [0, 0, 0, 0])

    assert [entry["rows_sent"] for entry in found[:2]] == [
        {"self": 1, "scale_up": 3, "scale_out": 0},
        {"self": 2, "scale_up": 2, "scale_out": 0},
    ]
    assert [entry["rows_received"]["scale_up"] for entry in found] == [1, 1, 1, 2]
    assert [entry["selections_sent"]["scale_up"] for entry in found] == [4, 2, 0, 0]
    assert [entry["node_rows_sent"] for entry in found[:2]] == [{"own": 2, "other": 0}] * 2


def test_the_summary_of_a_small_routing_is_the_one_counted_by_hand() -> None:
    """5 tokens on 2 + 2 + 2 + 2 + 0 ranks; 11 picks on 8 experts, of which 0, 2 and 3 are picked twice."""
    assert counts.summary(PICKS, SHAPE, 4) == {
        "mean_distinct_ranks": 8 / 5,
        "expert_load_max_over_mean": 2 / (11 / 8),
    }


@settings(max_examples=40, deadline=None)
@given(
    domains=st.sampled_from([[0], [0, 1], [0, 0, 1, 1], [0] * 4, [0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]]),
    local=st.integers(1, 3),
    tokens=st.integers(0, 6),
    data=st.data(),
)
def test_counts_equal_a_brute_force_count(
    domains: list[int], local: int, tokens: int, data: st.DataObject
) -> None:
    """Random picks with gaps, counted pair by pair with sets; domains may differ in size and be scattered."""
    ranks = len(domains)
    shape = Moe("w", 64, data.draw(st.integers(1, 5)), ranks * local, tokens)
    row = st.lists(st.integers(-1, shape.experts - 1), min_size=shape.topk, max_size=shape.topk)
    picks = data.draw(st.lists(st.lists(row, max_size=tokens), min_size=ranks, max_size=ranks))

    def tier(a: int, b: int) -> str:
        if a == b:
            return "self"
        return "scale_up" if domains[a] == domains[b] else "scale_out"

    chosen = {
        (s, t, k, e // local)
        for s, of_rank in enumerate(picks)
        for t, experts in enumerate(of_rank)
        for k, e in enumerate(experts)
        if e >= 0
    }
    rows = {(s, t, d) for s, t, _, d in chosen}
    nodes = {(s, t, domains[d]) for s, t, _, d in chosen}
    for rank, entry in enumerate(counts.count(picks, shape, domains)):
        assert entry["tokens"] == len(picks[rank])
        assert entry["selections"] == sum(c[0] == rank for c in chosen)
        for name in counts.TIERS:
            assert entry["rows_sent"][name] == sum(s == rank and tier(s, d) == name for s, _, d in rows)
            assert entry["rows_received"][name] == sum(d == rank and tier(s, d) == name for s, _, d in rows)
            assert entry["selections_sent"][name] == sum(
                s == rank and tier(s, d) == name for s, _, _, d in chosen
            )
            assert entry["selections_received"][name] == sum(
                d == rank and tier(s, d) == name for s, _, _, d in chosen
            )
        own = domains[rank]
        assert entry["node_rows_sent"]["own"] == sum(s == rank and n == own for s, _, n in nodes)
        assert entry["node_rows_sent"]["other"] == sum(s == rank and n != own for s, _, n in nodes)


@pytest.mark.parametrize("spread", Routing.SPREADS)
def test_a_routing_table_counts_like_its_lists_and_fits_the_schema(spread: str) -> None:
    """A Table and its nested lists give the same entries, and they validate as bytes_moe."""
    shape = Moe("w", 256, 4, 16, 9, routing=Routing("zipf", 1.0, spread=spread))
    table = routing.build(shape, 4)

    found = counts.count(table, shape, [0, 0, 1, 1])

    assert found == counts.count([e.tolist() for e in table.experts], shape, [0, 0, 1, 1])
    assert counts.summary(table, shape, 4) == counts.summary([e.tolist() for e in table.experts], shape, 4)
    schema = {"$ref": "#/$defs/bytes_moe", "$defs": SCHEMA["$defs"]}
    jsonschema_rs.validator_for(schema).validate(moe_bytes(shape, found))


def test_a_routing_without_tokens_has_zero_counts_and_summary() -> None:
    """Zero tokens are a workload, not an error."""
    shape = Moe("w", 64, 2, 8, 0)
    table = routing.build(shape, 4)

    assert all(entry["tokens"] == entry["selections"] == 0 for entry in counts.count(table, shape, [0] * 4))
    assert counts.summary(table, shape, 4) == {"mean_distinct_ranks": 0.0, "expert_load_max_over_mean": 0.0}


def test_a_routing_over_other_ranks_is_refused() -> None:
    """Counts of a table that was built for another number of ranks would be silently wrong."""
    with pytest.raises(ValueError, match="over 4 ranks, not 2"):
        counts.count(PICKS, SHAPE, [0, 0])
