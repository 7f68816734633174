"""The reduction at the end of `torch_dist`'s combine, as one Triton kernel. Imported on GPUs only.

Plain torch offers `embedding_bag` for it (used on CPU), which reads rows of 7168 columns at a tenth of the
memory's rate; a yardstick that loses its time there would flatter every library that is set beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COLUMNS = 1024  # that one program adds up


def gather_sum(back: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """[T, H] bf16: float32 sums, in the order of ranks, of the rows back[slots[r, t]], rounded once.

    back    [N, H] bf16; slots [R, T] int64 rows of it, or something >= N - 1 for none
    """
    ranks, tokens = slots.shape
    rows, hidden = back.shape
    out = back.new_empty(tokens, hidden)
    if tokens:
        grid = (tokens, triton.cdiv(hidden, COLUMNS))
        _gather_sum[grid](back, slots, out, tokens, rows - 1, ranks, hidden, COLUMNS, num_warps=4)
    return out


@triton.jit
def _gather_sum(back, slots, out, tokens, rows, ranks, hidden, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    total = tl.zeros([COLUMNS], tl.float32)
    for rank in range(ranks):
        slot = tl.load(slots + rank * tokens + token)
        row = tl.load(back + slot * hidden + column, mask=inside & (slot < rows), other=0.0)
        total += row.to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=inside)
