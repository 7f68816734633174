"""Bandwidth formulas: each by hand, with the source of its convention named in the formula itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime import bandwidth, counts, routing
from collectivex.runtime.bandwidth import FORMULAS, collective_counts, gbps
from collectivex.runtime.errors import UserError
from collectivex.runtime.types import COLLECTIVE_OPS, DTYPE_BYTES, Collective, Moe

SCHEMA = json.loads((Path(__file__).parents[2] / "schema" / "result.v1.json").read_text())
GIB, MIB = 2**30, 2**20
SIX = ("total_send", "nvl_send", "rdma_send", "total_recv", "nvl_recv", "rdma_recv")


def collective(op: str, size: int, ranks: int = 4, dtype: str = "float32") -> dict[str, Any]:
    shape = Collective(op, size, dtype)
    return {
        "case": {"ranks": ranks, "shape": asdict(shape)},
        "bytes": bandwidth.collective_bytes(shape, ranks),
    }


def moe(dtype: str = "bf16", wire: list[dict[str, int]] | None = None) -> dict[str, Any]:
    """Two ranks on two nodes each; hidden 256, so a bf16 row has 512 bytes and an fp8 row 256 + 2 * 4.

    8 experts, two a rank. Rank 0 sends to ranks 0 1 3 and 2; rank 1 to 1; rank 2 and rank 3 have no tokens.
    """
    shape = Moe("w", 256, topk=3, experts=8, tokens=2, dtype=dtype)
    entries = counts.count([[[0, 2, 7], [4, 5, -1]], [[2, 3, -1]], [], []], shape, [0, 0, 1, 1])
    return {"case": {"ranks": 4, "shape": asdict(shape)}, "bytes": bandwidth.moe_bytes(shape, entries, wire)}


def rows(name: str, component: str, dtype: str = "bf16") -> list[float]:
    """The numerator of each rank in rows: GB/s over 1 us are kilobytes."""
    document = moe(dtype)
    row = bandwidth.row_bytes(Moe("w", 256, 3, 8, 2, dtype), component)
    return [(gbps(name, document, component, 1.0, of=rank) or 0.0) * 1e3 / row for rank in range(4)]


# Collectives


@pytest.mark.parametrize(
    ("op", "algorithm", "bus"),
    [
        ("all_reduce", 268.435456, 402.653184),  # 2 * 3/4
        ("all_gather", 268.435456, 201.326592),  # 3/4
        ("reduce_scatter", 268.435456, 201.326592),
        ("all_to_all", 268.435456, 201.326592),
        ("gather", 268.435456, 201.326592),
        ("scatter", 268.435456, 201.326592),
        ("all_to_all_v", 268.435452, 201.326589),  # S = 2^30 - 16: sixths of 2^30 in whole 16 bytes
        ("broadcast", 268.435456, 268.435456),  # 1
        ("reduce", 268.435456, 268.435456),
        ("sendrecv", 268.435456, 268.435456),
    ],
)
def test_one_gibibyte_on_four_ranks_in_four_milliseconds(op: str, algorithm: float, bus: float) -> None:
    """2^30 / 4e-3 s = 268.4 GB/s; bus factors of nccl-tests 2.19.6 for n = 4."""
    document = collective(op, GIB)

    assert gbps("algbw", document, "call", 4000.0) == pytest.approx(algorithm)
    assert gbps("busbw", document, "call", 4000.0) == pytest.approx(bus)
    assert gbps("busbw", document, "call_floor", 4000.0, of=3) == pytest.approx(bus)


def test_every_collective_has_a_factor_and_counts() -> None:
    """No operation of the vocabulary is missing, and none is invented."""
    for op in COLLECTIVE_OPS:
        assert bandwidth.bus_factor(op, 8) > 0
        assert collective_counts(op, 1792, "float32", 8)[2] == 1792  # 28 distances of 64 bytes
    assert bandwidth.bus_factor("hypercube", 8) == 7 / 8  # its algbw in nccl-tests, and its busbw
    for function in (
        lambda: bandwidth.bus_factor("scan", 2),
        lambda: collective_counts("scan", 8, "float32", 2),
    ):
        with pytest.raises(ValueError, match="scan"):
            function()


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("all_reduce", (262144, 262144, MIB)),
        ("broadcast", (262144, 262144, MIB)),
        ("reduce", (262144, 262144, MIB)),
        ("sendrecv", (262144, 262144, MIB)),
        ("all_gather", (65536, 262144, MIB)),  # S is the gathered whole
        ("reduce_scatter", (262144, 65536, MIB)),  # S is the unreduced whole
        ("all_to_all", (262144, 262144, MIB)),  # S is a rank's buffer, own share included
        ("gather", (65536, 262144, MIB)),
        ("scatter", (262144, 65536, MIB)),
        ("all_to_all_v", (262140, 262140, MIB - 16)),  # 174752 + 349520 + 524288 bytes
    ],
)
def test_element_counts_of_one_mebibyte_on_four_ranks(op: str, expected: tuple[int, int, int]) -> None:
    """float32: 262144 elements in all, 65536 for each rank."""
    assert expected == collective_counts(op, MIB, "float32", 4)


@pytest.mark.parametrize(
    ("op", "size", "expected"),
    [
        ("all_reduce", 7, (3, 3, 6)),  # bfloat16: whole elements, rounded down
        ("all_reduce", 0, (1, 1, 2)),  # never nothing
        ("all_gather", 1000, (166, 498, 996)),  # 500 elements are 166 for each of 3 ranks
        ("all_to_all", 2, (3, 3, 6)),  # at least one element a peer: more than was asked
        ("all_to_all_v", 1000, (480, 480, 960)),  # 20 times 16 for each of 3 ranks; the parts are 320 and 640
        ("all_to_all_v", 47, (0, 0, 0)),  # no 16 bytes for each of 3 ranks: nothing, and refused
    ],
)
def test_a_size_that_does_not_divide_is_realised_as_whole_chunks(
    op: str, size: int, expected: tuple[int, int, int]
) -> None:
    """Three ranks, bfloat16; the realised S goes into the result beside the requested one."""
    assert expected == collective_counts(op, size, "bfloat16", 3)
    block = bandwidth.collective_bytes(Collective(op, size, "bfloat16"), 3)
    assert block == {"family": "collective", "size": expected[2], "requested": size}


@given(
    st.sampled_from(COLLECTIVE_OPS),
    st.integers(0, 2**40),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.integers(1, 64),
)
def test_the_realised_size_is_the_largest_that_fits(op: str, size: int, dtype: str, ranks: int) -> None:
    """S is the larger buffer; it is at most the requested size, and less by under one element a rank."""
    width = DTYPE_BYTES[dtype]
    sent, received, realised = collective_counts(op, size, dtype, ranks)

    assert max(sent, received) * width == realised
    assert realised <= max(size, ranks * width)
    lost = 16 * (2 * ranks - 1) if op == "all_to_all_v" else ranks * width
    assert realised > size - lost


def test_an_uneven_exchange_of_a_kilobyte_on_four_ranks() -> None:
    """By hand from src/alltoallv.cu of nccl-tests 2.19.6: total 1024 is 16 times 64; the distances 1, 2 and 3
    add up to 6; 1024/6 = 170.67 -> 160, 2048/6 = 341.33 -> 336, 3072/6 = 512."""
    sent, received = zip(*(bandwidth.all_to_all_v_bytes(1024, rank, 4) for rank in range(4)), strict=True)

    assert sent == ([0, 160, 336, 512], [512, 0, 160, 336], [336, 512, 0, 160], [160, 336, 512, 0])
    assert received == ([0, 512, 336, 160], [160, 0, 512, 336], [336, 160, 0, 512], [512, 336, 160, 0])
    assert bandwidth.all_to_all_v_bytes(1087, 0, 4) == (sent[0], received[0])  # 1088 would be 17 times 64
    assert bandwidth.all_to_all_v_bytes(1000, 0, 1) == ([992], [992])  # alone it keeps all


@given(st.integers(0, 2**40), st.integers(1, 64))
def test_an_uneven_exchange_balances(size: int, ranks: int) -> None:
    """What i sends to j is what j receives from i; rows and columns have one sum; parts are whole 16 bytes
    and those of the formula in doubles; the requested size can be read off the sum."""
    table = [bandwidth.all_to_all_v_bytes(size, rank, ranks) for rank in range(ranks)]
    total = size // (16 * ranks) * 16 * ranks
    distances = ranks * (ranks - 1) / 2

    for i, (sent, received) in enumerate(table):
        assert received == [table[j][0][i] for j in range(ranks)]
        assert sum(sent) == sum(received) == sum(table[0][0]) <= total
        assert all(part % 16 == 0 for part in sent)
        if ranks > 1:
            doubles = [
                int(float((j - i) % ranks) * float(total) / distances) // 16 * 16 for j in range(ranks)
            ]
            assert sent == doubles
    assert bandwidth.all_to_all_v_requested(sum(table[0][0]), ranks) == total


# MoE


@pytest.mark.parametrize(
    ("hidden", "dtype", "dispatch"),
    [(7168, "bf16", 14336), (7168, "fp8", 7392), (200, "fp8", 208)],
)
def test_row_bytes_of_dispatch_follow_the_type_and_of_combine_are_always_bf16(
    hidden: int, dtype: str, dispatch: int
) -> None:
    """DeepSeek-V3: 2 * 7168, and 7168 + 56 scales of 4 bytes; 200 values have two scales."""
    shape = Moe("w", hidden, 8, 256, 1, dtype)

    assert dispatch == bandwidth.row_bytes(shape, "dispatch")
    assert 2 * hidden == bandwidth.row_bytes(shape, "combine")


@pytest.mark.parametrize(
    ("name", "dispatch", "combine"),
    [
        # sent in dispatch: rank 0 to ranks 0 1 3 and 2, rank 1 to itself; combine sends what was received
        ("logical", [4, 1, 0, 0], [1, 2, 1, 1]),
        ("remote", [3, 0, 0, 0], [0, 1, 1, 1]),
        # rank 0 to rank 1, then back; its tokens need the other domain once each, whichever way
        ("scale_up", [1, 0, 0, 0], [0, 1, 0, 0]),
        ("scale_out", [2, 0, 0, 0], [2, 0, 0, 0]),
        ("deepep_normal", [1, 2, 1, 1], [1, 2, 1, 1]),
        ("per_selection", [5, 2, 0, 0], [5, 2, 0, 0]),
        # nodes: rank 0's first token goes to both nodes, its second to the other; rank 1's stays
        ("total_send", [3, 1, 0, 0], [1, 2, 1, 1]),
        ("nvl_send", [1, 1, 0, 0], [1, 2, 0, 0]),
        ("rdma_send", [2, 0, 0, 0], [0, 0, 1, 1]),
        ("total_recv", [1, 2, 1, 1], [3, 1, 0, 0]),
        ("nvl_recv", [1, 2, 0, 0], [1, 1, 0, 0]),
        ("rdma_recv", [0, 0, 1, 1], [2, 0, 0, 0]),
    ],
)
def test_each_formula_counts_the_rows_that_its_source_counts(
    name: str, dispatch: list[int], combine: list[int]
) -> None:
    """Rows by rank, counted by hand on two nodes of two ranks, in bf16 and fp8."""
    for dtype in ("bf16", "fp8"):
        assert rows(name, "dispatch", dtype) == pytest.approx(dispatch)
        assert rows(name, "combine", dtype) == pytest.approx(combine)


def test_flashinfer_quotes_remote_rows_of_all_ranks_with_eight_bytes_for_each_remote_pick() -> None:
    """Only rank 0 sends: 3 rows of 512 bytes, and 4 of its 5 picks (2, 7, 4, 5) lie on other ranks."""
    assert gbps("flashinfer", moe(), "dispatch", 1.0, of=0) == pytest.approx(1.536 + 0.032)
    assert gbps("flashinfer", moe(), "dispatch", 1.0) == pytest.approx(1.536 + 0.032)
    assert gbps("flashinfer", moe(), "dispatch", 1.0, of="mean") == pytest.approx(0.392)
    assert gbps("flashinfer", moe("fp8"), "dispatch", 1.0) == pytest.approx(0.792 + 0.032)
    assert gbps("flashinfer", moe(), "combine", 1.0) == pytest.approx(1.536)
    assert gbps("flashinfer", moe(), "roundtrip", 1.0) == pytest.approx(2 * 1.536 + 0.032)
    assert gbps("remote", moe(), "dispatch", 1.0) == pytest.approx(0.384)
    assert gbps("remote", moe(), "dispatch", 1.0, of="total") == pytest.approx(1.536)


def test_flashinfer_reproduces_what_its_benchmark_prints() -> None:
    """4 ranks of 4096 tokens, top-8 of 256: 607.944 MiB there, 607.195 MiB back; other random routing."""
    shape = Moe("deepseek-v3", 7168, 8, 256, 4096)
    entries = counts.count(routing.build(shape, 4), shape, [0] * 4)
    document = {"case": {"ranks": 4, "shape": asdict(shape)}, "bytes": bandwidth.moe_bytes(shape, entries)}

    dispatch, combine = (gbps("flashinfer", document, part, 1.0) or 0.0 for part in ("dispatch", "combine"))
    assert dispatch * 1e3 / MIB == pytest.approx(607.944, rel=0.002)
    assert (dispatch - combine) / combine == pytest.approx(607.944 / 607.195 - 1, rel=0.01)


def test_deepep_low_latency_adds_sixteen_bytes_to_fp8_rows_only() -> None:
    """Rank 0 has 5 picks: 5 * (264 + 16) in fp8 dispatch, 5 * 512 in bf16 dispatch and in combine."""
    name = "deepep_low_latency"

    assert gbps(name, moe("fp8"), "dispatch", 1.0, of=0) == pytest.approx(1.4)
    assert gbps(name, moe("bf16"), "dispatch", 1.0, of=0) == pytest.approx(2.56)
    assert gbps(name, moe("fp8"), "combine", 1.0, of=0) == pytest.approx(2.56)


def test_deepep_low_latency_reproduces_the_published_anchor() -> None:
    """DeepEP's README, EP8 on H800, 128 tokens: fp8 dispatch 77 us 98 GB/s, combine 114 us 127 GB/s."""
    shape = Moe("deepseek-v3", 7168, 8, 256, 128, "fp8")
    entries = counts.count(routing.build(shape, 8), shape, [0] * 8)
    document = {"case": {"ranks": 8, "shape": asdict(shape)}, "bytes": bandwidth.moe_bytes(shape, entries)}

    # Their routing masks some picks at random (about 1 %), hence the tolerance.
    assert gbps("deepep_low_latency", document, "dispatch", 77.0) == pytest.approx(98, rel=0.02)
    assert gbps("deepep_low_latency", document, "combine", 114.0) == pytest.approx(127, rel=0.02)


