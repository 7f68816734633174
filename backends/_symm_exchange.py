"""The exchange of `symm_mem`: its state on one rank, its launches, and what it shows the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ._symm_window import Kernel, Window, far
from .base import Context, Received

if TYPE_CHECKING:
    import torch

    from ..runtime.problem import MoeProblem


class Opened(Protocol):
    """What an exchange uses of the backend that set symmetric memory up: the window that all cases share."""

    context: Context
    kernels: Any
    triton: Any
    polls: int

    def open(self, regions: Mapping[str, int]) -> Window: ...

    def quiet(self) -> None: ...

    def check(self, private: torch.Tensor) -> None: ...


STAGINGS = 2


class Launch(NamedTuple):
    """How a kernel is spread: `groups` of tokens times `parts` of a row, programs of `warps` warps."""

    groups: int
    parts: int
    warps: int

    @property
    def programs(self) -> int:
        return self.groups * self.parts

    def columns(self, hidden: int) -> dict[str, int]:
        """The kernels' constants for this hidden size. A part is whole blocks of 128, for fp8."""
        chunk = 128 * -(-hidden // (128 * self.parts))
        return {"PARTS": self.parts, "CHUNK": chunk, "TILE": 1 << (chunk - 1).bit_length()}


# Both launches are the best of some forty that benchmarks/symm_mem_check.py tried on four H200 (132 SMs).
def dispatch_launch(hidden: int, tokens: int) -> Launch:
    """One program per SM at most, half a row each: every program counts slots, and every one signals.

    A handful of tokens is spread wider, or most SMs would have nothing to do.
    """
    least, most = -(-hidden // 8192), -(-hidden // 1024)
    parts = max(least, min(2, most)) if tokens >= 16 else most
    return Launch(max(1, min(tokens, 132 // parts)), parts, 8 if hidden > 1024 * parts else 4)


def combine_launch(hidden: int, tokens: int) -> Launch:
    """512 columns to one warp: two 16-byte loads per thread and rank, all of them in flight at once."""
    parts = -(-hidden // 512)
    return Launch(max(1, min(tokens, 1056 // parts)), parts, 1)


class State(NamedTuple):
    """What dispatch leaves in the window for the experts, by source and slot (T of each source).

    rows     [R*T, H] bf16, or fp8 with scales [R*T, H/128] float32
    meta     [R*T, WORDS] int32: K local expert ids (-1: none), K float32 weights as bits, the token's number
    counts   [R] int32: valid slots of each source, from 0
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    meta: torch.Tensor
    counts: torch.Tensor


class Staged(NamedTuple):
    """Rows in one of the staging buffers, valid until `stage` has been called twice more."""

    rows: torch.Tensor
    number: int


class OneSided:
    """One exchange. All ranks make the same exchanges in the same order; dispatch and combine go in turns."""

    realised: Mapping[str, int | float | str] = {}

    def __init__(
        self,
        backend: Opened,
        problem: MoeProblem,
        known: bool,
        launches: tuple[Launch, Launch] | None = None,
    ):
        """Collective. `known`: the slots and metadata of a first call are kept, later ones move rows only."""
        import torch

        shape, ranks = problem.shape, backend.context.ranks
        self.backend, self.problem, self.known = backend, problem, known
        self.rank, self.size, self.capacity = ranks.rank, ranks.size, max(1, shape.tokens)
        self.words = 4 * -(-(2 * shape.topk + 1) // 4)
        defaults = dispatch_launch(shape.hidden, self.capacity), combine_launch(shape.hidden, self.capacity)
        self.sending, self.fetching = launches or defaults
        window = self._lay_out()
        self.stagings, self.sent = 0, False
        self.out = torch.empty_like(problem.x)
        self._compile(window)
        self.wire = self._wire()

    def _lay_out(self) -> Window:
        import torch

        shape, quantised = self.problem.shape, self.problem.shape.dtype == "fp8"
        slots, hidden = self.size * self.capacity, shape.hidden
        blocks = hidden // 128 if quantised else 0
        kind = self.problem.format.dtype if quantised else torch.bfloat16
        self.row_bytes = hidden * kind.itemsize + 4 * blocks
        regions = {"rows": slots * hidden * kind.itemsize, "scales": slots * 4 * blocks}
        regions |= {"meta": slots * 4 * self.words}
        regions |= {f"staged {i}": slots * 2 * hidden for i in range(STAGINGS)}
        window = self.backend.open(regions)
        self.state = State(
            window.region("rows", (slots, hidden), kind),
            window.region("scales", (slots, blocks), torch.float32) if quantised else None,
            window.region("meta", (slots, self.words), torch.int32),
            window.control[self.backend.kernels.COUNTS :][: self.size],
        )
        self.staging = [
            window.region(f"staged {i}", (slots, hidden), torch.bfloat16) for i in range(STAGINGS)
        ]
        return window

    def _compile(self, window: Window) -> None:
        """All kernels before the first call: no rank waits on its GPU for another one's compiler."""
        import torch

        from ..runtime import fp8

        backend, problem, state, shape = self.backend, self.problem, self.state, self.problem.shape
        kernels, power, device = backend.kernels, backend.triton.next_power_of_2, problem.x.device
        slots = torch.full((max(1, problem.tokens), self.size), -1, dtype=torch.int32, device=device)
        words = kernels.TURNS + self.fetching.programs
        self.private = torch.zeros(words, dtype=torch.int32, device=device)
        where = (far(window.control), window.peers, self.private)
        where += (problem.tokens, self.capacity, self.rank)
        scales = state.meta if state.scales is None else state.scales  # unused without fp8
        given = (problem.x, problem.topk_idx, problem.topk_weights, slots)
        common = {"H": shape.hidden, "R": self.size, "LANES": power(self.size), "POLLS": backend.polls}
        constants = common | self.sending.columns(shape.hidden)
        constants |= {"K": shape.topk, "KP": power(shape.topk), "PER_RANK": problem.local_experts}
        constants |= {"WORDS": self.words, "META": power(self.words)}
        constants |= {"BLOCK": 128 if self.capacity <= 128 else 512}
        constants |= {"QUANT": 0 if state.scales is None else fp8.BLOCK}
        constants |= {"FMAX": problem.format.max, "TINY": fp8.TINY}
        tensors = (*given, far(state.rows), far(scales), far(state.meta), *where)
        sender = (kernels.dispatch, self.sending.programs, self.sending.warps, tensors)
        learn = Kernel(*sender, constants | {"KNOWN": False})
        self._dispatch = Kernel(*sender, constants | {"KNOWN": True}) if self.known else learn
        constants = common | self.fetching.columns(shape.hidden)
        fetcher = (kernels.combine, self.fetching.programs, self.fetching.warps)
        self._combine = [
            Kernel(*fetcher, (far(rows), slots, self.out, *where), constants) for rows in self.staging
        ]
        backend.quiet()
        if self.known:
            learn()
            backend.quiet()

    def dispatch(self) -> State:
        if self.sent:
            raise RuntimeError("dispatch again before combine: peers may still use what it overwrites")
        self.sent = True
        self._dispatch()
        return self.state

    def combine(self, state: State, staged: Staged) -> torch.Tensor:
        if not self.sent:
            raise RuntimeError("combine without a dispatch")
        if self.stagings - staged.number >= STAGINGS:
            raise RuntimeError("these staged rows have been overwritten")
        self.sent = False
        self._combine[staged.number % STAGINGS]()
        return self.out

    def received(self, state: State) -> Received:
        """Raises RuntimeError where a wait was given up."""
        import torch

        self.backend.check(self.private)
        index, picks = self._valid(state), self.problem.shape.topk
        meta = state.meta[index]
        ids = meta[:, :picks].long()
        weights = meta[:, picks : 2 * picks].contiguous().view(torch.float32)
        scales = None if state.scales is None else state.scales[index]
        sources = index // self.capacity * self.problem.shape.tokens + meta[:, 2 * picks]
        rows = state.rows.view(torch.uint8)[index].view(state.rows.dtype)
        return Received(rows, ids, scales, torch.where(ids >= 0, weights, 0.0), sources=sources)

    def stage(self, state: State, rows: torch.Tensor) -> Staged:
        staged = Staged(self.staging[self.stagings % STAGINGS], self.stagings)
        staged.rows.index_copy_(0, self._valid(state), rows)
        self.stagings += 1
        return staged

    def _valid(self, state: State) -> torch.Tensor:
        """[N] int64: the slots that hold rows, by source."""
        import torch

        slot = torch.arange(self.capacity, device=state.counts.device)
        return (slot < state.counts[:, None]).view(-1).nonzero()[:, 0]

    def outputs(self) -> Sequence[torch.Tensor]:
        # Staged rows are combine's input. Metadata and counts come with every dispatch, unless known.
        scales = [] if self.state.scales is None else [self.state.scales]
        fresh = [] if self.known else [self.state.meta, self.state.counts]
        return [self.state.rows, *scales, *fresh, self.out]

    def _wire(self) -> Mapping[str, int]:
        """Bytes to other ranks per call: rows, metadata and counts, signals of 4 bytes. Collective."""
        import torch

        problem = self.problem
        owner = torch.where(problem.topk_idx >= 0, problem.topk_idx // problem.local_experts, -1).cpu()
        hits = (owner[:, :, None] == torch.arange(self.size)).any(1)
        rows = self.backend.context.ranks.all_gather(hits.sum(0).tolist())
        others = [r for r in range(self.size) if r != self.rank]
        sent, returned = sum(rows[self.rank][r] for r in others), sum(rows[r][self.rank] for r in others)
        meta, counts = (0, 0) if self.known else (4 * self.words, 4 * len(others))
        signals = 4 * len(others)
        return {
            "dispatch": sent * (self.row_bytes + meta) + counts + signals * self.sending.programs,
            "combine": returned * 2 * problem.shape.hidden + signals,
        }

    def close(self) -> None:
        self.backend.quiet()
