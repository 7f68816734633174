"""The inputs of one rank of an MoE exchange: exactly representable, and every row says where it came from.

The row of the token with global id g = source_rank * T + t holds integers in [-A, A] without zero, A
being the amplitude of the fp8 format (112 or 120): exact in bf16, and with +-A in every block of 128
columns the fp8 scale is a power of two under any formula, while the rounding to e4m3 is still exercised.
The signs of the first 32 columns spell g and a checksum over g and the input set, with magnitudes from 16
up that no rounding to fp8 can take the sign of: a received row is known even if the library reports no
source and keeps no order.

The harness rewrites x in place with another input set before every checked call, so that what a library
left over from the call before is caught.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from . import fp8
from .device import Device
from .errors import UserError
from .ranks import Ranks
from .routing import Table
from .types import CODE_COLUMNS, Moe

ID_BITS = 20
CODE_MAGNITUDE = 16
CHUNK = 1 << 24  # elements of a temporary: 64 MiB in int32 or float32


@dataclass(frozen=True)
class Arrivals:
    """What a rank must receive, in ascending order of token.

    ids       [N] int64 global token ids
    experts   [N, K'] int64 local expert ids, -1 where there is none
    weights   [N, K'] float32, 0 where there is none
    """

    ids: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


@dataclass
class MoeProblem:
    """One rank's part of an exchange. T = shape.tokens, K = shape.topk, H = shape.hidden; this rank has T_r
    tokens, which may be 0.

    topk_idx, topk_weights   [T_r, K] int64 global expert ids and float32: what a library is given
    x                        [T_r, H] bf16
    all_experts, all_weights [R*T, K] (one row at least) the same of all ranks by global token id, -1 and 0
                             where a rank has fewer than T tokens: for the oracle, out of a library's reach
    input_set                which input set x holds
    barrier                  waits for all ranks
    """

    shape: Moe
    rank: int
    size: int
    ranks_per_node: int
    table: Table
    device: torch.device
    barrier: Callable[[], None] = lambda: None
    topk_idx: torch.Tensor = field(init=False)
    topk_weights: torch.Tensor = field(init=False)
    x: torch.Tensor = field(init=False)
    all_experts: torch.Tensor = field(init=False)
    all_weights: torch.Tensor = field(init=False)
    input_set: int = field(init=False, default=0)

    @classmethod
    def build(cls, shape: Moe, ranks: Ranks, table: Table, device: Device) -> MoeProblem:
        """Raises UserError for a hidden size that this oracle or the fp8 blocks cannot carry."""
        torch_device = device.torch_device
        return cls(shape, ranks.rank, ranks.size, ranks.ranks_per_node, table, torch_device, ranks.barrier)

    def __post_init__(self) -> None:
        shape, table = self.shape, self.table
        check(shape, self.size)
        rows = max(1, self.size * shape.tokens)
        experts = torch.full((rows, shape.topk), -1, dtype=torch.int64)
        weights = torch.zeros(rows, shape.topk)
        for source, tokens in enumerate(table.tokens):
            first = source * shape.tokens
            experts[first : first + tokens] = table.experts[source]
            weights[first : first + tokens] = table.weights[source]
        self.all_experts, self.all_weights = experts.to(self.device), weights.to(self.device)
        self.topk_idx = self.all_experts[self.own].clone()
        self.topk_weights = self.all_weights[self.own].clone()
        self.x = torch.empty(self.tokens, shape.hidden, dtype=torch.bfloat16, device=self.device)
        self.fill(0)

    @property
    def tokens(self) -> int:
        """T_r."""
        return self.table.tokens[self.rank]

    @property
    def capacity(self) -> int:
        """T, the most tokens that any rank has."""
        return self.shape.tokens

    @property
    def local_experts(self) -> int:
        return self.shape.experts // self.size

    @property
    def first_local_expert(self) -> int:
        return self.rank * self.local_experts

    @property
    def own(self) -> slice:
        """This rank's tokens among all, by global id."""
        first = self.rank * self.capacity
        return slice(first, first + self.tokens)

    @cached_property
    def format(self) -> fp8.Fp8Format:
        return fp8.format_of(self.device)

    @property
    def amplitude(self) -> int:
        return self.format.amplitude

    @cached_property
    def topk_idx32(self) -> torch.Tensor:
        """topk_idx as int32, for libraries that take it so."""
        return self.topk_idx.to(torch.int32)

    def quantise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, H] bf16 -> (q [N, H] fp8, scales [N, H/128] float32): one kernel on GPUs."""
        return fp8.quantise(x, self.format)

    def fill(self, input_set: int, saved: torch.Tensor | None = None) -> None:
        """Rewrite x in place with an input set; `saved` is a copy of x from when it held that set."""
        self.input_set = input_set
        if saved is not None:
            self.x.copy_(saved)
            return
        ids = self.own_ids()
        for rows in chunks(self.tokens, self.shape.hidden):
            self.x[rows] = self.pattern(ids[rows], input_set).to(torch.bfloat16)

    def own_ids(self) -> torch.Tensor:
        return torch.arange(self.own.start, self.own.stop, device=self.device)

    def pattern(self, ids: torch.Tensor, input_set: int) -> torch.Tensor:
        """[N, H] int32: the rows of these tokens as they are sent."""
        return pattern(ids, self.shape.hidden, input_set, self.amplitude)

    def payload(self, ids: torch.Tensor, input_set: int) -> torch.Tensor:
        """[N, H] float32: the rows of these tokens as they must arrive, after fp8 where that is the dtype."""
        sent = self.pattern(ids, input_set)
        return fp8.round_trip(sent, self.format) if self.shape.dtype == "fp8" else sent.to(torch.float32)

    def decode(self, rows: torch.Tensor, input_set: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [N] int64, known [N] bool) of received rows [N, H]. Where not known, the id is 0: the signs
        spell no token of this input set."""
        ids, known = decode(rows, input_set)
        capacity = max(self.capacity, 1)
        tokens = torch.tensor((*self.table.tokens, 0), device=self.device)
        source = (ids // capacity).clamp_(max=self.size)
        known &= ids % capacity < tokens[source]
        return torch.where(known, ids, 0), known

    def arrivals(self, layout: str) -> Arrivals:
        """What this rank must receive in a layout of `backends.base.Variant`, from the routing alone."""
        local = self.all_experts - self.first_local_expert
        here = (local >= 0) & (local < self.local_experts)
        local = torch.where(here, local, -1)
        weights = torch.where(here, self.all_weights, 0.0)
        if layout == "token-rank":
            ids = here.any(1).nonzero()[:, 0]
            return Arrivals(ids, local[ids], weights[ids])
        ids, pick = here.nonzero().unbind(1)
        return Arrivals(ids, local[ids, pick, None], weights[ids, pick, None])

    def weights_of(self, ids: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """[N, K'] float32: the weights that tokens `ids` [N] gave to local experts [N, K'], 0 for no pick."""
        experts = torch.where(local >= 0, local + self.first_local_expert, -2)
        match = self.all_experts[ids][:, None, :] == experts[:, :, None]
        return (match * self.all_weights[ids][:, None, :]).sum(2)


def check(shape: Moe, ranks: int) -> None:
    """Raises UserError for a shape whose rows cannot carry their code or their scales."""
    if shape.hidden < CODE_COLUMNS:
        raise UserError(
            f"hidden {shape.hidden} is below {CODE_COLUMNS}", "the oracle codes each row in 32 columns"
        )
    if shape.hidden * max(f.amplitude for f in fp8.FORMATS.values()) >= 1 << 24:
        raise UserError(f"hidden {shape.hidden} is too large", "the oracle adds up a row exactly in float32")
    if shape.dtype == "fp8" and shape.hidden % fp8.BLOCK:
        raise UserError(
            f"hidden {shape.hidden} is no multiple of {fp8.BLOCK}", "fp8 has a scale for 128 columns"
        )
    if shape.tokens * ranks > 1 << ID_BITS:
        raise UserError(
            f"{shape.tokens} tokens on {ranks} ranks are more than {1 << ID_BITS}",
            f"the oracle tells {1 << ID_BITS} tokens apart",
        )


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows, each at most CHUNK elements wide (or one row)."""
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def mix(x: Any) -> Any:
    """A 32-bit hash of integers (or of an int64 tensor); the constants, both below 2**31 so that no product
    leaves int64, are those of C. Wellons' hash-prospector ("lowbias32")."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def pattern(ids: torch.Tensor, hidden: int, input_set: int, amplitude: int) -> torch.Tensor:
    """[N, hidden] int32 rows of the tokens `ids` [N]; see the top of this file. The same on every device.

    Two 15-bit factors and a 30-bit addend stay below 2**31. At most one temporary beside the result.
    """
    key = mix(ids + mix(input_set + 1))
    factor = ((key & 0x7FFF) | 1).to(torch.int32)
    addend = (mix(key + 1) & 0x3FFFFFFF).to(torch.int32)
    columns = ((mix(torch.arange(hidden, device=ids.device) + 0x51ED) & 0x7FFF) | 1).to(torch.int32)
    rows = factor[:, None] * columns[None, :]
    rows += addend[:, None]
    rows ^= rows >> 13
    rows.remainder_(2 * amplitude).sub_(amplitude)
    rows += rows >= 0  # no zeros: -A .. -1, 1 .. A
    last = rows[:, fp8.BLOCK - 1 :: fp8.BLOCK]
    last.copy_(torch.where(last > 0, amplitude, -amplitude))
    code = ids | (_checksum(ids, input_set) << ID_BITS)
    bits = (code[:, None] >> torch.arange(CODE_COLUMNS, device=ids.device)) & 1
    head = rows[:, :CODE_COLUMNS]
    magnitude = CODE_MAGNITUDE + head.abs() % (amplitude - CODE_MAGNITUDE + 1)
    head.copy_(torch.where(bits == 1, -magnitude, magnitude))
    return rows


def decode(rows: torch.Tensor, input_set: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [N] int64, known [N] bool) from the signs of rows [N, H] of any float dtype. A row of zeros, of
    NaN or of another input set (but for one in 4095) is not known."""
    negative = rows[:, :CODE_COLUMNS].to(torch.float32) < 0
    code = (negative.to(torch.int64) << torch.arange(CODE_COLUMNS, device=rows.device)).sum(1)
    ids = code & ((1 << ID_BITS) - 1)
    return ids, (code >> ID_BITS) == _checksum(ids, input_set)


def _checksum(ids: torch.Tensor, input_set: int) -> torch.Tensor:
    # 1 .. 4095: the code of a row without a negative sign is nobody's.
    return mix(ids ^ mix(~input_set)) % 4095 + 1
