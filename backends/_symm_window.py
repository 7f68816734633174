"""One rank's symmetric buffer, and a kernel that is ready to run over it; for `symm_mem`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .base import Context

ALIGNED = 256


class Window:
    """This rank's symmetric buffer: a control block, then named regions, at the same places on all ranks.

    control  [CONTROL] int32: counters, as `_symm_kernels` numbers them
    peers    [R] int64: distance of each rank's buffer from ours in units of `_symm_kernels.UNIT` bytes
    """

    def __init__(self, context: Context, symmetric: Any, kernels: Any, size: int):
        """Collective. `symmetric` is torch.distributed._symmetric_memory."""
        import torch

        self.size, self.control_bytes = size, 4 * kernels.CONTROL
        ranks, device = context.ranks, context.device.torch_device
        self.buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(self.buffer, context.group)
        bases = [self.handle.get_buffer(rank, (size,), torch.uint8).data_ptr() for rank in range(ranks.size)]
        mine = bases[ranks.rank]
        # get_buffer starts where the allocation does. Our tensor may start later, if on all ranks alike.
        offsets = ranks.all_gather(self.buffer.data_ptr() - mine)
        if len(set(offsets)) != 1 or any((base - mine) % kernels.UNIT for base in bases):
            raise RuntimeError(
                f"symmetric buffers are not laid out alike: offsets {offsets}, addresses {bases}"
            )
        distances = [(base - mine) // kernels.UNIT for base in bases]
        self.peers = torch.tensor(distances, dtype=torch.int64, device=device)

    @staticmethod
    def needed(kernels: Any, regions: Mapping[str, int]) -> int:
        """Bytes of a window with these regions (name -> bytes)."""
        return 4 * kernels.CONTROL + sum(_aligned(size) for size in regions.values())

    def lay_out(self, regions: Mapping[str, int]) -> None:
        """Give the regions their places and zero the counters. No rank may have anything in flight."""
        import torch

        self.control = self.buffer[: self.control_bytes].view(torch.int32)
        self.control.zero_()
        self._starts, at = dict[str, int](), self.control_bytes
        for name, size in regions.items():
            self._starts[name] = at
            at += _aligned(size)

    def region(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        start = self._starts[name]
        return self.buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(*shape)


class Kernel:
    """A Triton kernel with all its arguments, compiled and loaded; a call is a launch on the current stream.

    Launching what `warmup` returned spares the host half the work of a launch: nothing is looked up again.
    """

    def __init__(
        self, function: Any, programs: int, warps: int, given: Sequence[Any], constants: Mapping[str, Any]
    ):
        self.compiled = function.warmup(*given, grid=(programs,), num_warps=warps, **constants)
        if self.compiled is None:  # Triton's interpreter has nothing to compile
            self._launch = partial(function[(programs,)], *given, **constants)
        else:
            rest = [constants[name] for name in function.arg_names[len(given) :]]
            self._launch = partial(self.compiled[programs, 1, 1], *given, *rest)

    def __call__(self) -> None:
        self._launch()


def far(tensor: torch.Tensor) -> Any:
    """`tensor` as an argument from which a kernel goes to other windows.

    Of a plain tensor Triton assumes that no address lies beyond its size: on AMD it would cut distances to
    32 bits. The wrapper hides the size and keeps the alignment.
    """
    import triton

    return triton.reinterpret(tensor, tensor.dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
