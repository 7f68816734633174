"""How many rows and selections go where: the counts from which every MoE bandwidth is derived.

A selection is one valid (token, expert) pick; a row is one unique (token, destination rank) pair; a node row
one unique (token, destination scale-up domain) pair, for libraries that send a token once to where NVLink
takes over and call that a node. Tiers as seen from a rank: self (the rank itself), scale_up (another rank of
its domain, on whatever node), scale_out (a rank of another domain). See domains.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .types import Moe

if TYPE_CHECKING:
    import torch

    from .routing import Table

    Experts = Table | Sequence[torch.Tensor] | Sequence[Sequence[Sequence[int]]]

TIERS: tuple[str, ...] = ("self", "scale_up", "scale_out")


def count(table: Experts, shape: Moe, domains: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each rank, in the form of bytes_moe.ranks of the result schema, for one dispatch.

    table     a routing table, or its experts: per source rank [T_r, K] global expert ids (tensor or nested
              lists), negative where there is no pick
    domains   for each rank its scale-up domain, numbered from 0
    """
    import torch

    ranks, domain_of = len(domains), torch.tensor(domains)
    selections, rows, node_rows = [], [], []  # each a list over source ranks of counts per destination
    tokens = []
    for experts in _experts(table, shape.topk):
        tokens.append(len(experts))
        owner = experts.div(shape.experts // ranks, rounding_mode="floor")
        targets = domain_of[owner.clamp(min=0)].where(owner >= 0, -1)
        selections.append(owner[owner >= 0].bincount(minlength=ranks).tolist())
        rows.append(_unique_per_token(owner, ranks))
        node_rows.append(_unique_per_token(targets, max(domains) + 1))
    if len(tokens) != ranks:
        raise ValueError(f"the routing is over {len(tokens)} ranks, not {ranks}")

    entries = []
    for rank in range(ranks):
        own = node_rows[rank][domains[rank]]
        received = [[source[rank] for source in matrix] for matrix in (rows, selections)]
        entries.append(
            {
                "tokens": tokens[rank],
                "selections": sum(selections[rank]),
                "rows_sent": _by_tier(rows[rank], rank, domains),
                "rows_received": _by_tier(received[0], rank, domains),
                "selections_sent": _by_tier(selections[rank], rank, domains),
                "selections_received": _by_tier(received[1], rank, domains),
                "node_rows_sent": {"own": own, "other": sum(node_rows[rank]) - own},
            }
        )
    return entries


def summary(table: Experts, shape: Moe, ranks: int) -> dict[str, float]:
    """What routing_proof says about a routing over all its tokens; both are 0 when there is no pick at all.

    mean_distinct_ranks         ranks that a token's picks live on, averaged over tokens
    expert_load_max_over_mean   picks of the most picked expert over the mean of all experts; 1 is balanced
    """
    tokens = distinct = 0
    load = [0] * shape.experts
    for experts in _experts(table, shape.topk):
        owner = experts.div(shape.experts // ranks, rounding_mode="floor")
        tokens += len(experts)
        distinct += sum(_unique_per_token(owner, ranks))
        picks = experts[experts >= 0].bincount(minlength=shape.experts).tolist()
        load = [a + b for a, b in zip(load, picks, strict=True)]
    if not any(load):
        return {"mean_distinct_ranks": 0.0, "expert_load_max_over_mean": 0.0}
    return {
        "mean_distinct_ranks": distinct / tokens,
        "expert_load_max_over_mean": max(load) * shape.experts / sum(load),
    }


def _experts(table: Experts, topk: int) -> list[torch.Tensor]:
    import torch

    from .routing import Table

    per_rank = table.experts if isinstance(table, Table) else table
    # The reshape gives an empty list of a rank without tokens its second dimension.
    return [torch.as_tensor(e, dtype=torch.int64).reshape(-1, topk) for e in per_rank]


def _unique_per_token(targets: torch.Tensor, size: int) -> list[int]:
    """For each of `size` targets, in how many rows of `targets` [T, K] it stands; negatives do not count."""
    import torch

    seen = torch.zeros(len(targets), size + 1, dtype=torch.bool)  # the last column takes the negatives
    seen.scatter_(1, targets.where(targets >= 0, torch.full_like(targets, size)), True)
    return seen[:, :size].sum(dim=0).tolist()


def _by_tier(per_peer: Sequence[int], rank: int, domains: Sequence[int]) -> dict[str, int]:
    tiers = dict.fromkeys(TIERS, 0)
    for peer, n in enumerate(per_peer):
        if peer == rank:
            tiers["self"] += n
        elif domains[peer] == domains[rank]:
            tiers["scale_up"] += n
        else:
            tiers["scale_out"] += n
    return tiers
