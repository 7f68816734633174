"""Our own one-sided exchange and all-reduce on torch symmetric memory: the reference without dependencies.

Ranks write to and read from each other's memory through plain pointers: no multicast, no vendor library, no
host synchronisation. The kernels are Triton and use nothing that one vendor alone has.

dispatch is one kernel. Each program counts from the expert ids how many earlier tokens go where: that is the
slot of its token at each destination. It writes row, local expert ids, weights and number there, and adds
one to that rank's arrival counter. The last program waits for the signals of all programs of all ranks.
combine is one kernel. The first program tells all ranks that this one has come; each waits until all have,
fetches the rows of its tokens and adds them up.
Each source has T slots at every rank; `received` compacts them, outside the windows.

Why nobody overwrites what another rank still reads. dispatch and combine go in turns (enforced), each ends
only when all ranks have begun the same call, and a signal follows all that its rank's stream did before the
call.
  received rows   come with dispatch n+1, after the sender's combine n, for which all ranks have come to
                  combine n: their experts have done with the rows of dispatch n.
  staged rows     are made after our dispatch n+1, for which all ranks have begun theirs: combine n is over.
  counters        only grow. Between two signals of a rank on one counter lies a call on the other, for which
                  all ranks have ended the first call: a count never mixes signals of two calls.
  slots, output   are private, and ordered by the stream.
So one buffer and one crossing per call are enough, and no address changes: a captured graph can be replayed.
A signal is an atomic add of release order behind a program barrier, a wait a loop of acquiring loads, both
of system scope. In dispatch only the last program waits, after its own signal; in combine all wait for the
first one of each rank, which GPUs start first. Every wait is bounded: after `polls` polls (some ten seconds)
a rank sets a flag and never waits again, and `received` raises.

all_reduce one-shot: all write their input to everybody and add up for themselves, with one crossing. The
inbox has two halves, each with a counter, used in turns: call n tells that the peers have begun it, so are
done with the half of call n-1.
all_reduce two-shot: rank r adds up the r-th part and writes the sum to everybody; a second crossing tells
that all have read their inbox. A program deals only with its namesakes, of which there are no more than run
at once.

What bounds it: a crossing is a fence that waits for the acknowledgement of all writes, a signal and a poll,
2 to 3 us over NVLink. A pair has two, two launches, and the flight of the first rows. From some 32 tokens of
7168 columns on its rows take more: bytes to other ranks over the speed of the links (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..runtime.bandwidth import collective_counts
from ..runtime.types import Case, Collective, Moe
from . import base
from ._symm_exchange import OneSided
from ._symm_window import Kernel, Window, far
from .base import Context, Facts, MissingLibrary, Source, Variant

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem

ONE_SHOT_LIMIT = 16 << 20
MAX_RANKS = 64  # as in the kernels, which cannot be imported everywhere
POLLS = 1 << 23

_ONE_SHOT = "write the input to every rank, wait for theirs, add up in float32"
_TWO_SHOT = "scatter to the rank that adds up, float32 sum, write the sum to every rank"
_DISPATCH = "slots from the expert ids, quantise (fp8), write rows and metadata to the peers, wait for theirs"
_CACHED = "quantise (fp8), write rows to the peers, wait for theirs; slots and metadata known"
_COMBINE = "wait until all ranks have staged, fetch the rows, float32 sum in rank order, one cast to bf16"


def _all_reduce(name: str, mode: str, window: str) -> Variant:
    dtypes = ("float32", "float16", "bfloat16")
    ops = ("all_reduce",)
    return Variant(name, mode, dtypes, {"call": window}, family="collective", ops=ops, graph_safe=True)


def _exchange(mode: str, dispatch: str) -> Variant:
    window = {"dispatch": dispatch, "combine": _COMBINE}
    return Variant("one-sided", mode, ("bf16", "fp8"), window, graph_safe=True)


FACTS = Facts(
    name="symm_mem",
    title="torch symmetric memory with our Triton kernels",
    source=Source("bundled", "torch", "the torch of the environment", "a reference without dependencies"),
    devices=("cuda", "hip"),
    env={
        "TORCH_SYMMMEM": "CUDA",  # peer pointers, not NVSHMEM or NCCL
        "TORCH_SYMMMEM_IMPLICIT_POOL": "0",  # an allocation is a buffer, at the same offset on all ranks
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    },
    variants=(
        _all_reduce("one-shot", "out-of-place", _ONE_SHOT),
        _all_reduce("one-shot", "in-place", _ONE_SHOT),
        _all_reduce("two-shot", "out-of-place", _TWO_SHOT),
        _all_reduce("two-shot", "in-place", _TWO_SHOT),
        _exchange("normal", f"{_DISPATCH}; capacity for the worst case"),
        _exchange("cached", _CACHED),
        _exchange("low-latency", _DISPATCH),
    ),
    validated=("cuda",),
)


class Backend:
    facts = FACTS
    polls = POLLS

    def why_not(self, case: Case) -> str | None:
        reason = base.why_not(self.facts, case)
        if reason is not None:
            return reason
        if case.nodes > 1:
            return "peer pointers reach the ranks of one node only"
        if case.ranks > MAX_RANKS:
            return f"symm_mem has counters for {MAX_RANKS} ranks"
        if isinstance(case.shape, Moe):
            odd = case.shape.hidden % 8
            return (
                f"hidden {case.shape.hidden} is no multiple of 8: rows go in 16-byte words" if odd else None
            )
        size = collective_counts(case.shape.op, case.shape.bytes, case.shape.dtype, case.ranks)[2]
        if case.variant == "one-shot" and size > ONE_SHOT_LIMIT:
            return f"one-shot sends all to everybody: not above {ONE_SHOT_LIMIT >> 20} MiB"
        if case.variant == "two-shot" and size % (16 * case.ranks):
            return f"{size} bytes are no whole number of 16-byte words for each of {case.ranks} ranks"
        return None

    def setup(self, context: Context) -> None:
        """Raises MissingLibrary without Triton, or with a torch that has no symmetric memory."""
        try:
            import torch.distributed._symmetric_memory as symmetric
            import triton

            from . import _symm_kernels, _symm_reduce_kernels
        except ImportError as error:
            problem = f"symm_mem needs Triton and a torch with symmetric memory: {error}"
            raise MissingLibrary(problem) from error
        self.context, self.symmetric, self.triton = context, symmetric, triton
        self.kernels, self.reduce_kernels = _symm_kernels, _symm_reduce_kernels
        self.window: Window | None = None

    def open(self, regions: Mapping[str, int]) -> Window:
        """A window with these regions (name -> bytes) and counters at zero. Collective.

        It is kept, and only grows: all ranks come here with the same sizes in the same order.
        """
        needed = Window.needed(self.kernels, regions)
        self.quiet()
        if self.window is None or self.window.size < needed:
            self.window = None
            self.window = Window(self.context, self.symmetric, self.kernels, needed)
        self.window.lay_out(regions)
        self.quiet()
        return self.window

    def quiet(self) -> None:
        """Wait until no rank has anything in flight."""
        self.context.device.synchronize()
        self.context.ranks.barrier()

    def check(self, private: torch.Tensor) -> None:
        """Raises RuntimeError where a kernel gave up waiting. Synchronises."""
        code = int(private[self.kernels.FAILED])
        if code:
            waits = ("dispatch", "combine", "one-shot", "two-shot, first half", "two-shot, second half")
            raise RuntimeError(f"{waits[code - 1]}: no signal from all peers within {self.polls} polls")

    def collective(self, case: Case, shape: Collective) -> AllReduce:
        return AllReduce(self, shape, case.variant, in_place=case.mode == "in-place")

    def moe(self, case: Case, problem: MoeProblem) -> OneSided:
        return OneSided(self, problem, known=case.mode == "cached")

    def versions(self) -> Mapping[str, str]:
        import torch

        return {"torch": torch.__version__, "triton": self.triton.__version__}

    def close(self) -> None:
        self.quiet()
        self.window = None


class AllReduce:
    """One all-reduce over preallocated tensors. Peers write to the output of two-shot, in the window."""

    realised: Mapping[str, int | float | str] = {}

    def __init__(self, backend: Backend, shape: Collective, variant: str, in_place: bool):
        import torch

        self.backend, kernels, ranks = backend, backend.kernels, backend.context.ranks
        dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[shape.dtype]
        new = partial(torch.zeros, device=backend.context.device.torch_device)
        count, width = collective_counts(shape.op, shape.bytes, shape.dtype, ranks.size)[0], dtype.itemsize
        one_shot = variant == "one-shot"
        part, room = count if one_shot else count // ranks.size, -(-count // 128) * 128
        inbox = 2 * ranks.size * room if one_shot else count
        window = backend.open({"inbox": inbox * width, "output": 0 if one_shot else count * width})
        self.output = new(count, dtype=dtype) if one_shot else window.region("output", (count,), dtype)
        self.input = self.output if in_place else new(count, dtype=dtype)
        # One 16-byte word a thread while there are programs enough, then two.
        block = (4096 if part * width <= 4096 * kernels.MAX_PROGRAMS else 8192) // width
        programs = min(-(-part // block), kernels.MAX_PROGRAMS)
        self.private = new(kernels.TURNS + programs, dtype=torch.int32)
        where = (far(window.control), window.peers, self.private)
        tensors = (self.input, far(self.output), far(window.region("inbox", (inbox,), dtype)), *where)
        sizes = (count, room, ranks.rank) if one_shot else (part, ranks.rank)
        constants = {"R": ranks.size, "LANES": backend.triton.next_power_of_2(ranks.size), "BLOCK": block}
        function = backend.reduce_kernels.one_shot if one_shot else backend.reduce_kernels.two_shot
        self.run = Kernel(function, programs, 8, (*tensors, *sizes), constants | {"POLLS": backend.polls})
        backend.quiet()

    def close(self) -> None:
        """Raises RuntimeError where a wait was given up."""
        self.backend.check(self.private)
        self.backend.quiet()
