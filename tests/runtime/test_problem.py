"""Inputs: exact, told apart by their own content, the same on every device."""

import hashlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime import fp8, problem, routing
from collectivex.runtime.device import CpuDevice
from collectivex.runtime.errors import UserError
from collectivex.runtime.problem import MoeProblem, decode, pattern
from collectivex.runtime.ranks import run_threads
from collectivex.runtime.types import Moe, Routing

SHAPE = Moe("small", 256, 4, 16, 12)


def make(shape: Moe = SHAPE, rank: int = 1, ranks: int = 4) -> MoeProblem:
    return MoeProblem(shape, rank, ranks, ranks, routing.build(shape, ranks), torch.device("cpu"))


@given(
    st.lists(st.integers(0, 2**20 - 1), max_size=20),
    st.integers(32, 300),
    st.integers(0, 1000),
    st.sampled_from([112, 120]),
)
def test_rows_hold_small_integers_without_zero(ids, hidden, input_set, amplitude):
    """Integers in [-A, A], none 0, +-A in every block of 128 columns, the coded columns at least 16."""
    rows = pattern(torch.tensor(ids, dtype=torch.int64), hidden, input_set, amplitude)

    assert rows.shape == (len(ids), hidden)
    assert ((rows.abs() >= 1) & (rows.abs() <= amplitude)).all()
    assert (rows[:, :32].abs() >= 16).all()
    assert (rows[:, 127::128].abs() == amplitude).all()
    assert torch.equal(rows.to(torch.bfloat16).to(torch.int32), rows)


@given(st.lists(st.integers(0, 2**20 - 1), min_size=1, max_size=20), st.integers(0, 1000))
def test_a_row_tells_its_token_in_every_dtype(ids, input_set):
    """The signs survive bf16 and both fp8 formats."""
    tokens = torch.tensor(ids)
    for format in fp8.FORMATS.values():
        rows = pattern(tokens, 128, input_set, format.amplitude)
        for received in (rows.to(torch.bfloat16), fp8.reference_quantise(rows, format)[0]):
            found, known = decode(received, input_set)
            assert known.all()
            assert torch.equal(tokens, found)


def test_rows_of_another_input_set_are_not_known():
    """A stale row shows by its checksum, all but about one in 4095 of them."""
    rows = pattern(torch.arange(20000), 32, 7, 112)

    _, known = decode(rows, 8)

    assert known.sum() < 20


@pytest.mark.parametrize("value", [0.0, float("nan"), 1.0, -0.0])
def test_a_row_of_one_value_is_nobodys(value):
    """Zeroed, poisoned and constant rows are not taken for a token."""
    for input_set in range(50):
        assert not decode(torch.full((1, 32), value), input_set)[1].any()


def test_different_tokens_and_sets_have_different_rows():
    """No two rows agree, and columns 32 up differ too: a swapped payload behind the code is caught."""
    rows = torch.cat([pattern(torch.arange(3000), 160, s, 112)[:, 32:] for s in (0, 1, 2)])

    assert len(torch.unique(rows, dim=0)) == 9000


def test_the_values_spread_over_their_range():
    """Every value of [-112, 112] but 0 occurs, about equally often."""
    rows = pattern(torch.arange(4000), 127, 0, 112)[:, 32:]
    counts = torch.bincount(rows.flatten() + 112, minlength=225)

    assert counts[112] == 0
    expected = rows.numel() / 224
    assert (counts[counts > 0] - expected).abs().max() < 0.2 * expected
    assert (counts > 0).sum() == 224


def test_the_pattern_is_frozen():
    """A change of the inputs is a change of the contract: this hash of ours moves with it."""
    rows = pattern(torch.tensor([0, 1, 12345, 2**20 - 1]), 384, 3, 112).to(torch.int8)

    digest = hashlib.sha256(bytes(rows.flatten().view(torch.uint8).tolist())).hexdigest()

    assert digest.startswith("7840999e0bb133d8")


def test_chunking_changes_nothing(monkeypatch):
    """Filling row by row gives what filling at once gives."""
    whole = make().x.clone()
    monkeypatch.setattr(problem, "CHUNK", 300)

    assert torch.equal(whole, make().x)
    assert len(list(problem.chunks(12, 256))) == 12


