"""Routing: the same picks everywhere, distinct, distributed as asked, and quick to make."""

import hashlib
import math
import struct
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectivex.runtime import routing
from collectivex.runtime.errors import UserError
from collectivex.runtime.types import Moe, Routing

MASK = 2**64 - 1
SMALL = Moe("small", 64, topk=4, experts=16, tokens=7)


# An independent reference with Python's own integers.


def mix(state: int, counter: int) -> int:
    """splitmix64: output number `counter` (from 0) of the generator with this state."""
    z = (state + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def draw(seed: int, stream: int, token: int, slot: int, attempt: int) -> int:
    return mix(mix(mix(seed & MASK, stream), token), (slot << 32) + attempt) & (2**63 - 1)


def popularity(shape: Moe) -> list[int]:
    if shape.routing.kind == "uniform":
        return [1] * shape.experts
    key = mix(shape.routing.seed & MASK, 2)
    order = sorted(range(shape.experts), key=lambda e: (signed(mix(key, e)), e))
    weights = [0] * shape.experts
    for position, expert in enumerate(order, start=1):
        weights[expert] = max(1, math.floor(2**32 / position**shape.routing.skew))
    return weights


def pick(left: list[int], value: int) -> int:
    value %= sum(left)
    for expert, weight in enumerate(left):
        value -= weight
        if value < 0:
            return expert
    raise AssertionError


def reference_row(shape: Moe, token: int) -> tuple[list[int], list[float]]:
    seed, weights = shape.routing.seed, popularity(shape)
    chosen: list[int] = []
    for slot in range(shape.topk):
        for attempt in range(16):
            expert = pick(weights, draw(seed, 1, token, slot, attempt))
            if expert not in chosen:
                break
        else:
            left = [0 if e in chosen else w for e, w in enumerate(weights)]
            expert = pick(left, draw(seed, 1, token, slot, 16))
        chosen.append(expert)
    gates = [(draw(seed, 3, token, slot, 0) % 15 + 1) / 16 for slot in range(shape.topk)]
    return chosen, gates


def test_the_mixer_is_splitmix64() -> None:
    """The first outputs for state 1234567 are those that Rosetta Code lists for splitmix64."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]

    found = routing._hash(torch.tensor(1234567), torch.arange(5)).tolist()

    assert [signed(v) for v in expected] == found
    assert expected == [mix(1234567, i) for i in range(5)]


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        replace(SMALL, topk=16),
        replace(SMALL, routing=Routing(seed=-5, spread="linear")),
        replace(SMALL, routing=Routing(seed=2**63 + 11)),
        replace(SMALL, routing=Routing("zipf", 1.0, seed=3)),
        replace(SMALL, topk=16, routing=Routing("zipf", 2.0, seed=4, spread="one-empty")),
        replace(SMALL, topk=12, routing=Routing("zipf", 5.0, seed=9)),
    ],
    ids=lambda s: f"{s.routing.label}-k{s.topk}-seed{s.routing.seed}",
)
def test_every_pick_and_weight_equals_the_pure_python_reference(shape: Moe) -> None:
    """Tensor arithmetic and Python integers agree element by element, where few experts are left too."""
    table = routing.build(shape, ranks=4)

    for rank, (experts, weights) in enumerate(zip(table.experts, table.weights, strict=True)):
        rows = [reference_row(shape, rank * shape.tokens + t) for t in range(table.tokens[rank])]
        assert [row[0] for row in rows] == experts.tolist()
        assert [row[1] for row in rows] == weights.tolist()


@pytest.mark.parametrize(
    ("kind", "skew", "start"),
    [("uniform", 0.0, "0ae6080cdd3834cc"), ("zipf", 1.2, "62d8267bf232da98")],
)
def test_the_hash_of_a_large_table_is_the_recorded_one(kind: str, skew: float, start: str) -> None:
    """A change of any pick changes the contract; and the table takes well under a second of one core."""
    shape = Moe("deepseek-v3", 7168, 8, 256, 8192, routing=Routing(kind, skew))

    began = time.process_time()
    table = routing.build(shape, ranks=4)
    spent = time.process_time() - began

    assert start == table.hash[:16]
    assert spent < 1.0


def test_the_hash_covers_the_documented_bytes() -> None:
    """sha256 over little-endian int64 tokens, then each rank's int64 experts and float32 weights."""
    table = routing.build(replace(SMALL, routing=Routing(spread="linear")), ranks=2)

    sha = hashlib.sha256(struct.pack("<2q", *table.tokens))
    for experts, weights in zip(table.experts, table.weights, strict=True):
        sha.update(struct.pack(f"<{experts.numel()}q", *experts.flatten().tolist()))
        sha.update(struct.pack(f"<{weights.numel()}f", *weights.flatten().tolist()))

    assert sha.hexdigest() == table.hash


def test_the_hash_tells_seed_kind_spread_and_size_apart() -> None:
    """Two different routings never share a hash; the same one always does."""
    shapes = [
        SMALL,
        replace(SMALL, tokens=8),
        replace(SMALL, routing=Routing(seed=2)),
        replace(SMALL, routing=Routing("zipf", 1.0)),
        replace(SMALL, routing=Routing(spread="one-empty")),
    ]

    hashes = [routing.build(shape, 4).hash for shape in shapes]

    assert len(shapes) == len(set(hashes))
    assert hashes == [routing.build(shape, 4).hash for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 4, 8]),
    local=st.integers(1, 6),
    tokens=st.integers(0, 20),
    seed=st.integers(-(2**64), 2**64),
    kind=st.sampled_from([("uniform", 0.0), ("zipf", 0.0), ("zipf", 1.2), ("zipf", 30.0)]),
    spread=st.sampled_from(Routing.SPREADS),
    data=st.data(),
)
def test_a_token_always_picks_distinct_experts_that_exist(
    ranks: int, local: int, tokens: int, seed: int, kind: tuple[str, float], spread: str, data: st.DataObject
) -> None:
    """Shapes, types and ranges hold for every routing, up to topk = experts and an extreme skew."""
    experts = ranks * local
    topk = data.draw(st.integers(1, experts))
    shape = Moe("w", 64, topk, experts, tokens, routing=Routing(*kind, seed=seed, spread=spread))

    table = routing.build(shape, ranks)

    assert ranks == len(table.tokens) == len(table.experts) == len(table.weights)
    for n, picks, gates in zip(table.tokens, table.experts, table.weights, strict=True):
        assert (n, topk) == tuple(picks.shape) == tuple(gates.shape)
        assert (torch.int64, torch.float32) == (picks.dtype, gates.dtype)
        assert all(len(set(row)) == topk and min(row) >= 0 and max(row) < experts for row in picks.tolist())
        assert set((gates * 16).flatten().tolist()) <= set(range(1, 16))


