"""Inputs and expected outputs of collectives: exact in every dtype, coded by rank and position.

The value of rank r at position i in input set s is (hash(r, i) + s) mod m + 1: from one set to the next
it changes at every position. Copies use m = 251 (exact in bfloat16). Sums use the largest m with ranks *
m <= 256 in bfloat16 (2048 in float16, 251 * ranks in float32): sums of integers up to there are exact in
any order. As no value is 0, a missing rank shows at every position.

Root is rank 0. sendrecv is a ring: rank r sends to r + 1, receives from r - 1. all_to_all has equal chunks,
all_to_all_v those of `bandwidth.all_to_all_v_bytes`, in the order of the ranks on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..backends.base import CollectiveCall
from .bandwidth import all_to_all_v_bytes, all_to_all_v_requested
from .device import Device
from .poison import poison
from .problem import CHUNK, mix
from .types import Check

ROOT = 0
SUMS = ("all_reduce", "reduce_scatter", "reduce")
LARGEST = 251  # distinct values of a copy
_EXACT_TO = {torch.bfloat16: 256, torch.float16: 2048}


def collective_input(
    op: str,
    rank: int,
    ranks: int,
    numel: int,
    dtype: torch.dtype,
    input_set: int,
    device: torch.device,
) -> torch.Tensor:
    """[numel] what rank `rank` puts in."""
    out = torch.empty(numel, dtype=dtype, device=device)
    _fill(out, op, rank, ranks, input_set)
    return out


def collective_expected(
    op: str,
    rank: int,
    ranks: int,
    numel: int,
    dtype: torch.dtype,
    input_set: int,
    device: torch.device,
) -> torch.Tensor | None:
    """[numel] what rank `rank` must find in its output, or None where the operation promises it nothing."""
    if not _has_output(op, rank):
        return None
    out = torch.empty(numel, dtype=dtype, device=device)
    for start, stop, values in _expected(op, rank, ranks, numel, dtype, input_set, device):
        out[start:stop] = values
    return out


def check_collective(
    call: CollectiveCall,
    op: str,
    rank: int,
    ranks: int,
    input_set: int,
    device: Device,
    phase: str = "before",
) -> list[Check]:
    """One checked call: poison, fill, run, compare. Every rank calls it; two checks come back on each."""
    prepare_collective(call, op, rank, ranks, input_set)
    device.synchronize()
    call.run()
    device.synchronize()
    return check_left(call, op, rank, ranks, input_set, phase)


def prepare_collective(call: CollectiveCall, op: str, rank: int, ranks: int, input_set: int) -> None:
    """Poison the output, then fill the input: in place the one is part of the other."""
    poison([call.output])
    _fill(call.input, op, rank, ranks, input_set)


def check_left(
    call: CollectiveCall, op: str, rank: int, ranks: int, input_set: int, phase: str
) -> list[Check]:
    """What calls on this input set left: "output" and "inputs unchanged". The device is drained.

    Out of place the input must be as it was. Where input and output share memory, only the output counts.
    After several calls only where `repeats` says that each does the same.
    """
    found = _output_detail(call, op, rank, ranks, input_set)
    kept = None if _overlap(call.input, call.output) else _input_detail(call, op, rank, ranks, input_set)
    return [
        Check("output", phase, found is None, detail=found),
        Check("inputs unchanged", phase, kept is None, detail=kept),
    ]


def repeats(call: CollectiveCall, op: str) -> bool:
    """Whether a second call on what the first left does the same. In place, only where nobody's own part
    changes: sums grow, and exchanged parts go on to the next rank."""
    return op in ("all_gather", "gather", "broadcast", "scatter") or not _overlap(call.input, call.output)


def modulus(op: str, ranks: int, dtype: torch.dtype) -> int:
    """How many distinct values an input has. Raises ValueError where not even sums of ones are exact."""
    if op not in SUMS:
        return LARGEST
    distinct = min(LARGEST, _EXACT_TO.get(dtype, LARGEST * ranks) // ranks)
    if distinct < 1:
        raise ValueError(f"sums over {ranks} ranks are not exact in {dtype}")
    return distinct


def input_set_of(value: float, op: str, rank: int, ranks: int, dtype: torch.dtype) -> int:
    """The input set, modulo `modulus`, that position 0 of this rank's input shows."""
    m = modulus(op, ranks, dtype)
    at_zero = int(_values(op, rank, ranks, 0, 1, dtype, 0, torch.device("cpu"))[0])
    return (int(value) - at_zero) % m


def _values(
    op: str,
    source: int,
    ranks: int,
    start: int,
    stop: int,
    dtype: torch.dtype,
    input_set: int,
    device: torch.device,
) -> torch.Tensor:
    """[stop - start] int64: positions start .. stop - 1 of the input of rank `source`."""
    m = modulus(op, ranks, dtype)
    position = torch.arange(start, stop, device=device)
    return (mix(position + mix(source + 1)) + input_set % m) % m + 1


