"""Block-128 fp8: one float32 scale for every 128 columns of a row, as the EP libraries transport it.

    scale = max(|x| of the block) / FMAX        q = round-to-nearest-even(x * (FMAX / max(|x|)))

On GPUs one Triton kernel does it (`fp8_kernel.py`): it is inside the timed dispatch window of libraries that
do not quantise themselves. Its reference is plain torch, which is also what the oracle uses on every device,
so that a fault of the kernel cannot excuse itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

BLOCK = 128
# Below every scale that the libraries produce (they clamp the block maximum to 1e-4): no division by zero.
TINY = 1e-30


@dataclass(frozen=True)
class Fp8Format:
    """An 8-bit float with 4 exponent and 3 mantissa bits.

    max        largest finite value, FMAX
    amplitude  largest integer of the oracle's inputs: amplitude / max is a power of two, so that the scale
               is exact under any formula, also one that rounds it up to a power of two (UE8M0)
    """

    name: str
    dtype: torch.dtype
    max: float
    amplitude: int


E4M3FN = Fp8Format("e4m3fn", torch.float8_e4m3fn, 448.0, 112)  # OCP: NVIDIA, and AMD from gfx950
E4M3FNUZ = Fp8Format("e4m3fnuz", torch.float8_e4m3fnuz, 240.0, 120)  # AMD gfx940 to gfx942
FORMATS = {f.name: f for f in (E4M3FN, E4M3FNUZ)}


def format_of(device: torch.device) -> Fp8Format:
    """The format that the matrix units of `device` take; e4m3fn on CPU."""
    if device.type == "cuda" and torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        return E4M3FNUZ if arch.startswith("gfx94") else E4M3FN
    return E4M3FN


def quantise(x: torch.Tensor, format: Fp8Format = E4M3FN) -> tuple[torch.Tensor, torch.Tensor]:
    """x [N, H] contiguous, H a multiple of 128 -> (q [N, H] fp8, scales [N, H/128] float32)."""
    if x.is_cuda and _has_kernel(x.device):
        from .fp8_kernel import quantise as kernel

        return kernel(x, format.dtype, format.max, TINY, BLOCK)
    return reference_quantise(x, format)


def reference_quantise(x: torch.Tensor, format: Fp8Format = E4M3FN) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantise` must return, bit for bit, in plain torch operations on any device."""
    rows, hidden = x.shape
    blocks = x.to(torch.float32).view(rows, hidden // BLOCK, BLOCK)
    largest = blocks.abs().amax(2).clamp_(min=TINY)
    # Not `format.max / largest`: torch computes a scalar over a tensor as a reciprocal and a product.
    inverse = torch.full_like(largest, format.max).div_(largest)
    q = (blocks * inverse[:, :, None]).to(format.dtype).view(rows, hidden)
    return q, largest / format.max


def dequantise(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32(q) * scale: [N, H] float32."""
    rows, hidden = q.shape
    values = q.to(torch.float32).view(rows, hidden // BLOCK, BLOCK)
    return (values * scales[:, :, None]).view(rows, hidden)


def round_trip(x: torch.Tensor, format: Fp8Format = E4M3FN) -> torch.Tensor:
    """What is left of x [N, H] after quantising and dequantising: [N, H] float32."""
    return dequantise(*reference_quantise(x, format))


@cache
def _has_kernel(device: torch.device) -> bool:
    # Conversion to e4m3fn is a hardware instruction from compute capability 8.9; Triton has none below.
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 9)
