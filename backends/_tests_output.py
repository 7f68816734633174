"""What nccl-tests and rccl-tests print and write: the text table, and the JSON document of newer versions.

Reading only: what is missing, cut short or contradictory is reported as such, and nccl_tests.py decides what
becomes of it. The table is read by the names in its header, never by counting columns: options and forks add
some. Source of both formats: NVIDIA/nccl-tests 2.13 to 2.19.6, src/common.cu and src/util.cu.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.loaded import nccl_version

JSON_VERSIONS = (1, 2, 3)
PLACEMENTS = ("out-of-place", "in-place")  # in the order of the columns
_KEYS = {"out-of-place": "out_of_place", "in-place": "in_place"}


class Unreadable(ValueError):
    """A document that is cut short, or not of a form that is known here."""


@dataclass(frozen=True)
class Timing:
    """One placement of one row.

    us       microseconds per call, as printed; NaN where the program printed that
    wrong    elements that its own check found wrong, over all ranks; None where it did not check
    each_us  per-iteration times of all calls in order (JSON of -I 1), the slowest GPU's each
    """

    us: float
    busbw: float
    wrong: int | None
    each_us: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One size of one cycle. `size` is the bytes of S, dtype and redop are the program's own names."""

    size: int
    dtype: str
    redop: str
    root: int
    at: Mapping[str, Timing]

    @property
    def facts(self) -> tuple[Any, ...]:
        """What the text and the JSON of one run must agree on exactly: counts of wrong elements as the text
        has them, with six digits."""
        wrong = ((p, None if t.wrong is None else f"{t.wrong:g}") for p, t in sorted(self.at.items()))
        return self.size, self.dtype, self.redop, *wrong


@dataclass
class Report:
    """One run as it told of itself. None or empty: it did not say.

    program        the binary's name in its first lines, `concluded` in its last
    nccl           version of the library that it ran with, `headers` of the one it was compiled with
    settings       of its "nThread ..." line: "nThread", "nGpus", "iters", "validation", "graph", ...
    ranks          from its list of devices
    table          whether the header of the table appeared
    cputime        the column is launch time on the host, not the time of the operation
    out_of_bounds  failed checks by its footer; `passed` what the footer calls that
    reduced        bytes that it lowered -e to for want of memory
    errors         its own error lines, without host names
    unreadable     lines of the table that are none
    """

    program: str | None = None
    concluded: str | None = None
    version: str | None = None
    nccl: str | None = None
    headers: str | None = None
    settings: dict[str, int] = field(default_factory=dict)
    ranks: int | None = None
    table: bool = False
    tables: int = 0
    cputime: bool = False
    rows: list[Row] = field(default_factory=list)
    out_of_bounds: int | None = None
    passed: bool | None = None
    reduced: int | None = None
    document: str | None = None
    errors: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the footer is there: without it a table may be a part, or a usage text with exit code 0."""
        return self.out_of_bounds is not None


# ------------------------------------------------------------------------------------------------ text

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TAG = re.compile(r"^\[\d+,\d+\]<std(?:out|err)>:", re.MULTILINE)  # mpirun --tag-output
# A debug line may start in the middle of a row, right after its root ("-1" or "0"); after it the row goes on.
# Host names start with a letter here, so that a root of 0 stays with its row.
_DEBUG = re.compile(
    r"(?:^|(?<=\s)|(?<=\s-1)|(?<=\s0))[A-Za-z][\w.-]*:\d+:\d+ \[-?\d+\] NCCL [A-Z]+ [^\n]*\n?", re.MULTILINE
)
_VERSION = re.compile(r"# [nr]ccl-tests version (\S+) [nr]ccl-headers=(\d+) [nr]ccl-library=(\d+)")
_SETTING = re.compile(
    r"(nThread|nGpus|minBytes|maxBytes|warmup iters|agg iters|iters|validation|graph):? (\d+)"
)
_RANK = re.compile(r"#\s+Rank\s+(\d+) ")
_REDUCED = re.compile(r"# Reducing maxBytes to (\d+) ")
_BOUNDS = re.compile(r"# Out of bounds values\s*: (\d+) (OK|FAILED)")
_DOCUMENT = re.compile(r"# Writing JSON output to (.+)")
_ERRORS = (
    re.compile(r"Test (?:NCCL|CUDA) failure .*"),
    re.compile(r"Test timeout \(\d+s\).*"),
    re.compile(r"# error: (.+)"),
    re.compile(r"Invalid number of GPUs: .*"),
    re.compile(r"error while loading shared libraries: .*"),
    re.compile(r"invalid (?:option|size)\b.*"),
    re.compile(r"Incompatible NCCL versions\. .*"),
    re.compile(r"# skipping json output; .*"),
)


def read_text(text: str) -> Report:
    """Everything that stdout and stderr of one run say. Never raises: what cannot be read is reported."""
    report = Report()
    columns: list[str] = []
    for line in clean(text).splitlines():
        if line.lstrip().startswith("#"):
            columns = _header(line) or columns
            _comment(report, line)
            report.tables += bool(_header(line))
        elif columns and re.match(r"\s*\d+\s", line):
            row = _row(columns, line.split())
            if row is None:
                report.unreadable.append(line.strip())
            else:
                report.rows.append(row)
        _error(report, line)
    report.table = bool(columns)
    report.cputime = "cputime" in columns
    return report


def clean(text: str) -> str:
    """Without what terminals and the library's own debug output put between the lines."""
    return _DEBUG.sub("", _TAG.sub("", _ANSI.sub("", text.replace("\r", ""))))


def rows_in(text: str) -> int:
    """How many whole rows a run has printed so far; a line that is still being written does not count."""
    whole, _, _ = clean(text).rpartition("\n")
    return len(read_text(whole).rows)


