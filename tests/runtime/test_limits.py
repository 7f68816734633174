"""Limits: each tier's bytes against that tier's limit, with hand-computed times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from factory import collective_case, moe_case, result

from collectivex.runtime import limits

UP = {"name": "scale_up", "GBps": 900.0, "kind": "datasheet", "source": "of a GPU"}
OUT = {"name": "scale_out", "GBps": 400.0, "kind": "datasheet", "source": "of a node"}
TWO, ONE = [0] * 8 + [1] * 8, [0] * 16


def measured(case: Any, us: float, domains: list[int], component: str | None = None) -> dict[str, Any]:
    """A result of two nodes of eight; `us` is the median of every component, or of one, the others slow."""
    slow: dict[str, float] = dict.fromkeys(("dispatch", "combine", "roundtrip"), 1e9)
    times = us if component is None else {**slow, component: us}
    document = result(replace(case, regimes=("fresh",)), us=times, limits=[UP, OUT])
    return {**document, "placement": {"domains": domains, "source": "sku"}}


def exchange(us: float, domains: list[int], component: str) -> dict[str, Any]:
    """16 ranks, 4096 tokens a rank that go to every rank, hidden 7168: a row has 14336 bytes.

    Within a domain of 8 a rank sends 7 rows a token: 7 * 4096 * 14336 B = 411.04 MB; over 900 GB/s 456.7 us.
    Each token crosses to the other domain once: 8 ranks * 4096 * 14336 B = 469.76 MB a node; over 400 GB/s
    1174.4 us. In a domain of 16 it is 15 rows a token: 880.80 MB, 978.7 us.
    """
    document = measured(moe_case(4096, ranks=16, nodes=2), us, domains, component)
    rows = {"self": 4096, "scale_up": 4096 * (7 if domains == TWO else 15)}
    rows["scale_out"] = 4096 * 16 - rows["self"] - rows["scale_up"]
    across = 4096 if domains == TWO else 0
    for rank in document["bytes"]["ranks"]:
        rank |= {"rows_sent": rows, "rows_received": rows, "node_rows_sent": {"own": 4096, "other": across}}
    return document


@pytest.mark.parametrize(
    ("domains", "fastest", "said"),
    [
        (TWO, 1174.4, "out of a node whose network has 400 GB/s (of a node)"),
        (ONE, 978.7, "over a link of 900 GB/s (of a GPU)"),
    ],
)
@pytest.mark.parametrize("component", ["dispatch", "combine"])
def test_each_tier_of_an_exchange_stands_against_its_own_limit(
    domains: list[int], fastest: float, said: str, component: str
) -> None:
    """Two domains are bound by the network, one by NVLink; 2 % are allowed."""
    assert limits.beats_limit(exchange(fastest / 1.01, domains, component), True) is None
    sentence = limits.beats_limit(exchange(fastest / 1.03, domains, component), True)
    assert sentence is not None
    assert sentence.startswith(f"fresh {component} would carry ")
    assert sentence.endswith(said)


def test_rows_that_cross_do_not_count_against_the_links_within() -> None:
    """In 470 us all remote rows (15 a token) are 1874 GB/s, those that stay within (7 a token) 875: a network
    that nobody stated is no reason to call that impossible; 440 us are one."""
    document = exchange(470.0, TWO, "dispatch")
    document["limits"] = [UP]
    assert limits.beats_limit(document, True) is None
    document = exchange(440.0, TWO, "dispatch")
    document["limits"] = [UP]
    assert "would carry 934 GB/s over a link of 900" in (limits.beats_limit(document, True) or "")


@pytest.mark.parametrize(
    ("op", "factor"),
    [
        ("all_reduce", 2.0),  # two domains: what each must send is S, S of it twice over both
        ("all_gather", 1.0),
        ("reduce_scatter", 1.0),
        ("broadcast", 1.0),
        ("reduce", 1.0),
        ("all_to_all", 8.0),  # each of 16 ranks half of its S
        ("sendrecv", 2.0),  # the ring leaves each node once
        ("gather", 0.5),  # the shares of the eight ranks without the root
        ("scatter", 0.5),
        (
            "all_to_all_v",
            128 * 8 / 120,
        ),  # 128 pairs at distances 1 to 15, as many at 8 - d as at 8 + d, of 120
    ],
)
def test_what_of_a_collective_must_cross_between_two_nodes(op: str, factor: float) -> None:
    """In S over all ranks. S = 1 GiB over two networks of 400 GB/s: factor * 1073.7 MB / 800 GB/s."""
    assert limits.crossings(op, TWO) == pytest.approx(factor)
    assert limits.crossings(op, ONE) == 0
    fastest = factor * (1 << 30) / 800e3
    case = collective_case(op, 1 << 30, ranks=16, nodes=2)
    assert limits.beats_limit(measured(case, fastest / 1.01, TWO), False) is None
    sentence = limits.beats_limit(measured(case, fastest / 1.03, TWO), False)
    assert sentence is not None
    assert "would carry 412 GB/s out of a node whose network has 400 GB/s" in sentence


def test_domains_of_unequal_size_share_an_all_to_all_by_their_size() -> None:
    """Three ranks and one: 3 of them send a quarter of S out, the fourth three quarters: 3/4 + 3/4."""
    assert limits.crossings("all_to_all", [0, 0, 0, 1]) == pytest.approx(1.5)
    assert limits.crossings("all_reduce", [0, 0, 0, 1]) == pytest.approx(2.0)
    assert limits.crossings("gather", [0, 0, 0, 1]) == pytest.approx(0.25)
    assert limits.crossings("scatter", [1, 0, 0, 0]) == pytest.approx(0.75)
    # 0, 1 and 2 send 3, 2 and 1 sixths to rank 3, which sends everything out
    assert limits.crossings("all_to_all_v", [0, 0, 0, 1]) == pytest.approx(2.0)
    assert limits.crossings("sendrecv", [0, 1, 0, 1]) == 4
    assert limits.crossings("hypercube", [0, 0, 0, 1]) == limits.crossings("all_gather", [0, 0, 0, 1]) == 1


def test_a_collective_within_one_domain_stands_against_the_links_only() -> None:
    """16 ranks of one NVLink domain over two trays: busbw 15/8 of 1 GiB in 2236.96 us are 900 GB/s, more than
    any network would let through."""
    case = collective_case("all_reduce", 1 << 30, ranks=16, nodes=2)
    fastest = 15 / 8 * (1 << 30) / 900e3
    assert limits.beats_limit(measured(case, fastest / 1.01, ONE), False) is None
    sentence = limits.beats_limit(measured(case, fastest / 1.03, ONE), False)
    assert "would carry 927 GB/s over a link of 900 GB/s (of a GPU)" in (sentence or "")


def test_over_several_domains_a_collective_is_not_held_to_the_links_within() -> None:
    """All-gather in domains of 8 with a fast network: busbw 15/16 S may exceed what one link carries, for
    half of S comes over the other domain's GPUs' NICs."""
    case = collective_case("all_gather", 1 << 30, ranks=16, nodes=2)
    document = {**measured(case, 1000.0, TWO), "limits": [UP]}
    assert limits.beats_limit(document, False) is None


def test_in_network_reduction_is_a_stated_reason() -> None:
    """A switch that adds and copies explains all of it for reductions, nothing for an exchange."""
    case = collective_case("all_reduce", 1 << 30, ranks=16, nodes=2)
    assert limits.beats_limit(measured(case, 1.0, ONE), True) is None
    assert limits.beats_limit(measured(case, 1.0, ONE), False) is not None
    assert limits.beats_limit(exchange(1.0, ONE, "dispatch"), True) is not None


def test_a_time_of_zero_and_an_unknown_limit_say_nothing() -> None:
    """A clock that did not move is another fault; a pool without numbers has no ceiling."""
    case = collective_case("sendrecv", 1 << 30, ranks=16, nodes=2)
    assert limits.beats_limit(measured(case, 0.0, TWO), False) is None
    assert limits.beats_limit({**measured(case, 1.0, TWO), "limits": None}, False) is None
