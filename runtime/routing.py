"""Which experts every token picks: deterministic, and the same on every machine and torch version.

Every number is a keyed counter hash in integer arithmetic, draw(seed, stream, token, slot, attempt), with the
splitmix64 finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) as
the mixer. No random generator, no floating point: nothing depends on device, thread count or library version.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from dataclasses import dataclass
from decimal import ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal, localcontext

import torch

from .errors import UserError, unknown
from .types import Moe, Routing

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# Independent streams of the one seed.
_EXPERTS, _POPULARITY, _WEIGHTS = 1, 2, 3
# Rejections per slot before the draw is made among the experts that are left: the same distribution,
# but it ends for any skew.
_REJECTIONS = 16
_CHUNK = 4096  # rows drawn that way at a time: bounds the [rows, experts] scratch


@dataclass(frozen=True, eq=False)
class Table:
    """The picks of all tokens of all ranks; rank r's tokens are rows t = 0 .. tokens[r] - 1.

    tokens    tokens per rank
    experts   per source rank: [tokens[r], K] int64 on CPU, distinct within a row
    weights   per source rank: [tokens[r], K] float32 on CPU, m/16 with m in 1..15: sums and products with
              small integers are exact
    hash      sha256 (hex) over tokens, experts and weights
    """

    tokens: tuple[int, ...]
    experts: list[torch.Tensor]
    weights: list[torch.Tensor]
    hash: str


def build(shape: Moe, ranks: int) -> Table:
    """The routing of `shape` over `ranks` ranks. Raises UserError for an impossible shape."""
    check(shape, ranks)
    tokens = tokens_per_rank(shape.tokens, ranks, shape.routing.spread)
    # The global id rank * T + t does not depend on the spread: a token keeps its picks when others go.
    ids = torch.cat([torch.arange(n) + rank * shape.tokens for rank, n in enumerate(tokens)])
    popularity = expert_weights(shape.experts, shape.routing)
    experts = list(_pick(ids, shape.topk, popularity, shape.routing.seed).split(list(tokens)))
    weights = list(_gate_weights(ids, shape.topk, shape.routing.seed).split(list(tokens)))
    return Table(tokens, experts, weights, _digest(tokens, experts, weights))


def check(shape: Moe, ranks: int) -> None:
    """Raises UserError when `shape` cannot be routed over `ranks` ranks."""
    routing = shape.routing
    if routing.kind not in Routing.KINDS:
        raise unknown("routing", routing.kind, Routing.KINDS)
    if routing.spread not in Routing.SPREADS:
        raise unknown("spread of tokens", routing.spread, Routing.SPREADS)
    if not math.isfinite(routing.skew) or routing.skew < 0:
        raise UserError(f"a skew of {routing.skew} is not a number from 0 up", "Zipf's law has skew 1")
    if ranks < 1 or shape.experts < 1 or shape.topk < 1 or shape.tokens < 0:
        raise UserError(
            f"cannot route {shape.tokens} tokens to {shape.topk} of {shape.experts} experts on {ranks} ranks",
            "tokens may be zero; ranks, experts and topk are at least 1",
        )
    if shape.topk > shape.experts:
        raise UserError(
            f"topk {shape.topk} is more than the {shape.experts} experts", "a token picks distinct experts"
        )
    if shape.experts % ranks:
        raise UserError(
            f"{shape.experts} experts cannot be divided over {ranks} ranks",
            "use a number of ranks that divides the number of experts",
        )


def tokens_per_rank(tokens: int, ranks: int, spread: str) -> tuple[int, ...]:
    """Tokens each rank has; `spread` as in `types.Routing`."""
    if spread == "even":
        return (tokens,) * ranks
    if spread == "linear":
        return tuple(-(-tokens * (rank + 1) // ranks) for rank in range(ranks))
    if spread == "one-empty":
        return (tokens,) * (ranks - 1) + (0,)
    raise unknown("spread of tokens", spread, Routing.SPREADS)


def expert_weights(experts: int, routing: Routing) -> torch.Tensor:
    """Popularity of each expert: [experts] int64, proportional to the chance of being drawn first.

    Zipf: floor(2**32 / position**skew), at least 1. Positions are dealt to experts by a seeded permutation:
    otherwise rank 0 would own all the hot ones.
    """
    if routing.kind == "uniform":
        return torch.ones(experts, dtype=torch.int64)
    by_position = torch.tensor([_zipf_weight(position, routing.skew) for position in range(1, experts + 1)])
    keys = _hash(_stream(routing.seed, _POPULARITY), torch.arange(experts))
    order = torch.argsort(keys, stable=True)
    weights = torch.empty(experts, dtype=torch.int64)
    weights[order] = by_position
    return weights


def expected_distinct_ranks(experts: int, topk: int, ranks: int) -> float:
    """Mean number of distinct ranks that a token's `topk` experts live on, for uniform routing.

    E[D] = R * (1 - C(E - L, K) / C(E, K)), L = E / R: a rank is missed when all K distinct picks fall on
    the E - L experts of the others (hypergeometric distribution).
    """
    local = experts // ranks
    return ranks * (1 - math.comb(experts - local, topk) / math.comb(experts, topk))


def _zipf_weight(position: int, skew: float) -> int:
    # `decimal` and not float pow, whose last bit differs between C libraries. Rounded at 20 places first, so
    # that a quotient that is exactly an integer does not fall below it.
    with localcontext(Context(prec=60)):
        quotient = Decimal(2**32) / Decimal(position) ** Decimal(str(skew))
        exact = quotient.quantize(Decimal(1).scaleb(-20), rounding=ROUND_HALF_EVEN)
        return max(1, int(exact.to_integral_value(rounding=ROUND_FLOOR)))


def _pick(ids: torch.Tensor, topk: int, popularity: torch.Tensor, seed: int) -> torch.Tensor:
    """[N, topk] int64 distinct experts for the tokens `ids` [N], drawn by popularity without replacement."""
    keys = _hash(_stream(seed, _EXPERTS), ids)
    cumulative = popularity.cumsum(0)
    total = int(cumulative[-1])
    picks = torch.full((len(ids), topk), -1, dtype=torch.int64)
    for slot in range(topk):
        pending = torch.arange(len(ids))
        for attempt in range(_REJECTIONS):
            draw = _draw(keys[pending], slot, attempt) % total
            pick = torch.searchsorted(cumulative, draw, right=True)
            taken = (picks[pending, :slot] == pick[:, None]).any(dim=1)
            picks[pending[~taken], slot] = pick[~taken]
            pending = pending[taken]
            if not len(pending):
                break
        for rows in pending.split(_CHUNK):
            picks[rows, slot] = _pick_of_rest(keys[rows], picks[rows, :slot], popularity)
    return picks


def _pick_of_rest(keys: torch.Tensor, chosen: torch.Tensor, popularity: torch.Tensor) -> torch.Tensor:
    """[N] int64: one more expert for each row of `chosen` [N, slot], among those not yet chosen."""
    left = popularity.expand(len(keys), -1).clone().scatter_(1, chosen, 0)
    cumulative = left.cumsum(1)
    draw = _draw(keys, chosen.shape[1], _REJECTIONS)[:, None] % cumulative[:, -1:]
    return torch.searchsorted(cumulative, draw, right=True)[:, 0]


def _gate_weights(ids: torch.Tensor, topk: int, seed: int) -> torch.Tensor:
    keys = _hash(_stream(seed, _WEIGHTS), ids)
    numerators = [_draw(keys, slot, 0) % 15 + 1 for slot in range(topk)]
    return torch.stack(numerators, dim=1).to(torch.float32) / 16


def _stream(seed: int, stream: int) -> torch.Tensor:
    return _hash(torch.tensor(_signed(seed)), torch.tensor(stream))


def _draw(keys: torch.Tensor, slot: int, attempt: int) -> torch.Tensor:
    """Non-negative int64 below 2**63, one for each key. The bias of a modulus M is below M / 2**63."""
    return _hash(keys, torch.tensor(slot << 32 | attempt)) & (2**63 - 1)


def _hash(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """splitmix64's output for state `keys` advanced `counters` + 1 times: int64, wrapping."""
    z = keys + (counters + 1) * _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    # torch shifts int64 arithmetically; the mask makes it a logical shift.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _digest(tokens: tuple[int, ...], experts: list[torch.Tensor], weights: list[torch.Tensor]) -> str:
    """Little-endian int64 tokens, then per rank int64 experts and float32 weights, row by row."""
    sha = hashlib.sha256(_little_endian(array("q", tokens)))
    for picks, gates in zip(experts, weights, strict=True):
        sha.update(_little_endian(array("q", picks.flatten().tolist())))
        sha.update(_little_endian(array("f", gates.flatten().tolist())))
    return sha.hexdigest()


def _little_endian(values: array) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