def _comment(report: Report, line: str) -> None:
    if found := _VERSION.match(line):
        report.version = found[1]
        report.headers, report.nccl = nccl_version(int(found[2])), nccl_version(int(found[3]))
    elif found := re.match(r"# Collective test (starting|concluded): (\S+)", line):
        name = re.sub(r".*[/\\]", "", found[2])
        if found[1] == "starting":
            report.program = name
        else:
            report.concluded = name
    elif line.startswith("# nThread"):
        report.settings = {name: int(value) for name, value in _SETTING.findall(line)}
    elif found := _RANK.match(line):
        report.ranks = max(report.ranks or 0, int(found[1]) + 1)
    elif found := _REDUCED.match(line):
        report.reduced = int(found[1])
    elif found := _BOUNDS.match(line):
        report.out_of_bounds, report.passed = int(found[1]), found[2] == "OK"
    elif found := _DOCUMENT.match(line):
        report.document = found[1].strip()


def _error(report: Report, line: str) -> None:
    for pattern in _ERRORS:
        if found := pattern.search(line):
            said = (found[1] if found.groups() else found[0]).strip()
            report.errors.append(re.sub(r"(?<=\s)/\S*/", "", said))


def _header(line: str) -> list[str]:
    """Column names of the table's header, or nothing where this line is not it."""
    names = line.lstrip().lstrip("#").split()
    return names if names[:3] == ["size", "count", "type"] else []


def _row(columns: Sequence[str], words: Sequence[str]) -> Row | None:
    """A row by the names of its columns; None where it does not have one word for each ("timestamp": two).
    hypercube_perf leaves the column redop empty: its rows have a number there, the root."""
    if len(words) > 3 and columns[3] == "redop" and re.fullmatch(r"-?\d+", words[3]):
        words = [*words[:3], "", *words[3:]]
    if len(words) != len(columns) + columns.count("timestamp"):
        return None
    starts = [i for i, name in enumerate(columns) if name in ("time", "cputime")]
    ends = [*starts[1:], len(columns)]
    try:
        first = dict(zip(columns[: starts[0]], words, strict=False))
        at = {}
        for placement, start, end in zip(PLACEMENTS, starts, ends, strict=True):
            cells = dict(zip(columns[start:end], words[start:end], strict=True))
            at[placement] = Timing(float(words[start]), float(cells["busbw"]), _wrong(cells["#wrong"]))
        root = int(first.get("root", "-1"))
        return Row(int(first["size"]), first["type"], first.get("redop", "none"), root, at)
    except (ValueError, KeyError, IndexError):
        return None


def _wrong(word: str) -> int | None:
    """`%g` of a count of elements: 0, 12, 1e+06; N/A where nothing was checked. A NaN counts as one wrong."""
    if word == "N/A":
        return None
    value = float(word)
    return math.ceil(value) if math.isfinite(value) else 1


# ------------------------------------------------------------------------------------------------ JSON


def read_json(text: str) -> Report:
    """The document that -J wrote. Raises Unreadable where it is cut short or of a version not known here."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is cut short or no JSON: {error}") from error
    if not isinstance(found, dict) or found.get("version") not in JSON_VERSIONS:
        version = found.get("version") if isinstance(found, dict) else None
        raise Unreadable(f"has file version {version!r}; known are {', '.join(map(str, JSON_VERSIONS))}")
    if "end_time" not in found or "out_of_bounds" not in found:
        raise Unreadable("ends before its footer")
    try:
        bounds, config = found["out_of_bounds"], found["config"]
        return Report(
            program=re.sub(r".*[/\\]", "", str(found["args"][0])),
            nccl=nccl_version(found["nccl_version"]),
            settings={
                "nThread": config["nthreads"],
                "nGpus": config["ngpus"],
                "iters": config["iterations"],
                "agg iters": config["aggregated_iterations"],
                "validation": config["validation"],
                "graph": config["graph"],
            },
            table=True,
            tables=1,
            cputime=any("cpu_time" in entry["out_of_place"] for entry in found["results"]),
            rows=[_json_row(entry) for entry in found["results"]],
            out_of_bounds=bounds["count"],
            passed=_true(bounds["okay"]),
            errors=[str(e) for e in found.get("errors", ()) if e],
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unreadable(f"is not of the known form: {type(error).__name__} {error}") from error


def _json_row(entry: Mapping[str, Any]) -> Row:
    at = {}
    for placement in PLACEMENTS:
        body, each = entry[_KEYS[placement]], entry.get(f"{_KEYS[placement]}_per_iter")
        if body is None:
            continue
        us = body["time"] if "time" in body else body["cpu_time"]
        wrong = body["nwrong"]
        at[placement] = Timing(
            _number(us),
            _number(body["bus_bw"]),
            None if wrong is None else _wrong(str(wrong)),
            tuple(_number(value) for value in each["times_us"]) if each else (),
        )
    return Row(entry["size"], entry["type"], entry["redop"], int(entry["root"]), at)


def _number(value: float | str) -> float:
    """NaN is written as the string "nan"."""
    return float(value)


def _true(value: bool | str) -> bool:
    """Booleans are written as strings."""
    return value is True or value == "true"


def without_private(text: str) -> str:
    """A readable document again, without the environment of the process, hosts, process ids, bus addresses
    and folders. Raises Unreadable for one that cannot be read, and so cannot be cleaned."""
    try:
        found = json.loads(text)
        found.pop("env", None)
        found["args"] = [re.sub(r"^.*/", "", str(word)) for word in found.get("args", ())]
        for device in found.get("config", {}).get("devices", ()):
            for name in ("hostname", "pid", "device_hex"):
                device.pop(name, None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise Unreadable(f"is cut short or no JSON: {error}") from error
    return json.dumps(found, indent=1) + "\n"
