"""The machine: tools that answer, fail and hang; kernel files."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from collectivex.runtime import detect, machine, nvml, smi

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures/machine"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder that is all of PATH, and a way to put tools there that print a fixture."""

    def tool(name, *cases, code=0):
        """cases: (pattern of the arguments, fixture)."""
        lines = [f'*"{pattern}"*) cat "{FIXTURES / fixture}"; exit {code};;' for pattern, fixture in cases]
        file = tmp_path / name
        file.write_text('#!/bin/sh\ncase "$*" in\n' + "\n".join(lines) + "\nesac\nexit 2\n")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(nvml, "clocks", lambda uuid=None: None)
    return tool


def on(monkeypatch, vendor):
    here = detect.Machine(vendor, ("x",), "Some CPU", 4)
    monkeypatch.setattr(detect, "machine", lambda root=Path("/"): here)


def test_nvidia_gpus_and_links_come_from_nvidia_smi(tools, monkeypatch):
    """Without torch, one query for the GPUs and two tools for the links."""
    on(monkeypatch, "nvidia")
    tools(
        "nvidia-smi",
        ("--query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits", "nvidia-smi-gpus.csv"),
        ("nvlink -s", "nvlink-h200x4.txt"),
        ("topo -m", "topo-h200x4.txt"),
    )

    assert [gpu["arch"] for gpu in machine.gpus()] == ["sm_90"] * 4
    assert machine.links().per_gpu == 18


def test_clocks_come_from_nvidia_smi_where_nvml_is_missing(tools, monkeypatch):
    """One query with the fields' names of today."""
    on(monkeypatch, "nvidia")
    tools("nvidia-smi", ("clocks_event_reasons.active", "nvidia-smi-clocks.csv"))

    assert [gpu["sm_mhz"] for gpu in machine.clocks()] == [1980, 345, 120, 1755]


def test_an_older_driver_is_asked_with_the_older_name(tools, monkeypatch):
    """Before 535 the field clocks_event_reasons.active does not exist, and the whole query fails."""
    on(monkeypatch, "nvidia")
    tools("nvidia-smi", ("clocks_throttle_reasons.active", "nvidia-smi-clocks.csv"))

    assert len(machine.clocks()) == 4


@pytest.mark.parametrize("vendor", ["nvidia", "amd"])
def test_failing_tools_leave_the_machine_undescribed(tools, monkeypatch, vendor):
    """Exit codes and messages of a broken driver: nothing is known, nothing is raised."""
    on(monkeypatch, vendor)
    for name, fixture in (("nvidia-smi", "nvidia-smi-failed.txt"), ("rocm-smi", "rocm-smi-failed.txt")):
        tools(name, ("", fixture), code=9)

    assert machine.gpus() == []
    assert machine.links() is None
    assert machine.clocks(root=FIXTURES / "nowhere") == []


def test_amd_gpus_come_from_amd_smi_else_rocm_smi(tools, monkeypatch):
    """The newer tool also knows the compute units."""
    on(monkeypatch, "amd")
    tools("rocm-smi", ("showproductname", "rocm-smi-gpus.json"), ("showtopotype", "rocm-smi-topo.json"))
    old = machine.gpus()
    tools("amd-smi", ("static", "amd-smi-static.json"))

    assert [gpu["arch"] for gpu in old] == ["gfx942"] * 5
    assert [gpu["sms"] for gpu in machine.gpus()] == [256, 256]
    assert machine.links().kind == "xgmi"


def test_amd_clocks_come_from_the_kernel(monkeypatch):
    """hwmon: Hz, millidegrees, microwatts; only amdgpu's monitors, card10 after card1."""
    on(monkeypatch, "amd")
    monkeypatch.setattr(nvml, "clocks", lambda uuid=None: None)
    first, second = machine.clocks(root=FIXTURES)

    assert first == {
        "gpu": 0,
        "sm_mhz": 2100.0,
        "memory_mhz": 1300.0,
        "temperature_c": 52.0,
        "power_w": 266.0,
        "power_limit_w": 750.0,
        "throttle": None,
    }
    assert (second["gpu"], second["sm_mhz"]) == (1, 132.0)


