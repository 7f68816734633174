"""Physical limits, and the measurements that pretend to beat them. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .bandwidth import gbps, implausible, limit_share

# Switch multicast lets a reduction beat the link: in-network arithmetic is a stated reason.
_IN_NETWORK = ("NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE")


def scale_up_limit(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result's scale-up limit (GB/s per rank and direction), or None where none is known."""
    return next((limit for limit in result["limits"] or () if limit["name"] == "scale_up"), None)


def link_bandwidth(result: Mapping[str, Any], measurement: Mapping[str, Any]) -> float | None:
    """GB/s that a rank's link carried at the median of the headline: busbw, or the remote rows' rate."""
    formula = "busbw" if result["bytes"]["family"] == "collective" else "remote"
    time_us = measurement[measurement["headline"]]["p50"]
    return gbps(formula, result, measurement["component"], time_us, of="mean")


def beats_limit(result: Mapping[str, Any], in_network: bool) -> str | None:
    """Why a result is implausible, in one sentence, or None.

    in_network   whether the fabric may have reduced or multicast on the way, which explains a busbw above the
                 link rate. Floors are left out: the fastest rank of a chain may find its data already there.
    """
    limit = scale_up_limit(result)
    if limit is None or result["bytes"] is None:
        return None
    if in_network and result["case"]["shape"].get("op") in (
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "broadcast",
    ):
        return None
    for measurement in result["measurements"]:
        if measurement["component"].endswith("_floor"):
            continue
        achieved = link_bandwidth(result, measurement)
        if achieved is not None and implausible(limit_share(achieved, limit["GBps"])):
            return (
                f"{measurement['regime']} {measurement['component']} would carry {achieved:.0f} GB/s "
                f"over a link of {limit['GBps']:g} GB/s ({limit['source']})"
            )
    return None


def may_reduce_in_network(environment: Mapping[str, str]) -> bool:
    """Whether the communication settings leave NVLS or SHARP possible (NCCL enables NVLS by default)."""
    return any(
        environment.get(name, "1" if name == "NCCL_NVLS_ENABLE" else "0") != "0" for name in _IN_NETWORK
    )
