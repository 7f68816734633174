"""The rank half: one process per GPU, inside the vendor's container. Set up, then cell by cell:
check, measure, check, write.

Needs the standard library, torch and one vendor library. Exit codes: 0 all cells done, 1 a cell raised (the
supervisor starts a fresh group for the rest), 2 set-up failed, 3 infrastructure, 97 rendezvous port taken.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..backends.base import Context, Library, MissingLibrary, Program
from . import document, domains, environment, nvml, programs, provenance, registry
from .device import CpuDevice, Device, ManualDevice, gpu
from .document import Outcome, Place
from .errors import InfraError, UserError
from .heartbeat import Heartbeat
from .ranks import Ranks, TorchRanks
from .session import Session
from .supervise import PORT_TAKEN
from .types import CASES_SCHEMA, CONTRACT, Cell, Check, Collective, Moe, Status, case_from_json
from .writing import write_result, write_samples

RENDEZVOUS_TIMEOUT_S = 300


def command(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    try:
        cases = json.loads(Path(args.cases).read_text())
    except (OSError, ValueError) as error:
        hint = "`cx run` writes it and starts the workers"
        raise UserError(f"cannot read {args.cases}: {error}", hint) from error
    if cases.get("schema") != CASES_SCHEMA or cases.get("contract") != CONTRACT:
        raise UserError(
            f"{args.cases} is not a cases document of contract {CONTRACT}", "use one CollectiveX for both"
        )
    where = environment.rank_environment()
    heart = Heartbeat(Path(args.cases).parent, where.rank)
    if args.parent is not None:
        environment.die_with_parent(parent=args.parent)
    try:
        backend = registry.load(cases["backend"])
        if isinstance(backend, Program):
            return programs.run(backend, cases, where, heart, Path(args.out))
        session = set_up(cases, backend, where, heart, Path(args.out), began)
    except SystemExit:  # a runner of programs that was told to end
        raise
    except (MissingLibrary, UserError) as error:
        heart.error("setup", error)
        return 2
    except InfraError as error:
        heart.error("infra", error)
        return 3
    except PortTaken:
        return PORT_TAKEN
    except BaseException as error:
        heart.error("peer" if lost_peer(error) else "setup", error)
        raise
    kind = "case"
    try:
        run_cells(
            session,
            heart,
            [(Cell(case_from_json(c["case"]), c["run"]), c["position"]) for c in cases["cells"]],
        )
        kind = "teardown"
        tear_down(session, heart)
    except InfraError as error:
        heart.error("infra", error)
        return 3
    except BaseException as error:
        heart.error("peer" if lost_peer(error) else kind, error)
        raise
    return 0


def lost_peer(error: BaseException) -> bool:
    """Whether this is only what the end of another rank looks like from here."""
    return isinstance(error, RuntimeError) and (
        "gloo/transport" in str(error) or "closed by peer" in str(error)
    )


def session_key(cases: dict[str, Any]) -> str:
    """The key that host names are hashed with: a file of the log folder that goes when the execution ends."""
    return Path(cases["key_file"]).read_text()


class PortTaken(Exception):
    """Rank 0 could not bind the rendezvous port."""


def set_up(
    cases: dict[str, Any], backend: Library, where: Any, heart: Heartbeat, out: Path, began: float
) -> Session:
    """Device, process group, backend, provenance: in this order, so that versions are read as loaded."""
    heart.beat("import torch", 0)
    require_torch()
    manual = "manual" in backend.facts.devices
    device: Device = ManualDevice() if manual else CpuDevice()
    if cases["device"] == "gpu":
        device = gpu(where.local_rank)
    heart.beat("rendezvous", 0)
    gc.freeze()  # what set-up made is here to stay: no collection need look at it again
    ranks, group = join(where, device, heart)
    place = locate(cases["place"], ranks, device)
    started = time.perf_counter()
    heart.beat("backend setup", 0)
    backend.setup(Context(ranks, device, group))
    align = aligner(ranks, device, group)
    align()
    device.synchronize()
    found = provenance.collect(
        facts=backend.facts,
        versions=backend.versions(),
        ranks=ranks,
        key=session_key(cases),
        image=cases.get("image"),
    )
    seconds = {"start_s": started - began, "setup_s": time.perf_counter() - started}
    return Session(ranks, device, backend, place, align, heart.beat, session_key(cases), out, found, seconds)


def require_torch() -> None:
    """Raises UserError where the torch that is installed does not load."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        hint = "cx doctor says what is here; install torch anew"
        raise UserError(f"torch does not load: {error}", hint) from error


def join(where: Any, device: Device, heart: Heartbeat) -> tuple[Ranks, Any]:
    """The measured process group (gloo or NCCL/RCCL) and beside it a gloo group for control."""
    import torch.distributed as dist

    timeout = timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
    try:
        store = dist.TCPStore(
            where.master_address,
            where.master_port,
            where.world_size,
            is_master=where.rank == 0,
            timeout=timeout,
        )
    except (RuntimeError, dist.DistNetworkError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise PortTaken from error
        raise InfraError(f"rendezvous at port {where.master_port} failed: {error}") from error
    on_gpu = device.kind != "cpu"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=where.rank,
        world_size=where.world_size,
        timeout=timedelta(hours=2),
        device_id=device.torch_device if on_gpu else None,
    )
    control = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    ranks = TorchRanks(control, where.rank, where.world_size, where.local_rank, where.ranks_per_node)
    return ranks, dist.group.WORLD


