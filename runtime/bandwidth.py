"""Every GB/s by a named formula: bytes counted from the workload over a measured time, 1 GB = 1e9 bytes.

The numerators in circulation differ by up to a factor of four for the same transfer (per selection, per
unique token-rank row, per unique token-node row), so results store counts and each number names its formula:

    gbps("busbw", document, "call", time_us)            document: mapping with the result's "case" and "bytes"
    gbps("remote", document, "dispatch", time_us, of=3)

Collectives: all numerators follow nccl-tests (doc/PERFORMANCE.md and src/*.cu, version 2.19.6). S is its size
column: the bytes of a rank's buffer for all_reduce, broadcast, reduce, sendrecv and all_to_all (own share
included), of the whole gathered, scattered or unreduced buffer for all_gather, hypercube, gather, scatter and
reduce_scatter, and what a rank sends in all for all_to_all_v.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from .errors import unknown
from .types import DTYPE_BYTES, Collective, Moe

IMPLAUSIBLE_SHARE = 1.02
FP8_BLOCK = 128  # values that share one float32 scale
ALIGN = 16  # bytes; nccl-tests rounds the shares of ranks down to whole multiples
_DEEPEP_LL_HEADER = 16  # DeepEP's low-latency bench counts a 16-byte header with every fp8 row
_FLASHINFER_PICK = 8  # FlashInfer's counts an int32 id and a float32 weight with every pick that leaves

Document = Mapping[str, Any]
PerRank = Callable[[Document, str], "list[float] | None"]

# Operations whose S is shared out over the ranks, and whose busbw is therefore (n-1)/n of their algbw.
# nccl-tests has this factor for all_to_all_v too, though its S has no share of the rank's own. Both its algbw
# and its busbw of hypercube are S (n-1)/n over the time.
SHARED_OUT = (
    *("all_gather", "reduce_scatter", "all_to_all"),
    *("gather", "scatter", "all_to_all_v", "hypercube"),
)
# What a timed component moves. A floor moves what its operation moves; anything else moves nothing counted.
_PARTS = {"dispatch": ("dispatch",), "combine": ("combine",), "roundtrip": ("dispatch", "combine")}


@dataclass(frozen=True)
class Formula:
    """A named bandwidth.

    definition   its numerator, in a sentence
    source       who counts like this, and where
    quoted       how its source quotes it: the mean over ranks, or the total of all ranks
    per_rank     (document, part) -> bytes of each rank, or None where the document does not tell;
                 part is "call", "dispatch" or "combine"
    """

    name: str
    family: str
    definition: str
    source: str
    per_rank: PerRank
    quoted: Literal["mean", "total"] = "mean"
    unit: ClassVar[str] = "GB/s"


def gbps(
    name: str,
    document: Document,
    component: str,
    time_us: float,
    of: int | Literal["mean", "total"] | None = None,
) -> float | None:
    """Bandwidth of one component by one formula; the caller chooses the time (average, max, a percentile).

    of   a rank, the "mean" over ranks, the "total" of all ranks, or None for what the formula's source quotes
    None where the document has no such bytes or the time is not above 0. Raises UserError for an unknown
    name and ValueError for a formula of another family.
    """
    if name not in FORMULAS:
        raise unknown("bandwidth formula", name, FORMULAS)
    formula = FORMULAS[name]
    if formula.family != document["bytes"]["family"]:
        raise ValueError(f"{name} is a formula for {formula.family}")
    per_rank = _bytes(formula, document, component)
    if per_rank is None or time_us <= 0:
        return None
    of = formula.quoted if of is None else of
    if of == "total":
        moved = sum(per_rank)
    elif of == "mean":
        moved = sum(per_rank) / len(per_rank)
    else:
        moved = per_rank[of]
    return moved / time_us / 1e3  # bytes per microsecond are MB/s


def shared_out(name: str, quoted: float, ranks: int) -> dict[str, float]:
    """A bandwidth as its formula's source quotes it, per rank (the mean over ranks) and in all."""
    if FORMULAS[name].quoted == "total":
        return {"per_rank": quoted / ranks, "aggregate": quoted}
    return {"per_rank": quoted, "aggregate": quoted * ranks}


