"""What there is to build a library with: torch, compilers, toolkit, GPU. And what of it is lacking.

Standard library only: it runs in the place where the ranks will run. torch is asked in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..backends.base import Facts, Recipe
from . import environment
from .commands import TIMED_OUT, run
from .errors import UserError

COMPILERS = ("/usr/bin/gcc", "/usr/bin/g++")  # the distribution's: what torch's extensions are built with
ASK_S = 180.0
# torch is asked what it is, and which NCCL or RCCL it loads.
_ASK = """
import json, torch
maps = [line.split(maxsplit=5) for line in open("/proc/self/maps")]
ccl = sorted({m[5].strip() for m in maps if len(m) > 5 and ("/libnccl.so" in m[5] or "/librccl.so" in m[5])})
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
arch = gpu and (gpu.gcnArchName.split(":")[0] if torch.version.hip else "%d.%d" % (gpu.major, gpu.minor))
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
    "file": torch.__file__, "ccl": ccl, "arch": arch}))
"""
# Who brings what a build includes or links, as distributions call it.
_VERBS = "libibverbs-dev (Debian) or rdma-core-devel (RHEL)"
_TOOLKIT = "the CUDA toolkit"
WHERE = {
    "nvcc": _TOOLKIT,
    "infiniband/verbs.h": _VERBS,
    "infiniband/mlx5dv.h": _VERBS,
    "numa.h": "libnuma-dev (Debian) or numactl-devel (RHEL)",
    "-lnuma": "libnuma-dev (Debian) or numactl-devel (RHEL)",
    "-lcuda": f"the driver, or lib64/stubs of {_TOOLKIT}",
    "-lnvidia-ml": f"the driver, or lib64/stubs of {_TOOLKIT}",
    "cuda_runtime.h": _TOOLKIT,
    "cublas_v2.h": _TOOLKIT,
    "nvml.h": _TOOLKIT,
    "nccl.h": "the NCCL that torch loads, its development part",
    "-lnvtx3interop": _TOOLKIT,
}


@dataclass(frozen=True)
class Here:
    """torch  what it says of itself: version, cuda, hip, file, ccl (paths of NCCL or RCCL), arch; {} where
           there is none, {"error": ...} where it cannot be imported
    cuda   the toolkit that nvcc belongs to
    arch   compute capability to build for, "9.0", or AMD's name; None: nobody said, and there is no GPU
    """

    torch: Mapping[str, object]
    cuda: Path | None
    cc: str
    cxx: str
    arch: str | None

    @property
    def site(self) -> Path | None:
        """The folder that torch is installed in."""
        file = self.torch.get("file")
        return Path(str(file)).parent.parent if file else None

    @property
    def ccl(self) -> Path | None:
        """The NCCL or RCCL that torch loads."""
        found = self.torch.get("ccl")
        return Path(found[0]) if isinstance(found, list) and found else None

    def names(self, folder: Path, cache: Path) -> dict[str, str]:
        """What the names in braces of a recipe stand for. `cache`: for what ranks compile."""
        ccl = self.ccl
        return {
            "folder": str(folder),
            "cache": str(cache),
            "cuda": str(self.cuda),
            "cuda_major": str(self.torch.get("cuda") or "").partition(".")[0],
            "arch": self.arch or "",
            "sm": (self.arch or "").replace(".", ""),
            "cxx": self.cxx,
            "ccl": str(ccl),
            "ccl_folder": str(ccl.parent) if ccl else "",
            "ccl_include": str(_ccl_include(ccl, self.cuda) or "") if ccl else "",
            "jobs": str(environment.build_jobs()),
        }

    def build(self) -> dict[str, str]:
        """The environment of every build: one toolkit, one host compiler, one architecture. A variable's own
        name in its value is what it was before (see environment.child_environment)."""
        jobs = str(environment.build_jobs())
        env = {"CC": self.cc, "CXX": self.cxx, "MAX_JOBS": jobs, "CMAKE_BUILD_PARALLEL_LEVEL": jobs}
        env["PIP_CONSTRAINT"] = ""  # of some vendors' images: ours are exact, and for this folder only
        if self.cuda is None:
            return env
        top = self.cuda
        # A slim toolkit lacks headers that torch includes; torch's own packages bring them: after the others.
        packaged = sorted((self.site / "nvidia").glob("*/include")) if self.site else []
        include = [top / "include", top / "include" / "cccl", "$CPATH", *packaged]
        link = [top / "lib64", top / "lib64" / "stubs", "$LIBRARY_PATH"]
        env |= {
            "CUDA_HOME": str(top),
            "CUDACXX": str(top / "bin" / "nvcc"),
            "CUDAHOSTCXX": self.cxx,
            "NVCC_CCBIN": self.cxx,
            "NVCC_PREPEND_FLAGS": "",  # conda's names its own host compiler
            "PATH": os.pathsep.join([str(top / "bin"), "$PATH"]),
            "CPATH": os.pathsep.join(map(str, include)),
            "LIBRARY_PATH": os.pathsep.join(map(str, link)),
        }
        return {**env, "TORCH_CUDA_ARCH_LIST": self.arch} if self.arch else env


def here(arch: str | None, gpu: bool = True) -> Here:
    """What this machine, or container, has. `arch`: of the pool, in any spelling; None: that of the GPU.
    Without `gpu` nothing is asked of torch."""
    torch = ask_torch() if gpu else {}
    found = capability(arch) if arch else torch.get("arch")
    cc, cxx = (path if Path(path).exists() else shutil.which(Path(path).name) or path for path in COMPILERS)
    return Here(torch, cuda_home(), cc, cxx, str(found) if found else None)


def ask_torch() -> dict[str, object]:
    if find_spec("torch") is None:
        return {}
    done = run([sys.executable, "-c", _ASK], timeout_s=ASK_S)
    if done.code == TIMED_OUT:
        return {"error": f"importing torch took more than {ASK_S:g} s"}
    try:
        return json.loads(done.out)
    except ValueError:
        said = done.err.strip().splitlines()
        return {"error": said[-1] if said else f"importing torch ended with exit code {done.code}"}


def capability(arch: str) -> str:
    """ "sm90", "sm_90" and "9.0" are "9.0", "sm103" is "10.3"; AMD's names stay."""
    found = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)[a-z]?", arch)
    return f"{found[1]}.{found[2]}" if found else arch


