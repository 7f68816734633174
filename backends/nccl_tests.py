"""nccl-tests: NVIDIA's own benchmark of NCCL, started as it is and read.

It is there to be set beside our measurement of the same library by the same calls, and beside what everybody
quotes. Its loop is not one of our regimes (docs/decisions/0004-external-programs.md): regime `loop`.

  call             one process, one wall clock of the host around n calls back to back and the final wait,
                   over n; with MPI the slowest process (-a 3). One sample a cycle (-N).
  call_iteration   from a second process, where the program offers it (-I, 2.19.2): the time between CUDA
                   events around each call, the slowest GPU's. Apart, so that the events cost `call` nothing.
                   On one node only: over several, a step of the scheduler is one MPI program.

One process covers a sweep of sizes of one operation and dtype, and both placements, as its users run it. Its
buffers rotate through the allocation of the largest size, which stands in every record
(`sweep_maximum_bytes`); the knob `sweep=0` gives each size a process of its own.

The binaries are looked for in nccl_tests/bin of the folder of prepared libraries ($CX_LIBRARIES, else the
cache folder's), then on PATH. Without -J (before 2.17.3) the text table is read instead.
Multicast kernels (-D 3, -D 4) are never asked for.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..runtime import environment
from ..runtime.bandwidth import ALIGN, SHARED_OUT
from ..runtime.commands import TIMED_OUT, Done, run
from ..runtime.types import COLLECTIVE_OPS, DTYPE_BYTES, PROGRAM_OPS, Case, Collective
from . import _tests_verdict, base
from ._tests_output import Unreadable, rows_in, without_private
from .base import Answer, Ended, Facts, MissingLibrary, Recipe, Source, Start, Variant

ASK_TIMEOUT_S = 60.0
# What a run cannot do without: their absence means a build older than 2.13.4, whose table is another one.
NEEDED = frozenset("tgbefnwcodaC")
OPS = (*COLLECTIVE_OPS, *PROGRAM_OPS)
PROGRAMS = {op: f"{op}_perf" for op in OPS}
PROGRAMS |= {"all_to_all": "alltoall_perf", "all_to_all_v": "alltoallv_perf"}
# All others are in every version whose output is understood here.
FIRST_IN = {"alltoallv_perf": "2.19.0"}
DTYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
UNCHECKED_IN_PLACE = ("all_to_all", "all_to_all_v", "sendrecv")  # they set reportErrors to 0 there
# hypercube_perf groups the sends of each of its steps, and one thread with several GPUs groups those groups:
# NCCL then runs all steps at once, and more than two ranks get wrong data (seen on four H200 with 2.19.6;
# NVIDIA/nccl-tests issues 190 and 356). So it gets a thread for each GPU. Of per-iteration times only those
# of the first thread are reported.
THREAD_EACH = ("hypercube",)
_WINDOW = {
    "call": "n calls issued by one host thread for all GPUs of a process and the final wait, on the host's "
    "clock, over n; out of place without a local copy",
    "call_iteration": "from one CUDA event to the next between successive calls of such a loop, slowest GPU",
}
HYPERCUBE_WINDOW = {
    "call": "n calls issued by one host thread for each GPU and the final wait, on the slowest thread's "
    "clock, over n; out of place with a local copy of the own share"
}


def variants(window: Mapping[str, str], of_hypercube: Mapping[str, str]) -> tuple[Variant, ...]:
    """Every program in both placements, with what their windows contain."""
    return tuple(
        Variant("", mode, tuple(DTYPES), contains, family="collective", ops=ops)
        for ops, contains in ((COLLECTIVE_OPS, window), (PROGRAM_OPS, of_hypercube))
        for mode in ("out-of-place", "in-place")
    )


FACTS = Facts(
    name="nccl_tests",
    title="nccl-tests (NVIDIA's benchmark, as it is)",
    source=Source(
        "git",
        "https://github.com/NVIDIA/nccl-tests",
        "v2.19.6",
        "the first that can leave iterations out of -I's summary; outputs from 2.13.4 on are understood",
    ),
    # Built with the NCCL that torch loads, which is the one that everything else is measured with.
    recipe=Recipe(
        git="https://github.com/NVIDIA/nccl-tests",
        commit="a0b82b2260cf",
        links={"nccl/include": "{ccl_include}", "nccl/lib/libnccl.so": "{ccl}"},
        needs=("git", "make", "nvcc"),
        headers=("cuda_runtime.h",),
        steps=(
            (
                *("make", "-C", "src", "-j{jobs}", "BUILDDIR={folder}/source/build", "CUDA_HOME={cuda}"),
                *("NCCL_HOME={folder}/nccl", "CXX={cxx}"),
                "NVCC_GENCODE=-gencode=arch=compute_{sm},code=sm_{sm}",
            ),
        ),
        keep={"bin": "build/*_perf"},
        prepend={"PATH": ("bin",), "LD_LIBRARY_PATH": ("{ccl_folder}",)},
        programs=("bin/all_reduce_perf",),
    ),
    devices=("cuda",),
    variants=variants(_WINDOW, HYPERCUBE_WINDOW),
    knobs=("sweep", "per_iteration", "mpi"),
    regimes=("loop",),
    validated=("cuda",),
)


class Backend:
    """See base.Program."""

    facts = FACTS
    # NCCL_TESTS_DEVICE, _SPLIT, _MIN_BW, ...: other GPUs, another number of ranks, another exit code. Without
    # NCCL_TESTS_ALLTOALLV_* alltoallv_perf has its default pattern, that of bandwidth.all_to_all_v_bytes.
    withheld = ("NCCL_TESTS_",)

    def why_not(self, case: Case) -> str | None:
        reason = base.why_not(self.facts, case)
        if reason is not None or not isinstance(case.shape, Collective):
            return reason
        op, size, its_name = case.shape.op, case.shape.bytes, self.facts.name.replace("_", "-")
        if case.mode == "in-place" and op in UNCHECKED_IN_PLACE:
            return f"{its_name} does not check in-place {op}, so its number would stand without proof"
        if op == "hypercube" and case.ranks & (case.ranks - 1):
            return f"hypercube runs on a power of two of ranks, not on {case.ranks}"
        if op in THREAD_EACH and dict(case.knobs).get("per_iteration") == 1:
            return (
                f"{its_name} gives {op} a thread for each GPU, and per-iteration times of the first one only"
            )
        if least_bytes(op, case.shape.dtype, case.ranks) > size:
            return f"{its_name} rounds each rank's share down to 16 bytes: nothing is left of {size} bytes"
        for name, value in case.knobs:
            if value not in (0, 1):
                return f"{self.facts.name} has the knob {name!r} as 0 or 1, not {value!r}"
        return not_on_several(case)

    def groups(self, cases: Sequence[Case]) -> list[list[Case]]:
        """Cases of one operation, dtype and sampling whose sizes are a geometric series, by rising size."""
        alike: dict[tuple[object, ...], list[Case]] = {}
        for case in cases:
            shape = _shape(case)
            key = (shape.op, shape.dtype, case.ranks, case.nodes, case.sampling, case.knobs, case.deadline_s)
            alike.setdefault(key, []).append(case)
        found = []
        for same in alike.values():
            sizes = sorted({_shape(case).bytes for case in same})
            alone = dict(same[0].knobs).get("sweep") == 0
            for series in [[size] for size in sizes] if alone else geometric(sizes):
                members = [case for case in same if _shape(case).bytes in series]
                found.append(sorted(members, key=lambda case: (_shape(case).bytes, case.mode)))
        return found

    def starts(self, cases: Sequence[Case], folder: str, environ: Mapping[str, str]) -> list[Start]:
        first = cases[0]
        shape, knobs = _shape(first), dict(first.knobs)
        mpi = first.nodes > 1 or knobs.get("mpi") == 1
        binary = find(PROGRAMS[shape.op], mpi, environ)
        offered = options(binary, environ)
        each_too = "I" in offered and knobs.get("per_iteration", 1) == 1
        each_too = each_too and first.nodes == 1 and shape.op not in THREAD_EACH
        loops = [0, 1] if each_too else [0]
        extra = added(folder, mpi, environ)
        found = []
        for each in loops:
            name = f"{shape.op}-{shape.dtype}-{shape.bytes}{'-each' if each else ''}"
            output = str(Path(folder) / f"{name}.json") if "J" in offered else None
            argv = [*launcher(first, mpi, {**environ, **extra}), binary]
            argv += arguments(cases, offered, each, mpi, output)
            found.append(Start(name, tuple(cases), tuple(argv), extra, output))
        return found

    def progress(self, stdout: str) -> int:
        return rows_in(stdout)

    def answers(self, start: Start, ended: Ended) -> dict[Case, Answer]:
        sweep = _tests_verdict.Sweep.of(start, PROGRAMS, DTYPES)
        return _tests_verdict.judge(sweep, ended)

    def keep(self, output: str) -> str | None:
        try:
            return without_private(output)
        except Unreadable:
            return None


def _shape(case: Case) -> Collective:
    assert isinstance(case.shape, Collective)
    return case.shape


def not_on_several(case: Case) -> str | None:
    """What a start on several nodes cannot do: it is one process of an MPI program, which has one start."""
    asked = dict(case.knobs)
    if case.nodes > 1 and asked.get("mpi") == 0:
        return f"{case.backend} is an MPI program on several nodes: it has no mpi=0 there"
    if case.nodes > 1 and asked.get("per_iteration") == 1:
        return (
            f"{case.backend} runs one process for each GPU on several nodes: no second one for per_iteration"
        )
    return None


def geometric(sizes: Sequence[int]) -> list[list[int]]:
    """Rising sizes cut into the fewest series that one -b -e -f each can sweep, taken greedily."""
    found: list[list[int]] = []
    for size in sizes:
        series = found[-1] if found else []
        first_step = len(series) == 1 and size % series[0] == 0 and size // series[0] >= 2
        if first_step or (len(series) > 1 and size == series[-1] * (series[1] // series[0])):
            series.append(size)
        else:
            found.append([size])
    return found


def least_bytes(op: str, dtype: str, ranks: int) -> int:
    """The smallest S that moves anything: an element, or 16 bytes for each rank where S is shared out."""
    return ALIGN * ranks if op in SHARED_OUT else DTYPE_BYTES[dtype]


def find(program: str, mpi: bool, environ: Mapping[str, str]) -> str:
    """Path of a binary. Builds with NAME_SUFFIX=_mpi are preferred under MPI, wherever they are, and do
    without it too. Raises MissingLibrary."""
    names = [program, f"{program}_mpi"]
    prepared = environment.libraries_dir(environ) / "nccl_tests" / "bin"
    for name in reversed(names) if mpi else names:
        for folder in (str(prepared), environ.get("PATH", "")):
            path = shutil.which(name, path=folder)
            if path is not None:
                return path
    build = f"build {FACTS.source.name} at {FACTS.source.pin}" + (" with MPI=1" if mpi else "")
    since = f" (no version before {FIRST_IN[program]} has it)" if program in FIRST_IN else ""
    raise MissingLibrary(
        f"{program} is neither in {prepared} nor on PATH{since}: `cx prepare --backend "
        f"{FACTS.name}`, or {build}, and put its build folder on PATH or the binaries there"
    )


def asked(binary: str, environ: Mapping[str, str]) -> Done:
    """What a binary answers to -h. Raises MissingLibrary where it does not end; one that cannot
    be started says so in place of its usage."""
    done = run([binary, "-h"], timeout_s=ASK_TIMEOUT_S, env=environ)
    if done.code == TIMED_OUT:
        raise MissingLibrary(f"{Path(binary).name} -h cannot be run: {done.said}")
    return done


def options(binary: str, environ: Mapping[str, str]) -> frozenset[str]:
    """The option letters that this build offers, from its usage. Raises MissingLibrary where it cannot be
    started, or is too old."""
    done = asked(binary, environ)
    offered = frozenset(re.findall(r"\[-(\w),--\w+", done.out))
    if not offered:
        said = (done.err or done.out).strip().splitlines()
        what = said[-1] if said else f"it printed nothing and exited with {done.code}"
        raise MissingLibrary(
            f"{Path(binary).name} -h does not print its usage: {what}; if a library is missing, put its "
            "folder on LD_LIBRARY_PATH"
        )
    if not offered >= NEEDED:
        lacks = ", ".join(f"-{letter}" for letter in sorted(NEEDED - offered))
        raise MissingLibrary(f"{Path(binary).name} is too old: it has no {lacks}; build {FACTS.source.pin}")
    return offered


def arguments(
    cases: Sequence[Case], offered: frozenset[str], each: int, mpi: bool, output: str | None
) -> list[str]:
    """The options of a run over these cases. Everything is said, so that no default of a version decides;
    what a version does not offer is left out, and is then its only behaviour (-N 1, -I 0, -R 0)."""
    first, shape = cases[0], _shape(cases[0])
    sizes = sorted({_shape(case).bytes for case in cases})
    factor = sizes[1] // sizes[0] if len(sizes) > 1 else 2
    sampling = first.sampling
    threads = first.ranks if shape.op in THREAD_EACH and not mpi else 1
    said: dict[str, object] = {
        "t": threads,
        "g": 1 if mpi else first.ranks // threads,
        "b": sizes[0],
        "e": sizes[-1],
        "f": factor,
        "n": sampling.iterations,
        "m": 1,
        "w": sampling.warmup_iterations,
        "N": sampling.trials,
        "p": 0,
        "c": max(1, sampling.checked_calls),
        "o": "sum",
        "d": DTYPES[shape.dtype],
        "r": 0,
        "z": 0,
        "y": 0,
        "T": math.ceil(first.deadline_s),
        "G": 0,
        "C": 0,
        "S": 0,
        "a": 3,
        "R": 0,
        "M": 0,
        "u": 0,
        "I": each,
        "K": 0,
        "J": output,
    }
    return [
        word
        for letter, value in said.items()
        if letter in offered and value is not None
        for word in (f"-{letter}", str(value))
    ]


def launcher(case: Case, mpi: bool, environ: Mapping[str, str]) -> list[str]:
    """What starts one process per GPU: Open MPI's mpirun on one node. Nothing without MPI, and nothing on
    several nodes, where srun has started us once for each. mpirun hands on only what it is told to: every
    NCCL setting, NVLS off among them."""
    if not mpi or case.nodes > 1:
        return []
    handed = [n for n in sorted(environ) if n.startswith("NCCL_") or n in ("LD_LIBRARY_PATH", "PATH")]
    exports = [word for name in handed for word in ("-x", name)]
    argv = ["mpirun", "-np", str(case.ranks), "--map-by", f"ppr:{case.ranks}:node", "--bind-to", "none"]
    return [*argv, *exports]


def added(folder: str, mpi: bool, environ: Mapping[str, str]) -> dict[str, str]:
    """Debug output that somebody asked for goes to files of its own, not between the rows."""
    extra = {}
    if "NCCL_DEBUG" in environ and "NCCL_DEBUG_FILE" not in environ:
        extra["NCCL_DEBUG_FILE"] = f"{folder}/nccl-debug.%p.log"
    if mpi:
        extra |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return extra
