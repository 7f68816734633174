"""What a machine has, from made-up /proc, /dev and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from collectivex.runtime import detect
from collectivex.runtime.detect import machine, slug

CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC 9654\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 9654\n"


def write(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def nvidia(root: Path, minor: int, model: str = "NVIDIA H200") -> None:
    """One GPU as the kernel driver lists it."""
    text = f"Model: \t\t {model}\nIRQ:   \t\t 16\nDevice Minor: \t {minor}\n"
    write(root, f"proc/driver/nvidia/gpus/0000:{minor:02d}:00.0/information", text)


def test_a_machine_without_gpus_is_its_cpu(tmp_path: Path) -> None:
    """Model and logical cores come from /proc/cpuinfo."""
    write(tmp_path, "proc/cpuinfo", CPUINFO)
    found = machine(tmp_path)
    assert (found.vendor, found.gpus, found.cores) == ("cpu", (), 2)
    assert found.product == "amd-epyc-9654"


def test_only_gpus_whose_device_file_is_here_count(tmp_path: Path) -> None:
    """A container sees /proc of the whole host, but only the /dev files it was given."""
    write(tmp_path, "proc/cpuinfo", CPUINFO)
    for minor in range(8):
        nvidia(tmp_path, minor)
    for minor in (2, 5):
        write(tmp_path, f"dev/nvidia{minor}")
    found = machine(tmp_path)
    assert (found.vendor, found.gpus, found.product) == ("nvidia", ("NVIDIA H200",) * 2, "h200")


def test_amd_gpus_are_the_kfd_nodes_with_simds(tmp_path: Path) -> None:
    """Node 0 is the CPU. 90402 is gfx942, 90010 is gfx90a (the stepping is hexadecimal)."""
    write(tmp_path, "proc/cpuinfo", CPUINFO)
    for node, simds, version in ((0, 0, 0), (1, 1216, 90402), (10, 440, 90010)):
        text = f"cpu_cores_count 0\nsimd_count {simds}\ngfx_target_version {version}\n"
        write(tmp_path, f"sys/class/kfd/kfd/topology/nodes/{node}/properties", text)
    found = machine(tmp_path)
    assert (found.vendor, found.gpus, found.product) == ("amd", ("gfx942", "gfx90a"), "gfx942")


@pytest.mark.parametrize(
    ("then", "found"), [("exit 9", ("NVIDIA H200",)), ("sleep 47 & wait", ())], ids=["fails", "hangs"]
)
def test_without_the_kernels_list_the_tool_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str, found: tuple[str, ...]
) -> None:
    """What it lists counts, whatever its exit code; half a list, or no tool, is none."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n{then}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(detect, "SMI_TIMEOUT_S", 0.5)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert detect._nvidia_from_smi() == found
    monkeypatch.setenv("PATH", "/nowhere")
    assert detect._nvidia_from_smi() == ()


def test_a_cpu_without_a_name_is_called_by_its_architecture(tmp_path: Path) -> None:
    """Arm kernels print no model name; where there is no /proc at all one core is assumed."""
    write(tmp_path, "proc/cpuinfo", "processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert machine(tmp_path).cpu_model
    assert machine(tmp_path / "nowhere").cores == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [("AMD EPYC 9654 96-Core", "amd-epyc-9654-96-core"), ("  Intel(R) X  ", "intel-r-x"), ("™", "unknown")],
)
def test_a_slug_is_lower_case_letters_digits_and_dashes(name: str, said: str) -> None:
    """Topology classes stand in file names and keys."""
    assert slug(name) == said
