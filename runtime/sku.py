"""SKUs: machine pools as data. `load_sku` reads launchers/skus/<sku>.yaml or a file of yours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import detect, yamlfile
from .errors import UserError
from .fabric import Fabric
from .suite import locate

FOLDER = yamlfile.ROOT / "launchers" / "skus"
CPU_RANKS = 4  # by default, whatever the number of cores
DEVICES = {"nvidia": "cuda", "amd": "hip", "cpu": "cpu"}


@dataclass(frozen=True)
class ScaleUp:
    """The links inside a node or rack. GBps: per GPU and direction, 1e9 bytes per second."""

    kind: str
    domain: int
    links: int
    GBps: float
    source: str


@dataclass(frozen=True)
class ScaleOut:
    """The network. nics: per node; GBps: per NIC and direction, 1e9 bytes per second. See fabric.Fabric."""

    kind: str
    nics: int
    GBps: float
    source: str
    transport: str = "tcp"
    rails: bool = False
    small_mr: bool = False
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sku:
    """One machine pool; `nodes` is how many of its nodes are used.

    gpus_per_node  0: CPU
    cores          logical CPU cores per node; 0 where the file does not leave them to the machine
    env            set in every rank process
    refuse         backend -> why it cannot run here
    limits         further ceilings, in the form of the result's `limits`
    start          what starts the ranks of this machine: "ranker" (ours), "torchrun" or "mpi"
    container      "pyxis", "podman", "apptainer", "docker" or "none"
    scheduler      fields of slurm.Request
    """

    name: str
    title: str
    vendor: str
    arch: str | None
    product: str
    gpus_per_node: int
    cores: int
    scale_up: ScaleUp | None
    scale_out: ScaleOut | None
    mechanism: str
    image: str | None
    path: Path
    env: Mapping[str, str] = field(default_factory=dict)
    refuse: Mapping[str, str] = field(default_factory=dict)
    limits: tuple[Mapping[str, Any], ...] = ()
    nodes: int = 1
    cpu: str = "x86_64"
    max_nodes: int | None = None
    container: str = "none"
    mpi: str = "none"
    start: str = "ranker"
    scheduler: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """The name backends declare it by: "cuda", "hip" or "cpu"."""
        return DEVICES[self.vendor]

    @property
    def default_ranks(self) -> int:
        return self.nodes * (self.gpus_per_node or CPU_RANKS)

    @property
    def topology_class(self) -> str:
        """What decides which numbers may be compared: product, scale-up, GPUs x nodes ("h200-nvlink4-4x1"),
        and of several scale-up domains the network ("h200-nvlink4-8x2-infiniband-ndr").

        On CPUs the cores stand for the GPUs where they are known: "amd-epyc-cpu-2x1". A link that nobody
        declared is "unstated". Where domains span nodes and are several: "gb200-nvl72-4x36-2domains".
        """
        link = "cpu" if self.vendor == "cpu" else self.scale_up.kind if self.scale_up else "unstated"
        name = f"{self.product}-{link}-{self.gpus_per_node or self.cores or ''}x{self.nodes}"
        domains = -(-self.nodes // (self.nodes_per_domain or 1))
        if 1 < domains < self.nodes:
            name += f"-{domains}domains"
        return f"{name}-{self.scale_out.kind}" if domains > 1 and self.scale_out else name

    @property
    def nodes_per_domain(self) -> int | None:
        """Nodes that share a scale-up domain: 18 trays of 4 GPUs are one of 72. None where nobody says."""
        if self.scale_up is None or not self.gpus_per_node:
            return None
        return max(1, self.scale_up.domain // self.gpus_per_node)

    def all_limits(self) -> list[dict[str, Any]]:
        """The ceilings of this pool in the form of the result's `limits`, in one direction: scale_up and what
        the file adds of a GPU, scale_out of a node with all its NICs."""
        found: list[dict[str, Any]] = []
        if self.scale_up is not None:
            found.append({"name": "scale_up", "GBps": self.scale_up.GBps, "source": self.scale_up.source})
        if self.scale_out is not None:
            rate = self.scale_out.nics * self.scale_out.GBps
            found.append({"name": "scale_out", "GBps": rate, "source": self.scale_out.source})
        return [*({**limit, "kind": "datasheet"} for limit in found), *map(dict, self.limits)]

    def at(self, nodes: int) -> Sku:
        """This pool with `nodes` nodes in use. Raises UserError where one node is all there is."""
        if nodes > 1 and self.mechanism == "process":
            hint = "a pool with a scheduler starts several nodes; see `cx list skus`"
            raise UserError(f"SKU {self.name!r} starts processes on one machine, not on {nodes} nodes", hint)
        if self.max_nodes is not None and nodes > self.max_nodes:
            hint = f"use --nodes {self.max_nodes} or less"
            raise UserError(
                f"SKU {self.name!r} has jobs of at most {self.max_nodes} nodes, not {nodes}", hint
            )
        return replace(self, nodes=nodes)

    def fabric(self) -> Fabric:
        """The network between nodes as this file knows it; a site adds its names."""
        mnnvl = self.scale_up is not None and self.scale_up.domain > self.gpus_per_node
        out = self.scale_out
        if out is None:
            return Fabric(mnnvl=mnnvl)
        return Fabric(out.transport, tuple(out.devices), rails=out.rails, small_mr=out.small_mr, mnnvl=mnnvl)


def names() -> list[str]:
    """The SKUs that come with the project."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_sku(name_or_path: str, machine: detect.Machine | None = None) -> Sku:
    """A SKU by name, or from a YAML file by path. Raises UserError for everything that is wrong in it.

    machine    what `vendor: auto` resolves to; the one we are on when it is not given
    """
    path = locate(name_or_path, "SKU", FOLDER, names())
    data = yamlfile.read(path, "sku")
    yamlfile.refuse(path, _mistakes(path, data))
    facts = {key: value for key, value in data.items() if key != "schema"}
    here = _resolve(data, machine)
    return Sku(
        **{
            **facts,
            **here,
            "scale_up": ScaleUp(**data["scale_up"]) if data["scale_up"] else None,
            "scale_out": ScaleOut(**data["scale_out"]) if data["scale_out"] else None,
            "refuse": {entry["backend"]: entry["reason"] for entry in data["refuse"]},
            "limits": tuple(data["limits"]),
            "path": path,
        }
    )


