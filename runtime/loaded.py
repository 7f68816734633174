"""Which communication libraries this process really has mapped, and what they say about themselves.

A package version says what was installed; LD_LIBRARY_PATH, a preload or a second copy decide what runs. So
the truth is read from /proc/self/maps and from the mapped files. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from .redact import Redactor

# Name -> file name (or the last two parts of the path). Wheels may add a hash: libcudart-9335f6a2.so.12.
_SO = r"(?:-[0-9a-f]{8})?\.so(?:\.[\w.-]+)?"
_EXTENSION = r"(?:\.[\w-]+)?\.so"
LIBRARIES: Mapping[str, re.Pattern[str]] = {
    name: re.compile(rf"(?:^|/){pattern}$")
    for name, pattern in {
        "nccl": "libnccl" + _SO,
        "rccl": "librccl" + _SO,
        "nccl_ep": "libnccl_ep" + _SO,
        "nccl_net": r"lib[nr]ccl-net[\w-]*\.so(?:\.[\w.-]+)?",
        "nccl_tuner": r"lib[nr]ccl-tuner[\w-]*\.so(?:\.[\w.-]+)?",
        "torch_cpu": "libtorch_cpu" + _SO,
        "torch_cuda": "libtorch_cuda" + _SO,
        "torch_hip": "libtorch_hip" + _SO,
        "cudart": "libcudart" + _SO,
        "cuda": "libcuda" + _SO,
        "amdhip64": "libamdhip64" + _SO,
        "nvshmem_host": "libnvshmem_host" + _SO,
        "nvshmem_transport": r"nvshmem_transport_\w+\.so(?:\.[\w.-]+)?",
        "gloo": "libgloo" + _SO,
        "mscclpp": "(?:libmscclpp" + _SO + "|_mscclpp" + _EXTENSION + ")",
        "uccl": r"(?:libuccl[\w-]*" + _SO + "|uccl/ep" + _EXTENSION + ")",
        "deep_ep": "(?:deep_ep_cpp|deep_ep/_C)" + _EXTENSION,
        "hybrid_ep": "hybrid_ep_cpp" + _EXTENSION,
        "cupti": "libcupti" + _SO,
        "ibverbs": "libibverbs" + _SO,
        "mlx5": "libmlx5" + _SO,
        "mori": r"libmori\w*" + _SO,
        "mpi": "libmpi" + _SO,
        "fabric": "libfabric" + _SO,
    }.items()
}
# Of these one process can hold only one copy without surprises. Of the others several files are normal.
SINGLE = ("nccl", "rccl", "nccl_ep", "cudart", "amdhip64", "nvshmem_host", "gloo", "cupti", "mpi")


@dataclass(frozen=True)
class Mapped:
    """A library file mapped executable. `identity` is device and inode: one file under two names is one."""

    name: str
    path: str
    identity: str


@dataclass(frozen=True)
class Loaded:
    """What may be published of a mapped library: `version` as it says itself, `build_version` as those who
    were compiled against it expect it, `path` without what belongs to the machine or its user."""

    name: str
    version: str | None
    build_version: str | None
    path: str | None


def parse_maps(text: str) -> list[Mapped]:
    """The libraries of interest in the text of /proc/<pid>/maps, each file once, in order of address.

    A line is `address perms offset dev inode path`; the path may hold spaces, and ends in ` (deleted)` when
    the file is gone. Only executable mappings count: a file that is merely read was not loaded. A line cut
    short is skipped.
    """
    found: dict[str, Mapped] = {}
    for line in text.splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) < 6 or "x" not in parts[1] or not parts[5].startswith("/"):
            continue
        path = parts[5].removesuffix(" (deleted)")
        name = library_name(path)
        if name is not None:
            identity = f"{parts[3]}:{parts[4]}" if parts[4] != "0" else path
            found.setdefault(identity, Mapped(name, path, identity))
    return list(found.values())


def library_name(path: str) -> str | None:
    return next((name for name, pattern in LIBRARIES.items() if pattern.search(path)), None)


_SYSTEM = re.compile(
    r"/(?:usr/)?lib(?:32|64)?/(?:(?:x86_64|aarch64)-linux-gnu/)?[^/]+"
    r"|/usr/local/(?:cuda(?:-[\d.]+)?|nvidia)/(?:[\w.-]+/)*[^/]+"
    r"|/opt/rocm(?:-[\d.]+)?/(?:[\w.-]+/)*[^/]+"
)


def safe_path(path: str, redactor: Redactor) -> str:
    """From site-packages on, or whole where only a distribution puts files there, else the base name."""
    for folder in ("/site-packages/", "/dist-packages/"):
        _, found, inside = path.rpartition(folder)
        if found:
            path = folder[1:] + inside
            break
    else:
        if not _SYSTEM.fullmatch(path):
            path = path.rsplit("/", 1)[-1]
    return redactor.text(path)


# ------------------------------------------------------------------------------- what libraries say


def libraries(redactor: Redactor, torch: ModuleType | None = None) -> list[Loaded]:
    """What this process has mapped. `torch`, when it is imported, tells the versions it was built with.
    Empty where there is no /proc (macOS)."""
    try:
        text = Path("/proc/self/maps").read_text(errors="surrogateescape")
    except OSError:
        return []
    built = build_versions(torch)
    return [
        Loaded(m.name, version_of(m), built.get(m.name), safe_path(m.path, redactor))
        for m in parse_maps(text)
    ]


def version_of(mapped: Mapped) -> str | None:
    """What the mapped file itself reports, or None where it has no way to say. Never loads anything new."""
    ask = _ASK.get(mapped.name)
    if ask is None:
        return None
    try:
        library = ctypes.CDLL(mapped.path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ask(library)
    except (OSError, AttributeError):  # no longer there under this path; or older than the question
        return None


def build_versions(torch: ModuleType | None) -> dict[str, str]:
    """The versions that torch was compiled with (torch.cuda.nccl.version() is that, not what is loaded)."""
    if torch is None:
        return {}
    cuda, hip = torch.version.cuda, torch.version.hip
    versions = {"cudart": cuda, "amdhip64": hip}
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        versions["rccl" if hip else "nccl"] = ".".join(str(n) for n in torch.cuda.nccl.version())
    return {name: version for name, version in versions.items() if version}


def _nccl(library: ctypes.CDLL) -> str:
    return nccl_version(_one_int(library.ncclGetVersion))


def nccl_version(code: int) -> str:
    """22703 -> "2.27.3". NCCL_VERSION of nccl.h: X * 10000 + Y * 100 + Z, before 2.9 X * 1000 + ..."""
    major, rest = divmod(code, 10000 if code >= 10000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def cuda_version(code: int) -> str:
    """12080 -> "12.8". CUDART_VERSION: 1000 * major + 10 * minor."""
    return f"{code // 1000}.{code % 1000 // 10}"


def hip_version(code: int) -> str:
    """60342134 -> "6.3.42134". HIP_VERSION: major * 10000000 + minor * 100000 + patch."""
    return f"{code // 10_000_000}.{code // 100_000 % 100}.{code % 100_000}"


def _nvshmem(library: ctypes.CDLL) -> str:
    numbers = [ctypes.c_int(), ctypes.c_int(), ctypes.c_int()]
    library.nvshmemx_vendor_get_version_info(*(ctypes.byref(n) for n in numbers))
    return ".".join(str(n.value) for n in numbers)


def _mpi(library: ctypes.CDLL) -> str | None:
    """MPI_Get_library_version, which is allowed before MPI_Init."""
    text = ctypes.create_string_buffer(8192)  # MPI_MAX_LIBRARY_VERSION_STRING: Open MPI 256, MPICH 8192
    library.MPI_Get_library_version(text, ctypes.byref(ctypes.c_int()))
    return mpi_version(text.value.decode(errors="replace"))


def mpi_version(text: str) -> str | None:
    """Name and number out of an MPI's description of itself; the rest names its builder's machine."""
    for name, pattern in (
        ("Open MPI", r"Open MPI v([\w.]+)"),
        ("MPICH", r"MPICH Version:\s*([\w.]+)"),
        ("Intel MPI", r"Intel\S* MPI Library ([\w.]+)"),
    ):
        if found := re.search(pattern, text):
            return f"{name} {found[1]}"
    return None


def _one_int(function: Any) -> int:
    number = ctypes.c_int()
    status = function(ctypes.byref(number))
    if status != 0:
        raise OSError(f"{function.__name__} returned {status}")
    return number.value


_ASK: Mapping[str, Callable[[ctypes.CDLL], str | None]] = {
    "nccl": _nccl,
    "rccl": _nccl,
    "cudart": lambda library: cuda_version(_one_int(library.cudaRuntimeGetVersion)),
    "cuda": lambda library: cuda_version(_one_int(library.cuDriverGetVersion)),
    "amdhip64": lambda library: hip_version(_one_int(library.hipRuntimeGetVersion)),
    "cupti": lambda library: str(_one_int(library.cuptiGetVersion)),
    "nvshmem_host": _nvshmem,
    "mpi": _mpi,
}


# --------------------------------------------------------------------------------------------- findings


def findings(found: Iterable[Loaded]) -> list[str]:
    """What a reader must know: two copies of one library, or another version than the callers expect."""
    by_name: dict[str, list[Loaded]] = {}
    for library in found:
        by_name.setdefault(library.name, []).append(library)
    said = []
    for name, copies in by_name.items():
        if name in SINGLE and len(copies) > 1:
            each = " and ".join(f"{c.path} ({c.version or 'version unknown'})" for c in copies)
            said.append(f"{len(copies)} different {name} are mapped: {each}")
        for copy in copies:
            if copy.version and copy.build_version and _minor(copy.version) != _minor(copy.build_version):
                said.append(f"{name} {copy.version} is loaded, but torch was built with {copy.build_version}")
    return said


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])