def cuda_home() -> Path | None:
    """The toolkit: $CUDA_HOME, that of the nvcc on PATH, or the usual place. A wrapper in /usr/local/bin is
    no toolkit, so nvcc and the headers must be there together."""
    nvcc = shutil.which("nvcc")
    of_path = Path(nvcc).resolve().parent.parent if nvcc else None
    usual = [environment.cuda_home(), of_path, Path("/usr/local/cuda")]
    for folder in filter(None, usual):
        if (folder / "bin" / "nvcc").exists() and (folder / "include" / "cuda_runtime.h").exists():
            return folder.resolve()
    return None


def _ccl_include(ccl: Path, cuda: Path | None) -> Path | None:
    """The headers that belong to an NCCL or RCCL."""
    usual = [ccl.parent.parent / "include", ccl.parents[2] / "include", cuda and cuda / "include"]
    for folder in filter(None, usual):
        for name in ("nccl.h", "rccl/rccl.h"):
            if (folder / name).exists():
                return folder
    return None


# ---------------------------------------------------------------------------------------------- lacking


def require(facts: Facts, recipe: Recipe, at: Here, names: Mapping[str, str]) -> None:
    """Raises UserError with everything that a build of this library lacks here, before anything is built."""
    missing = list(lacks(facts, recipe, at, names))
    if missing:
        hint = "prepare it inside the image that will run it (--sku), or install these first"
        raise UserError(f"{facts.name} cannot be installed here. Lacking: {'; '.join(missing)}", hint)


def lacks(facts: Facts, recipe: Recipe, at: Here, names: Mapping[str, str]) -> Iterator[str]:
    """One phrase for each thing that is missing, the cause before what follows from it."""
    gpu = next((name for name in ("cuda", "hip") if name in facts.devices), None)
    problem = _torch_problem(at, gpu) if gpu else None
    if problem:
        yield problem
        return  # nothing else can be told without it
    for program in recipe.needs:
        if not (shutil.which(program) or (program == "nvcc" and at.cuda)):
            yield _told(program)
    if at.arch is None and {"nvcc", "hipcc"} & set(recipe.needs):
        yield "the architecture to build for (no GPU here: name the pool with --sku)"
    elif "nvcc" in recipe.needs and at.cuda:
        yield from _toolkit_problems(at, at.arch or "")
    for module in recipe.imports:
        if find_spec(module) is None:
            yield f"the Python package {module}"
    env = build_environment(recipe, at, names)
    for header in recipe.headers:
        if not _compiles(at.cxx, env, f"#include <{header}>\n", "-fsyntax-only"):
            yield _told(header)
    for library in recipe.libraries:
        if not _compiles(at.cxx, env, "", "-shared", "-o", os.devnull, after=(f"-l{library}",)):
            yield _told(f"-l{library}")
    if any("{ccl_include}" in text for text in recipe.links.values()) and not names["ccl_include"]:
        yield _told("nccl.h")


def _torch_problem(at: Here, gpu: str) -> str | None:
    kind = {"cuda": "CUDA", "hip": "ROCm"}[gpu]
    if "error" in at.torch:
        return f"a torch that imports ({at.torch['error']})"
    if not at.torch.get(gpu):
        have = f"this one is {at.torch['version']}" if at.torch else f"{sys.executable} has none"
        return f"torch with {kind} ({have})"
    return None


def _toolkit_problems(at: Here, arch: str) -> Iterator[str]:
    """nvcc must be of torch's CUDA, and know the GPU."""
    assert at.cuda is not None
    nvcc = str(at.cuda / "bin" / "nvcc")
    version = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]).out)
    torch = str(at.torch.get("cuda") or "")
    if version and torch and version[1] != torch.partition(".")[0]:
        found = f"{at.cuda} is {version[1]}.{version[2]}"
        yield f"an nvcc of CUDA {torch.partition('.')[0]}, as torch's ({found})"
    own = at.torch.get("arch")
    if own and own != arch:
        yield f"a GPU of the pool's architecture (this one is {own}, the pool's are {arch})"
    codes = run([nvcc, "--list-gpu-code"]).out
    if codes and f"sm_{arch.replace('.', '')}" not in codes.split():
        yield f"an nvcc that knows architecture {arch}"


def _told(what: str) -> str:
    return f"{what}, from {WHERE[what]}" if what in WHERE else what


def filled(texts: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """Texts of a recipe with what the names in braces stand for."""
    return {name: text.format(**names) for name, text in texts.items()}


def build_environment(recipe: Recipe, at: Here, names: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a build: ours, that of every build, the recipe's."""
    ours = environment.child_environment(at.build())
    return environment.child_environment(filled(recipe.build, names), environ=ours)


def _compiles(
    cxx: str, env: Mapping[str, str], text: str, *options: str, after: tuple[str, ...] = ()
) -> bool:
    argv = [cxx, "-x", "c++", *options, "-", *after]
    try:
        done = subprocess.run(argv, input=text, env=dict(env), capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0
