"""The control plane: how the ranks of one process group talk about the measurement, never through it.

`TorchRanks` uses a gloo group of its own, so that control traffic never touches the measured communicator.
`ThreadRanks` runs the same code with threads of one process, for tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    rank: int
    size: int
    local_rank: int
    ranks_per_node: int

    def barrier(self) -> None: ...

    def all_gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank."""
        ...

    def from_zero(self, value: T) -> T:
        """Rank 0's value on every rank: how a decision is taken once."""
        ...


def node_of(rank: int, ranks_per_node: int) -> int:
    return rank // ranks_per_node


class TorchRanks:
    """Over a torch.distributed gloo group."""

    def __init__(self, group: Any, rank: int, size: int, local_rank: int, ranks_per_node: int):
        self.group, self.rank, self.size = group, rank, size
        self.local_rank, self.ranks_per_node = local_rank, ranks_per_node

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier(group=self.group)

    def all_gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.group)
        return out

    def from_zero(self, value: T) -> T:
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


class ThreadRanks:
    """Over threads of this process. Make a set with `run_threads`."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]):
        self.rank, self.size, self.local_rank, self.ranks_per_node = rank, size, rank, size
        self._barrier, self._board = barrier, board

    def barrier(self) -> None:
        self._barrier.wait()

    def all_gather(self, value: T) -> list[T]:
        self._board[self.rank] = value
        self._barrier.wait()
        out = list(self._board)
        self._barrier.wait()
        return out

    def from_zero(self, value: T) -> T:
        return self.all_gather(value)[0]


def run_threads(size: int, work: Callable[[ThreadRanks], T], timeout_s: float = 60.0) -> list[T]:
    """Run `work` on `size` ranks, each a thread. The first exception of any rank is raised."""
    barrier = threading.Barrier(size, timeout=timeout_s)
    board: list[Any] = [None] * size

    def one(rank: int) -> T:
        try:
            return work(ThreadRanks(rank, size, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
        errors = [f.exception() for f in futures]
    first = [e for e in errors if e is not None and not isinstance(e, threading.BrokenBarrierError)]
    if first or any(errors):
        raise (first or [e for e in errors if e])[0]
    return [f.result() for f in futures]
