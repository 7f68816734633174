"""Which rank this process is, from the variables that its launcher set. Pure functions of a mapping;
environment.py passes the real one. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class RankEnvironment:
    """Who this process is. Ranks are placed in blocks: node = rank // ranks_per_node, on all nodes alike."""

    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int
    master_address: str
    master_port: int
    source: str = "torchrun"

    @property
    def nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    def variables(self) -> dict[str, str]:
        """The six variables under torchrun's names, which vendor libraries read as well."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class _Launcher:
    """How one launcher tells a process its rank. A name may have alternatives; the first that is set counts.
    It is this launcher when every name in `signs` (again with alternatives) is set."""

    name: str
    signs: tuple[tuple[str, ...], ...]
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    per_node: tuple[str, ...]


# The innermost launcher wins. mpirun starts one daemon per node through srun, and the ranks inherit that
# daemon's SLURM_PROCID, so MPI is asked before Slurm. A batch script has a SLURM_PROCID too (always 0) but
# no step id: it is not a rank.
_LAUNCHERS = (
    _Launcher("torchrun", (("RANK",),), ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    _Launcher(
        "Open MPI",
        (("OMPI_COMM_WORLD_RANK",),),
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Launcher(
        "MPICH",
        (("PMI_RANK",), ("MPI_LOCALRANKID",)),
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID",),
        ("MPI_LOCALNRANKS",),
    ),
    _Launcher(
        "Slurm",
        (("SLURM_PROCID",), ("SLURM_STEP_ID", "SLURM_STEPID")),
        ("SLURM_PROCID",),
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
        ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
    ),
)
_START = "start ranks with `cx run`, torchrun, srun or mpirun"


def read_rank(env: Mapping[str, str], master_address: str | None, master_port: int | None) -> RankEnvironment:
    """See environment.rank_environment."""
    launcher = next(
        (x for x in _LAUNCHERS if all(any(n in env for n in names) for names in x.signs)),
        None,
    )
    if launcher is None:
        if "PMIX_RANK" in env:
            raise UserError("PMIx tells this process its rank but not how many there are", _START)
        raise UserError(
            "this process is not a rank: none of RANK, OMPI_COMM_WORLD_RANK, SLURM_PROCID", _START
        )

    rank = _number(env, launcher.rank, launcher.name)
    size = _number(env, launcher.size, launcher.name)
    local_rank = _number(env, launcher.local_rank, launcher.name)
    per_node = _tasks_per_node(env, launcher.per_node, launcher.name)
    _check_places(rank, size, local_rank, per_node, launcher.name)
    address = master_address or env.get("MASTER_ADDR") or ("127.0.0.1" if size == per_node else None)
    if address is None:
        raise UserError(
            f"{launcher.name} started {size} ranks on {size // per_node} nodes, but MASTER_ADDR is not set",
            "set MASTER_ADDR to the first node's address and MASTER_PORT to a free port there",
        )
    port = master_port if master_port is not None else _number(env, ("MASTER_PORT",), launcher.name)
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is not a port", "use a free port between 1024 and 65535")
    return RankEnvironment(rank, size, local_rank, per_node, address, port, launcher.name)


def _number(env: Mapping[str, str], names: tuple[str, ...], launcher: str) -> int:
    name = next((n for n in names if n in env), None)
    if name is None:
        raise UserError(f"{launcher} started this process, but {' or '.join(names)} is not set", _START)
    if not re.fullmatch(r"[0-9]{1,9}", env[name].strip()):
        raise UserError(f"{name}={env[name]!r} is not a whole number", _START)
    return int(env[name])


def _tasks_per_node(env: Mapping[str, str], names: tuple[str, ...], launcher: str) -> int:
    """Slurm writes 2(x3),1 for three nodes of two tasks and one of one; we need all nodes alike."""
    name = next((n for n in names if n in env), None)
    if name is None or "(" not in env[name] and "," not in env[name]:
        return _number(env, names, launcher)
    parts = [re.fullmatch(r"([0-9]{1,9})(?:\(x[0-9]+\))?", part) for part in env[name].split(",")]
    counts = {int(part.group(1)) for part in parts if part}
    if not all(parts):
        raise UserError(f"{name}={env[name]!r} is not a list of task counts", _START)
    if len(counts) > 1:
        raise UserError(
            f"{name}={env[name]}: nodes have different numbers of ranks",
            "give every node the same number, for example with --ntasks-per-node",
        )
    return counts.pop()


def _check_places(rank: int, size: int, local_rank: int, per_node: int, launcher: str) -> None:
    what = f"{launcher} says rank {rank} of {size}, local rank {local_rank} of {per_node}"
    if size < 1 or per_node < 1 or rank >= size or local_rank >= per_node or per_node > size:
        raise UserError(f"contradictory: {what}", "unset left-over rank variables; " + _START)
    if size % per_node:
        raise UserError(f"uneven: {what}", "give every node the same number of ranks")
    if rank % per_node != local_rank:
        raise UserError(
            f"ranks are not placed in blocks: {what}",
            "fill one node after the other (srun --distribution=block, mpirun --map-by slot)",
        )