def _fill(tensor: torch.Tensor, op: str, rank: int, ranks: int, input_set: int) -> None:
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), CHUNK):
        stop = min(start + CHUNK, flat.numel())
        flat[start:stop] = _values(op, rank, ranks, start, stop, tensor.dtype, input_set, tensor.device)


def _has_output(op: str, rank: int) -> bool:
    # A broadcast need not write the root's own output, a reduce or gather nobody's but the root's.
    return not (op in ("reduce", "gather") and rank != ROOT or op == "broadcast" and rank == ROOT)


def _sources(
    op: str, rank: int, ranks: int, numel: int, width: int
) -> Iterator[tuple[int, int, tuple[int, ...], int]]:
    """(start, stop, sources, position): elements start .. stop - 1 of the output, of `width` bytes each, are
    the (summed) inputs of `sources` from `position` on."""
    if op in ("all_gather", "gather", "all_to_all"):
        chunk = numel // ranks
        for source in range(ranks):
            position = rank * chunk if op == "all_to_all" else 0
            yield source * chunk, (source + 1) * chunk, (source,), position
    elif op in ("all_reduce", "reduce"):
        yield 0, numel, tuple(range(ranks)), 0
    elif op == "reduce_scatter":
        yield 0, numel, tuple(range(ranks)), rank * numel
    elif op == "scatter":
        yield 0, numel, (ROOT,), rank * numel
    elif op == "all_to_all_v":
        size, start = all_to_all_v_requested(numel * width, ranks), 0
        for source in range(ranks):
            sent = [part // width for part in all_to_all_v_bytes(size, source, ranks)[0]]
            yield start, start + sent[rank], (source,), sum(sent[:rank])
            start += sent[rank]
    elif op == "broadcast":
        yield 0, numel, (ROOT,), 0
    elif op == "sendrecv":
        yield 0, numel, ((rank - 1) % ranks,), 0
    else:
        raise ValueError(f"no oracle for {op!r}")


def _expected(
    op: str, rank: int, ranks: int, numel: int, dtype: torch.dtype, input_set: int, device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, values int64) in pieces that bound the memory."""
    for first, last, sources, position in _sources(op, rank, ranks, numel, dtype.itemsize):
        for start in range(first, last, CHUNK):
            stop = min(start + CHUNK, last)
            at = position + start - first
            total = _values(op, sources[0], ranks, at, at + stop - start, dtype, input_set, device)
            for source in sources[1:]:
                total += _values(op, source, ranks, at, at + stop - start, dtype, input_set, device)
            yield start, stop, total


def _output_detail(call: CollectiveCall, op: str, rank: int, ranks: int, input_set: int) -> str | None:
    detail = _form(call, op, ranks)
    if detail is not None or not _has_output(op, rank):
        return detail
    out = call.output.view(-1)
    numel, wrong, evidence = out.numel(), 0, None
    for start, stop, values in _expected(op, rank, ranks, numel, out.dtype, input_set, out.device):
        count, first = _compare(out[start:stop], values, start)
        wrong, evidence = wrong + count, evidence or first
    return None if evidence is None else f"{wrong} of {numel} elements wrong, first: {evidence}"


def _input_detail(call: CollectiveCall, op: str, rank: int, ranks: int, input_set: int) -> str | None:
    given = call.input.view(-1)
    numel, wrong, evidence = given.numel(), 0, None
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        values = _values(op, rank, ranks, start, stop, given.dtype, input_set, given.device)
        count, first = _compare(given[start:stop], values, start)
        wrong, evidence = wrong + count, evidence or first
    return None if evidence is None else f"{wrong} of {numel} input elements changed, first: {evidence}"


def _compare(found: torch.Tensor, values: torch.Tensor, start: int) -> tuple[int, str | None]:
    """(elements that differ, the first of them); the int64 values are exact in the dtype of `found`."""
    expected = values.to(found.dtype)
    if torch.equal(found, expected):
        return 0, None
    wrong = (found != expected).nonzero()[:, 0]
    at = int(wrong[0])
    return len(wrong), f"element {start + at} is {float(found[at]):g}, expected {float(expected[at]):g}"


def _form(call: CollectiveCall, op: str, ranks: int) -> str | None:
    """Whether the sizes belong together."""
    sent, received = call.input.numel(), call.output.numel()
    gathers, scatters = op in ("all_gather", "gather"), op in ("reduce_scatter", "scatter")
    if sent * (ranks if gathers else 1) != received * (ranks if scatters else 1):
        return f"{op} over {ranks} ranks of {sent} elements cannot give {received}"
    moved = received * call.output.element_size()
    size = all_to_all_v_requested(moved, ranks)
    if op == "all_to_all_v" and moved != sum(all_to_all_v_bytes(size, 0, ranks)[0]):
        return f"{op} over {ranks} ranks has no size of which each sends {moved} bytes"
    if call.input.dtype != call.output.dtype:
        return f"input is {call.input.dtype}, output {call.output.dtype}"
    return None


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    a_end, b_end = (t.data_ptr() + t.numel() * t.element_size() for t in (a, b))
    return a.data_ptr() < b_end and b.data_ptr() < a_end
