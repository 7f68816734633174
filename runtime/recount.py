"""Bytes, counts and routing of a result, made again from its case: none of them is measured.

Routing is made with torch, which the host half can be without; `untold` says so. Every function yields
sentences about what does not agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from . import bandwidth, domains
from .errors import UserError
from .types import PROGRAM_REGIMES, Case, Collective, Moe

LARGEST_PICKS = 1 << 25  # of all tokens: about a minute and 2 GiB to route; 8192 tokens on 512 ranks are that
LARGEST_EXPERTS = 1 << 16

Document = Mapping[str, Any]


def problems(document: Document, case: Case) -> Iterator[str]:
    """What a result's `bytes` and `routing_proof` say beside what its case gives."""
    for name in ("bytes", "routing_proof") if isinstance(case.shape, Moe) else ("bytes",):
        if document[name] is None and document["measurements"]:
            yield f"{name}: none, and still there are measurements"
    if isinstance(case.shape, Collective):
        if document["bytes"] is not None:
            yield from _collective(document["bytes"], case, case.shape)
    elif untold(document, case) is None:
        yield from _exchange(document, case, case.shape)


def untold(document: Document, case: Case) -> str | None:
    """Why the routing of a result cannot be made again here, in a sentence; None where it can, or where
    there is none."""
    if not isinstance(case.shape, Moe) or document["bytes"] is document["routing_proof"] is None:
        return None
    shape = case.shape
    if shape.tokens * case.ranks * shape.topk > LARGEST_PICKS or shape.experts > LARGEST_EXPERTS:
        return "routing of that size is not made again: its counts and its hash are taken as they are"
    if find_spec("torch") is None:
        return "routing is not made again without torch: counts and hashes of exchanges are taken as they are"
    return None


def _collective(block: Document, case: Case, shape: Collective) -> Iterator[str]:
    """Ours realise what collective_counts says; a program may round down to 16 bytes for each rank."""
    if block["family"] != case.family:
        return  # said already
    if block["requested"] != shape.bytes:
        yield f"bytes.requested: its case gives {shape.bytes}, not {block['requested']}"
    if set(case.regimes) <= set(PROGRAM_REGIMES):
        if not shape.bytes - bandwidth.ALIGN * case.ranks < block["size"] <= shape.bytes:
            yield f"bytes.size: {block['size']} is not what a program makes of {shape.bytes}"
        return
    try:
        size = bandwidth.collective_bytes(shape, case.ranks)["size"]
    except ValueError as error:  # an operation that only programs have
        yield f"bytes.size: {error}"
        return
    if block["size"] != size:
        yield f"bytes.size: its case gives {size}, not {block['size']}"


def _exchange(document: Document, case: Case, shape: Moe) -> Iterator[str]:
    told = tuple(domains.of_result(document))
    if len(told) != case.ranks or max(told) >= case.ranks:
        return  # said already
    try:
        # Only these fields make the routing: cells of several dtypes and workloads share it.
        made = _routed(replace(shape, workload="", hidden=0, dtype="bf16"), case.ranks, told)
    except (UserError, ArithmeticError) as error:  # ArithmeticError: a skew beyond what decimals hold
        yield f"case.shape: cannot be routed: {error}"
        return
    proof, block = document["routing_proof"], document["bytes"]
    if proof is not None:
        yield from _unlike(made["proof"], proof, "routing_proof")
    if block is not None and block["family"] == case.family:
        expected = bandwidth.moe_bytes(shape, made["ranks"])
        del expected["wire"]  # what the library said of itself
        yield from _unlike(expected, block, "bytes")


def _unlike(expected: Any, found: Any, at: str) -> Iterator[str]:
    """Where `found` differs from `expected`, which says what is compared."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            yield from _unlike(value, found[name], f"{at}.{name}")
    elif isinstance(expected, list):
        if len(expected) == len(found):  # else said already
            for i, value in enumerate(expected):
                yield from _unlike(value, found[i], f"{at}[{i}]")
    elif expected != found:
        yield f"{at}: its case gives {expected}, not {found}"


@lru_cache(maxsize=512)
def _routed(shape: Moe, ranks: int, told: tuple[int, ...]) -> dict[str, Any]:
    """{"proof": what routing_proof says of it, "ranks": its counts}."""
    from . import counts, routing  # with torch

    table = routing.build(shape, ranks)
    proof = {"hash": table.hash, **counts.summary(table, shape, ranks)}
    return {"proof": proof, "ranks": counts.count(table, shape, told)}
