"""What the vendors' tools print, whole, cut short and failing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime import smi

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/machine"


def text(name):
    return (FIXTURES / name).read_text()


FAILURES = (
    "nvidia-smi-failed.txt",
    "nvidia-smi-mismatch.txt",
    "rocm-smi-failed.txt",
    "rocm-smi-truncated.json",
)
PARSERS = (
    smi.nvidia_gpus,
    smi.nvidia_clocks,
    smi.nvlink_status,
    smi.rocm_gpus,
    smi.amd_gpus,
    smi.amd_violations,
)


def test_gpus_come_out_of_the_query():
    """143771 MiB are 150754820096 bytes; compute capability 9.0 is sm_90."""
    found = smi.nvidia_gpus(text("nvidia-smi-gpus.csv"))

    assert len(found) == 4
    assert found[0] == {"name": "NVIDIA H200", "arch": "sm_90", "memory_bytes": 143771 * 1048576, "sms": None}


def test_clocks_come_out_of_the_query():
    """Numbers as numbers, the reasons of throttling as words: bits of nvmlClocksEventReasons."""
    found = smi.nvidia_clocks(text("nvidia-smi-clocks.csv"))

    assert [gpu["throttle"] for gpu in found] == ["none", "gpu-idle", "hw-slowdown,hw-thermal", "power-cap"]
    assert found[2] == {
        "gpu": 2,
        "sm_mhz": 120,
        "memory_mhz": 3201,
        "temperature_c": 93,
        "power_w": 212.4,
        "power_limit_w": 700.0,
        "ecc_corrected": 2,
        "ecc_uncorrected": 0,
        "throttle": "hw-slowdown,hw-thermal",
    }


def test_what_a_gpu_does_not_tell_is_none():
    """[N/A], [Not Supported] and [Unknown Error] are no numbers."""
    first, second = smi.nvidia_clocks(text("nvidia-smi-clocks-na.csv"))

    assert (first["sm_mhz"], first["power_w"], first["power_limit_w"]) == (210, None, None)
    assert set(second.values()) == {1, None}


def test_a_line_cut_short_is_left_out():
    """Half a line would put values under the wrong names."""
    assert [gpu["gpu"] for gpu in smi.nvidia_clocks(text("nvidia-smi-clocks-truncated.csv"))] == [0]


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("parse", PARSERS)
def test_a_failing_tool_gives_no_gpus(parse, name):
    """Error messages and broken JSON are nobody's GPUs."""
    assert parse(text(name)) == []


@given(st.text())
def test_no_text_makes_a_parser_fail(junk):
    """A machine that cannot be described can still be measured."""
    for parse in (
        *PARSERS,
        smi.topology,
        smi.rocm_links,
        smi.nvidia_driver,
        smi.number,
    ):
        parse(junk)
    smi.nvidia_links(junk, junk)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (0, "none"),
        (0x1, "gpu-idle"),
        (0x44, "power-cap,hw-thermal"),
        (0x8000, "0x8000"),
        (0x8004, "power-cap,0x8000"),
    ],
)
def test_throttle_bits_become_words(mask, words):
    """A bit that we do not know is shown as it is, not dropped."""
    assert smi.throttle_words(mask) == words


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1980", 1980), ("76.11", 76.11), ("-3", -3), ("nan", None), ("inf", None), ("1e3", None), ("", None)],
)
def test_only_plain_numbers_are_numbers(cell, value):
    """NaN and infinity have no place in JSON."""
    assert smi.number(cell) == value


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("driver-proprietary.txt", "535.183.06"),
        ("driver-open.txt", "580.95.05"),
        ("nvidia-smi-failed.txt", None),
    ],
)
def test_the_driver_version_is_that_of_the_kernel_module(name, version):
    """Not the compiler's, which stands in the same file; both kinds of module."""
    assert smi.nvidia_driver(text(name)) == version


# ----------------------------------------------------------------------------------------------- links


def test_links_are_counted_and_summed():
    """18 links of 26.562 GB/s: 478.1 GB/s per GPU and direction, all GPUs joined."""
    links = smi.nvidia_links(text("nvlink-h200x4.txt"), text("topo-h200x4.txt"))

    assert (links.kind, links.per_gpu) == ("nvlink", 18)
    assert links.GBps == pytest.approx(18 * 26.562)
    assert links.matrix[0] == ("X", "NV18", "NV18", "NV18")


def test_a_link_that_is_down_counts_for_the_whole():
    """The GPU with the fewest links decides what an exchange can reach."""
    links = smi.nvidia_links(text("nvlink-one-down.txt"), "")

    assert (links.kind, links.per_gpu) == ("nvlink", 17)


