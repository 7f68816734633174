"""What a launch will do, as the commands it will run: `cx launch --dry-run`, and the pieces both share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..backends.base import Program
from . import environment, fabric, images, prepared, registry, slurm
from .commands import shown
from .containers import Container
from .health import Wanted
from .matrix import Planned
from .mechanism import allowed_s, local_ranks, processes
from .processes import worker_command
from .site import Pool
from .sku import Sku
from .started import ContainerMechanism, SlurmMechanism, pulled_as
from .starting import LauncherProcesses
from .types import Case
from .yamlfile import ROOT

# What only the run itself can know.
JOB, EXECUTION, NODE, CASES = "JOBID", "EXECUTION", "NODE0", "logs/ATTEMPT/cases.json"


def mounted(sku: Sku, pool: Pool, image: str | None, root: Path, out: Path) -> Container:
    """The pool's container: code and prepared libraries read-only, results writable, nothing else."""
    if sku.container == "none":
        return Container("none", image, sku.vendor, pool.python or sys.executable)
    mounts, libraries = {root: False, out.resolve(): True}, None
    if image:
        libraries = prepared.of_image(image, sku.cpu, sku.arch)
        mounts |= {libraries: False} if libraries.is_dir() else {}
    rdma = sku.nodes > 1 and pool.fabric(sku).transport in fabric.RDMA
    return Container(sku.container, image, sku.vendor, "python3", mounts, rdma, libraries)


def settings(sku: Sku, pool: Pool) -> dict[str, str]:
    """The network's variables for every rank, and those that make NCCL say which network it took."""
    found = fabric.settings(pool.fabric(sku), sku.vendor, sku.nodes)
    return {**found, **fabric.EVIDENCE} if "NCCL_NET" in found else found


def import_prefix(job: str) -> list[str]:
    """What runs an import on one compute node of the job, outside the container."""
    return slurm.srun(job, "cx-import", 1, 1, slurm.step_minutes(images.IMPORT_S), ["--mpi=none"], [])


def lines(
    args: argparse.Namespace, sku: Sku, pool: Pool, planned: Sequence[Planned], out: Path
) -> Iterator[str]:
    """The launch as shell lines, with a comment on each part."""
    stage = Path(pool.stage_folder) / "collectivex-STAGE" if pool.stage_folder else None
    root, shared = (stage / "code", stage / "out") if stage else (ROOT, out.resolve())
    yield f"# {args.suite} on {sku.name}: {sku.topology_class}"
    if stage:
        yield f"# staging: the code goes to {root}, results come back from {shared}"
    if sku.mechanism == "slurm":
        yield from _allocation(sku, pool)
    image = yield from _image(sku, pool)
    for name, value in {**sku.env, **settings(sku, pool)}.items():
        yield f"# every rank: {name}={value}"
    container = mounted(sku, pool, image, root, shared)
    shards = _shards(planned)
    yield from _libraries(container, [cells[0].cell.case.backend for cells in shards.values()])
    for name, cells in shards.items():
        cases = [p.cell.case for p in cells]
        nodes, program = cases[0].nodes, isinstance(registry.load(cases[0].backend), Program)
        yield f"# {name}: {len(cells)} cells, {cases[0].ranks} ranks on {nodes} node{'s'[: nodes > 1]}"
        files = ("--cases", str(shared / CASES.replace("ATTEMPT", f"{name}.0")), "--out", str(shared))
        launched = replace(sku, start="ranker") if program else sku
        yield from _group(launched, container, root, name, cases, files)
    unsupported = sum(p.unsupported is not None for p in planned)
    yield f"# {len(planned)} cells in all, {unsupported} unsupported"


def _allocation(sku: Sku, pool: Pool) -> Iterator[str]:
    given = environment.slurm_job()
    if given is not None:
        yield f"# allocation: the one we are in, job {given[0]}"
        return
    yield "# allocation: lasts as long as we hold the pipe to cat"
    yield shown(slurm.salloc(pool.request(sku, sku.nodes), f"cx-{EXECUTION}"))


def _image(sku: Sku, pool: Pool) -> Iterator[str]:
    """Lines about the image; returns what stands for it in the lines after."""
    name = pool.image or sku.image
    if sku.container == "none":
        return ""
    if pool.image_file:
        yield f"# image: {pool.image_file}"
        return pool.image_file
    reference = images.parse(name or "")
    yield f"# image: {reference.name}; DIGEST is what the registry says it is now"
    if sku.container == "docker" or sku.mechanism == "docker":
        yield shown([sku.container, "pull", "--quiet", pulled_as(name or "")])
        return f"{reference.registry}/{reference.repository}@DIGEST"
    if sku.container == "podman":
        return f"{reference.registry}/{reference.repository}@DIGEST"
    target = Path(pool.image_folder or "") / f"DIGEST.{sku.cpu}.sqsh"
    before = import_prefix(JOB) if pool.import_on == "compute" else []
    yield "# unless it is there:"
    yield shown(images.import_argv(reference, sku.cpu, target.with_name(f".{target.name}.tmp"), before))
    yield shown([*before, "unsquashfs", "-l", str(target.with_name(f".{target.name}.tmp"))])
    return str(target)


def _libraries(container: Container, backends: Sequence[str]) -> Iterator[str]:
    """Where ranks find what `cx prepare` installed inside the image, for backends that can be prepared."""
    names = [name for name in dict.fromkeys(backends) if registry.load(name).facts.recipe is not None]
    if names and container.libraries is not None:
        found = "read-only" if container.libraries in container.mounts else "read-only, once it is there"
        yield f"# prepared libraries of {', '.join(names)}: {container.libraries}, mounted {found}"


def _shards(planned: Sequence[Planned]) -> dict[str, list[Planned]]:
    found: dict[str, list[Planned]] = {}
    for item in planned:
        if item.unsupported is None:
            found.setdefault(f"{item.cell.case.backend}.r{item.cell.run}", []).append(item)
    return found


def _group(
    sku: Sku,
    container: Container,
    root: Path,
    name: str,
    cases: Sequence[Case],
    files: Sequence[str],
) -> Iterator[str]:
    """Health, the group, health again."""
    nodes, ranks, seconds = cases[0].nodes, processes(cases[0]), allowed_s(cases)
    if sku.mechanism == "process":
        if sku.start != "ranker":
            yield shown(LauncherProcesses(sku.start, root).argv(files, ranks))
            return
        yield f"# {ranks} times, as ranks 0 to {ranks - 1}:"
        yield shown(worker_command(*files))
        return
    wanted = Wanted(sku.vendor, cases[0].ranks // nodes, sku.product)
    look = ("health", "--vendor", sku.vendor, "--out", f"{files[-1]}/logs/{name}.health")
    group = f"cx-{EXECUTION}-{name}.0"
    if sku.mechanism == "docker":
        docker = ContainerMechanism(container, root, wanted, {}, start=sku.start)
        health = docker.argv("cx-health", *look)
        ranked = docker.argv(group, *local_ranks(files, ranks, sku.start))
    else:
        step = SlurmMechanism(JOB, [NODE], container, root, wanted, sku.mpi)
        health = step.argv("cx-health", nodes, 1, 120, *look)
        ranked = step.argv(group, nodes, ranks // nodes, seconds, "rank", *files)
    yield shown(health)
    yield shown(ranked)
    yield shown(health)