def limit_share(achieved_gbps: float, limit_gbps: float) -> float:
    """Achieved over limit, both in GB/s of one direction of one rank; see `implausible`."""
    return achieved_gbps / limit_gbps


def implausible(share: float) -> bool:
    """More than 2 % above a physical limit: something was not moved, not timed, or not counted right."""
    return share > IMPLAUSIBLE_SHARE


def row_bytes(shape: Moe, component: str) -> int:
    """Bytes of one row: combine always bf16, 2H; dispatch 2H, or for fp8 H and a float32 scale per 128."""
    if component == "dispatch" and shape.dtype == "fp8":
        return shape.hidden + 4 * -(-shape.hidden // FP8_BLOCK)
    return 2 * shape.hidden


def moe_bytes(
    shape: Moe, ranks: Sequence[Mapping[str, Any]], wire: Sequence[Mapping[str, int]] | None = None
) -> dict[str, Any]:
    """The result's `bytes` for an exchange. `ranks`: from counts.count; `wire`: from each rank's backend.

    meta_bytes is what a dispatched row carries beside its values in any library, an int32 expert id and a
    float32 weight per pick; no formula includes it (`flashinfer` counts them for picks of other ranks).
    """
    return {
        "family": "moe",
        "row_bytes": {part: row_bytes(shape, part) for part in ("dispatch", "combine")},
        "meta_bytes": 8 * shape.topk,
        "ranks": list(ranks),
        "wire": None if wire is None else [dict(w) for w in wire],
    }


def collective_bytes(shape: Collective, ranks: int) -> dict[str, Any]:
    """The result's `bytes` for a collective: the size that was realised and the one that was requested."""
    size = collective_counts(shape.op, shape.bytes, shape.dtype, ranks)[2]
    return {"family": "collective", "size": size, "requested": shape.bytes}


def collective_counts(op: str, size: int, dtype: str, ranks: int) -> tuple[int, int, int]:
    """Elements of a rank's input, of its output, and the realised S in bytes, for a requested S of `size`.

    A shared-out buffer has the same whole number of elements for each rank, rounded down, at least one
    (nccl-tests rounds to 16 bytes, down to nothing): the realised S may differ from the requested one.
    all_to_all_v rounds as nccl-tests does, and is nothing below 16 bytes a rank.
    """
    width = DTYPE_BYTES[dtype]
    if op in ("all_reduce", "broadcast", "reduce", "sendrecv"):
        count = max(1, size // width)
        return count, count, count * width
    chunk = max(1, size // width // ranks)
    whole = ranks * chunk
    if op in ("all_gather", "gather"):
        return chunk, whole, whole * width
    if op in ("reduce_scatter", "scatter"):
        return whole, chunk, whole * width
    if op == "all_to_all":
        return whole, whole, whole * width
    if op == "all_to_all_v":
        moved = sum(all_to_all_v_bytes(size, 0, ranks)[0])  # as much for every rank, both ways
        return moved // width, moved // width, moved
    raise ValueError(f"no element counts for {op!r}")


def all_to_all_v_bytes(size: int, rank: int, ranks: int) -> tuple[list[int], list[int]]:
    """Bytes that a rank sends to each rank, and receives from each, for a requested S of `size`.

    The pattern of nccl-tests' alltoallv_perf where no matrix is given (2.19.6, src/alltoallv.cu,
    AlltoAllvGetCollByteCount and AlltoAllvGetPeerBytesDistanceWeighted with its spread of 1): of S, rounded
    down to 16 bytes for each rank, rank i sends to rank j a part proportional to the distance (j - i) mod n,
    rounded down to 16 bytes, and nothing to itself. All ranks send and receive the same sum, the realised S.
    A single rank keeps everything. The division there is one of doubles: the same below 2^40 bytes.
    """
    total = size // (ALIGN * ranks) * ALIGN * ranks
    if ranks == 1:
        return [total], [total]
    distances = ranks * (ranks - 1) // 2
    parts = [distance * total // distances // ALIGN * ALIGN for distance in range(ranks)]
    sent = [parts[(peer - rank) % ranks] for peer in range(ranks)]
    return sent, [parts[(rank - peer) % ranks] for peer in range(ranks)]


def all_to_all_v_requested(moved: int, ranks: int) -> int:
    """The least requested S of which a rank sends `moved` bytes, where there is one: its n - 1 parts lose
    less than 16 bytes each, so it is the next multiple of 16 bytes for each of n ranks."""
    return -(-moved // (ALIGN * ranks)) * ALIGN * ranks


def bus_factor(op: str, ranks: int) -> float:
    """busbw / algbw: what a rank's link must carry, at least, for each byte of S (nccl-tests)."""
    if op == "all_reduce":
        return 2 * (ranks - 1) / ranks
    if op in SHARED_OUT:
        return (ranks - 1) / ranks
    if op in ("broadcast", "reduce", "sendrecv"):
        return 1.0
    raise ValueError(f"no bus bandwidth factor for {op!r}")


def _bytes(formula: Formula, document: Document, component: str) -> list[float] | None:
    parts: Sequence[str] = ("call",)
    if formula.family == "moe":
        parts = _PARTS.get(component.removesuffix("_floor"), ())
    moved = [formula.per_rank(document, part) for part in parts]
    known = [m for m in moved if m is not None]
    if not known or len(known) < len(moved):
        return None
    return [sum(of_rank) for of_rank in zip(*known, strict=True)]


def _algbw(document: Document, part: str) -> list[float]:
    return [float(document["bytes"]["size"])] * document["case"]["ranks"]


def _busbw(document: Document, part: str) -> list[float]:
    factor = bus_factor(document["case"]["shape"]["op"], document["case"]["ranks"])
    return [factor * size for size in _algbw(document, part)]


def _wire(document: Document, part: str) -> list[float] | None:
    wire = document["bytes"]["wire"]
    if wire is None or any(part not in of_rank for of_rank in wire):
        return None
    return [float(of_rank[part]) for of_rank in wire]


# Rows of one rank, by entry of bytes.ranks. Combine sends back what dispatch received.


def _rows(rows: Callable[[Mapping[str, Any], str], int]) -> PerRank:
    """Bytes from rows: times the row size of the part."""

    def per_rank(document: Document, part: str) -> list[float]:
        row = document["bytes"]["row_bytes"][part]
        return [float(rows(entry, part) * row) for entry in document["bytes"]["ranks"]]

    return per_rank


def _sent(entry: Mapping[str, Any], part: str) -> Mapping[str, int]:
    return entry["rows_sent" if part == "dispatch" else "rows_received"]


def _logical(entry: Mapping[str, Any], part: str) -> int:
    return sum(_sent(entry, part).values())


def _remote(entry: Mapping[str, Any], part: str) -> int:
    return _logical(entry, part) - _sent(entry, part)["self"]


def _scale_up(entry: Mapping[str, Any], part: str) -> int:
    return _sent(entry, part)["scale_up"]


def _scale_out(entry: Mapping[str, Any], part: str) -> int:
    return entry["node_rows_sent"]["other"]


def _received(entry: Mapping[str, Any], part: str) -> int:
    return sum(entry["rows_received"].values())


def _selections(entry: Mapping[str, Any], part: str) -> int:
    return entry["selections"]


def _nccl_ep(entry: Mapping[str, Any], part: str, *, link: str, side: str) -> int:
    """The token owner's side counts unique (token, domain), the expert's side unique (token, rank). Where
    NVLink joins nodes their "node" is the NVLink domain (NCCL: the LSA team)."""
    if (side == "send") == (part == "dispatch"):
        total, rdma = sum(entry["node_rows_sent"].values()), entry["node_rows_sent"]["other"]
    else:
        total, rdma = sum(entry["rows_received"].values()), entry["rows_received"]["scale_out"]
    return {"total": total, "nvl": total - rdma, "rdma": rdma}[link]


def _deepep_low_latency(document: Document, part: str) -> list[float]:
    fp8 = part == "dispatch" and document["case"]["shape"]["dtype"] == "fp8"
    row = document["bytes"]["row_bytes"][part] + (_DEEPEP_LL_HEADER if fp8 else 0)
    return [float(entry["selections"] * row) for entry in document["bytes"]["ranks"]]


def _flashinfer(document: Document, part: str) -> list[float]:
    rows = _rows(_remote)(document, part)
    assert rows is not None
    if part == "combine":
        return rows
    picks = [entry["selections_sent"] for entry in document["bytes"]["ranks"]]
    away = [to["scale_up"] + to["scale_out"] for to in picks]
    return [b + _FLASHINFER_PICK * n for b, n in zip(rows, away, strict=True)]


def _nccl_ep_formulas() -> list[Formula]:
    said = {
        "total_send": "unique (token, domain) rows, own domain included",
        "nvl_send": "unique (token, domain) rows to the own domain",
        "rdma_send": "unique (token, domain) rows to other domains",
        "total_recv": "unique (source token, rank) rows received, own included",
        "nvl_recv": "unique (source token, rank) rows received from the own domain, own included",
        "rdma_recv": "unique (source token, rank) rows received from other domains",
    }
    formulas = []
    for name, definition in said.items():
        link, side = name.split("_")
        sentence = f"Dispatch: {definition}; combine swaps send and recv."
        source = "NCCL contrib/nccl_ep ep_bench 0.1.0, high-throughput metrics"
        formulas.append(
            Formula(name, "moe", sentence, source, _rows(partial(_nccl_ep, link=link, side=side)))
        )
    return formulas


FORMULAS: Mapping[str, Formula] = {
    formula.name: formula
    for formula in (
        Formula("algbw", "collective", "The size S of the operation.", "nccl-tests 2.19.6", _algbw),
        Formula(
            "busbw",
            "collective",
            "S times what a rank's link must carry for each byte of it: 2(n-1)/n for all_reduce, (n-1)/n for "
            "all_gather, reduce_scatter, all_to_all, gather, scatter, all_to_all_v and hypercube, 1 for "
            "broadcast, reduce and sendrecv.",
            "nccl-tests 2.19.6, doc/PERFORMANCE.md",
            _busbw,
        ),
        Formula(
            "logical",
            "moe",
            "Unique (token, rank) rows that the rank sends, those to itself included.",
            "CollectiveX",
            _rows(_logical),
        ),
        Formula(
            "remote",
            "moe",
            "Unique (token, rank) rows that the rank sends to other ranks.",
            "CollectiveX",
            _rows(_remote),
        ),
        Formula(
            "scale_up",
            "moe",
            "Unique (token, rank) rows that the rank sends to other ranks of its scale-up domain.",
            "CollectiveX",
            _rows(_scale_up),
        ),
        Formula(
            "scale_out",
            "moe",
            "Unique (token, domain) rows of the rank's tokens with other scale-up domains: what must cross "
            "between domains, whoever forwards it there; both ways.",
            "CollectiveX",
            _rows(_scale_out),
        ),
        Formula(
            "wire",
            "moe",
            "Bytes that the library itself says it sends, padding and metadata included.",
            "the backend",
            _wire,
        ),
        *_nccl_ep_formulas(),
        Formula(
            "deepep_normal",
            "moe",
            "Unique (token, rank) rows that arrive in dispatch, the rank's own included; both ways.",
            "DeepEP tests/test_intranode.py (NVL column); MoRI and UCCL count alike",
            _rows(_received),
        ),
        Formula(
            "per_selection",
            "moe",
            "One row for each valid (token, expert) pick, whether or not rows are shared.",
            "NCCL contrib/nccl_ep ep_bench 0.1.0 low-latency, which knows bf16 only; mscclpp "
            "run_ep_bench_python.py for bf16, in fp8 without the scales",
            _rows(_selections),
        ),
        Formula(
            "deepep_low_latency",
            "moe",
            "per_selection, with 16 more bytes for each fp8 row.",
            "DeepEP tests/test_low_latency.py",
            _deepep_low_latency,
        ),
        Formula(
            "flashinfer",
            "moe",
            "remote, summed over all ranks; dispatch with 8 more bytes for each pick of another rank.",
            "FlashInfer benchmarks/routines/moe_comm.py 0.6.18, _calculate_exact_comm_traffic; where that "
            "takes block-scaled fp8 for bf16 rows, the rows as they are",
            _flashinfer,
            quoted="total",
        ),
    )
}