@pytest.mark.parametrize(
    ("name", "kind", "per_gpu"),
    [
        ("topo-h200x4.txt", "nvlink", 18),  # 3 x 18 = 54 is more than a GPU has: a switch
        ("topo-h100x8-nics.txt", "nvlink", 18),
        ("topo-h100x4-mesh.txt", "nvlink", 18),  # 3 x 6 direct links
        ("topo-pairs.txt", "mixed", 4),
        ("topo-pcie.txt", "pcie", None),
    ],
)
def test_without_the_status_the_matrix_gives_the_count(name, kind, per_gpu):
    """In some virtual machines `nvlink -s` fails and `topo -m` does not."""
    links = smi.nvidia_links(text("nvlink-inactive.txt"), text(name))

    assert (links.kind, links.per_gpu, links.GBps) == (kind, per_gpu, None)


def test_nics_and_affinities_are_no_gpus():
    """The matrix of an 8-GPU node with 8 NICs is 8 by 8."""
    matrix = smi.topology(text("topo-h100x8-nics.txt"))

    assert [len(row) for row in matrix] == [8] * 8
    assert {cell for row in matrix for cell in row} == {"X", "NV18"}


@pytest.mark.parametrize("name", ["topo-truncated.txt", "nvidia-smi-failed.txt"])
def test_half_a_matrix_is_none(name):
    """A cell that was cut ("NV" for NV18) must not be believed."""
    assert smi.topology(text(name)) == ()
    assert smi.nvidia_links("", text(name)) is None


def test_one_gpu_has_nobody_to_be_linked_with():
    """A matrix of one and no links: unknown rather than PCIe."""
    assert smi.nvidia_links("", text("topo-one-gpu.txt")) is None


# ------------------------------------------------------------------------------------------------- amd


@pytest.mark.parametrize("name", ["rocm-smi-gpus.json", "rocm-smi-warning.json"])
def test_rocm_smi_names_the_gpus(name):
    """Bytes are bytes; a warning before the JSON does no harm; card10 comes after card3."""
    found = smi.rocm_gpus(text(name))

    assert len(found) == 5
    assert found[0] == {
        "name": "AMD Instinct MI300X",
        "arch": "gfx942",
        "memory_bytes": 206141652992,
        "sms": None,
    }


@pytest.mark.parametrize("name", ["amd-smi-static.json", "amd-smi-static-list.json"])
def test_amd_smi_names_the_gpus(name):
    """Both forms of its JSON. Its serial number is not taken along."""
    expected = {
        "name": "AMD Instinct MI355X",
        "arch": "gfx950",
        "memory_bytes": 294896 * 1048576,
        "sms": 256,
    }

    assert smi.amd_gpus(text(name)) == [expected, expected]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("amd-smi-throttle-63.json", [[], ["power-cap", "socket-thermal"]]),
        # an idle MI300 has low_utilization and total_gfx_clk_below_host_limit ACTIVE: no reason
        ("amd-smi-throttle-70.json", [[], ["gfx-thermal"]]),
        ("amd-smi-throttle-na.json", [None, None]),  # the tool knows the fields, the GPU does not fill them
        ("amd-smi-static.json", [None, None]),  # GPUs without the field
    ],
)
def test_amd_smi_says_what_holds_a_gpu_back(name, expected):
    """The generations of its JSON; sources in fixtures/machine/README.md. Silence is unknown, not fine."""
    assert smi.amd_violations(text(name)) == expected


@pytest.mark.parametrize("word", list(smi.AMD_THROTTLE))
def test_each_violation_of_amd_has_its_word(word):
    """One status at a time, among others that are not active."""
    told = {f"{name}_violation_status": "NOT ACTIVE" for name in smi.AMD_THROTTLE}
    told[f"{word}_violation_status"] = "ACTIVE"
    found = smi.amd_violations(json.dumps([{"gpu": 0, "throttle": told}]))
    assert found == [[smi.AMD_THROTTLE[word]]]


def test_one_known_status_makes_a_gpu_known():
    """Newer fields are N/A on older chips; what is told counts."""
    told = {"prochot_violation_status": "NOT ACTIVE", "hbm_thermal_violation_status": "N/A"}
    assert smi.amd_violations(json.dumps([{"gpu": 0, "throttle": told}])) == [[]]


def test_rocm_smi_tells_the_links():
    """Eight GPUs, all pairs XGMI: seven links each; the lower half of the matrix is filled in."""
    links = smi.rocm_links(text("rocm-smi-topo.json"))

    assert (links.kind, links.per_gpu) == ("xgmi", 7)
    assert links.matrix[7][:2] == ("XGMI", "XGMI")
    assert links.matrix[7][7] == "X"
    assert smi.rocm_links(text("rocm-smi-topo-pcie.json")).kind == "pcie"
    assert smi.rocm_links(text("rocm-smi-failed.txt")) is None


def test_only_gpus_that_were_held_back_are_named():
    """Idling is no fault; heat, power and brakes are."""
    said = smi.slowed(smi.nvidia_clocks(text("nvidia-smi-clocks.csv")), "before")

    assert said == [
        "GPU 2 was held back before: hw-slowdown, hw-thermal",
        "GPU 3 was held back before: power-cap",
    ]
