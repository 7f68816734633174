"""Whether a result agrees with itself, with its manifest and with the file of its samples, as far as that
costs next to nothing: what every reader asks of every record; `cx validate` works out the rest (recheck.py).

Every function yields sentences about what does not agree. The documents are schema-valid already.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from .types import Status

REDUCTIONS = ("max", "median", "min", "spread")
LARGEST_SIDECAR = 256 << 20  # bytes, unpacked: 4,000 samples of 20 series of 64 ranks are half of it
MANIFEST_FACTS = ("execution", "suite", "sku", "contract")  # what a record and its manifest both say

_GZIP = b"\x1f\x8b\x08"
_SHORTEST, _LONGEST = 2, 32  # characters of one sample in JSON with its comma, at least and at most
_FRAME = 4096  # characters of a sidecar, and of each of its series, beside the samples
_ORDERED = ("min", "p50", "p90", "p95", "p99", "max")

Document = Mapping[str, Any]


def contradictions(document: Document, manifest: Mapping[str, str], folder: str) -> Iterator[str]:
    """Everything here about one result of the execution in `folder`; `manifest` has the MANIFEST_FACTS."""
    for said, stated in membership(document, manifest):
        yield f"is of {said}, its manifest of {stated}"
    for i, entry in enumerate(document["measurements"]):
        for problem in order(entry):
            yield f"contradicts itself: measurements[{i}]{problem}"
    for problem in verdicts(document):
        yield f"contradicts itself: {problem}"
    problem = sidecar(document, folder)
    if problem is not None:
        yield f"has no samples that can be its own: {problem}"


def membership(document: Document, manifest: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What the record says and what the manifest says, where they differ: ("sku b300", "h200x4-nvlink")."""
    for name in MANIFEST_FACTS:
        said = document["contract"] if name == "contract" else document["identity"][name]
        if said != manifest[name]:
            yield f"{name} {said}", manifest[name]


def order(entry: Document) -> Iterator[str]:
    """The statistics of one measurement: percentiles in order, each inside its interval, and the reductions
    over ranks one above the other."""
    for name in REDUCTIONS:
        stats = entry[name]
        low, high = stats["min"], stats["max"]
        if not 0 <= low <= stats["p50"] <= stats["p90"] <= stats["p95"] <= stats["p99"] <= high:
            yield f".{name}: percentiles are not in order between minimum and maximum"
        elif not low <= stats["mean"] <= high:
            yield f".{name}.mean: {stats['mean']} is not between minimum and maximum"
        for at, interval in stats["intervals"].items():
            if "low" in interval and not low <= interval["low"] <= stats[at] <= interval["high"] <= high:
                yield f".{name}.{at}: {stats[at]} is not inside its interval"
    least, middle, most = entry["min"], entry["median"], entry["max"]
    if any(not least[name] <= middle[name] <= most[name] for name in _ORDERED):
        yield ": the minimum over ranks is above the median, or the median above the maximum"


def verdicts(document: Document) -> Iterator[str]:
    """Correctness and knobs against the status."""
    verdict = document["correctness"]
    if verdict is not None:
        passed = bool(verdict["checks"]) and all(check["passed"] for check in verdict["checks"])
        if verdict["passed"] != passed:
            yield f"correctness.passed: says {verdict['passed']}, its checks say {passed}"
    if document["status"] not in (Status.OK.value, Status.IMPLAUSIBLE.value):
        return
    if verdict is None or not verdict["passed"]:
        yield "status: publishes a latency without a passed check"
    proof = document["routing_proof"]
    if proof is not None and not proof["equal_across_ranks"]:
        yield "status: publishes a latency of ranks with different routing"
    for name, knob in document["knobs"].items():
        if knob["requested"] is not None and knob["requested"] != knob["realised"]:
            what = f"{knob['requested']} asked, {knob['realised']} applied"
            yield f"knobs.{name}: {what}, and still {document['status']}"


def sidecar(document: Document, folder: str) -> str | None:
    """Why the file of the raw samples cannot be theirs, or None, by a look at its ends: a whole gzip file
    begins with gzip's mark and ends with the length of what it holds, which the number of samples bounds."""
    reference = document["samples"]
    if reference is None:
        return "it names none" if document["measurements"] else None
    name = reference["file"]
    if name != f"samples/{reference['sha256']}.json.gz":
        return f"{name} is not named by {reference['sha256']}"
    try:
        path = os.path.join(folder, name)
        if not stat.S_ISREG(os.stat(path).st_mode):
            return f"{name} is not a regular file"
        with open(path, "rb", buffering=0) as file:
            begins = file.read(len(_GZIP))
            file.seek(-4, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
    except OSError as error:  # EINVAL: shorter than four bytes
        return f"{name} cannot be read: {error.strerror}"
    if begins != _GZIP:
        return f"{name} is not gzip"
    least, most = _lengths(document)
    if not least <= length <= min(most, LARGEST_SIDECAR):
        return f"{name} is truncated, or of another result: its end tells of {length} bytes unpacked"
    return None


def _lengths(document: Document) -> tuple[int, int]:
    """Least and most bytes of a sidecar unpacked; no program's loop has more than one row."""
    ranks, entries = document["case"]["ranks"], document["measurements"]
    samples = sum(m["max"]["n"] * (1 if m["regime"] == "loop" else ranks) for m in entries)
    return _SHORTEST * samples, _LONGEST * samples + _FRAME * (1 + len(entries))