@pytest.mark.parametrize(("ranks", "factor"), [(2, 4.01), (4, 2.21), (8, 1.51)])
def test_per_selection_over_logical_is_the_known_factor(ranks: int, factor: float) -> None:
    """K / E[D] for K 8 of 256 uniform: why a low-latency GB/s and a normal one cannot be compared."""
    shape = Moe("deepseek-v3", 7168, 8, 256, 8192 // ranks)
    entries = counts.count(routing.build(shape, ranks), shape, [0] * ranks)
    document = {
        "case": {"ranks": ranks, "shape": asdict(shape)},
        "bytes": bandwidth.moe_bytes(shape, entries),
    }

    a = gbps("per_selection", document, "dispatch", 100.0)
    b = gbps("logical", document, "dispatch", 100.0)

    assert a is not None
    assert b is not None
    assert a / b == pytest.approx(factor, rel=0.01)
    assert a == pytest.approx(8192 / ranks * 8 * 14336 / 100 / 1e3)  # T * K * 2H in 100 us


def test_a_round_trip_moves_dispatch_and_combine_and_a_floor_what_its_operation_moves() -> None:
    """In fp8 the two directions have rows of different size, so they add up in bytes."""
    document = moe("fp8")

    assert gbps("logical", document, "roundtrip", 1.0, of=0) == pytest.approx((4 * 264 + 1 * 512) / 1e3)
    assert gbps("logical", document, "combine_floor", 1.0, of=1) == pytest.approx(2 * 512 / 1e3)


def test_a_component_that_moves_nothing_and_a_time_of_zero_have_no_bandwidth() -> None:
    """Expert-side staging is reported without bytes; a fake clock may stand still."""
    assert gbps("logical", moe(), "stage", 1.0) is None
    assert gbps("logical", moe(), "dispatch", 0.0) is None


def test_wire_is_what_the_backend_says_and_nothing_where_it_says_nothing() -> None:
    """Rank 2's 3000 bytes in 2 us are 1.5 GB/s; a part that no rank, or not every rank, knows has none."""
    wire = [{"dispatch": 1000 * (rank + 1)} for rank in range(4)]

    assert gbps("wire", moe(wire=wire), "dispatch", 2.0, of=2) == pytest.approx(1.5)
    assert gbps("wire", moe(wire=wire), "roundtrip", 2.0) is None
    assert gbps("wire", moe(wire=[*wire[:3], {}]), "dispatch", 2.0) is None
    assert gbps("wire", moe(), "dispatch", 2.0) is None


@pytest.mark.parametrize("component", ["dispatch", "combine"])
def test_the_six_metrics_are_consistent(component: str) -> None:
    """total = nvl + rdma on either side, and all that is sent between nodes' rows arrives somewhere."""
    for side in ("send", "recv"):
        total, nvl, rdma = (rows(f"{link}_{side}", component) for link in ("total", "nvl", "rdma"))
        assert [n + r for n, r in zip(nvl, rdma, strict=True)] == pytest.approx(total)


def test_every_formula_is_described_and_answers_for_its_family() -> None:
    """Name, family, one sentence, source and unit; and a number for a document of that family, only."""
    wire = [{"dispatch": 1} for _ in range(4)]
    documents = {"collective": collective("all_reduce", MIB), "moe": moe(wire=wire)}

    assert set(SIX) < set(FORMULAS)
    for name, formula in FORMULAS.items():
        assert (name, "GB/s") == (formula.name, formula.unit)
        assert formula.definition.endswith(".")
        assert formula.source
        other = "moe" if formula.family == "collective" else "collective"
        component = "call" if formula.family == "collective" else "dispatch"
        assert gbps(name, documents[formula.family], component, 10.0) is not None
        with pytest.raises(ValueError, match=f"formula for {formula.family}"):
            gbps(name, documents[other], component, 10.0)


def test_an_unknown_formula_is_a_user_error_with_the_known_ones() -> None:
    """The nearest name is the hint."""
    with pytest.raises(UserError, match="no bandwidth formula named 'busbww'; have: algbw, busbw") as error:
        gbps("busbww", collective("all_reduce", MIB), "call", 1.0)

    assert error.value.hint == "did you mean 'busbw'?"


def test_more_than_two_percent_above_a_limit_is_implausible() -> None:
    """450 GB/s of NVLink: 459 is 1.02 and passes, 460 does not."""
    assert bandwidth.limit_share(225.0, 450.0) == 0.5
    assert not bandwidth.implausible(bandwidth.limit_share(459.0, 450.0))
    assert bandwidth.implausible(bandwidth.limit_share(460.0, 450.0))


def test_the_blocks_fit_the_schema() -> None:
    """bytes_moe with and without wire, and bytes_collective."""
    for name, blocks in {
        "bytes_moe": [moe()["bytes"], moe("fp8", [{"dispatch": 5, "combine": 6}] * 4)["bytes"]],
        "bytes_collective": [collective("all_gather", 1000, 3)["bytes"]],
    }.items():
        validator = jsonschema_rs.validator_for({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})
        for block in blocks:
            validator.validate(block)
