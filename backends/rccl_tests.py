"""rccl-tests: AMD's benchmark of RCCL, started as it is and read. The sibling of nccl_tests.py, whose window,
sweeps and verdict it shares.

Never yet run on its hardware by this harness: recorded texts and a stand-in only (contract-only).

What differs from nccl-tests, from the sources of three generations (2024: ROCm/rccl-tests, frozen; 2025 and
2026: ROCm/rocm-systems, projects/rccl-tests)
  - The same letter means different things: -x is a file in 2025 and the CTA policy in 2026, -u a mask of
    compute units where nccl-tests has unaligned buffers, -y was once the kind of memory. A letter is used
    only where the usage of the binary gives it the name that we mean.
  - Two forms of JSON: one object for each size and placement (-x, -Z in 2025; no footer, no settings), and
    the document of nccl-tests (-J in 2026). The first is a second witness beside the table, the second the
    source.
  - -O 1 turns the in-place half off in 2026, and -q runs on into -R in 2024: neither is ever passed.
  - alltoallv_perf has a pattern of its own: parts by the sum of the two ranks, the rest of S to one of them
    (src/alltoallv.cu). gather, scatter and hypercube are those of nccl-tests.
  - Buffers stay where they are; nccl-tests rotates them through its allocation. -E 0 and -F 0 say so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime import environment
from ..runtime.types import Case, Collective, Status
from . import _tests_verdict, nccl_tests
from ._tests_output import Row, Unreadable, read_text, without_private
from .base import Answer, Ended, Facts, MissingLibrary, Source, Start
from .nccl_tests import DTYPES, HYPERCUBE_WINDOW, NEEDED, PROGRAMS

# What we mean by a letter. A binary whose usage calls it otherwise does not get it.
MEANINGS = {
    **{"t": "nthreads", "g": "ngpus", "b": "minbytes", "e": "maxbytes", "f": "stepfactor", "n": "iters"},
    **{"m": "agg_iters", "w": "warmup_iters", "N": "run_cycles", "p": "parallel_init", "c": "check"},
    **{"o": "op", "d": "datatype", "r": "root", "z": "blocking", "y": "stream_null", "T": "timeout"},
    **{"G": "cudagraph", "C": "report_cputime", "S": "report_timestamps", "a": "average"},
    **{"R": "local_register", "M": "memory_report", "J": "output_file"},
}
EXTRAS = {"E": ("rotating_tensor", 0), "F": ("cache_flush", 0)}
ONLY_RCCL = frozenset({"cumask", "memory_type", "cache_flush", "rotating_tensor"})
_WINDOW = {
    "call": "n calls issued by one host thread for all GPUs of a process and the final wait, on the host's "
    "clock, over n; out of place without a local copy; always the same buffers"
}
_HYPERCUBE_WINDOW = {"call": f"{HYPERCUBE_WINDOW['call']}; always the same buffers"}

FACTS = Facts(
    name="rccl_tests",
    title="rccl-tests (AMD's benchmark, as it is)",
    source=Source(
        "git",
        "https://github.com/ROCm/rocm-systems/projects/rccl-tests",
        "491c996048b80c9e0114244fa8060e613ebdb2ad",
        "has -J; ROCm/rccl-tests is frozen since 2024, whose outputs are understood too",
    ),
    devices=("hip",),
    variants=nccl_tests.variants(_WINDOW, _HYPERCUBE_WINDOW),
    knobs=("sweep", "mpi"),
    regimes=("loop",),
    validated=(),
)


class Backend(nccl_tests.Backend):
    """See base.Program; `groups` and `progress` are those of nccl_tests."""

    facts = FACTS
    withheld = ("NCCL_TESTS_", "RCCL_TESTS_")

    def why_not(self, case: Case) -> str | None:
        if isinstance(case.shape, Collective) and case.shape.op == "all_to_all_v":
            return "rccl-tests' alltoallv_perf moves a pattern of its own, not that of nccl-tests"
        return super().why_not(case)

    def starts(self, cases: Sequence[Case], folder: str, environ: Mapping[str, str]) -> list[Start]:
        first = cases[0]
        assert isinstance(first.shape, Collective)
        shape = first.shape
        mpi = first.nodes > 1 or dict(first.knobs).get("mpi") == 1
        binary = find(PROGRAMS[shape.op], environ)
        usage = ask(binary, environ)
        name = f"{shape.op}-{shape.dtype}-{shape.bytes}"
        words, output = told(usage, str(Path(folder) / f"{name}.json"))
        letters = frozenset(letter for letter, meaning in MEANINGS.items() if usage.get(letter) == meaning)
        extra = nccl_tests.added(folder, mpi, environ)
        argv = [*nccl_tests.launcher(first, mpi, {**environ, **extra}), binary]
        argv += nccl_tests.arguments(cases, letters - {"J"}, 0, mpi, None)
        argv += [
            w
            for letter, (n, value) in EXTRAS.items()
            if usage.get(letter) == n
            for w in (f"-{letter}", str(value))
        ]
        return [Start(name, tuple(cases), (*argv, *words), extra, output)]

    def answers(self, start: Start, ended: Ended) -> dict[Case, Answer]:
        # On gfx942 a remark without an end of line stands before the first line of the header.
        stdout = re.sub(r"(FNUZ FP8 types)(?=[^\n])", r"\1\n", ended.stdout)
        ended = replace(ended, stdout=stdout)
        lines, problem = None, None
        if "-Z" in start.argv:
            if ended.output is not None:
                lines, problem = _second_witness(ended)
            start, ended = replace(start, output=None), replace(ended, output=None)
        sweep = _tests_verdict.Sweep.of(start, PROGRAMS, DTYPES)
        answers = _tests_verdict.judge(sweep, ended)
        if problem is not None and any(a.status is Status.OK for a in answers.values()):
            return sweep.all(*problem)
        for answer in answers.values():
            _as_rccl(answer, stdout)
            if lines is None and "-Z" in start.argv and answer.status is Status.OK:
                answer.warnings.append("no JSON lines were written: the table stands alone")
        return answers

    def keep(self, output: str) -> str | None:
        try:
            if output.lstrip().startswith("{") and '"version"' in output:
                return without_private(output)
            return "".join(json.dumps(entry) + "\n" for entry in read_lines(output))
        except Unreadable:
            return None


def find(program: str, environ: Mapping[str, str]) -> str:
    """Path of a binary: in rccl_tests/bin of the prepared libraries, else on PATH. Raises MissingLibrary."""
    prepared = environment.libraries_dir(environ) / "rccl_tests" / "bin"
    for folder in (str(prepared), environ.get("PATH", "")):
        path = shutil.which(program, path=folder)
        if path is not None:
            return path
    build = f"build {FACTS.source.name} at {FACTS.source.pin}"
    raise MissingLibrary(f"{program} is neither in {prepared} nor on PATH: {build}")


def ask(binary: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Letter -> name of the options in this build's usage. Raises MissingLibrary for what cannot be started,
    is too old, or is nccl-tests: the binaries have the same names."""
    done = nccl_tests.asked(binary, environ)
    name, usage = Path(binary).name, named_options(done.out)
    if not usage:
        said = (done.err or done.out).strip().splitlines()
        raise MissingLibrary(f"{name} -h does not print its usage: {said[-1] if said else 'it says nothing'}")
    if not ONLY_RCCL & set(usage.values()):
        raise MissingLibrary(f"{name} is of nccl-tests, not of rccl-tests: put the latter's first on PATH")
    lacks = sorted(letter for letter in NEEDED if usage.get(letter) != MEANINGS[letter])
    if lacks:
        raise MissingLibrary(f"{name} is too old: it has no {', '.join(f'-{letter}' for letter in lacks)}")
    return usage


