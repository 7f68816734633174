"""Where operations run and how time is read: CUDA/HIP events on GPUs, a monotonic clock on CPU.

`ManualDevice` is the clock that tests and the fake backend control.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Protocol

from .errors import InfraError, UserError

if TYPE_CHECKING:
    import torch

Mark = Any


class Device(Protocol):
    kind: str  # "cpu", "cuda", "hip"
    torch_device: torch.device

    def reserve(self, marks: int) -> None:
        """Make room for this many marks at once, before the window: older marks are given up."""
        ...

    def mark(self) -> Mark:
        """A point in time: an event on the current stream, or a reading of the clock."""
        ...

    def elapsed_us(self, start: Mark, end: Mark) -> float:
        """Microseconds between two marks. Both must have been reached (see `synchronize`)."""
        ...

    def synchronize(self) -> None:
        """Wait until everything issued on this device is done."""
        ...


class CpuDevice:
    """Host clock; operations are synchronous, so `synchronize` has nothing to wait for."""

    kind = "cpu"

    def __init__(self) -> None:
        import torch

        self.torch_device = torch.device("cpu")

    def reserve(self, marks: int) -> None:
        return None

    def mark(self) -> int:
        return time.perf_counter_ns()

    def elapsed_us(self, start: int, end: int) -> float:
        return (end - start) / 1e3

    def synchronize(self) -> None:
        return None


class GpuDevice:
    """CUDA or HIP: events on the current stream (cudaEventElapsedTime, resolution about 0.5 us).

    Events are made once and used again: making one costs the host more than recording it, and would be paid
    inside the loop that is measured.
    """

    def __init__(self, index: int) -> None:
        import torch

        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.kind = "hip" if torch.version.hip else "cuda"
        self._event = torch.cuda.Event
        self._events: list[Mark] = []
        self._next = 0
        self.reserve(16)

    def reserve(self, marks: int) -> None:
        while len(self._events) < marks:
            event = self._event(enable_timing=True)
            event.record()  # the driver makes an event at its first use
            self._events.append(event)
        self._next = 0

    def mark(self) -> Mark:
        event = self._events[self._next]
        self._next = (self._next + 1) % len(self._events)
        event.record()
        return event

    def elapsed_us(self, start: Mark, end: Mark) -> float:
        return start.elapsed_time(end) * 1e3

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self.torch_device)


def gpu(index: int) -> GpuDevice:
    """The GPU of that number among those that this process sees. Raises UserError where torch is built
    without CUDA and ROCm, InfraError where no driver serves it or it sees fewer GPUs."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise UserError(
            f"torch {torch.__version__} is built without CUDA and ROCm, and the pool has GPUs",
            "run in the environment or image whose torch is built for them, or use --sku local; cx doctor "
            "says what is here",
        )
    try:
        torch.cuda.init()
    except RuntimeError as error:
        why = str(error).strip().partition("\n")[0]
        raise InfraError(f"torch cannot use the GPUs: {why}", "cx doctor says what is here") from error
    seen = torch.cuda.device_count()
    if index >= seen:
        raise InfraError(
            f"the rank's GPU is number {index}, and it sees {seen}",
            "CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES or the container hide the others, or the node has "
            "fewer than its SKU says",
        )
    return GpuDevice(index)


class ManualDevice:
    """A clock that moves only when told to: `spend(us)`. Stands in for a CPU."""

    kind = "cpu"

    def __init__(self) -> None:
        import torch

        self.torch_device = torch.device("cpu")
        self.now_us = 0.0

    def spend(self, us: float) -> None:
        self.now_us += us

    def reserve(self, marks: int) -> None:
        return None

    def mark(self) -> float:
        return self.now_us

    def elapsed_us(self, start: float, end: float) -> float:
        return end - start

    def synchronize(self) -> None:
        return None