def _resolve(data: Mapping[str, Any], machine: detect.Machine | None) -> dict[str, Any]:
    """vendor, product, GPUs and cores, from the machine where the file leaves them to it."""
    if data["vendor"] != "auto":
        facts = {"vendor": data["vendor"], "product": data["product"], "gpus_per_node": data["gpus_per_node"]}
        return {**facts, "cores": 0}
    machine = machine or detect.machine()
    return {
        "vendor": machine.vendor,
        "product": machine.product,
        "gpus_per_node": len(machine.gpus),
        "cores": machine.cores,
    }


def _mistakes(path: Path, data: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    if path.stem != data["name"]:
        found.append(("name", f"{data['name']!r} is not the name of the file, {path.stem!r}"))
    if data["vendor"] == "auto":
        return found
    if data["mechanism"] == "process" and (data.get("container", "none") != "none" or data["image"]):
        found.append(("mechanism", "processes of this machine run in no image and no container"))
    if data["mechanism"] == "docker" and data.get("container") not in ("docker", "podman"):
        found.append(("container", "mechanism docker needs container: docker or podman"))
    if data["mechanism"] == "slurm" and data.get("container") == "docker":
        found.append(("container", "Slurm starts ranks with pyxis, podman or apptainer, or with none"))
    if data["mechanism"] == "slurm" and data.get("start", "ranker") != "ranker":
        found.append(("start", "in a Slurm step srun starts the ranks; `mpi: pmix` is for what needs MPI"))
    for key in ("product", "gpus_per_node"):
        if data[key] is None:
            found.append((key, "only a pool with `vendor: auto` can leave this to the machine"))
    gpus = data["gpus_per_node"]
    if gpus is not None and (gpus == 0) != (data["vendor"] == "cpu"):
        found.append(("gpus_per_node", f"{gpus} does not fit vendor {data['vendor']}"))
    return found
