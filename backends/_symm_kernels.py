"""The kernels of the exchange of `symm_mem`, which tells the protocol and why it holds.

Plain peer pointers and no inline assembly: NVIDIA, AMD and Triton's interpreter run the same code. To be
imported only where Triton is.

window   one rank's symmetric buffer; all windows are laid out alike
peers    [R] int64: each window's distance from ours in units of UNIT bytes
private  int32 memory that no peer sees
LANES    R rounded up to a power of two: the length of vectors over ranks
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = 128
# Words (int32) of the control block at the head of a window: signals that dispatch and combine have had, rows
# that each source has sent, counters of the collectives. Each counter has a line of 32 words to itself.
ARRIVED, ENTERED, COUNTS, COUNTERS = 0, 32, 64, 128
MAX_RANKS = COUNTERS - COUNTS
MAX_PROGRAMS = 128  # of a collective: its programs wait for their namesakes, so all of them must run at once
CONTROL = COUNTERS + 2 * 32 * MAX_PROGRAMS
# Words of private memory: what gave up waiting (0: nothing), signals that dispatch has awaited, and what each
# program of any other kernel has.
FAILED, AWAITED, TURNS = 0, 1, 2

_UNIT = tl.constexpr(UNIT)
_ARRIVED, _ENTERED, _COUNTS = tl.constexpr(ARRIVED), tl.constexpr(ENTERED), tl.constexpr(COUNTS)
_AWAITED, _TURNS = tl.constexpr(AWAITED), tl.constexpr(TURNS)


@triton.jit
def there(pointer, distance):
    """The place in another window that `pointer` is in ours.

    The constant factor tells the compiler that both are aligned alike; else it would move single elements.
    `pointer` comes from an argument that `_symm_window.far` made.
    """
    return pointer + distance * (_UNIT // (pointer.dtype.scalar.element_ty.primitive_bitwidth // 8))


@triton.jit
def signal(counter, peers, R: tl.constexpr, LANES: tl.constexpr):
    """Add one to this counter at every rank, after all that this program has read and written."""
    rank = tl.arange(0, LANES)
    theirs = there(counter + rank * 0, tl.load(peers + rank, mask=rank < R, other=0))
    tl.debug_barrier()
    tl.atomic_add(theirs, 1, mask=rank < R, sem="release", scope="sys")


@triton.jit
def wait(counter, target, private, CODE: tl.constexpr, POLLS: tl.constexpr):
    """Until our counter has reached `target` (both wrap around); what preceded those signals is visible then.

    Gives up after POLLS polls and leaves CODE in `private`. From then on nobody waits: a peer that died costs
    its time once, not at every call.
    """
    behind = tl.atomic_add(counter, 0, sem="acquire", scope="sys") - target
    if behind < 0:
        left = tl.where(tl.load(private) == 0, POLLS, 0)
        while (behind < 0) & (left > 0):
            behind = tl.atomic_add(counter, 0, sem="acquire", scope="sys") - target
            left -= 1
        if behind < 0:
            tl.store(private, CODE)
    tl.debug_barrier()


@triton.jit
def _hits(ids, LANES: tl.constexpr, PER_RANK: tl.constexpr):
    """ids [N, K] int32, -1 for none -> [N, LANES] int32: 1 where a token has an expert on a rank."""
    owner = tl.where(ids >= 0, ids // PER_RANK, -1)
    hit = owner[:, :, None] == tl.arange(0, LANES)[None, None, :]
    return tl.max(hit.to(tl.int32), axis=1)


@triton.jit
def _rows_before(
    topk,
    first,
    K: tl.constexpr,
    KP: tl.constexpr,
    LANES: tl.constexpr,
    PER_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[LANES] int32: how many of the tokens before `first` go to each rank."""
    total = tl.zeros([LANES], tl.int32)
    pick = tl.arange(0, KP)[None, :]
    for start in range(0, first, BLOCK):
        token = start + tl.arange(0, BLOCK)[:, None]
        ids = tl.load(topk + token * K + pick, mask=(token < first) & (pick < K), other=-1)
        total += tl.sum(_hits(ids.to(tl.int32), LANES, PER_RANK), axis=0)
    return total


