"""How a rank gets into its image: argument lists for each container program. Pure functions.

Everywhere the same: the repository and what was prepared inside the image are mounted read-only, the output
folder writable, each at its own path; the image's own Python runs our runner, nothing of the user's home is
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UserError

_AMD = ("/dev/kfd", "/dev/dri")
# What a process inside must see of the scheduler to know its rank.
SLURM_NAMES = (
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_NUM_NODES"),
)


@dataclass(frozen=True)
class Container:
    """kind     "pyxis", "podman", "apptainer", "docker" or "none"
    image    a squashfs file (pyxis, apptainer) or a reference with digest; None for "none"
    vendor   whose devices are passed in
    python   the Python that runs the ranks, inside
    mounts   folder -> writable; the same path inside and outside
    rdma     whether the network between nodes is used: its devices, and memory locked without limit
    libraries  the folder of what was prepared inside this image, see prepared.of_image; None without an image
    """

    kind: str
    image: str | None
    vendor: str
    python: str
    mounts: Mapping[Path, bool] = field(default_factory=dict)
    rdma: bool = False
    libraries: Path | None = None

    def __post_init__(self) -> None:
        for path in self.mounts:
            if self.kind != "none" and any(c in str(path) for c in ",:"):
                raise UserError(
                    f"{path} cannot be mounted: its name has a comma or colon", "use another folder"
                )

    def entry(self, root: Path, *arguments: str) -> list[str]:
        """argv of `collectivex <arguments>` from the checkout at `root`."""
        program = "import sys; sys.path.insert(0, sys.argv.pop(1)); from collectivex.runtime.cli import main"
        return [self.python, "-u", "-c", f"{program}; sys.exit(main())", str(root), *arguments]

    def srun_options(self) -> list[str]:
        """Options that pyxis adds to srun; none for everything else."""
        if self.kind != "pyxis":
            return []
        mounts = ",".join(f"{p}:{p}" + ("" if writable else ":ro") for p, writable in self.mounts.items())
        return [
            f"--container-image={self.image}",
            f"--container-mounts={mounts}",
            "--container-workdir=/",
            "--no-container-mount-home",
            "--no-container-entrypoint",
        ]

    def prefix(self, name: str | None = None, user: tuple[int, int] | None = None) -> list[str]:
        """What stands before the command where a program makes the container; nothing for the other kinds.

        name    of the container, ours alone, so that nothing else is ever ended; it ends with its stdin.
                None: one container for each task of a Slurm step, where no two can have one name
        user    user and group id inside; None: the program's own choice
        """
        if self.kind == "apptainer":
            binds = [f"--bind={p}:{p}" + ("" if w else ":ro") for p, w in self.mounts.items()]
            device = ["--nv"] if self.vendor == "nvidia" else ["--rocm"] if self.vendor == "amd" else []
            return ["apptainer", "exec", "--no-home", "--pwd=/", *device, *binds, str(self.image)]
        if self.kind not in ("docker", "podman"):
            return []
        argv = [self.kind, "run", "--rm", "--init", "--network=host", "--ipc=host"]
        argv += [f"--name={name}", "--interactive"] if name else []
        argv += ["--env=HOME=/tmp", "--workdir=/", "--entrypoint="]
        argv += [f"--user={user[0]}:{user[1]}"] if user else []
        if self.kind == "podman" and user and user[0] != 0:
            argv.append("--userns=keep-id")  # else that id inside is one of the user's sub-ids outside
        argv += self._devices()
        argv += ["--device=/dev/infiniband", "--ulimit=memlock=-1"] if self.rdma else []
        if not name:  # which rank of the step it is stands in these
            argv += [f"--env={variable}" for variable in SLURM_NAMES]
        for path, writable in self.mounts.items():
            argv.append(f"--volume={path}:{path}" + ("" if writable else ":ro"))
        return [*argv, str(self.image)]

    def _devices(self) -> list[str]:
        if self.vendor == "nvidia":
            return ["--gpus=all"] if self.kind == "docker" else ["--device=nvidia.com/gpu=all"]
        if self.vendor == "amd":
            groups = ["--group-add=video", "--security-opt=seccomp=unconfined"]
            return [*(f"--device={path}" for path in _AMD), *groups]
        return []
