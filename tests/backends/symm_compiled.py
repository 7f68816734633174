"""Compile the kernels of `symm_mem` for GPUs that are not here, as the backend itself calls them on rank 1 of
4, launch them on a driver that only takes notes, and print what they consist of as JSON.

    python tests/backends/symm_compiled.py      with a Triton, without TRITON_INTERPRET
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from collectivex.backends.base import Context  # noqa: E402
from collectivex.backends.symm_mem import Backend  # noqa: E402
from collectivex.runtime import fp8, routing  # noqa: E402
from collectivex.runtime.device import CpuDevice  # noqa: E402
from collectivex.runtime.problem import MoeProblem  # noqa: E402
from collectivex.runtime.types import Case, Collective, Moe, Routing  # noqa: E402

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
RANKS = 4


class Notes:
    """Triton's driver: compiles for `target`, and keeps what would be launched."""

    def __init__(self, target: GPUTarget, device: int):
        self.target, self.device, self.utils, self.launches = target, device, self, list[Any]()
        self.launcher_cls = lambda source, metadata: lambda *call: self.launches.append((metadata.name, call))

    def get_current_device(self) -> int:
        return self.device  # Triton keeps the target of a device for good

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 64 << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, name, 0, 0, 1024


class Alone:
    """Rank 1 of 4: the others agree to everything."""

    rank, size, local_rank, ranks_per_node = 1, RANKS, 1, RANKS

    def barrier(self) -> None:
        return None

    def all_gather(self, value: Any) -> list[Any]:
        return [value] * RANKS

    def from_zero(self, value: Any) -> Any:
        return value


class Symmetric:
    """Symmetric memory of which only this rank's part exists."""

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        whole = torch.zeros(size + 128, dtype=dtype)
        start = -whole.data_ptr() % 128
        return whole[start : start + size]

    def rendezvous(self, tensor: torch.Tensor, group: Any) -> Any:
        self.get_buffer = lambda rank, sizes, dtype: tensor
        return self


def contents(target: str, compiled: Any) -> dict[str, Any]:
    """How often each instruction on global memory occurs, and what did not fit into registers."""
    if target == "sm_90":
        found = re.findall(r"\b((?:ld|st|atom|red)\.global[\w.:]*)", compiled.asm["ptx"])
        spilled = 0
    else:
        text = compiled.asm["amdgcn"]
        found = re.findall(r"\b((?:global|buffer)_(?:load|store|atomic)\w*)", text)
        match = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
        assert match is not None
        spilled = int(match[1])
    return {"instructions": {word: found.count(word) for word in sorted(set(found))}, "spilled": spilled}


def calls(backend: Backend, target: str) -> dict[str, Any]:
    """name -> a kernel that is ready."""

    def exchange(mode: str, tokens: int, dtype: str, spread: str = "even") -> Any:
        shape = Moe("deepseek-v3", 7168, 8, 256, tokens, dtype, Routing(spread=spread))
        table = routing.build(shape, RANKS)
        problem = MoeProblem.build(shape, backend.context.ranks, table, backend.context.device)
        problem.format = fp8.E4M3FNUZ if target == "gfx942" else fp8.E4M3FN
        return backend.moe(Case("symm_mem", "one-sided", mode, shape, RANKS), problem)

    def pair(which: str, *case: Any) -> Any:
        made = exchange(*case)
        return made._dispatch if which == "dispatch" else made._combine[0]

    def reduce(variant: str, dtype: str) -> Any:
        shape = Collective("all_reduce", 1 << 16, dtype)
        return backend.collective(Case("symm_mem", variant, "in-place", shape, RANKS), shape).run

    return {
        "dispatch": pair("dispatch", "low-latency", 128, "bf16"),
        "dispatch one token": pair("dispatch", "normal", 1, "bf16"),
        "dispatch many tokens": pair("dispatch", "normal", 300, "bf16", "linear"),
        "dispatch fp8": pair("dispatch", "low-latency", 256, "fp8"),
        "dispatch known": pair("dispatch", "cached", 128, "bf16"),
        "combine": pair("combine", "low-latency", 128, "bf16"),
        "one-shot": reduce("one-shot", "bfloat16"),
        "two-shot": reduce("two-shot", "float32"),
    }


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for device, target in enumerate(TARGETS):
        notes = Notes(TARGETS[target], device)
        driver.set_active(notes)
        backend = Backend()
        backend.setup(Context(Alone(), CpuDevice(), None))
        backend.symmetric = Symmetric()
        for name, launch in calls(backend, target).items():
            launch()
            kernel, call = notes.launches[-1]
            made = launch.compiled
            found.setdefault(name, {})[target] = {
                **contents(target, made),
                "kernel": kernel,
                "arguments": len(call[9:]),  # after the grid, the stream and Triton's own
                "parameters": len(made.src.fn.arg_names),
                "bounded": re.findall(r"%(\w+): !tt.ptr<\w+> {[^}]*pointer_range", made.asm["ttir"]),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
