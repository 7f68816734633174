"""`cx launch`: the same execution wherever it is started, and however its ranks are.

From a login shell it asks for an allocation; inside one (also as a batch script) it uses that one; without a
scheduler it starts containers or processes here. The records, the summary and the exit code are those of
`cx run`: it is the same Execution, given another mechanism.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import environment, execute, images, recipe, slurm
from .allocation import allocated
from .commands import run
from .containers import Container
from .errors import CollectiveXError, InfraError, UserError
from .execute import Execution
from .health import Unhealthy, Wanted
from .manifest import Manifest
from .matrix import Planned
from .mechanism import Mechanism
from .progress import Progress
from .redact import Private
from .scrub import also_hide, scrub
from .site import Pool, load_pool
from .sku import Sku
from .slurm import AllocationLost
from .staging import Stage
from .started import ContainerMechanism, SlurmMechanism, docker_image
from .suite import Suite
from .types import Status
from .yamlfile import ROOT

RETRIES = 2  # on other nodes, when the first turn out unfit


def command(args: argparse.Namespace) -> int:
    suite, sku, planned = execute.plan(args)
    pool = load_pool(args.site, sku)
    hide(pool)
    out = Path(args.out or execute.default_folder(suite.name))
    if args.dry_run:
        print("\n".join(recipe.lines(args, sku, pool, planned, out)))
        return 0
    if sku.mechanism == "process":
        args.out = str(out)
        return execute.command(args)
    with execute.terminated_like_interrupted():
        return Launch(args, sku, pool, out).run(suite, planned)


def hide(pool: Pool, nodes: Sequence[str] = ()) -> None:
    """Facts of the site, and the nodes we got, are told in no record."""
    names = (pool.account, pool.partition, pool.qos, pool.reservation)
    folders = (pool.image_folder, pool.stage_folder, pool.image_file)
    hosts = (*pool.nodelist, *pool.exclude, *nodes)
    also_hide(Private(hosts, tuple(filter(None, names)), tuple(filter(None, folders))))


@dataclass
class Launch:
    """One `cx launch` on a scheduler or in containers."""

    args: argparse.Namespace
    sku: Sku
    pool: Pool
    out: Path
    root: Path = ROOT

    def run(self, suite: Suite, planned: Sequence[Planned]) -> int:
        given = environment.slurm_job()
        again = given is not None and given[1] > 0 and (self.out / "manifest.json").exists()  # requeued
        words = execute.told(without_site(sys.argv[1:]))
        cells = [item.cell for item in planned]
        resume = self.args.resume or again
        recipe.mounted(self.sku, self.pool, None, ROOT, self.out)  # what cannot be mounted is told first
        manifest = Manifest.open(self.out, suite.name, self.sku.name, words, cells, resume)
        execution = self.execution(suite, planned, manifest, self.out)
        stage = Stage(Path(self.pool.stage_folder)) if self.pool.stage_folder else None
        try:
            if stage is not None:
                stage.fill(self.out)
                manifest.path = stage.out / "manifest.json"
                execution = self.execution(suite, planned, manifest, stage.out)
                self.root = stage.root
            self.conduct(execution, given[0] if given else None)
        except KeyboardInterrupt:
            say("interrupted: what was measured is kept; run again with --resume to go on")
            execution.conclude(Status.NOT_RUN, "interrupted, or told to end by the scheduler")
        except CollectiveXError as error:
            print(f"error: {scrub(str(error))}", file=sys.stderr)
            execution.conclude(status_of(error), scrub(error.message))
        finally:
            if stage is not None and execution.out == stage.out:
                say(f"staging: {stage.bring_back(self.out)} results copied back")
                stage.remove()
        return execute.report(self.out)

    def execution(self, suite: Suite, planned: Sequence[Planned], manifest: Manifest, out: Path) -> Execution:
        self.shared = out
        progress, settings = Progress(len(planned)), recipe.settings(self.sku, self.pool)
        fail_fast = self.args.fail_fast
        return Execution(suite, self.sku, planned, out, manifest, progress, fail_fast, settings=settings)

    def conduct(self, execution: Execution, given: str | None) -> None:
        """Run on the allocation we are in, or on one of our own, elsewhere again when its nodes are unfit."""
        if self.sku.mechanism == "docker":
            execution.mechanism = self.docker()
            execution.run()
            return
        if given is not None:
            self.on_job(given, execution)
            return
        if self.pool.import_on == "login":
            self.container("")  # before nodes wait for it
        asked = self.pool.request(self.sku, self.sku.nodes)
        for retries_left in reversed(range(RETRIES + 1)):
            execution.progress.ended = sum(execution.done(item.cell) for item in execution.planned)
            try:
                name, wait_s = f"cx-{execution.place.execution}", self.pool.wait_minutes * 60
                with allocated(asked, name, wait_s, say) as job:
                    self.on_job(job, execution)
                infra = Status.INFRA in execution.manifest.cells.values()
                if not infra or not retries_left or execution.fail_fast:
                    return
                say("retrying what the machine failed")
            except (Unhealthy, AllocationLost) as error:
                nodes = error.nodes if isinstance(error, Unhealthy) else ()
                if not retries_left or isinstance(error, AllocationLost) and not error.elsewhere:
                    raise
                say(f"retrying on other nodes: {scrub(error.message)}")
                asked = replace(asked, exclude=tuple(sorted({*asked.exclude, *nodes})))

    def on_job(self, job: str, execution: Execution) -> None:
        hosts = slurm.hostnames(job)
        hide(self.pool, hosts)
        slurm.realised(self.sku.nodes, hosts)
        container, image = self.container(job)
        wanted = Wanted(self.sku.vendor, self.sku.gpus_per_node, self.sku.product)
        mechanism = SlurmMechanism(job, hosts, container, self.root, wanted, self.sku.mpi, image)
        execution.mechanism = mechanism
        execution.place = replace(execution.place, allocation=f"slurm-{job}")
        execution.run()
        if not all(execution.manifest.is_good(item.cell.id) for item in execution.planned):
            mechanism.require_alive()

    def docker(self) -> Mechanism:
        name = self.pool.image or self.sku.image or ""
        say(f"image: pulling {name}")
        reference, image = docker_image(self.sku.container, name, self.sku.cpu)
        wanted = Wanted(self.sku.vendor, self.sku.gpus_per_node, self.sku.product)
        return ContainerMechanism(self.mounted(reference), self.root, wanted, image, start=self.sku.start)

    def container(self, job: str) -> tuple[Container, dict[str, str | None] | None]:
        """How ranks of a step get into the image, and the image as provenance tells it."""
        image, told = step_image(self.sku, self.pool, job)
        return self.mounted(image), told

    def mounted(self, image: str | None) -> Container:
        return recipe.mounted(self.sku, self.pool, image, self.root, self.shared)


def step_image(sku: Sku, pool: Pool, job: str) -> tuple[str | None, dict[str, str | None] | None]:
    """What a step of a job names as its image, and the image as provenance tells it; None without one."""
    if sku.container == "none":
        return None, None
    name = pool.image or sku.image or Path(pool.image_file or "").name
    image: dict[str, str | None] = {"reference": name, "digest": None, "arch": sku.cpu}
    if pool.image_file:
        path = Path(pool.image_file)
        if pool.import_on == "login" and not path.is_file():
            raise InfraError(f"the image file {path.name} does not exist", "see image_file in the site file")
        return str(path), image
    reference = images.parse(name)
    if sku.container == "podman":
        digest = images.resolve(reference)
        return f"{reference.name.rpartition(':')[0]}@{digest}", {**image, "digest": digest}
    before = recipe.import_prefix(job) if pool.import_on == "compute" else []
    folder = Path(pool.image_folder or "")
    path, digest = images.ensure(reference, sku.cpu, folder, say, before, run)
    return str(path), {**image, "digest": digest}


def status_of(error: CollectiveXError) -> Status:
    """What cells become that a launch never reached: the machine's fault, or nobody's."""
    stopped = isinstance(error, AllocationLost) and error.state in (
        "CANCELLED",
        "TIMEOUT",
        "DEADLINE",
        "COMPLETED",
    )
    return Status.NOT_RUN if stopped or isinstance(error, UserError) else Status.INFRA


def without_site(words: Sequence[str]) -> list[str]:
    """The command line without where the site file is."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--site"):
            kept.append(word)
        skip = word == "--site"
    return kept


def say(text: str) -> None:
    """A phase, for people."""
    print(text, file=sys.stderr, flush=True)