def locate(told: dict[str, Any], ranks: Ranks, device: Device) -> Place:
    """The place of the cases document with the scale-up domains that the GPUs realise. Collective. Raises
    InfraError where they contradict what the pool stated."""
    fabric = None
    if device.kind == "cuda":
        import torch

        fabric = nvml.fabric(f"GPU-{torch.cuda.get_device_properties(device.torch_device).uuid}")
    place = Place.told(told)
    nodes = ranks.size // ranks.ranks_per_node
    found, source = domains.placed(ranks.size, nodes, place.nodes_per_domain, ranks.all_gather(fabric))
    return replace(place, domains=tuple(found), domains_source=source)


def aligner(ranks: Ranks, device: Device, group: Any) -> Callable[[], None]:
    """What makes ranks start together: a one-element all-reduce on a communicator of its own (GPU), or a host
    barrier (CPU)."""
    if device.kind == "cpu":
        return ranks.barrier
    import torch
    import torch.distributed as dist

    apart = dist.new_group(backend="nccl")
    one = torch.ones(1, device=device.torch_device)
    return lambda: (dist.all_reduce(one, group=apart), None)[1]


def run_cells(session: Session, heart: Heartbeat, cells: Iterable[tuple[Cell, int]]) -> None:
    for cell, position in cells:
        heart.begin(cell.id, cell.case.deadline_s)
        result = run_cell(session, cell, position)
        if session.ranks.rank == 0:
            heart.beat("write", 0)
            write_result(session.out, cell.id, result)
        session.ranks.barrier()
        heart.end()


def run_cell(session: Session, cell: Cell, position: int) -> dict[str, Any]:
    """Everything about one cell, ending in its result document (rank 0's is the one that is written)."""
    from .run_collective import measure_collective
    from .run_moe import measure_moe

    began = time.perf_counter()
    before = provenance.clocks(session.ranks, session.device)
    if isinstance(cell.case.shape, Collective):
        outcome = measure_collective(session, cell.case, cell.case.shape)
    else:
        assert isinstance(cell.case.shape, Moe)
        outcome = measure_moe(session, cell.case, cell.case.shape)
    outcome.seconds["total_s"] = time.perf_counter() - began
    after = provenance.clocks(session.ranks, session.device)
    result = build_result(session, cell, position, outcome)
    result["provenance"] = {**session.provenance, "clocks": {"before": before, "after": after}}
    result["warnings"] += provenance.findings(result["provenance"])
    return result


def build_result(session: Session, cell: Cell, position: int, outcome: Outcome) -> dict[str, Any]:
    """Gather the samples of all ranks, reduce, and decide the status. Collective."""
    facts = session.backend.facts
    checks = merge_checks(session.ranks, outcome.checks)
    found = [(s, session.ranks.all_gather(s.samples_us)) for s in outcome.series]
    result = document.empty(cell, session.place, Status.OK, None, position, facts)
    result["correctness"] = document.correctness(checks)
    result["first_call_us"] = outcome.first_call_us
    result["bytes"] = outcome.bytes
    result["routing_proof"] = outcome.routing_proof
    result["warnings"] = outcome.warnings
    result["timing_split"] = {k: round(v, 4) for k, v in {**session.setup_seconds, **outcome.seconds}.items()}
    result["knobs"] = document.knobs(dict(cell.case.knobs), outcome.realised)
    wrong = [c for c in checks if not c.passed]
    unlike = document.not_applied(result)
    if wrong or not checks:
        result["status"] = str(Status.INCORRECT)
        result["reason"] = (
            f"{wrong[0].name} ({wrong[0].phase}): {wrong[0].detail}" if wrong else "nothing was checked"
        )
        return result
    if unlike:
        knob = result["knobs"][unlike[0]]
        result["status"] = str(Status.INCORRECT)
        result["reason"] = f"{unlike[0]}: asked for {knob['requested']}, the library used {knob['realised']}"
        return result
    document.measure(result, cell.case, session.place, found, session.provenance["environment"])
    if session.ranks.rank == 0:
        entries = [document.sidecar_entry(*one) for one in found]
        result["samples"] = write_samples(session.out, cell.id, entries)
    return result


def merge_checks(ranks: Ranks, checks: Sequence[Check]) -> list[Check]:
    """One check for all ranks: passed where every rank passed, with the first failing rank's evidence."""
    merged = []
    for of_ranks in zip(*ranks.all_gather(list(checks)), strict=True):
        first = of_ranks[0]
        failed = [(rank, c) for rank, c in enumerate(of_ranks) if not c.passed]
        if failed:
            rank, bad = failed[0]
            first = replace(bad, detail=f"rank {rank}: {bad.detail}")
        merged.append(first)
    return merged


def tear_down(session: Session, heart: Heartbeat) -> None:
    """Close the library, then the process group. A crash here cannot touch results already written."""
    import torch.distributed as dist

    heart.beat("teardown", 0)
    faulthandler.dump_traceback_later(60, exit=True, file=sys.stderr)
    session.backend.close()
    session.ranks.barrier()
    dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