def test_each_rank_holds_its_part_of_the_table():
    """topk_idx, weights and x are those of the rank's own tokens, for uneven and empty ranks as well."""
    for spread in Routing.SPREADS:
        shape = replace(SHAPE, routing=Routing(spread=spread))
        table = routing.build(shape, 4)
        for rank in range(4):
            p = MoeProblem(shape, rank, 4, 4, table, torch.device("cpu"))
            assert torch.equal(table.experts[rank], p.topk_idx)
            assert torch.equal(table.weights[rank], p.topk_weights)
            assert p.topk_idx32.dtype == torch.int32
            ids = rank * 12 + torch.arange(table.tokens[rank])
            assert torch.equal(pattern(ids, 256, 0, 112).to(torch.bfloat16), p.x)
            assert (p.capacity, p.local_experts, p.first_local_expert) == (12, 4, 4 * rank)


def test_fill_rewrites_in_place():
    """A library that has registered x keeps its address; a saved copy brings a set back."""
    p = make()
    address, saved = p.x.data_ptr(), p.x.clone()
    p.fill(5)
    assert p.input_set == 5
    assert (p.x != saved).any(1).all()

    p.fill(0, saved)

    assert p.input_set == 0
    assert torch.equal(saved, p.x)
    assert p.x.data_ptr() == address


@pytest.mark.parametrize("layout", ["token-rank", "token-expert"])
@pytest.mark.parametrize("spread", Routing.SPREADS)
def test_arrivals_are_what_the_table_sends(layout: str, spread: str):
    """Against a plain walk over every token and pick."""
    shape = replace(SHAPE, routing=Routing(spread=spread))
    table = routing.build(shape, 4)
    for rank in range(4):
        p = MoeProblem(shape, rank, 4, 4, table, torch.device("cpu"))
        walked = []
        for source in range(4):
            for token in range(table.tokens[source]):
                picks = {
                    int(e) - 4 * rank: float(w)
                    for e, w in zip(table.experts[source][token], table.weights[source][token], strict=True)
                    if int(e) // 4 == rank
                }
                if picks and layout == "token-rank":
                    walked.append((source * 12 + token, picks))
                elif picks:
                    walked += [(source * 12 + token, {e: w}) for e, w in picks.items()]
        found = p.arrivals(layout)
        rows = [
            (g, {e: w for e, w in zip(experts, weights, strict=True) if e >= 0})
            for g, experts, weights in zip(
                found.ids.tolist(), found.experts.tolist(), found.weights.tolist(), strict=True
            )
        ]
        assert walked == rows
        assert found.experts.shape[1] == (4 if layout == "token-rank" else 1)
        assert torch.equal(p.weights_of(found.ids, found.experts), found.weights)


def test_tokens_that_no_rank_has_are_not_known():
    """A row that decodes to a token beyond its rank's last is nobody's."""
    shape = replace(SHAPE, routing=Routing(spread="one-empty"))
    p = make(shape)
    ids = torch.tensor([0, 35, 36, 47, 48, 2**20 - 1])

    found, known = p.decode(p.pattern(ids, 2), 2)

    assert known.tolist() == [True, True, False, False, False, False]
    assert found.tolist() == [0, 35, 0, 0, 0, 0]


def test_build_takes_place_and_barrier_from_the_ranks():
    """The worker's way to make one."""

    def one(ranks):
        p = MoeProblem.build(SHAPE, ranks, routing.build(SHAPE, 2), CpuDevice())
        p.barrier()
        return p.rank, p.size, p.ranks_per_node

    assert run_threads(2, one) == [(0, 2, 2), (1, 2, 2)]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden": 31}, "hidden 31"),
        ({"hidden": 200, "dtype": "fp8"}, "no multiple of 128"),
        ({"tokens": 2**19}, "tokens on 4 ranks"),
        ({"hidden": 2**18}, "hidden 262144"),  # the repeated check adds up rows in float32
    ],
)
def test_a_shape_that_cannot_be_coded_is_the_users_error(change: dict, what: str):
    """Before anything is allocated."""
    with pytest.raises(UserError, match=what):
        problem.check(replace(SHAPE, **change), 4)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_rows():
    """Bit for bit, for many tokens and sets."""
    ids = torch.randint(0, 2**20, (2000,))
    for input_set in (0, 1, 77):
        here = pattern(ids, 7168, input_set, 112)
        there = pattern(ids.cuda(), 7168, input_set, 112)
        assert torch.equal(here, there.cpu())
        found, known = decode(there, input_set)
        assert known.all()
        assert torch.equal(ids, found.cpu())
