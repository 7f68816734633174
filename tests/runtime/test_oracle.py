"""The oracle against plain walks in exact rationals, and its own ways to fail."""

import struct
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from faking import moe_case, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from collectivex.backends.base import Received, Variant
from collectivex.backends.fake import FACTS
from collectivex.runtime import collective_oracle, experts, fp8, oracle, problem, routing
from collectivex.runtime.device import CpuDevice
from collectivex.runtime.problem import MoeProblem
from collectivex.runtime.types import COLLECTIVE_OPS, DTYPE_BYTES, Moe, Routing

SHAPE = Moe("small", 128, 4, 16, 5)
VARIANTS = {v.name: v for v in FACTS.variants if v.mode == "normal"}
CPU = torch.device("cpu")


def make(shape: Moe = SHAPE, rank: int = 0, ranks: int = 2) -> MoeProblem:
    return MoeProblem(shape, rank, ranks, ranks, routing.build(shape, ranks), CPU)


def received(p: MoeProblem, variant: Variant, input_set: int = 0) -> Received:
    """What an honest library delivers."""
    p.fill(input_set)
    wanted = p.arrivals(variant.layout)
    sent, scales = p.pattern(wanted.ids, input_set), None
    rows = sent.to(torch.bfloat16)
    if p.shape.dtype == "fp8":
        rows, scales = fp8.reference_quantise(sent)
    counts = torch.bincount(wanted.experts[wanted.experts >= 0], minlength=p.local_experts).tolist()
    return Received(rows, wanted.experts, scales, wanted.weights, counts, wanted.ids)


# A reference in exact rationals, one element at a time.


def bf16(x: Fraction) -> Fraction:
    """Round to nearest even bfloat16. Exact: numerators here fit float32, whose bits are then cut by hand."""
    bits = struct.unpack("<I", struct.pack("<f", float(x)))[0]
    assert Fraction(struct.unpack("<f", struct.pack("<I", bits))[0]) == x, "not exact in float32"
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return Fraction(struct.unpack("<f", struct.pack("<I", bits))[0])


