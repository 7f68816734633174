"""Reading vendors' benchmarks: the numbers that stand in an output, and none from one that is cut short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from vendor_output import READERS, Shape, Told  # noqa: E402

from collectivex.backends._tests_output import Unreadable  # noqa: E402

FIXTURES = ROOT / "tests" / "fixtures" / "vendor_bench"
OUTPUTS = {
    "deepep_low_latency": ("low_latency", Shape(4, 128)),
    "uccl_low_latency": ("low_latency", Shape(4, 128)),
    "deepep_intranode": ("intranode", Shape(4, 4096, 24)),
    "uccl_intranode": ("intranode", Shape(4, 4096, 24)),
    "deepep_elastic": ("elastic", Shape(4, 4096)),
    "mscclpp_latency": ("mscclpp_bench", Shape(4, 128)),
    "mscclpp_throughput": ("mscclpp_bench", Shape(4, 4096)),
    "nccl_ep_latency": ("mscclpp_bench", Shape(4, 128)),
    "flashinfer_t128": ("flashinfer", Shape(4, 128)),
    "hybrid": ("hybrid", Shape(4, 4096)),
}


def fixture(name: str) -> str:
    return (FIXTURES / f"{name}.txt").read_text()


def told(name: str, text: str | None = None, shape: Shape | None = None) -> dict[str, Told]:
    reader, asked = OUTPUTS[name]
    return READERS[reader](fixture(name) if text is None else text, shape or asked).told


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_cut_anywhere_is_refused(name: str) -> None:
    """Every proper part that lost a number or the last line raises; so do only the blank lines at the end."""
    lines = fixture(name).rstrip().splitlines(keepends=True)
    for kept in range(len(lines)):
        with pytest.raises(Unreadable):
            told(name, "".join(lines[:kept]))


@pytest.mark.parametrize("name", [name for name in OUTPUTS if not name.endswith("intranode")])
def test_more_ranks_than_printed_are_missed(name: str) -> None:
    """It must be as many as ours had. (In test_intranode.py rank 0 prints alone, and does not say.)"""
    with pytest.raises(Unreadable, match="rank"):
        told(name, shape=OUTPUTS[name][1]._replace(ranks=8))


@pytest.mark.parametrize("name", ["deepep_intranode", "deepep_elastic", "nccl_ep_latency"])
def test_an_output_of_another_size_is_refused(name: str) -> None:
    """These print their tokens; 2048 were never asked for."""
    with pytest.raises(Unreadable, match="tokens"):
        told(name, shape=OUTPUTS[name][1]._replace(tokens=2048))


def test_the_low_latency_lines_of_all_ranks_are_averaged() -> None:
    """Pairs of 96.95, 97.10, 97.23 and 97.20 us; the bandwidths and the kernels likewise."""
    found = told("deepep_low_latency")
    assert found["dispatch + combine"].us == pytest.approx((96.95 + 97.10 + 97.23 + 97.20) / 4)
    assert found["dispatch + combine"].gbps == pytest.approx((227.43 + 227.07 + 226.76 + 226.84) / 4)
    assert found["dispatch"].us == pytest.approx((32.13 + 32.53 + 32.17 + 32.14) / 4)
    assert found["combine"].gbps == pytest.approx((248.63 + 252.79 + 254.53 + 252.41) / 4)
    assert told("uccl_low_latency")["combine"].us == pytest.approx((68.22 + 69.74 + 67.42 + 68.35) / 4)


def test_a_rank_that_died_is_missed() -> None:
    """Rank 2 left a traceback where its numbers were; three ranks do not stand for four."""
    lines = [line for line in fixture("uccl_low_latency").splitlines() if not line.startswith("[rank 2]")]
    text = "\n".join([*lines, "torch.AcceleratorError: CUDA error: unspecified launch failure", ""])
    with pytest.raises(Unreadable, match="has the lines of 3 ranks of 4"):
        told("uccl_low_latency", text)


def test_a_rank_that_printed_twice_is_refused() -> None:
    """Two runs in one file: nobody can tell which line is whose."""
    text = fixture("deepep_low_latency")
    with pytest.raises(Unreadable, match="two lines of rank 0"):
        told("deepep_low_latency", text + text)


def test_the_default_configuration_counts_and_the_best_is_a_note() -> None:
    """DeepEP prints ", 428.56 us", UCCL ", avg_t: 403.47 us"; for combine both end another way."""
    assert told("deepep_intranode") == {
        "fp8 dispatch": Told(428.56, 254.97),
        "bf16 dispatch": Told(816.09, 259.67),
        "combine": Told(596.20, 355.44),
    }
    assert told("uccl_intranode") == {
        "fp8 dispatch": Told(403.47, 270.82),
        "bf16 dispatch": Told(551.23, 384.44),
        "combine": Told(604.24, 350.71),
    }
    notes = READERS["intranode"](fixture("uccl_intranode"), Shape(4, 4096, 24)).notes
    assert notes[1] == "bf16 dispatch: its best, chunk 10 takes 530.02 µs, 3.8 % less than the default"


def test_another_number_of_sms_is_refused() -> None:
    """Our kernels ran on 24, theirs must have too."""
    with pytest.raises(Unreadable, match="says SMs 24, not 20"):
        told("deepep_intranode", shape=Shape(4, 4096, 20))


def test_both_kernels_of_an_elastic_operation_are_added() -> None:
    """Rank 0's dispatch: 288.475 + 66.258 us for 110567808 bytes; the mean is over four ranks."""
    output = READERS["elastic"](fixture("deepep_elastic"), Shape(4, 4096))
    dispatch = output.told["dispatch"]
    us = [288.475 + 66.258, 288.516 + 61.502, 288.410 + 60.601, 288.532 + 66.247]
    assert dispatch.us == pytest.approx(sum(us) / 4)
    moved = [110567808, 110882304, 110769984, 110979648]
    assert dispatch.gbps == pytest.approx(sum(b / t for b, t in zip(moved, us, strict=True)) / 4 / 1e3)
    expanded = (288.704 + 288.713 + 288.667 + 288.752 + 136.756 + 133.532 + 132.353 + 138.699) / 4
    assert output.told["expanded dispatch"].us == pytest.approx(expanded)
    assert output.told["cached dispatch"].us == pytest.approx(352.63, abs=0.01)
    assert output.told["combine"].us == pytest.approx(626.07, abs=0.01)
    assert output.told["reduced combine"].us == pytest.approx(681.53, abs=0.01)
    assert output.notes == ["16 SMs"]


