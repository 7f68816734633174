"""The all-reduce kernels of `symm_mem`; terms as in `_symm_kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from ._symm_kernels import COUNTERS, TURNS, signal, there, wait

_COUNTERS, _TURNS = tl.constexpr(COUNTERS), tl.constexpr(TURNS)


@triton.jit(do_not_specialize=["rank"])
def one_shot(
    given,  # [count]
    result,  # [count], may be `given`
    inbox,  # [2, R, room] in the window
    control,
    peers,
    private,
    count,
    room,
    rank,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Every rank sends all it has to all, and each adds up for itself. One crossing; halves in turns."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    turn = tl.load(private + _TURNS + pid) + 1
    half = (turn & 1).to(tl.int64) * R
    lane = tl.arange(0, BLOCK)
    for start in range(pid * BLOCK, count, programs * BLOCK):
        live = start + lane < count
        values = tl.load(given + start + lane, mask=live)
        for step in tl.static_range(R):
            distance = tl.load(peers + (rank + 1 + step) % R)
            place = there(inbox, distance) + (half + rank) * room + start + lane
            tl.store(place, values, mask=live)
    counter = control + _COUNTERS + (2 * pid + (turn & 1)) * 32
    signal(counter, peers, R, LANES)
    # Each half has a counter of its own: every second turn adds R to it.
    wait(counter, (turn + 1) // 2 * R, private, 3, POLLS)
    tl.store(private + _TURNS + pid, turn)
    for start in range(pid * BLOCK, count, programs * BLOCK):
        live = start + lane < count
        total = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(R):
            place = inbox + (half + source) * room + start + lane
            total += tl.load(place, mask=live, other=0.0).to(tl.float32)
        tl.store(result + start + lane, total.to(result.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["rank"])
def two_shot(
    given,  # [R * chunk]
    result,  # [R * chunk] in the window, may be `given`
    inbox,  # [R, chunk] in the window
    control,
    peers,
    private,
    chunk,
    rank,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Every rank adds up one R-th and sends the sum to all. Two crossings."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    target = tl.load(private + _TURNS + pid) + R
    lane = tl.arange(0, BLOCK)
    for start in range(pid * BLOCK, chunk, programs * BLOCK):
        live = start + lane < chunk
        for step in tl.static_range(R):
            peer = (rank + 1 + step) % R
            values = tl.load(given + peer * chunk + start + lane, mask=live)
            place = there(inbox, tl.load(peers + peer)) + rank * chunk + start + lane
            tl.store(place, values, mask=live)
    counter = control + _COUNTERS + 2 * pid * 32
    signal(counter, peers, R, LANES)
    wait(counter, target, private, 4, POLLS)
    for start in range(pid * BLOCK, chunk, programs * BLOCK):
        live = start + lane < chunk
        total = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(R):
            total += tl.load(inbox + source * chunk + start + lane, mask=live, other=0.0).to(tl.float32)
        for step in tl.static_range(R):
            distance = tl.load(peers + (rank + 1 + step) % R)
            place = there(result, distance) + rank * chunk + start + lane
            tl.store(place, total.to(result.dtype.element_ty), mask=live)
    signal(counter + 32, peers, R, LANES)
    wait(counter + 32, target, private, 5, POLLS)
    tl.store(private + _TURNS + pid, target)
