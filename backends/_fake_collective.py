"""Collectives of the fake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runtime.bandwidth import all_to_all_v_bytes, all_to_all_v_requested, collective_counts
from ..runtime.types import Case, Collective
from ._fake_plan import Plan
from ._fake_rows import bits
from .base import Context

if TYPE_CHECKING:
    import torch


class Call:
    """One collective. The input set is read from the input itself."""

    def __init__(self, plan: Plan, context: Context, case: Case, shape: Collective):
        import torch

        self.plan, self.realised, self.op = plan, plan.realised, shape.op
        self.rank, self.ranks = context.ranks.rank, context.ranks.size
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[shape.dtype]
        sent, received, _ = collective_counts(shape.op, shape.bytes, shape.dtype, self.ranks)
        memory = torch.zeros(max(sent, received), dtype=dtype, device=context.device.torch_device)
        mine = slice(self.rank * min(sent, received), (self.rank + 1) * min(sent, received))
        if case.mode == "out-of-place":
            self.input, self.output = memory.new_zeros(sent), memory.new_zeros(received)
        elif sent == received:
            self.input = self.output = memory
        else:  # the smaller buffer is this rank's part of the larger one
            self.input, self.output = (memory[mine], memory) if sent < received else (memory, memory[mine])
        self.calls, self.input_set = 0, 0
        self.known: dict[int, torch.Tensor | None] = {}
        self.before: torch.Tensor | None = None

    def run(self) -> None:
        call, self.calls = self.calls, self.calls + 1
        self.plan.enter(call)
        self.plan.spend("call")
        expected = self._expected()
        if expected is not None:
            self._write(expected, call)
        if self.plan.strikes("input-modified", call):
            self.input[0] *= -1

    def close(self) -> None:
        return None

    def _expected(self) -> torch.Tensor | None:
        from ..runtime import collective_oracle as oracle

        input_set = oracle.input_set_of(
            float(self.input[0]), self.op, self.rank, self.ranks, self.input.dtype
        )
        if input_set not in self.known:
            if len(self.known) >= 4:
                self.known.clear()
            out = self.output
            self.known[input_set] = oracle.collective_expected(
                self.op, self.rank, self.ranks, out.numel(), out.dtype, input_set, out.device
            )
        self.input_set = input_set
        return self.known[input_set]

    def _write(self, expected: torch.Tensor, call: int) -> None:
        strikes = self.plan.strikes
        right, out, count = expected, expected.clone(), expected.numel()
        if strikes("zeroed-output", call):
            out.zero_()
        if strikes("nan", call):
            out[count // 2] = float("nan")
        if strikes("output-bit-flip", call):
            bits(out)[count // 2] ^= 1
        if strikes("corruption-1-in-70", call) or strikes("late-corruption", call):
            out[0] += 1
        if strikes("wrong-chunk-order", call):
            out = out.roll(max(1, count // self.ranks))
        if strikes("missing-rank", call):
            out = self._without_last(out)
        if strikes("bf16-accumulation", call):
            out = out.bfloat16().to(out.dtype)
        if strikes("stale-output", call):
            out = self.before if self.before is not None else out[:0]
        end = len(out) - strikes("partial-write", call)
        self.output[:end] = out[:end]
        self.before = right

    def _without_last(self, out: torch.Tensor) -> torch.Tensor:
        from ..runtime import collective_oracle as oracle

        count = out.numel()
        if self.op not in oracle.SUMS:
            out[self._first_of_last(count, out.itemsize) :] = 0
            return out
        last, first = self.ranks - 1, self.rank * count if self.op == "reduce_scatter" else 0
        theirs = oracle.collective_input(
            self.op, last, self.ranks, first + count, out.dtype, self.input_set, out.device
        )
        return out - theirs[first:]

    def _first_of_last(self, count: int, width: int) -> int:
        """Where the last rank's part of a copied output begins; 0 where the output is one rank's."""
        if self.op == "all_to_all_v":
            size = all_to_all_v_requested(count * width, self.ranks)
            return count - all_to_all_v_bytes(size, self.rank, self.ranks)[1][-1] // width
        gathered = self.op in ("all_gather", "gather", "all_to_all")
        return count // self.ranks * (self.ranks - 1) if gathered else 0
