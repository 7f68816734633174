"""The Triton kernel behind `fp8.quantise`. Imported on GPUs only: Triton is not there without one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 16  # blocks of 128 columns that one program quantises


def quantise(
    x: torch.Tensor, dtype: torch.dtype, largest: float, tiny: float, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fp8.quantise`. One launch; no synchronisation; may be captured in a graph.

    largest   of the finite values of `dtype`
    tiny      least maximum of a block of `block` columns
    """
    rows, hidden = x.shape
    q = torch.empty(rows, hidden, dtype=dtype, device=x.device)
    scales = torch.empty(rows, hidden // block, dtype=torch.float32, device=x.device)
    blocks = scales.numel()
    if blocks:
        _quantise[(triton.cdiv(blocks, GROUP),)](x, q, scales, blocks, largest, tiny, block, GROUP)
    return q, scales


@triton.jit
def _quantise(
    x, q, scales, blocks, FMAX: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    block = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    live = block < blocks
    at = block[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + at, mask=live[:, None], other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(values), axis=1), TINY)
    limit = tl.full([GROUP], FMAX, tl.float32)
    # div_rn: Triton's plain division is off by up to two units in the last place.
    tl.store(scales + block, tl.div_rn(largest, limit), mask=live)
    inverse = tl.div_rn(limit, largest)
    tl.store(q + at, (values * inverse[:, None]).to(q.dtype.element_ty), mask=live[:, None])