def test_a_token_keeps_its_picks_when_the_spread_changes() -> None:
    """The hash takes the global token id, so an uneven run is a subset of the even one."""
    even = routing.build(SMALL, 4)
    linear = routing.build(replace(SMALL, routing=Routing(spread="linear")), 4)

    for rank, n in enumerate(linear.tokens):
        assert torch.equal(even.experts[rank][:n], linear.experts[rank])
        assert torch.equal(even.weights[rank][:n], linear.weights[rank])


@pytest.mark.parametrize(
    ("spread", "expected"),
    [("even", (10, 10, 10, 10)), ("linear", (3, 5, 8, 10)), ("one-empty", (10, 10, 10, 0))],
)
def test_spreads_give_the_documented_tokens_per_rank(spread: str, expected: tuple[int, ...]) -> None:
    """By hand for T = 10 on 4 ranks; linear is ceil(2.5), ceil(5), ceil(7.5), ceil(10)."""
    assert expected == routing.tokens_per_rank(10, 4, spread)


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, 1.0), (2, 1.993), (4, 3.614), (8, 5.295), (16, 6.523), (32, 7.267)]
)
def test_the_closed_form_of_distinct_ranks_gives_the_known_values(ranks: int, expected: float) -> None:
    """E = 256, K = 8: R (1 - C(E-L, K) / C(E, K)), values of the EP libraries' byte accounting."""
    assert expected == pytest.approx(routing.expected_distinct_ranks(256, 8, ranks), abs=5e-4)


def test_uniform_routing_reaches_the_expected_number_of_distinct_ranks() -> None:
    """The mean over 32768 tokens lies within four standard errors of the closed form, for every R."""
    table = routing.build(Moe("w", 64, 8, 256, 32768), ranks=1)

    for ranks in (2, 4, 8, 16, 32):
        owner = table.experts[0] // (256 // ranks)
        distinct = torch.zeros(32768, ranks).scatter_(1, owner, 1).sum(dim=1)
        error = distinct.std().item() / math.sqrt(32768)
        assert abs(distinct.mean().item() - routing.expected_distinct_ranks(256, 8, ranks)) < 4 * error