@triton.jit
def _quantise(values, FMAX: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[TILE] -> (scaled float32 [TILE], scales [TILE / BLOCK]), bit for bit as in runtime/fp8.py."""
    blocks = tl.reshape(values.to(tl.float32), [TILE // BLOCK, BLOCK])
    largest = tl.maximum(tl.max(tl.abs(blocks), axis=1), TINY)
    limit = tl.full([TILE // BLOCK], FMAX, tl.float32)
    # div_rn: Triton's plain division is off by up to two units in the last place.
    inverse = tl.div_rn(limit, largest)
    return tl.reshape(blocks * inverse[:, None], [TILE]), tl.div_rn(largest, limit)


@triton.jit
def _share(tokens, PARTS: tl.constexpr):
    """(first, last, part) of this program: one part of the columns of the tokens from first to last - 1.

    Programs come in groups of PARTS. A group has consecutive tokens, the last group the last token.
    """
    pid, groups = tl.program_id(0), tl.num_programs(0) // PARTS
    each = tl.cdiv(tokens, groups)
    first = tl.minimum(pid // PARTS * each, tokens)
    return first, tl.minimum(first + each, tokens), pid % PARTS


@triton.jit(do_not_specialize=["tokens", "capacity", "rank"])
def dispatch(
    x,  # [tokens, H] bf16
    topk,  # [tokens, K] int64 expert ids
    weights,  # [tokens, K] float32
    slots,  # [tokens, R] int32, private: the slot of each token at each rank, -1 where it does not go
    rows,  # [R * capacity, H] bf16 or fp8, in the window: what each source has sent
    scales,  # [R * capacity, H / QUANT] float32, in the window
    meta,  # [R * capacity, WORDS] int32, in the window: K local ids, K weights, the token
    control,
    peers,
    private,
    tokens,
    capacity,
    rank,
    H: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,  # K rounded up to a power of two
    R: tl.constexpr,
    LANES: tl.constexpr,
    WORDS: tl.constexpr,
    META: tl.constexpr,  # WORDS rounded up to a power of two
    PER_RANK: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of a part
    TILE: tl.constexpr,  # CHUNK rounded up to a power of two
    BLOCK: tl.constexpr,  # tokens counted at a time
    KNOWN: tl.constexpr,  # the slots are those of an earlier call, and no metadata travels
    QUANT: tl.constexpr,  # 0, or columns per fp8 scale
    FMAX: tl.constexpr,
    TINY: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Send each token once to every rank that has one of its experts; end when all rows for us are here."""
    first, last, part = _share(tokens, PARTS)
    ranks, word, lane = tl.arange(0, LANES), tl.arange(0, META), tl.arange(0, TILE)
    column = part * CHUNK + lane
    inside = (lane < CHUNK) & (column < H)
    x += first.to(tl.int64) * H
    # Asked for here, so that it is on its way while the slots are counted.
    values = tl.load(x + column, mask=inside & (first < last), other=0.0)
    before = tl.zeros([LANES], tl.int32)
    if not KNOWN:
        before = _rows_before(topk, first, K, KP, LANES, PER_RANK, BLOCK)
    for token in range(first, last):
        if KNOWN:
            slot = tl.load(slots + token * R + ranks, mask=ranks < R, other=-1)
        else:
            ids = tl.load(topk + token * K + word, mask=word < K, other=-1).to(tl.int32)
            weight = tl.load(weights + token * K + word - K, mask=(word >= K) & (word < 2 * K), other=0.0)
            text = tl.where(word == 2 * K, token, weight.to(tl.int32, bitcast=True))
            hit = tl.reshape(_hits(ids[None, :], LANES, PER_RANK), [LANES])
            slot = tl.where(hit > 0, before, -1)
            before += hit
            tl.store(slots + token * R + ranks, slot, mask=(ranks < R) & (part == 0))
        if QUANT > 0:
            scaled, scale = _quantise(values, FMAX, TINY, QUANT, TILE)
            block = tl.arange(0, TILE // QUANT)
            within = (block < CHUNK // QUANT) & (part * (CHUNK // QUANT) + block < H // QUANT)
            sent = scaled.to(rows.dtype.element_ty)
        else:
            sent = values
        for step in tl.static_range(R):
            peer = (rank + 1 + step) % R  # every rank starts with another one
            at = tl.sum(tl.where(ranks == peer, slot, 0))
            row = rank.to(tl.int64) * capacity + at
            distance = tl.load(peers + peer)
            tl.store(there(rows, distance) + row * H + column, sent, mask=inside & (at >= 0))
            if QUANT > 0:
                place = there(scales, distance) + row * (H // QUANT) + part * (CHUNK // QUANT) + block
                tl.store(place, scale, mask=within & (at >= 0))
            if not KNOWN:
                local = ids - peer * PER_RANK
                local = tl.where((ids >= 0) & (local >= 0) & (local < PER_RANK), local, -1)
                mask = (word < WORDS) & (at >= 0) & (part == 0)
                tl.store(
                    there(meta, distance) + row * WORDS + word, tl.where(word < K, local, text), mask=mask
                )
        x += H
        values = tl.load(x + column, mask=inside & (token + 1 < last), other=0.0)
    waits = tl.program_id(0) == tl.num_programs(0) - 1
    if not KNOWN:
        # The last program's tokens end with the last: it has counted them all.
        theirs = there(control + _COUNTS + rank + ranks * 0, tl.load(peers + ranks, mask=ranks < R, other=0))
        tl.store(theirs, before, mask=(ranks < R) & waits)
    signal(control + _ARRIVED, peers, R, LANES)
    if waits:
        target = tl.load(private + _AWAITED) + R * tl.num_programs(0)
        wait(control + _ARRIVED, target, private, 1, POLLS)
        tl.store(private + _AWAITED, target)


@triton.jit(do_not_specialize=["tokens", "capacity", "rank"])
def combine(
    staged,  # [R * capacity, H] bf16, in the window: what goes back, by source and slot
    slots,  # [tokens, R] int32, as dispatch left them
    out,  # [tokens, H] bf16
    control,
    peers,
    private,
    tokens,
    capacity,
    rank,
    H: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    POLLS: tl.constexpr,
):
    """Fetch each token's rows from the ranks that have one and add them up in float32, in rank order."""
    turns = private + _TURNS + tl.program_id(0)
    target = tl.load(turns) + R
    if tl.program_id(0) == 0:
        signal(control + _ENTERED, peers, R, LANES)
    wait(control + _ENTERED, target, private, 2, POLLS)
    tl.store(turns, target)
    first, last, part = _share(tokens, PARTS)
    lane = tl.arange(0, TILE)
    column = part * CHUNK + lane
    inside = (lane < CHUNK) & (column < H)
    out += first.to(tl.int64) * H
    for token in range(first, last):
        total = tl.zeros([TILE], tl.float32)
        for peer in tl.static_range(R):
            at = tl.load(slots + token * R + peer)
            row = rank.to(tl.int64) * capacity + at
            place = there(staged, tl.load(peers + peer)) + row * H + column
            total += tl.load(place, mask=inside & (at >= 0), other=0.0).to(tl.float32)
        tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)
        out += H
