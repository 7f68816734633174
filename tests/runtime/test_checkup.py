"""What the doctor says about the machine."""

import resource
import shutil
import socket
from types import SimpleNamespace

import pytest

from collectivex.runtime import checkup, environment, machine
from collectivex.runtime.smi import Links

OFF = environment.MULTICAST_OFF
GPU = {"name": "NVIDIA H200", "arch": "sm_90", "memory_bytes": 143771 * 2**20, "sms": 132}
CLOCK = {"gpu": 0, "temperature_c": 41, "throttle": "none", "ecc_uncorrected": 0}


@pytest.fixture
def quiet(monkeypatch):
    """A machine with a driver, cool GPUs and no NICs."""
    monkeypatch.setattr(machine, "clocks", lambda: [CLOCK])
    monkeypatch.setattr(machine, "driver", lambda: "580.95.05")
    monkeypatch.setattr(machine, "nics", lambda: [])


def said(lines, name):
    (line,) = [line for line in lines if line.name == name]
    return line


def test_gpus_are_counted_and_described(quiet):
    """Four of a kind: number, name, architecture, memory in GiB (143771 MiB are 140)."""
    lines = checkup.machine_lines([GPU] * 4, Links("nvlink", 18, 478.1))

    assert said(lines, "GPUs").value == "4 x NVIDIA H200 (sm_90, 140 GiB)"
    assert said(lines, "links").value == "nvlink, 18 per GPU, 478 GB/s per GPU and direction"
    assert {line.state for line in lines} == {"ok"}


def test_gpus_of_different_kinds_are_pointed_out(quiet):
    """An exchange between unlike GPUs measures neither."""
    line = said(checkup.machine_lines([GPU, {**GPU, "name": "NVIDIA H100"}], None), "GPUs")

    assert line.state == "warn"
    assert "not all alike" in line.value


def test_a_machine_without_gpus_is_fine(monkeypatch, quiet):
    """Backends run on the CPU there; nothing is said of drivers and multicast."""
    monkeypatch.setattr(machine, "gpus", lambda: [])

    assert [line.name for line in checkup.machine_lines(None, None)] == ["CPU", "GPUs"]


@pytest.mark.parametrize(
    ("links", "state"),
    [
        (None, "warn"),
        (Links("nvlink", 18), "ok"),
        (Links("xgmi", 7), "ok"),
        (Links("pcie", None), "warn"),
        (Links("mixed", 4), "warn"),
    ],
)
def test_anything_but_full_links_comes_with_a_hint(links, state):
    """Unknown, PCIe and partly linked GPUs are worth a word."""
    line = checkup.link_line(links)

    assert line.state == state
    assert (line.hint is not None) == (state == "warn")


def test_gpus_that_are_held_back_or_broken_are_named():
    """Throttling and uncorrected memory errors; a well machine gets one line with its hottest GPU."""
    bad = checkup.health_lines(
        [{**CLOCK, "throttle": "hw-thermal"}, {**CLOCK, "gpu": 1, "ecc_uncorrected": 3}]
    )

    assert [line.value for line in bad] == [
        "GPU 0 was held back just now: hw-thermal",
        "GPU 1 has 3 uncorrected memory errors",
    ]
    assert [line.value for line in checkup.health_lines([CLOCK, {**CLOCK, "temperature_c": 55}])] == [
        "no GPU throttled, no uncorrected memory errors, at most 55 C"
    ]
    assert checkup.health_lines([]) == []


@pytest.mark.parametrize(
    ("environ", "state", "word"),
    [
        ({}, "ok", "left to the libraries"),
        (OFF, "ok", "off ("),
        ({"NCCL_NVLS_ENABLE": "0"}, "warn", "NVSHMEM_DISABLE_NVLS unset"),
        ({**OFF, "NCCL_NVLS_ENABLE": "1"}, "warn", "NCCL_NVLS_ENABLE on"),
    ],
)
def test_multicast_switches_that_disagree_are_pointed_out(environ, state, word):
    """All off or none set is fine; some off means that ranks get all four."""
    (line,) = checkup.multicast_lines(environ)

    assert line.state == state
    assert word in line.value
    assert (line.hint is not None) == (state == "warn")


def test_a_port_that_is_down_is_pointed_out(monkeypatch):
    """RDMA ports are listed with their rate and state."""
    port = {"name": "mlx5_0", "port": 1, "rate_gbps": 400, "link_layer": "InfiniBand", "state": "ACTIVE"}
    monkeypatch.setattr(machine, "nics", lambda: [port, {**port, "state": "DOWN"}])

    assert [line.state for line in checkup.nic_lines()] == ["ok", "warn"]
    assert checkup.nic_lines()[0].value == "mlx5_0:1 InfiniBand 400 Gb/s ACTIVE"


# ---------------------------------------------------------------------------------------------- limits


def test_this_machine_passes_its_own_limits(tmp_path):
    """Tests start ranks on loopback, so it must be usable; every line has a known state."""
    lines = checkup.limit_lines()

    assert said(lines, "loopback ports").state == "ok"
    assert {line.state for line in lines} <= {"ok", "warn", "missing"}
    assert all(line.hint for line in lines if line.state != "ok")


def test_little_shared_memory_and_disk_are_pointed_out(monkeypatch, tmp_path):
    """Docker's default of 64 MiB makes NCCL fail with an unrelated message."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, free=2**26))
    lines = checkup.limit_lines(tmp_path)

    assert "--shm-size" in said(lines, str(tmp_path)).hint
    assert said(lines, "disk here").state == "warn"
    assert said(checkup.limit_lines(tmp_path / "none"), str(tmp_path / "none")).state == "missing"


@pytest.mark.parametrize(
    ("limit", "nics", "state", "value"),
    [
        (65536, [], "ok", "64 KiB"),
        (65536, [{}], "warn", "64 KiB"),
        (resource.RLIM_INFINITY, [{}], "ok", "unlimited"),
    ],
)
def test_locked_memory_matters_where_there_is_rdma(monkeypatch, limit, nics, state, value):
    """Registering memory needs it; without NICs nobody does."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    monkeypatch.setattr(machine, "nics", lambda: nics)
    line = said(checkup.limit_lines(), "locked memory")

    assert (line.state, line.value) == (state, value)


def test_few_open_files_are_pointed_out(monkeypatch):
    """256, the default of some systems, is not enough for a handful of ranks."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))

    assert said(checkup.limit_lines(), "open files").state == "warn"


def test_an_unusable_loopback_is_said_in_the_systems_words(monkeypatch):
    """A sandbox that refuses to bind."""

    class Refused(socket.socket):
        def bind(self, address):
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", Refused)

    assert checkup.loopback_trouble() == "Operation not permitted"


def test_what_no_tool_tells_is_not_called_well() -> None:
    """amdgpu's files know neither throttling nor memory errors: unknown is a warning, not an ok."""
    record = {"gpu": 0, "temperature_c": 41, "throttle": None}
    (line,) = checkup.health_lines([record])
    assert (line.state, line.value) == ("warn", "unknown: throttling and memory errors, at most 41 C")