def test_uniform_routing_loads_every_expert_and_weight_alike() -> None:
    """Pearson's chi-square of 256 experts and of 15 weights stays below its 0.9999 quantile (347.6; 42.5)."""
    table = routing.build(Moe("w", 64, 8, 256, 32768), ranks=1)

    # The slots after the first are drawn without replacement, which only lowers the statistic.
    for values, cells, bound in (
        (table.experts[0], 256, 347.6),
        ((table.weights[0] * 16).long() - 1, 15, 42.5),
    ):
        load = values.flatten().bincount(minlength=cells).double()
        expected = load.sum() / cells
        assert ((load - expected) ** 2 / expected).sum() < bound


def test_zipf_popularity_follows_its_weights() -> None:
    """The first pick of 65536 tokens: chi-square of 256 experts below its 0.9999 quantile (347.6)."""
    shape = Moe("w", 64, 1, 256, 65536, routing=Routing("zipf", 1.2))
    weights = routing.expert_weights(256, shape.routing).double()

    load = routing.build(shape, 1).experts[0].flatten().bincount(minlength=256).double()

    expected = weights / weights.sum() * 65536
    assert expected.min() > 5  # the statistic needs filled cells
    assert ((load - expected) ** 2 / expected).sum() < 347.6


def test_draws_without_replacement_have_the_exact_probabilities() -> None:
    """Weights 4:2:1 by hand: P(first a, then b) = 4/7 * 2/3, and so on for all six orders."""
    popular = torch.tensor([4, 2, 1])
    n = 30000

    pairs = Counter(map(tuple, routing._pick(torch.arange(n), 2, popular, seed=1).tolist()))

    weights = (4, 2, 1)
    for a in range(3):
        for b in {0, 1, 2} - {a}:
            p = weights[a] / 7 * weights[b] / (7 - weights[a])
            assert abs(pairs[(a, b)] - n * p) < 4 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize(
    ("position", "skew", "expected"),
    [
        (1, 1.2, 2**32),
        (3, 1, 1431655765),  # floor(2^32 / 3)
        (4, 2.0, 2**28),
        (4, 0.5, 2**31),  # an exact quotient must not fall one short
        (9, 0.5, 1431655765),
        (7, 0.0, 2**32),
        (256, 40.0, 1),  # never zero: every expert can be picked
    ],
)
def test_zipf_weights_are_the_floor_of_the_exact_quotient(position: int, skew: float, expected: int) -> None:
    """By hand from floor(2^32 / position^skew), at least 1."""
    assert expected == routing._zipf_weight(position, skew)


def test_hot_experts_are_spread_over_the_ranks_by_the_seed() -> None:
    """For ten seeds the eight hottest of 256 experts never share one of 8 ranks, and the order differs."""
    orders = []
    for seed in range(10):
        weights = routing.expert_weights(256, Routing("zipf", 1.0, seed=seed))
        hottest = weights.argsort(descending=True)[:8]
        assert len(set((hottest // 32).tolist())) > 1
        orders.append(tuple(hottest.tolist()))

    assert len(orders) == len(set(orders))


@pytest.mark.parametrize(
    ("change", "ranks", "says"),
    [
        ({"topk": 17}, 4, "topk 17 is more than the 16 experts"),
        ({}, 3, "16 experts cannot be divided over 3 ranks"),
        ({"topk": 0}, 4, "0 of 16 experts"),
        ({"tokens": -1}, 4, "-1 tokens"),
        ({}, 0, "on 0 ranks"),
        ({"routing": Routing("zpif", 1.0)}, 4, "no routing named 'zpif'; have: uniform, zipf"),
        ({"routing": Routing(spread="odd")}, 4, "no spread of tokens named 'odd'"),
        ({"routing": Routing("zipf", -1.0)}, 4, "skew of -1.0"),
        ({"routing": Routing("zipf", math.nan)}, 4, "skew of nan"),
    ],
)
def test_an_impossible_shape_is_a_user_error(change: dict, ranks: int, says: str) -> None:
    """What cannot be routed is refused in one sentence that names the numbers."""
    with pytest.raises(UserError) as error:
        routing.build(replace(SMALL, **change), ranks)

    assert says in error.value.message
