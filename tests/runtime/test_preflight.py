"""What is refused before any rank is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from collectivex.runtime import detect, device, machine, matrix, preflight
from collectivex.runtime.detect import Machine
from collectivex.runtime.errors import InfraError, UserError
from collectivex.runtime.sku import load_sku
from collectivex.runtime.suite import load_suite

SUITE = load_suite("smoke")
H200 = "NVIDIA H200"


def require(
    monkeypatch, vendor: str, *gpus: str, pool: str = "h200x4-nvlink", backend: str = "torch_dist"
) -> None:
    """Ask for `pool` on a machine with these GPUs, all of which the vendor's tool shows too."""
    monkeypatch.setattr(detect, "machine", lambda *_: Machine(vendor, gpus, "a CPU", 8))
    monkeypatch.setattr(machine, "gpus", lambda *_: [{"name": gpu} for gpu in gpus])
    sku = load_sku(pool)
    preflight.require_gpus(sku, matrix.expand(SUITE, sku, [backend]))


def test_the_gpus_that_the_pool_says_are_enough(monkeypatch):
    """Four H200, as its SKU says, or more."""
    require(monkeypatch, "nvidia", *[H200] * 4)
    require(monkeypatch, "nvidia", *[H200] * 8)


def test_fewer_gpus_than_ranks_are_one_error_before_anything_starts(monkeypatch):
    """With both numbers, and what to do."""
    with pytest.raises(
        UserError, match="4 ranks of SKU 'h200x4-nvlink' need 4 GPUs; this machine has 2"
    ) as told:
        require(monkeypatch, "nvidia", H200, H200)
    assert "cx doctor" in (told.value.hint or "")


def test_a_tool_that_sees_more_gpus_than_the_kernel_shows_is_believed(monkeypatch):
    """Not every virtual machine or container shows all device files."""
    monkeypatch.setattr(detect, "machine", lambda *_: Machine("nvidia", (H200,), "a CPU", 8))
    monkeypatch.setattr(machine, "gpus", lambda *_: [{"name": H200}] * 4)
    sku = load_sku("h200x4-nvlink")
    preflight.require_gpus(sku, matrix.expand(SUITE, sku, ["torch_dist"]))


def test_other_gpus_do_not_measure_under_the_name_of_a_pool(monkeypatch):
    """Neither of another product, nor of another vendor: they would be held against this pool's limits."""
    with pytest.raises(UserError, match="are h200; this machine has NVIDIA A100-SXM4-80GB"):
        require(monkeypatch, "nvidia", *["NVIDIA A100-SXM4-80GB"] * 4)
    with pytest.raises(UserError, match="are h200; this machine has gfx942"):
        require(monkeypatch, "amd", *["gfx942"] * 4)


def test_a_program_counts_its_gpus_itself(monkeypatch):
    """nccl-tests says how many it found; GPUs of another product are refused for it too."""
    require(monkeypatch, "nvidia", backend="nccl_tests")
    with pytest.raises(UserError, match="this machine has NVIDIA A100"):
        require(monkeypatch, "nvidia", "NVIDIA A100", backend="nccl_tests")


def test_a_cpu_needs_no_gpus(monkeypatch):
    """`local` without any."""
    monkeypatch.setattr(detect, "machine", lambda *_: Machine("cpu", (), "a CPU", 8))
    sku = load_sku("local")
    preflight.require_gpus(sku, matrix.expand(SUITE, sku, ["torch_dist"]))


@pytest.mark.parametrize(("gpus", "ranks"), [(3, 2), (4, 4), (5, 4), (6, 4), (7, 4), (32, 16)])
def test_every_number_of_gpus_runs_smoke(gpus: int, ranks: int):
    """Its 16 experts are shared out over the most ranks that divide them."""
    pool = load_sku("local", Machine("nvidia", (H200,) * gpus, "a CPU", 64))
    planned = matrix.expand(SUITE, pool, ["torch_dist"])
    assert {p.cell.case.ranks for p in planned} == {ranks}


def test_a_rank_says_why_torch_has_no_gpu_for_it(monkeypatch):
    """A build without CUDA, a driver that does not serve it, fewer GPUs than local ranks."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="is built without CUDA and ROCm, and the pool has GPUs"):
        device.gpu(0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12040).\nPlease update"
        )

    monkeypatch.setattr(torch.cuda, "init", too_old)
    with pytest.raises(
        InfraError, match=r"torch cannot use the GPUs: The NVIDIA driver .* \(found version 12040\)\.\nhint"
    ):
        device.gpu(0)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InfraError, match="the rank's GPU is number 2, and it sees 2"):
        device.gpu(2)


def test_a_reader_that_goes_away_does_not_end_a_run(tmp_path):
    """`cx run ... 2>&1 | head -1`: the cells are measured and accounted for all the same."""
    out = tmp_path / "out"
    asked = "--suite smoke --backend torch_dist --ranks 2 --only all_reduce-4096B --only reduce_scatter-4096B"
    run = f"{sys.executable} -m collectivex run {asked} --out {out}"
    subprocess.run(["bash", "-c", f"{run} 2>&1 | head -1"], timeout=120)
    told = subprocess.run(
        [sys.executable, "-m", "collectivex", "summarize", str(out)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "ok 2 / 2 requested" in told.stdout, told.stdout + told.stderr