def test_an_elastic_run_of_other_configurations_is_refused() -> None:
    """Without --test-first-only it goes on to more; in bf16 the bytes would be others."""
    text = fixture("deepep_elastic")
    for other in (text.replace("use_fp8_dispatch=1", "use_fp8_dispatch=0"), text + text):
        with pytest.raises(Unreadable, match="use_fp8_dispatch=1"):
            told("deepep_elastic", other)


def test_the_mscclpp_summary_is_read_by_its_sections() -> None:
    """The same words stand in both sections; the kernels' dispatch is quoted at the least rank."""
    assert told("mscclpp_latency") == {
        "dispatch": Told(31.27, 469.47),
        "combine": Told(30.09, 487.89),
        "total": Told(64.26, 456.86),
        "dispatch kernel, least rank": Told(27.15, 540.75),
        "combine kernel": Told(29.45, 498.39),
    }
    assert told("nccl_ep_latency")["total"] == Told(106.95, 274.51)
    assert told("mscclpp_throughput")["combine"] == Told(508.70, 923.45)


def test_a_run_whose_profiler_lost_the_kernels_keeps_the_host_times() -> None:
    """It then says so instead of a kernel section."""
    head, _, rest = fixture("mscclpp_latency").partition("Dispatch:    avg")
    text = f"{head}  NOTE: kineto captured 0 EP kernels (collector unavailable).\n\nByte counts: {rest[-40:]}"
    assert set(told("mscclpp_latency", text)) == {"dispatch", "combine", "total"}


def test_flashinfer_says_milliseconds_and_terabytes() -> None:
    """0.042 ms and 0.953 TB/s of all ranks together."""
    assert told("flashinfer_t128") == {"total": Told(42.0, pytest.approx(953.0))}
    phases = READERS["flashinfer"](fixture("flashinfer_t4096_phases"), Shape(4, 4096)).told
    assert phases["dispatch"] == Told(488.0, pytest.approx(1305.0))
    assert phases["combine"] == Told(494.0, pytest.approx(1290.0))
    assert phases["total"] == Told(989.0, pytest.approx(1288.0))


def test_the_fused_lines_of_hybrid_are_not_the_plain_ones() -> None:
    """Each of its labels begins or ends another one."""
    assert told("hybrid") == {
        "dispatch": Told(707.7, 298.52),
        "combine": Told(654.8, 322.64),
        "dispatch kernel": Told(514.4, 410.69),
        "combine kernel": Told(525.8, 401.77),
    }


def test_an_nccl_tests_table_gives_the_out_of_place_columns() -> None:
    """25.55 us and 61.55 GB/s of 1 MiB; in place it took 24.58 us."""
    output = READERS["nccl_tests"](fixture("nccl_tests_all_reduce"), Shape(4))
    assert output.told["1048576 bytes of bfloat16"] == Told(25.55, 61.55)
    assert output.told["67108864 bytes of bfloat16"] == Told(320.76, 313.83)


def test_nccl_tests_cycles_are_averaged() -> None:
    """Recorded on four H200s with -N 4: 4096 bytes took 19.02, 18.99, 19.20 and 19.60 us out of place."""
    text = (ROOT / "tests" / "fixtures" / "nccl_tests" / "h200x4-all_reduce-cycles.txt").read_text()
    output = READERS["nccl_tests"](text, Shape(4))
    assert output.told["4096 bytes of bfloat16"].us == pytest.approx((19.02 + 18.99 + 19.20 + 19.60) / 4)
    assert output.told["262144 bytes of bfloat16"].gbps == pytest.approx((14.23 + 19.52 + 18.28 + 19.66) / 4)
    assert output.notes == ["NCCL 2.28.9"]
    with pytest.raises(Unreadable, match="cut short"):
        READERS["nccl_tests"](text.partition("# Out of bounds")[0], Shape(4))
    with pytest.raises(Unreadable, match="ranks 4, not 2"):
        READERS["nccl_tests"](text, Shape(2))
