"""Which ranks share a scale-up domain: those of a node, or of the nodes that one NVLink fabric joins.

Traffic within a domain is scale-up, between domains scale-out; where a node ends says neither. Domains are
numbered from 0, one number per rank. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InfraError
from .ranks import node_of


def stated(ranks: int, nodes: int, nodes_per_domain: int | None) -> list[int]:
    """As the pool says. `nodes_per_domain`: None where nobody said; then every node is a domain."""
    return [node_of(rank, ranks // nodes) // (nodes_per_domain or 1) for rank in range(ranks)]


def realised(fabrics: Sequence[str | None], ranks_per_node: int) -> list[int] | None:
    """As the GPUs say, or None where they do not.

    fabrics   for each rank the identity of its GPU's fabric (nvml.fabric), None where it has none to tell: a
              fabric that ends at the node has no identity. GPUs of a node that disagree do not tell either.
    """
    nodes = [set(fabrics[first : first + ranks_per_node]) for first in range(0, len(fabrics), ranks_per_node)]
    if any(len(told) != 1 or None in told for told in nodes):
        return None
    numbers: dict[str | None, int] = {}
    return [numbers.setdefault(fabric, len(numbers)) for fabric in fabrics]


def placed(
    ranks: int, nodes: int, nodes_per_domain: int | None, fabrics: Sequence[str | None]
) -> tuple[list[int], str]:
    """The domains to go by, and who says so ("nvml", "sku", or "nodes" where nobody does).

    Raises InfraError where the GPUs contradict what the pool stated: the job would be filed under a topology
    class that it does not have.
    """
    plan = stated(ranks, nodes, nodes_per_domain)
    found = realised(fabrics, ranks // nodes) if nodes > 1 else None
    if found is None:
        return plan, "nodes" if nodes_per_domain is None else "sku"
    if nodes_per_domain is not None and found != plan:
        raise InfraError(
            f"the {nodes} nodes lie in {_said(found)}, the plan has them in {_said(plan)}",
            "ask for nodes of one domain (Slurm: --segment), or correct scale_up.domain of the SKU",
        )
    return found, "nvml"


def of_result(result: Mapping[str, Any]) -> list[int]:
    """The domain of every rank of a result; those without a placement have a domain per node."""
    placement, case = result.get("placement"), result["case"]
    return placement["domains"] if placement else stated(case["ranks"], case["nodes"], None)


def _said(domains: Sequence[int]) -> str:
    sizes = [str(domains.count(domain)) for domain in sorted(set(domains))]
    if len(sizes) == 1:
        return f"one scale-up domain of {sizes[0]} ranks"
    return f"{len(sizes)} scale-up domains of {', '.join(sizes)} ranks"