def test_torch_is_asked_first_about_the_gpus_it_sees():
    """SMs are known then; of gcnArchName only the architecture is kept."""
    props = {
        "name": "AMD Instinct MI300X",
        "gcnArchName": "gfx942:sramecc+:xnack-",
        "total_memory": 206141652992,
        "multi_processor_count": 304,
        "major": 9,
        "minor": 4,
    }
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: SimpleNamespace(**props),
    )
    hip = SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip="6.4.1"))
    nvidia = SimpleNamespace(cuda=cuda, version=SimpleNamespace(hip=None))
    expected = {"name": props["name"], "arch": "gfx942", "memory_bytes": 206141652992, "sms": 304}

    assert machine.gpus(hip) == [expected, expected]
    assert machine.gpus(nvidia)[0]["arch"] == "sm_94"


def test_rdma_ports_are_read_from_the_kernel():
    """Names that carry a bus address are numbered instead; a silent driver leaves None."""
    found = {nic["name"]: nic for nic in machine.nics(FIXTURES)}

    assert found["mlx5_0"] == {
        "name": "mlx5_0",
        "port": 1,
        "rate_gbps": 400,
        "rate": "4X NDR",
        "link_layer": "InfiniBand",
        "state": "ACTIVE",
    }
    assert (found["mlx5_1"]["state"], found["mlx5_1"]["link_layer"]) == ("DOWN", "Ethernet")
    assert set(found) == {"irdma0", "mlx5_0", "mlx5_1", "rdma3"}
    assert set(found["irdma0"].values()) == {"irdma0", 1, None}


@pytest.mark.parametrize("name", ["ibp26s0", "ibP257p0s0", "rocep65s0f0", "rdmap16s27", "ibs1"])
def test_names_made_of_bus_addresses_are_recognised(name):
    """udev's persistent names."""
    assert machine._BUS_NAME.match(name)


@pytest.mark.parametrize(
    "name", ["mlx5_0", "mlx5_bond_0", "bnxt_re0", "ionic_0", "irdma1", "efa_0", "hfi1_0"]
)
def test_names_the_kernel_counts_are_kept(name):
    """They say nothing about the host."""
    assert not machine._BUS_NAME.match(name)


def test_the_cpu_has_a_name_even_where_the_kernel_gives_none(monkeypatch):
    """Arm's /proc/cpuinfo has no model name."""
    monkeypatch.setattr(detect, "machine", lambda root: detect.Machine("cpu", (), "unknown", 72))

    assert machine.cpu()["cores"] == 72
    assert machine.cpu()["model"] not in ("", "unknown")


def test_a_tool_that_is_not_there_says_nothing():
    """No exception for what most machines do not have."""
    assert machine.Tool("no-such-tool-anywhere").output() == ""


def test_a_tool_that_hangs_is_given_up():
    """After its time the tool is killed and its output is empty."""
    began = time.monotonic()

    assert (
        machine.Tool(sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)").output(0.3)
        == ""
    )
    assert time.monotonic() - began < 5


@pytest.mark.gpu
def test_nvml_and_nvidia_smi_agree_on_a_real_gpu():
    """Both ways to read the same sensors: same GPUs, same limits and ECC counts."""
    fields = tuple(name for name, _ in smi.CLOCK_FIELDS)
    text = machine._query(fields) or machine._query((*fields[:-1], smi.OLD_THROTTLE_FIELD))
    ours, theirs = nvml.clocks(), smi.nvidia_clocks(text)

    assert ours
    for name in ("gpu", "power_limit_w", "ecc_uncorrected"):
        assert [record[name] for record in ours] == [record[name] for record in theirs]
    assert all(abs(a["temperature_c"] - b["temperature_c"]) <= 5 for a, b in zip(ours, theirs, strict=True))
