"""What the three DeepEP adapters share: which `deep_ep` is loaded, sizes, and rows grouped by expert."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.types import Case, Moe
from .base import MissingLibrary, Recipe

if TYPE_CHECKING:
    import torch

# Tokens per rank that buffers and run-time compiled kernels are made for, whatever a case has: the time of a
# call does not depend on it, that of compiling does on how many there are.
CAPACITY = 8192

UNKNOWN = "unknown"

_SITE = "{folder}/site/nvidia"
_JIT = {"CUDA_HOME": "{cuda}", "NVCC_CCBIN": "{cxx}"}  # both branches compile kernels with nvcc at run time
_VERBS = ("infiniband/verbs.h", "infiniband/mlx5dv.h")  # NVSHMEM's device code is written for the NIC

# DeepEP main, for both of its interfaces. It refuses to load unless torch's NCCL is the very file that it was
# built with, so the folder has its own, and comes before torch's on the path that torch looks along.
RECIPE = Recipe(
    git="https://github.com/deepseek-ai/DeepEP",
    submodules=("third-party/fmt",),
    packages=("nvidia-nccl-cu{cuda_major}==2.30.7", "nvidia-nvshmem-cu{cuda_major}==3.4.5"),
    needs=("git", "nvcc"),
    headers=("cuda_runtime.h", "cublas_v2.h", *_VERBS),
    libraries=("cuda",),
    imports=("setuptools",),
    build={
        "EP_NCCL_ROOT_DIR": f"{_SITE}/nccl",
        "EP_NVSHMEM_ROOT_DIR": f"{_SITE}/nvshmem",
        "LIBRARY_PATH": f"{_SITE}/nccl/lib:$LIBRARY_PATH",
    },
    prepend={"LD_LIBRARY_PATH": ("site/nvidia/nccl/lib", "site/nvidia/nvshmem/lib")},
    sets={
        **_JIT,
        "EP_NCCL_ROOT_DIR": f"{_SITE}/nccl",
        "NCCL_HOME": f"{_SITE}/nccl",
        "EP_JIT_CACHE_DIR": "{cache}",
    },
    modules=("deep_ep", "deep_ep._C"),
    versions={"deep_ep": "2.1.0+dd758ca"},
    nccl="2.30.7",
)
HYBRID = Recipe(
    git="https://github.com/deepseek-ai/DeepEP",
    packages=("nvidia-nvshmem-cu{cuda_major}==3.4.5", "nvidia-ml-py==13.615.71"),
    needs=("git", "nvcc"),
    headers=("cuda_runtime.h", "cublas_v2.h", "cuda/std/tuple", *_VERBS),
    libraries=("cuda", "nvtx3interop"),
    imports=("setuptools",),
    # With NVSHMEM_DIR it links a name that packages do not have.
    links={"site/nvidia/nvshmem/lib/libnvshmem_host.so": "libnvshmem_host.so.3"},
    build={"NVSHMEM_DIR": f"{_SITE}/nvshmem"},
    prepend={"LD_LIBRARY_PATH": ("site/nvidia/nvshmem/lib",), "CPATH": ("{cuda}/include/cccl",)},
    sets={**_JIT, "HYBRID_EP_CACHE_DIR": "{cache}"},
    modules=("deep_ep", "hybrid_ep_cpp"),
    versions={"deep_ep": "1.2.1+94a9f8f"},
)


def load(wanted: str, extension: str, hint: str, version: str, pin: str) -> Any:
    """The package `deep_ep` that has the class `wanted`: two libraries, main and hybrid-ep, go by that name.

    extension   its compiled module, by full name
    hint        what to do where it is missing
    version     the one that it must say it has, in `__version__` or as it was installed: `version+commit`
    pin         the commit that must be, where it says one; what says nothing is taken
    """
    try:
        package = importlib.import_module("deep_ep")
        importlib.import_module(extension)
    except (ImportError, AssertionError, OSError) as error:
        # AssertionError: main compares the NCCL that torch loaded with the one it was built against.
        raise MissingLibrary(
            f"deep_ep cannot be imported: {type(error).__name__}: {error}. {hint}"
        ) from error
    if not hasattr(package, wanted):
        raise MissingLibrary(f"this deep_ep has no {wanted}: it is the other branch of DeepEP. {hint}")
    public, _, local = (said := version_of(package)).partition("+")
    commit = re.fullmatch("[0-9a-f]{7,40}", local)
    if said != UNKNOWN and (public != version or (commit and local[: len(pin)] != pin[: len(local)])):
        raise MissingLibrary(f"deep_ep {said} is loaded, the adapter fits {version}+{pin[:7]}. {hint}")
    return package


def version_of(package: Any) -> str:
    """As the package was installed, "2.1.0+dd758ca"; else its `__version__`, which hybrid-ep has not; else
    unknown. Other packages of the name may lie on the path, so what is asked is the loaded file's."""
    try:
        found = metadata.distribution("deep_ep")
        file = Path(package.__file__ or "")
        if Path(str(found.locate_file("deep_ep/__init__.py"))).resolve() == file.resolve():
            return found.version
    except (metadata.PackageNotFoundError, AttributeError, OSError):
        pass
    return str(getattr(package, "__version__", UNKNOWN))


def versions(package: Any, extension: str) -> Mapping[str, str]:
    """What the loaded package says of itself, and the file of its compiled module."""
    compiled = importlib.import_module(extension)
    return {"deep_ep": version_of(package), extension: str(compiled.__file__)}


def one_node(case: Case) -> str | None:
    """These adapters drive the NVLink kernels; those over RDMA need NICs that nobody has tried them on."""
    return f"{case.backend} is driven on one node only" if case.nodes > 1 else None


def kernel_limits(name: str, case: Case, shape: Moe) -> str | None:
    """What the normal kernels of DeepEP and of what follows its API can take, whatever the row."""
    if shape.topk > 32:
        return f"{name} takes at most 32 experts a token, not {shape.topk}"
    if shape.experts // case.ranks > 1024:
        return f"{name} takes at most 1024 experts a rank, not {shape.experts // case.ranks}"
    sms = dict(case.knobs).get("num_sms", 2)
    if not isinstance(sms, int) or sms < 2 or sms % 2:
        return f"{name} pairs SMs: num_sms must be even, not {sms}"
    return None


def ll_kernel_limits(name: str, case: Case, shape: Moe, hidden: Sequence[int], topk: int) -> str | None:
    """The same for the low-latency kernels, compiled for some hidden sizes and up to `topk` experts."""
    if case.knobs:
        return f"{name} ll has no knobs; num_sms is one of its normal kernels"
    if shape.hidden not in hidden:
        return f"{name} ll is compiled for hidden {', '.join(map(str, hidden))}, not {shape.hidden}"
    if shape.topk > topk:
        return f"{name} ll takes at most {topk} experts a token, not {shape.topk}"
    return None


def capacity(tokens: int) -> int:
    """CAPACITY, or its smallest power-of-two multiple that holds `tokens`."""
    most = CAPACITY
    while most < tokens:
        most *= 2
    return most


def by_expert(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """[N, 1] int64 local expert id of each row, for rows grouped by expert."""
    import torch

    ids = torch.arange(len(counts), device=device)
    return ids.repeat_interleave(torch.tensor(counts, device=device))[:, None]


def padded(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`rows` [n, H], then NaN up to `count` rows: what nobody may read shows when somebody does."""
    import torch

    out = rows.new_full((count, rows.shape[1]), torch.nan)
    out[: len(rows)] = rows
    return out
