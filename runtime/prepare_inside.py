"""`cx prepare --sku` for pools whose ranks run in containers or on other nodes: the installation runs in the
same image, started by the same program, with the folder of the libraries mounted writable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..backends.base import Facts
from . import environment, prepared, slurm
from .allocation import allocated
from .commands import run
from .containers import Container
from .errors import InfraError, UserError
from .health import Wanted
from .launch import hide, say, step_image
from .site import Pool
from .sku import Sku
from .staging import Stage
from .started import SlurmMechanism, docker_image
from .yamlfile import ROOT

BUILD_S = 2 * 3600.0  # some compile for an hour


@dataclass(frozen=True)
class Inside:
    """Installations inside a pool's image, or with its nodes' Python where it has no image."""

    sku: Sku
    pool: Pool
    force: bool = False
    root: Path = ROOT

    def install(self, wanted: Sequence[Facts]) -> int:
        """All of them, one after the other. Raises UserError or InfraError for the first that fails."""
        hide(self.pool)
        if self.sku.mechanism == "docker":
            name = self.pool.image or self.sku.image or ""
            say(f"image: pulling {name}")
            container = self.container(docker_image(self.sku.container, name, self.sku.cpu)[0], self.root)
            for facts in wanted:
                self.in_container(container, facts)
            return 0
        with self.job() as job, self.code() as root:
            container = self.container(step_image(self.sku, self.pool, job)[0], root)
            for facts in wanted:
                self.in_step(job, container, root, facts)
        return 0

    @contextmanager
    def job(self) -> Iterator[str]:
        """The allocation we are in, else one node of our own."""
        given = environment.slurm_job()
        if given is not None:
            yield given[0]
            return
        asked, wait_s = self.pool.request(self.sku, 1), self.pool.wait_minutes * 60
        with allocated(asked, f"cx-prepare-{os.getpid()}", wait_s, say) as job:
            yield job

    @contextmanager
    def code(self) -> Iterator[Path]:
        """The checkout, or a copy where the nodes see only the stage."""
        if self.pool.stage_folder is None:
            yield self.root
            return
        stage = Stage(Path(self.pool.stage_folder))
        try:
            stage.fill(stage.out)
            yield stage.root
        finally:
            stage.remove()

    def container(self, image: str | None, root: Path) -> Container:
        """The pool's container with the code read-only and the folder of this image's libraries writable."""
        if self.sku.container == "none" or image is None:
            return Container("none", None, self.sku.vendor, self.pool.python or sys.executable)
        libraries = prepared.of_image(image, self.sku.cpu, self.sku.arch)
        libraries.mkdir(parents=True, exist_ok=True)
        mounts = {root: False, libraries: True}
        return Container(self.sku.container, image, self.sku.vendor, "python3", mounts, False, libraries)

    def arguments(self, container: Container, facts: Facts) -> list[str]:
        """Of the command inside. What ranks compile goes below /tmp there: everything else is read-only."""
        libraries, cache = container.libraries, Path(f"/tmp/collectivex-{os.getuid()}/jit")
        if libraries is None:
            libraries, cache = environment.libraries_dir(), environment.cache_dir() / "jit"
        words = ["install", "--backend", facts.name, "--libraries", str(libraries), "--cache", str(cache)]
        words += ["--arch", self.sku.arch] if self.sku.arch else []
        return [*words, "--force"] if self.force else words

    def in_container(self, container: Container, facts: Facts) -> None:
        name = f"cx-prepare-{os.getpid()}-{facts.name}"
        prefix = container.prefix(name, (os.getuid(), os.getgid()))
        argv = [*prefix, *container.entry(self.root, *self.arguments(container, facts))]
        try:
            finish(argv, environment.inherited(), facts)
        except BaseException:
            run([container.kind, "rm", "--force", name], timeout_s=60)
            raise

    def in_step(self, job: str, container: Container, root: Path, facts: Facts) -> None:
        hosts = slurm.hostnames(job)
        hide(self.pool, hosts)
        wanted = Wanted(self.sku.vendor, self.sku.gpus_per_node, self.sku.product)
        step = SlurmMechanism(job, hosts, container, root, wanted)
        argv = step.argv(f"cx-prepare-{facts.name}", 1, 1, BUILD_S, *self.arguments(container, facts))
        finish(argv, step.env, facts)


def finish(argv: Sequence[str], env: Mapping[str, str], facts: Facts) -> None:
    """Run the installation, its output before the user's eyes. Raises as it ended."""
    try:
        code = subprocess.run(argv, env=dict(env), stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        raise InfraError(f"cannot start {argv[0]}: {error.strerror}") from error
    if code:
        kind = UserError if code == UserError.exit_code else InfraError
        raise kind(f"{facts.name} was not installed in there (exit code {code})", "the reason is above")
