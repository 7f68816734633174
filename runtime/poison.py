"""Values that no correct operation leaves in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# NaN of each 8-bit float; torch's fill_ does not take them everywhere.
_NAN_BITS = {
    torch.float8_e4m3fn: 0x7F,
    torch.float8_e5m2: 0x7F,
    torch.float8_e4m3fnuz: 0x80,
    torch.float8_e5m2fnuz: 0x80,
    torch.float8_e8m0fnu: 0xFF,
}


def poison(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite in place, on the current stream: floats with NaN, integers with -2 (uint8: 254), bools with
    True."""
    for tensor in tensors:
        if tensor.dtype in _NAN_BITS:
            tensor.view(torch.uint8).fill_(_NAN_BITS[tensor.dtype])
        elif tensor.is_floating_point():
            tensor.fill_(torch.nan)
        else:
            tensor.fill_({torch.uint8: 254, torch.bool: True}.get(tensor.dtype, -2))