def expert(e: int, x: Fraction, u: Fraction, total: int) -> Fraction:
    a = (e % 4 + 1) * (-1 if e // 4 % 2 else 1)
    return a * x + (e // 8 - total // 16) * u


def walked(p: MoeProblem, variant: Variant, input_set: int) -> list[list[float]]:
    """The combined rows of this rank's tokens, by the definitions in `backends.base.Variant`."""
    rows = p.payload(p.own_ids(), input_set).tolist()
    columns = experts.column(p.shape.hidden, CPU).tolist()
    table, out = p.table, []
    for token, row in enumerate(rows):
        picks = table.experts[p.rank][token].tolist()
        weights = [Fraction(w) for w in table.weights[p.rank][token].tolist()]
        by_rank: dict[int, list[tuple[int, Fraction]]] = {}
        for e, w in zip(picks, weights, strict=True):
            by_rank.setdefault(e // p.local_experts, []).append((e, w))
        line = []
        for x, u in zip(map(Fraction, row), map(Fraction, columns), strict=True):
            partials = []
            for mine in by_rank.values():
                f = [(w, expert(e, x, u, p.shape.experts)) for e, w in mine]
                if variant.combine == "rank-sum":
                    partials.append(bf16(sum((w * y for w, y in f), Fraction(0))))
                elif variant.combine == "expert-sum":
                    partials.append(sum((bf16(w * y) for w, y in f), Fraction(0)))
                else:
                    partials.append(sum((w * bf16(y) for w, y in f), Fraction(0)))
            if variant.casts == "rank-partials":
                partials = [bf16(v) for v in partials]
            line.append(float(bf16(sum(partials, Fraction(0)))))
        out.append(line)
    return out


@pytest.mark.parametrize("name", sorted(n for n in VARIANTS if n))
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_the_expected_rows_are_the_definitions(name: str, dtype: str):
    """Every model and cast, element by element, against exact arithmetic; the casts make a difference."""
    p, variant = make(replace(SHAPE, dtype=dtype), rank=1), VARIANTS[name]

    expected = oracle.expected_combined(p, variant, 3)

    assert walked(p, variant, 3) == expected.tolist()
    other = replace(variant, casts="final" if variant.casts == "rank-partials" else "rank-partials")
    if variant.combine != "rank-sum":
        assert not torch.equal(expected, oracle.expected_combined(p, other, 3))


@pytest.mark.parametrize("name", sorted(n for n in VARIANTS if n))
def test_expert_step_and_reduction_give_the_expected_rows(name: str):
    """All ranks' expert steps, added up in a shuffled order, are the formulas' result."""
    variant, ranks = VARIANTS[name], 4
    total = torch.zeros(ranks * 5, 128)
    for rank in range(ranks):
        p = make(rank=rank, ranks=ranks)
        got = received(p, variant, 1)
        order = torch.randperm(len(got.rows))
        weights = p.arrivals(variant.layout).weights
        factor = weights[:, :1] if variant.combine == "weighted-sum" else 1
        staged = (oracle.expert_step(got, p, variant).float() * factor)[order]
        assert got.sources is not None
        partial = torch.zeros_like(total).index_add_(0, got.sources[order], staged)
        total += partial.bfloat16().float() if variant.casts == "rank-partials" else partial
    for rank in range(ranks):
        p = make(rank=rank, ranks=ranks)
        assert torch.equal(total[p.own].bfloat16(), oracle.expected_combined(p, variant, 1))


def test_no_two_experts_are_alike():
    """(a, b) is unique up to 4096 experts, and u has no zero: another expert gives another row."""
    for total in (8, 16, 256, 384, 4096):
        a, b = experts.coefficients(torch.arange(total), total)
        assert len({*zip(a.tolist(), b.tolist(), strict=True)}) == total
    u = experts.column(7168, CPU)
    assert u.abs().min() == 1
    assert u.abs().max() == 7


@pytest.mark.parametrize(
    ("total", "topk"), [(16, 4), (64, 6), (256, 8), (384, 8), (512, 10), (1024, 32), (4096, 64)]
)
def test_every_float32_sum_is_exact(total: int, topk: int):
    """The documented bound stays below 2**24 sixteenths; and it bounds what experts really return."""
    shape = Moe("w", 256, topk, total, 1)
    for amplitude in (112, 120):
        bound = experts.largest_sum(shape, amplitude)
        assert bound < 2**24
        a, b = experts.coefficients(torch.arange(total), total)
        largest = float((a.abs() * amplitude + b.abs() * 7).max())
        assert 15 * topk * largest <= bound


def test_weights_are_looked_up_where_the_library_transports_none():
    """By the token that the row itself names."""
    for name in ("rank-sum", "expert-sum"):
        p = make()
        got = received(p, VARIANTS[name], 2)
        staged = oracle.expert_step(got, p, VARIANTS[name])

        assert torch.equal(staged, oracle.expert_step(replace(got, weights=None), p, VARIANTS[name]))


def test_chunking_changes_nothing(monkeypatch):
    """Expectations, expert step and checks, a row at a time."""
    for name in ("rank-sum", "weighted-sum-partials"):
        p, variant = make(), VARIANTS[name]
        got = received(p, variant)
        whole = oracle.expected_combined(p, variant, 0), oracle.expert_step(got, p, variant)
        chain = oracle.expected_chain(p, variant)
        monkeypatch.setattr(problem, "CHUNK", 200)
        assert torch.equal(whole[0], oracle.expected_combined(p, variant, 0))
        assert torch.equal(whole[1], oracle.expert_step(got, p, variant))
        assert torch.equal(chain, oracle.expected_chain(p, variant))
        got.rows[-1, 77] += 1
        (payload, *_) = oracle.check_dispatch(got, p, variant, 0)
        assert f"row {len(got.rows) - 1} " in (payload.detail or "")
        monkeypatch.undo()


def test_a_model_without_formulas_is_refused():
    """Rather than checked against the wrong one."""
    p = make()
    variant = Variant("x", "normal", ("bf16",), {}, layout="token-rank", combine="weighted-sum")

    with pytest.raises(ValueError, match="no oracle"):
        oracle.expected_combined(p, variant, 0)


# Dispatch


def names_of_failed(checks) -> set[str]:
    return {check.name for check in checks if not check.passed}


@settings(max_examples=20, deadline=None)
@given(
    st.permutations(range(8)), st.sampled_from(["rank-sum", "expert-sum"]), st.sampled_from(["bf16", "fp8"])
)
def test_the_order_of_rows_does_not_matter(order, name, dtype):
    """Libraries deliver in any order: all checks stay green."""
    p, variant = make(replace(SHAPE, dtype=dtype)), VARIANTS[name]
    got = received(p, variant)
    index = torch.tensor([*order, *range(8, len(got.rows))])
    raw = got.rows.view(torch.uint8 if dtype == "fp8" else torch.int16)
    got = Received(
        raw[index].view(got.rows.dtype),
        got.experts[index],
        None if got.scales is None else got.scales[index],
        got.weights[index] if got.weights is not None else None,
        got.counts,
        got.sources[index] if got.sources is not None else None,
    )

    assert names_of_failed(oracle.check_dispatch(got, p, variant, 0)) == set()


def test_the_order_of_picks_within_a_row_does_not_matter():
    """A library may compact the local picks to the front, or reverse them."""
    p, variant = make(), VARIANTS["rank-sum"]
    got = received(p, variant)
    assert got.weights is not None
    flipped = replace(got, experts=got.experts.flip(1), weights=got.weights.flip(1))
    order = got.experts.argsort(dim=1, descending=True)
    compact = replace(got, experts=got.experts.gather(1, order), weights=got.weights.gather(1, order))

    for form in (flipped, compact):
        assert names_of_failed(oracle.check_dispatch(form, p, variant, 0)) == set()
        assert torch.equal(oracle.expert_step(got, p, variant), oracle.expert_step(form, p, variant))


def test_only_what_is_reported_is_checked():
    """A library that reports no weights, counts or sources has three checks fewer, not three green ones."""
    p, variant = make(), VARIANTS["rank-sum"]
    got = received(p, variant)
    bare = replace(got, weights=None, counts=None, sources=None)

    assert [c.name for c in oracle.check_dispatch(bare, p, variant, 0)] == ["payload", "sources", "experts"]
    assert len(oracle.check_dispatch(got, p, variant, 0)) == 6


@pytest.mark.parametrize(
    ("break_it", "failed"),
    [
        (lambda r: r.rows[2].mul_(-1), {"payload", "sources", "experts"}),
        (lambda r: r.rows[2, 100:].neg_(), {"payload"}),
        (lambda r: r.rows[2].zero_(), {"payload", "sources", "experts"}),
        (lambda r: r.rows[2].fill_(torch.nan), {"payload", "sources", "experts"}),
        (lambda r: r.experts[2].fill_(-1), {"experts"}),
        (lambda r: r.experts[2].fill_(8), {"experts"}),
        (lambda r: r.experts[2].fill_(-2), {"experts"}),
        (lambda r: r.weights[2].add_(1 / 16), {"weights"}),
        (lambda r: r.weights[2].fill_(torch.nan), {"weights"}),
        (lambda r: r.sources[2].add_(1), {"reported sources"}),
        (lambda r: r.counts.reverse(), {"counts"}),
        (lambda r: r.counts.pop(), {"counts"}),
    ],
)
def test_each_check_sees_its_own_fault(break_it, failed):
    """And says which row or token it was."""
    p, variant = make(), VARIANTS["expert-sum"]
    got = received(p, variant)
    assert got.counts != [*reversed(got.counts or ())]
    break_it(got)

    checks = oracle.check_dispatch(got, p, variant, 0)

    assert names_of_failed(checks) == failed
    for check in checks:
        assert check.passed or check.detail


def test_the_evidence_names_row_token_and_value():
    """A person can go and look."""
    p, variant = make(), VARIANTS["expert-sum"]
    got = received(p, variant)
    assert got.sources is not None
    got.rows[3, 99] += 1
    token, rank = int(got.sources[3]) % 5, int(got.sources[3]) // 5

    (payload, *_) = oracle.check_dispatch(got, p, variant, 0)

    wanted = int(got.rows[3, 99]) - 1
    assert payload.detail == (
        f"1 of {len(got.rows)} rows wrong; first: row 3 (token {token} of rank {rank}), "
        f"column 99 is {wanted + 1}, expected {wanted}"
    )


@pytest.mark.parametrize(
    "form",
    [
        lambda r: replace(r, rows=r.rows[:, :64]),
        lambda r: replace(r, rows=r.rows[:, :16]),
        lambda r: replace(r, rows=r.rows.float()),
        lambda r: replace(r, experts=r.experts[:-1]),
        lambda r: replace(r, scales=torch.ones(len(r.rows), 1)),
        lambda r: replace(r, weights=r.weights[:, :1]),
    ],
)
def test_a_malformed_answer_is_red_and_does_not_stop_the_ranks(form):
    """Every check fails with the reason; what is staged is NaN, so that the peers' combine completes."""
    p, variant, device = make(ranks=1), VARIANTS["rank-sum"], CpuDevice()

    class Malformed:
        realised, wire = {}, {}

        def dispatch(self):
            return None

        def received(self, state):
            return form(received(p, variant, p.input_set))

        def stage(self, state, rows):
            assert rows.shape == (5, 128)
            assert rows.isnan().all()
            return rows

        def combine(self, state, staged):
            return staged

        def outputs(self):
            return ()

        def close(self):
            return None

    checks = oracle.check_exchange(Malformed(), p, variant, 1, device)

    assert names_of_failed(checks) == {c.name for c in checks} - {"inputs unchanged"}
    assert not oracle.check_repeated(Malformed(), p, variant, 2, device).passed


class Answers:
    """An exchange that delivers honest rows, changed by `change`, and combines by formula whatever is staged;
    with `lazy` it writes its output in the first call only."""

    realised, wire = {}, {}

    def __init__(self, p: MoeProblem, variant: Variant, change=lambda r: r, lazy: bool = False):
        self.p, self.variant, self.change, self.lazy = p, variant, change, lazy
        self.out, self.calls = torch.zeros_like(p.x), 0

    def dispatch(self):
        return None

    def received(self, state):
        return self.change(received(self.p, self.variant, self.p.input_set))

    def stage(self, state, rows):
        return rows

    def combine(self, state, staged):
        self.calls += 1
        if self.calls == 1 or not self.lazy:
            self.out.copy_(oracle.expected_combined(self.p, self.variant, self.p.input_set))
        return self.out

    def outputs(self):
        return (self.out,)

    def close(self):
        return None


def low_bit(got: Received) -> Received:
    got.rows.view(torch.int16)[3, 60] ^= 1
    return got


def zero_row(got: Received) -> Received:
    got.rows[3] = 0
    return got


def without_first(got: Received) -> Received:
    assert got.weights is not None
    return Received(got.rows[1:], got.experts[1:], weights=got.weights[1:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (low_bit, "1 received rows wrong"),
        (zero_row, "1 received rows wrong, 1 tokens missing or not expected"),
        (without_first, "1 tokens missing or not expected"),
    ],
)
def test_repeated_calls_look_at_the_received_rows_too(change, said: str):
    """A wrong payload that the combined rows do not show is red."""
    p, variant = make(ranks=1), VARIANTS["rank-sum"]

    check = oracle.check_repeated(Answers(p, variant, change), p, variant, 4, CpuDevice())

    assert check.detail == f"4 of 4 calls wrong; first: call 0: {said}"
    assert oracle.check_repeated(Answers(p, variant), p, variant, 4, CpuDevice()).passed


def test_an_output_that_is_not_written_is_red_even_if_it_was_right_before():
    """The buffer held the right rows of the same input set: poison took them away."""
    p, variant = make(ranks=1), VARIANTS["rank-sum"]
    exchange = Answers(p, variant, lazy=True)

    first = oracle.check_exchange(exchange, p, variant, 1, CpuDevice())
    second = oracle.check_exchange(exchange, p, variant, 1, CpuDevice())

    assert names_of_failed(first) == set()
    assert names_of_failed(second) == {"combined"}


def test_repeated_calls_change_their_inputs():
    """Output of the call before is wrong in every call but the first."""
    case = moe_case(ranks=1, fault="stale-output@1")

    (check,) = on_ranks(case, lambda e, p, v, d: oracle.check_repeated(e, p, v, 6, d))

    assert "5 of 6 calls wrong; first: call 1" in (check.detail or "")


def test_what_stands_in_empty_slots_does_not_matter():
    """Libraries leave weights beside an expert id of -1 unwritten."""
    p, variant = make(), VARIANTS["rank-sum"]
    got = received(p, variant)
    assert got.weights is not None
    assert (got.experts < 0).any()
    dirty = replace(got, weights=got.weights.masked_fill(got.experts < 0, torch.nan))

    assert names_of_failed(oracle.check_dispatch(dirty, p, variant, 0)) == set()
    assert torch.equal(oracle.expert_step(got, p, variant), oracle.expert_step(dirty, p, variant))


def test_a_foreign_id_in_an_empty_slot_is_red():
    """Every pick that should come has come, and one more that is nobody's."""
    p, variant = make(), VARIANTS["rank-sum"]
    got = received(p, variant)
    row, slot = (got.experts < 0).nonzero()[0].tolist()
    for strange in (8, 1000, -2):
        got.experts[row, slot] = strange
        assert names_of_failed(oracle.check_dispatch(got, p, variant, 0)) == {"experts"}


def test_a_row_of_nobody_besides_the_right_ones_is_red():
    """Every row that should come has come, and one of zeros without an expert."""
    p, variant = make(), VARIANTS["rank-sum"]
    got = received(p, variant)
    more = Received(
        torch.cat([got.rows, torch.zeros_like(got.rows[:1])]),
        torch.cat([got.experts, torch.full_like(got.experts[:1], -1)]),
    )

    assert names_of_failed(oracle.check_dispatch(more, p, variant, 0)) == {"payload", "sources"}


# Combined rows, inputs, chain


def test_a_combined_row_of_the_wrong_form_is_red():
    """Shape and dtype count, for ranks without tokens too."""
    p, variant = make(), VARIANTS["rank-sum"]
    good = oracle.expected_combined(p, variant, 0)

    assert oracle.check_combined(good, p, variant, 0).passed
    assert not oracle.check_combined(good.float(), p, variant, 0).passed
    assert not oracle.check_combined(good[:-1], p, variant, 0).passed
    empty = make(replace(SHAPE, routing=Routing(spread="one-empty")), rank=1)
    assert oracle.check_combined(good[:0], empty, variant, 0).passed
    assert not oracle.check_combined(good, empty, variant, 0).passed


@given(st.integers(0, 4), st.integers(0, 127), st.integers(0, 15))
def test_any_single_bit_of_the_output_counts(row, column, bit):
    """One flipped bit in one element (but the sign of a zero) is found, and named."""
    p, variant = make(), VARIANTS["weighted-sum"]
    out = oracle.expected_combined(p, variant, 0)
    out.view(torch.int16)[row, column] ^= (1 << bit) if bit < 15 else -(1 << 15)
    if out[row, column] == 0:
        return

    check = oracle.check_combined(out, p, variant, 0)

    assert not check.passed
    assert f"first: token {row}, 1 columns, column {column} is" in (check.detail or "")


def test_changed_inputs_are_red():
    """Rows, ids and weights; and rows of another set."""
    for change in (
        lambda p: p.x[1, 2].add_(1),
        lambda p: p.topk_idx[0, 0].add_(1),
        lambda p: p.topk_weights[0, 0].mul_(2),
        lambda p: p.fill(1),
    ):
        p = make()
        assert oracle.check_inputs_unchanged(p, 0).passed
        change(p)
        check = oracle.check_inputs_unchanged(p, 0)
        assert not check.passed
        assert check.detail


@pytest.mark.parametrize("name", sorted(n for n in VARIANTS if n))
def test_the_chain_does_not_depend_on_the_order_of_rows(name: str):
    """Rows staged for one dispatch serve every later one, whose order differs; a wrong rank's would show."""

    def work(exchange, p, variant, device):
        state = exchange.dispatch()
        staged = exchange.stage(state, oracle.chain_rows(exchange.received(state), p, variant))
        orders = []
        for _ in range(3):
            state = exchange.dispatch()
            orders.append(exchange.received(state).rows[:, :32].sign().tolist())
            out = exchange.combine(state, staged)
        assert orders[0] != orders[1]
        wrong = replace(p, rank=(p.rank + 1) % p.size)
        return oracle.check_chain(out, p, variant), oracle.check_chain(out, wrong, variant)

    for right, wrong in on_ranks(moe_case(name, ranks=2), work):
        assert right.passed
        assert right.phase == "after-chain"
        assert not wrong.passed


def test_chain_rows_are_one_row_of_this_rank():
    """Constant over rows, different between ranks, exact in bf16 and never zero."""
    variant = VARIANTS["rank-sum"]
    rows = [oracle.chain_rows(received(make(rank=r), variant), make(rank=r), variant) for r in (0, 1)]

    for r in rows:
        assert len(torch.unique(r, dim=0)) == 1
        assert r.dtype == torch.bfloat16
        assert (r != 0).all()
    assert (rows[0][0] != rows[1][0]).sum() > 100


def test_poison_leaves_nothing_that_could_be_right():
    """NaN in every float there is, -2 or its like in integers, through views too."""
    floats = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz]
    floats += [torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu]
    for dtype in floats:
        tensor = torch.zeros(4, 6).to(torch.uint8 if dtype.itemsize == 1 else dtype)
        tensor = tensor.view(dtype)
        oracle.poison([tensor[:, ::2]])
        assert tensor[:, ::2].float().isnan().all()
        assert not tensor[:, 1::2].float().isnan().any()
    for dtype, value in ((torch.int64, -2), (torch.int32, -2), (torch.uint8, 254), (torch.bool, True)):
        tensor = torch.zeros(3, dtype=dtype)
        oracle.poison([tensor])
        assert (tensor == value).all()


# Collectives


def expected_by_hand(op: str, inputs: list[torch.Tensor], rank: int) -> torch.Tensor | None:
    """From the operations' definitions (NCCL user guide, "Collective Operations")."""
    ranks = len(inputs)
    total = torch.stack([i.double() for i in inputs]).sum(0).to(inputs[0].dtype)
    chunk = len(inputs[0]) // ranks
    return {
        "all_reduce": total,
        "reduce": total if rank == 0 else None,
        "broadcast": inputs[0] if rank != 0 else None,
        "all_gather": torch.cat(inputs),
        "reduce_scatter": total[rank * chunk : (rank + 1) * chunk],
        "all_to_all": torch.cat([i[rank * chunk : (rank + 1) * chunk] for i in inputs]),
        "sendrecv": inputs[(rank - 1) % ranks],
        "gather": torch.cat(inputs) if rank == 0 else None,
        "scatter": inputs[0][rank * chunk : (rank + 1) * chunk],
    }[op]


@pytest.mark.parametrize("op", [op for op in COLLECTIVE_OPS if op != "all_to_all_v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_expected_output_is_the_operations_definition(op: str, dtype: torch.dtype, monkeypatch):
    """For each rank and several sizes, in pieces as well."""
    monkeypatch.setattr(collective_oracle, "CHUNK", 7)
    for ranks in (1, 2, 4, 8):
        for numel in (ranks, 6 * ranks):
            inputs = [oracle.collective_input(op, r, ranks, numel, dtype, 5, CPU) for r in range(ranks)]
            for rank in range(ranks):
                wanted = expected_by_hand(op, inputs, rank)
                size = numel if wanted is None else len(wanted)
                found = oracle.collective_expected(op, rank, ranks, size, dtype, 5, CPU)
                assert (wanted is None) == (found is None)
                assert wanted is None or torch.equal(wanted, found)


# What four ranks send each other of 1024 bytes, in bfloat16: see test_bandwidth.py, where it is worked out.
UNEVEN = [[0, 80, 168, 256], [256, 0, 80, 168], [168, 256, 0, 80], [80, 168, 256, 0]]


def uneven(sends: list[list[int]], rank: int, input_set: int = 5) -> torch.Tensor:
    """What a rank gets if `sends` are the elements: the segments of every source for it, in their order."""
    inputs = [
        oracle.collective_input("all_to_all_v", r, 4, 504, torch.bfloat16, input_set, CPU) for r in range(4)
    ]
    return torch.cat([i.split(row)[rank] for i, row in zip(inputs, sends, strict=True)])


def test_an_uneven_exchange_gives_the_segments_of_every_source_in_order(monkeypatch):
    """By hand for four ranks, in pieces as well; two ranks swap their buffers, one keeps its own."""
    monkeypatch.setattr(collective_oracle, "CHUNK", 7)
    for rank in range(4):
        found = oracle.collective_expected("all_to_all_v", rank, 4, 504, torch.bfloat16, 5, CPU)
        assert found is not None
        assert torch.equal(uneven(UNEVEN, rank), found)
    for rank, ranks, source in ((0, 2, 1), (1, 2, 0), (0, 1, 0)):
        theirs = oracle.collective_input("all_to_all_v", source, ranks, 64, torch.float32, 5, CPU)
        found = oracle.collective_expected("all_to_all_v", rank, ranks, 64, torch.float32, 5, CPU)
        assert found is not None
        assert torch.equal(theirs, found)


WRONG_SPLITS = {
    "equal": [[126] * 4] * 4,
    "8 elements moved from one peer to the next": [[0, 88, 160, 256], *UNEVEN[1:]],
    "by distance the other way round": [
        [row[(2 * r - i) % 4] for i in range(4)] for r, row in enumerate(UNEVEN)
    ],
    "with a share for itself": [[row[i - 1] for i in range(4)] for row in UNEVEN],
}


@pytest.mark.parametrize("name", WRONG_SPLITS)
def test_a_wrong_split_of_an_uneven_exchange_is_red(name: str):
    """The right bytes in all, but other ones for some rank."""
    reds = []
    for rank in range(4):
        wrong = uneven(WRONG_SPLITS[name], rank, 0)
        call = OneRank(504, 504, lambda c, wrong=wrong: c.output[: len(wrong)].copy_(wrong[:504]))
        call.input, call.output = call.input.bfloat16(), call.output.bfloat16()
        (output, kept) = oracle.check_collective(call, "all_to_all_v", rank, 4, 0, CpuDevice())
        assert kept.passed
        reds.append(not output.passed)
    assert any(reds)

    right = OneRank(504, 504, lambda c: c.output.copy_(uneven(UNEVEN, 3, 0)))
    right.input, right.output = right.input.bfloat16(), right.output.bfloat16()
    assert oracle.check_collective(right, "all_to_all_v", 3, 4, 0, CpuDevice())[0].passed


def test_an_uneven_exchange_of_a_size_that_does_not_exist_is_red():
    """508 elements are no sum of rounded parts; 504 of the input and 508 of the output are no exchange."""
    for sent, said in ((508, "no size of which each sends 1016 bytes"), (504, "cannot give 508")):
        call = OneRank(sent, 508, lambda c: None)
        call.input, call.output = call.input.bfloat16(), call.output.bfloat16()
        output, _ = oracle.check_collective(call, "all_to_all_v", 0, 4, 0, CpuDevice())
        assert said in str(output.detail)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sums_are_exact_in_every_dtype(dtype: str):
    """Sums of any subset of ranks are integers that the dtype holds; a missing rank shows everywhere."""
    kind = getattr(torch, dtype)
    mantissa = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    for ranks in (1, 2, 4, 8, 64, 256):
        m = collective_oracle.modulus("all_reduce", ranks, kind)
        assert 1 <= m <= 251
        assert ranks * m <= 2**mantissa
        values = oracle.collective_input("all_reduce", 0, ranks, 4000, kind, 0, CPU)
        assert (values.min(), len(values.unique())) == (1, m)
    assert DTYPE_BYTES[dtype] == kind.itemsize


def test_sums_that_cannot_be_exact_are_refused():
    """More ranks than bfloat16 can count."""
    with pytest.raises(ValueError, match="not exact"):
        collective_oracle.modulus("all_reduce", 512, torch.bfloat16)
    assert collective_oracle.modulus("all_gather", 512, torch.bfloat16) == 251


@given(st.integers(0, 300), st.integers(0, 7), st.sampled_from(["all_reduce", "all_gather"]))
def test_consecutive_input_sets_differ_everywhere(input_set, rank, op):
    """So stale output never passes; and the set can be read off position 0."""
    a, b = (
        oracle.collective_input(op, rank, 8, 50, torch.bfloat16, s, CPU) for s in (input_set, input_set + 1)
    )
    m = collective_oracle.modulus(op, 8, torch.bfloat16)

    assert (a != b).all()
    assert collective_oracle.input_set_of(float(a[0]), op, rank, 8, torch.bfloat16) == input_set % m


class OneRank:
    """A call on one rank that does what it is told."""

    realised = {}

    def __init__(self, sent: int, received: int, work) -> None:
        self.input, self.output, self.work = torch.zeros(sent), torch.zeros(received), work

    def run(self) -> None:
        self.work(self)

    def close(self) -> None:
        return None


def test_sizes_that_do_not_belong_together_are_red():
    """An all_gather over 2 ranks of 3 elements gives 6, not 3."""
    call = OneRank(3, 3, lambda c: c.output.copy_(c.input))

    output, _ = oracle.check_collective(call, "all_gather", 0, 2, 0, CpuDevice())

    assert output.detail == "all_gather over 2 ranks of 3 elements cannot give 3"


def test_a_wrong_element_is_named():
    """Where, what, and how many."""

    def work(call) -> None:
        call.output.copy_(call.input)
        call.output[4:6] = -1

    call = OneRank(9, 9, work)
    wanted = int(oracle.collective_input("all_reduce", 0, 1, 9, torch.float32, 3, CPU)[4])

    output, kept = oracle.check_collective(call, "all_reduce", 0, 1, 3, CpuDevice())

    assert output.detail == f"2 of 9 elements wrong, first: element 4 is -1, expected {wanted}"
    assert kept.passed


def test_an_output_that_a_collective_does_not_write_is_red_even_if_it_was_right_before():
    """The same input set twice, written only once."""
    calls = []

    def work(call) -> None:
        calls.append(1)
        if len(calls) == 1:
            call.output.copy_(call.input)

    call = OneRank(9, 9, work)

    assert oracle.check_collective(call, "all_reduce", 0, 1, 3, CpuDevice())[0].passed
    assert not oracle.check_collective(call, "all_reduce", 0, 1, 3, CpuDevice())[0].passed


def test_two_checks_come_back_on_every_rank():
    """Where an operation promises a rank nothing the check passes: lists of all ranks are merged in step."""
    for op, rank in (("reduce", 1), ("broadcast", 0), ("gather", 1)):
        untouched = OneRank(4, 8 if op == "gather" else 4, lambda call: None)
        checks = oracle.check_collective(untouched, op, rank, 2, 1, CpuDevice(), "after")
        assert [(c.name, c.phase, c.passed) for c in checks] == [
            ("output", "after", True),
            ("inputs unchanged", "after", True),
        ]
    assert not oracle.check_collective(untouched, "gather", 0, 2, 1, CpuDevice())[0].passed
    untouched = OneRank(4, 4, lambda call: None)
    assert not oracle.check_collective(untouched, "broadcast", 1, 2, 1, CpuDevice())[0].passed


# Speed


@pytest.mark.gpu
def test_a_gpu_expects_the_same_rows():
    """The whole oracle gives the same on CPU and GPU, bit for bit."""
    shape = Moe("w", 7168, 8, 256, 64, "fp8")
    table = routing.build(shape, 4)
    for name in (n for n in VARIANTS if n):
        here = MoeProblem(shape, 1, 4, 4, table, CPU)
        there = MoeProblem(shape, 1, 4, 4, table, torch.device("cuda"))
        assert torch.equal(
            oracle.expected_combined(here, VARIANTS[name], 2),
            oracle.expected_combined(there, VARIANTS[name], 2).cpu(),
        )
