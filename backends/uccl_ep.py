"""UCCL-EP on one NVLink node: DeepEP's first interface over UCCL's own transport, without NVSHMEM.

The wrapper calls itself `deep_ep`, or `uccl_deepep` where it was copied beside DeepEP. Which one is loaded
is told by what its Buffer takes (`is_intranode`), never by a package name.

The exchanges, their variants and windows: _deepep_buffer.py.

Facts that shape the adapter, from the sources of v0.1.1
  - On one node rows move through CUDA IPC pointers: no proxy thread runs, no NIC is touched. The rank comes
    from LOCAL_RANK where it is set, else from the current device; the address that ranks exchange is the
    first interface that is no loopback, or what UCCL_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names.
  - A second Buffer of the same mode aborts the process, so there is one of each, made at the first case that
    needs it (3 s of sleep) and made anew, after its predecessor is destroyed, only when a case needs more.
    It removes the barriers of its mode in /dev/shm: one UCCL job at a time on a host.
  - Where no NIC can register GPU memory (or there is none), the extension puts the low-latency buffer into
    pinned host memory, which has no CUDA IPC handle: rows would then wait for a proxy that does not run on
    one node. The adapter hands it device memory instead, as releases before v0.1.1 took; the result says so.
    The flags that only other nodes write stay in host memory, and combine reads them: a cost of such pools.
  - No rank may come without tokens: the extension refuses the null pointer of an empty tensor.
  - v0.1.1 may crash while the process ends. That is after the results: the harness records it apart.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..runtime.types import Case, Moe
from . import _deepep, _deepep_buffer
from ._deepep_buffer import Cached, LowLatency, Made, Normal, ll_capacity
from ._moe_only import MoeOnly
from .base import Context, Facts, MissingLibrary, Recipe, Source

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem

VERSION = "0.1.1"
WRAPPERS = ("uccl_deepep", "deep_ep")
RANKS = (2, 4, 8)  # the intranode kernels are instantiated for these
TMA_BYTES = 8192  # per warp: half a row and a barrier of 8 bytes
LL_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
LL_TOPK = 9
PROBE_BYTES = 4096
LARGEST_LL = 1024  # tokens: its four buffers then take 14 GiB a rank for DeepSeek-V3

_GIVEN = (
    "where no NIC can register GPU memory, over a buffer that the adapter allocates on the device in place "
    "of uccl.ep.get_rdma_buffer, which would take host memory and hang (knob device_memory_given = 1)"
)

_HINT = f"`cx prepare --backend uccl_ep` installs uccl {VERSION} and the wrapper of the same commit"

FACTS = Facts(
    name="uccl_ep",
    title="UCCL-EP",
    source=Source(
        "git",
        "https://github.com/uccl-project/uccl",
        "73ee4f12ba71717d6de34ba06806e1baaabe3f42",
        f"v{VERSION}, the newest release; wrapper and extension must be of one commit",
    ),
    # The extension is a wheel, built for CUDA 12; the wrapper, from the repository, calls itself deep_ep.
    recipe=Recipe(
        git="https://github.com/uccl-project/uccl",
        subfolder="ep/deep_ep_wrapper",
        packages=(f"uccl=={VERSION}", "nvidia-cuda-runtime-cu12==12.9.79"),
        needs=("git",),
        imports=("setuptools",),
        prepend={"LD_LIBRARY_PATH": ("site/nvidia/cuda_runtime/lib",)},
        modules=("uccl.ep", "deep_ep"),
        versions={"uccl": VERSION, "deep_ep": "0.1.0"},
    ),
    devices=("cuda",),
    variants=tuple(
        replace(v, window={name: f"{what}; {_GIVEN}" for name, what in v.window.items()})
        if v.name == "ll"
        else v
        for v in _deepep_buffer.VARIANTS
    ),
    knobs=("num_sms",),
    validated=("cuda",),
)


class Backend(MoeOnly):
    facts = FACTS

    def __init__(self) -> None:
        self.normal = self.ll = Made()

    def limit(self, case: Case, shape: Moe) -> str | None:
        if (reason := _deepep.one_node(case)) is not None:
            return reason
        if case.ranks not in RANKS:
            return f"uccl_ep's kernels exist for 2, 4 and 8 ranks, not for {case.ranks}"
        if shape.routing.spread == "one-empty":
            return f"uccl {VERSION} takes no rank without tokens"
        of_mode = _ll_limits if case.variant == "ll" else _normal_limits
        return of_mode(case, shape)

    def setup(self, context: Context) -> None:
        import torch  # noqa: F401  the extension finds libtorch by name, among what is loaded

        self.context = context
        self.wrapper = load()
        self.uccl = importlib.import_module("uccl")
        if self.uccl.__version__ != VERSION:
            raise MissingLibrary(f"uccl {self.uccl.__version__} is loaded, this fits {VERSION}: {_HINT}")
        self.default_sms: int = self.wrapper.Buffer.num_sms
        self.extension = importlib.import_module("uccl.ep")
        device = context.device.torch_device
        self.ours = not self.extension.can_register_rdma_gpu_buffer(device.index or 0, PROBE_BYTES)
        if self.ours:
            setattr(self.extension, "get_rdma_buffer", _device_memory(device))  # noqa: B010

    def moe(self, case: Case, problem: MoeProblem) -> Normal | Cached | LowLatency:
        cls, shape = self.wrapper.Buffer, problem.shape
        if case.variant == "ll":
            size = cls.get_low_latency_rdma_size_hint(LARGEST_LL, shape.hidden, problem.size, shape.experts)
            self.ll = self._fit(self.ll, size, shape, low_latency_mode=True, num_rdma_bytes=size)
            exchange = LowLatency(self.ll.buffer, problem)
            exchange.realised = {**exchange.realised, "device_memory_given": int(self.ours)}
            return exchange
        cls.set_num_sms(int(dict(case.knobs).get("num_sms", self.default_sms)))
        configs = (cls.get_dispatch_config(problem.size), cls.get_combine_config(problem.size))
        size = max(config.get_nvl_buffer_size_hint(2 * shape.hidden, problem.size) for config in configs)
        self.normal = self._fit(self.normal, size, shape, num_nvl_bytes=size)
        kind = Cached if case.variant == "cached" else Normal
        return kind(self.normal.buffer, problem, {"num_sms": cls.num_sms})

    def _fit(self, made: Made, size: int, shape: Moe, **how: Any) -> Made:
        """`made`, or what has room for `size` bytes. Every rank decides alike."""
        if made.size < size:
            self._destroy(made)
            buffer = self.wrapper.Buffer(group=self.context.group, explicitly_destroy=True, **how)
            return Made(size, buffer, shape.experts)
        if made is self.ll and made.experts != shape.experts:
            # The flags of another number of experts lie elsewhere in the same memory. No rank may be in a
            # call while they are cleared: the kernel itself does not wait.
            self._settle()
            made.buffer.clean_low_latency_buffer(ll_capacity(shape.tokens), shape.hidden, shape.experts)
            self._settle()
            made = made._replace(experts=shape.experts)
        return made

    def versions(self) -> Mapping[str, str]:
        return {
            "uccl": str(self.uccl.__version__),
            "uccl.ep": str(self.extension.__file__),
            "wrapper": self.wrapper.__name__,
        }

    def close(self) -> None:
        for made in (self.normal, self.ll):
            self._destroy(made)
        self.normal = self.ll = Made()

    def _destroy(self, made: Made) -> None:
        if made.buffer is not None:
            self._settle()  # a peer may still read our memory
            made.buffer.destroy()

    def _settle(self) -> None:
        self.context.device.synchronize()
        self.context.ranks.barrier()


def _device_memory(device: torch.device) -> Callable[[int, int], tuple[torch.Tensor, bool]]:
    """Stands for `uccl.ep.get_rdma_buffer`: (memory that takes part in DLPack, whether it is the host's).

    CUDA IPC shares whole allocations from their start: the block must be a segment of its own, which a large
    one is when the allocator has none cached.
    """

    def allocate(num_rdma_bytes: int, device_index: int) -> tuple[torch.Tensor, bool]:
        import torch

        torch.cuda.empty_cache()
        return torch.zeros(max(1, num_rdma_bytes), dtype=torch.uint8, device=device), False

    return allocate


def load() -> ModuleType:
    """The wrapper whose Buffer is UCCL's. Raises MissingLibrary where there is none."""
    found = []
    for name in WRAPPERS:
        try:
            package = importlib.import_module(name)
        except (ImportError, AssertionError, OSError) as error:
            found.append(f"{name} cannot be imported ({type(error).__name__}: {error})")
            continue
        if "is_intranode" in inspect.signature(package.Buffer.__init__).parameters:
            return package
        found.append(f"{name} is DeepEP itself")
    raise MissingLibrary(f"no Buffer of UCCL: {', '.join(found)}; {_HINT}")


def _normal_limits(case: Case, shape: Moe) -> str | None:
    row = shape.hidden * (1 if shape.dtype == "fp8" else 2)
    if row % 32:
        return f"uccl_ep moves rows in two halves of 16-byte words: hidden {shape.hidden} does not divide"
    if row // 2 + 8 > TMA_BYTES:
        where = f"{TMA_BYTES} bytes of shared memory"
        return f"uccl_ep stages half a row in {where}: hidden {shape.hidden} is too large"
    return _deepep.kernel_limits("uccl_ep", case, shape)


def _ll_limits(case: Case, shape: Moe) -> str | None:
    reason = _deepep.ll_kernel_limits("uccl_ep", case, shape, LL_HIDDEN, LL_TOPK)
    if reason is not None:
        return reason
    if shape.tokens > LARGEST_LL:
        return f"uccl_ep ll is given memory for {LARGEST_LL} tokens a rank, not {shape.tokens}"
    return None
