"""What a process printed, made fit for a record."""

from __future__ import annotations

import pytest

from collectivex.runtime.scrub import scrub


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("/scratch/x/libraries/deepep/deep_ep/_C.so", "…/deep_ep/_C.so"),
        ('File "/data/lib/mscclpp/ep/runtime.py", line 64', 'File "…/ep/runtime.py", line 64'),
        ("failed. /build/mscclpp/src/core/ipc.cc:454 (Cuda", "failed. …/core/ipc.cc:454 (Cuda"),
        ("neither in /data/x/nccl_tests/bin nor on PATH", "neither in …/nccl_tests/bin nor on PATH"),
    ],
)
def test_a_folder_of_this_machine_is_not_told(told, kept):
    """Where somebody keeps their libraries is a site fact; which file it was stays."""
    assert kept == scrub(told)


@pytest.mark.parametrize(
    "told",
    [
        "/usr/lib/x86_64-linux-gnu/libnccl.so.2",
        "/opt/rocm/lib/librccl.so",
        "/dev/shm/uccl/barrier",
        "https://github.com/deepseek-ai/DeepEP/tree/main",
        "30 GB/s of 4/8/16 ranks",
        "…/core/ipc.cc:454",
    ],
)
def test_what_every_machine_has_stays(told):
    """System paths, addresses of the web and fractions tell nothing of the machine."""
    assert told == scrub(told)
