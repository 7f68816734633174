"""Physical limits, and the measurements that pretend to beat them. Standard library only.

Each tier's bytes stand against that tier's limit: what must move within scale-up domains against the links of
a GPU, what must cross between domains against the network of a node. Both are the least that any library can
move, so that only what is impossible is called so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import domains
from .bandwidth import bus_factor, gbps, implausible, limit_share

# Switch multicast lets a reduction beat the link: in-network arithmetic is a stated reason.
_IN_NETWORK = ("NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE")
_MAY_MULTICAST = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")


def limit_of(result: Mapping[str, Any], tier: str) -> Mapping[str, Any] | None:
    """The result's limit of a tier, in GB/s and one direction, or None where none is known: "scale_up" of a
    GPU, "scale_out" of a node with all its NICs."""
    return next((limit for limit in result["limits"] or () if limit["name"] == tier), None)


def carried(result: Mapping[str, Any], measurement: Mapping[str, Any]) -> Iterator[tuple[str, float, str]]:
    """(tier, GB/s at the median of the headline, what carries it) for each tier whose bytes are known."""
    component, time_us = measurement["component"], measurement[measurement["headline"]]["p50"]
    up = None
    if result["bytes"]["family"] == "moe":
        up = gbps("scale_up", result, component, time_us, of="mean")
    elif (
        len(set(domains.of_result(result))) == 1
    ):  # over several domains nobody knows what part of a collective stays within each
        up = gbps("busbw", result, component, time_us, of="mean")
    if up is not None:
        yield "scale_up", up, "over a link of"
    out = _crossing(result, component, time_us)
    if out is not None:
        yield "scale_out", out / result["case"]["nodes"], "out of a node whose network has"


def beats_limit(result: Mapping[str, Any], in_network: bool) -> str | None:
    """Why a result is implausible, in one sentence, or None.

    in_network   whether the fabric may have reduced or multicast on the way, which explains a busbw above the
                 link rate. Floors are left out: the fastest rank of a chain may find its data already there.
    """
    if result["bytes"] is None or in_network and result["case"]["shape"].get("op") in _MAY_MULTICAST:
        return None
    for measurement in result["measurements"]:
        if measurement["component"].endswith("_floor"):
            continue
        for tier, achieved, over in carried(result, measurement):
            limit = limit_of(result, tier)
            if limit is not None and implausible(limit_share(achieved, limit["GBps"])):
                return (
                    f"{measurement['regime']} {measurement['component']} would carry {achieved:.0f} GB/s "
                    f"{over} {limit['GBps']:g} GB/s ({limit['source']})"
                )
    return None


def _crossing(result: Mapping[str, Any], component: str, time_us: float) -> float | None:
    """GB/s that all nodes together sent to other scale-up domains, at least."""
    if result["bytes"]["family"] == "moe":
        return gbps("scale_out", result, component, time_us, of="total")
    if time_us <= 0:
        return None
    op, size = result["case"]["shape"]["op"], result["bytes"]["size"]
    return crossings(op, domains.of_result(result)) * size / time_us / 1e3


def crossings(op: str, domain_of: Sequence[int]) -> float:
    """Bytes that all ranks together must send to other domains, for each byte of S (nccl-tests' size).

    A domain that reduces and copies within itself first needs what a single rank in its place would need
    (`bus_factor` of the domains); all_to_all cannot share: of the S of each rank the part for other domains,
    which for all_to_all_v grows with the distance (as it is before parts are rounded to 16 bytes); sendrecv
    is a ring over the ranks; gather and scatter move the shares of the ranks outside the root's domain.
    """
    ranks, count = len(domain_of), len(set(domain_of))
    if op == "all_to_all":
        return ranks - sum(domain_of.count(domain) for domain in domain_of) / ranks
    if op == "all_to_all_v":
        pairs = ((rank, distance) for rank in range(ranks) for distance in range(1, ranks))
        away = sum(d for rank, d in pairs if domain_of[rank] != domain_of[(rank + d) % ranks])
        return away / max(1, ranks * (ranks - 1) // 2)
    if op in ("gather", "scatter"):
        return 1 - domain_of.count(domain_of[0]) / ranks
    if op == "sendrecv":
        return sum(domain_of[rank] != domain_of[rank - 1] for rank in range(ranks))
    if op in ("broadcast", "reduce"):
        return count - 1
    return count * bus_factor(op, count)


def may_reduce_in_network(environment: Mapping[str, str]) -> bool:
    """Whether the communication settings leave NVLS or SHARP possible (NCCL enables NVLS by default)."""
    return any(
        environment.get(name, "1" if name == "NCCL_NVLS_ENABLE" else "0") != "0" for name in _IN_NETWORK
    )