def named_options(usage: str) -> dict[str, str]:
    return dict(re.findall(r"\[-(\w),--(\w+)", usage))


def told(usage: Mapping[str, str], path: str) -> tuple[list[str], str | None]:
    """What makes this generation write JSON, and where; nothing and None where it cannot."""
    if usage.get("J") == "output_file":
        return ["-J", path], path
    if usage.get("x") == "output_file" and usage.get("Z") == "output_format":
        return ["-x", path, "-Z", "json"], path
    return [], None


# --------------------------------------------------------------------------------------------- JSON lines


def read_lines(text: str) -> list[dict[str, Any]]:
    """The objects that -Z json wrote, each on a line; later builds put them into one array. Raises Unreadable
    for a file that is cut short."""
    body = text.strip().removeprefix("[")
    if text.lstrip().startswith("[") and not body.endswith("]"):
        raise Unreadable("is cut short")
    found = []
    for line in body.removesuffix("]").splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line.strip().removesuffix(","))
        except ValueError as error:
            raise Unreadable(f"is cut short or no JSON: {error}") from error
        if not isinstance(entry, dict) or not {"size", "type", "inPlace", "time"} <= set(entry):
            raise Unreadable(f"has a line of an unknown form: {line.strip()[:80]}")
        found.append(entry)
    return found


def _second_witness(ended: Ended) -> tuple[list[dict[str, Any]] | None, _tests_verdict.Problem | None]:
    """The JSON lines, and what is wrong where they do not say what the table says."""
    assert ended.output is not None
    try:
        lines = read_lines(ended.output)
    except Unreadable as error:
        return None, (Status.FAILED, f"the JSON lines of rccl-tests: the file {error}")
    rows = read_text(ended.stdout).rows
    if sorted(map(_facts_of_line, lines)) != sorted(fact for row in rows for fact in _facts_of_row(row)):
        return lines, (Status.FAILED, "table and JSON lines of rccl-tests contradict each other")
    return lines, None


def _facts_of_line(entry: Mapping[str, Any]) -> tuple[int, str, str, str]:
    wrong = str(entry.get("#wrong", entry.get("wrong")))
    placement = "in-place" if str(entry["inPlace"]) == "1" else "out-of-place"
    return int(entry["size"]), str(entry["type"]), placement, "N/A" if wrong == "N/A" else f"{float(wrong):g}"


def _facts_of_row(row: Row) -> list[tuple[int, str, str, str]]:
    return [
        (row.size, row.dtype, place, "N/A" if timing.wrong is None else f"{float(timing.wrong):g}")
        for place, timing in row.at.items()
    ]


def _as_rccl(answer: Answer, stdout: str) -> None:
    """Names of the sibling, versions as rccl-tests and RCCL tell them."""
    answer.checks = [replace(c, name=c.name.replace("nccl-tests", "rccl-tests")) for c in answer.checks]
    if answer.reason is not None:
        answer.reason = re.sub(r"\bnccl-tests\b", "rccl-tests", answer.reason)
    tests = re.search(r"^(?:# )?rccl-tests: Version (\S+)", stdout, re.MULTILINE)
    ran = re.search(r"^(?:# )?RCCL version ?:? ?([\w.+-]+)", stdout, re.MULTILINE)
    version = answer.versions.get("nccl-tests", "").split(",")[0]
    answer.versions = {"rccl-tests": tests[1] if tests else version or "not told"}
    answer.libraries = {
        "rccl": (ran[1] if ran else dict(answer.libraries).get("nccl", (None, None))[0], None)
    }
