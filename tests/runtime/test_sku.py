"""SKUs: what they mean, and that every mistake is reported as `file:key: problem`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from collectivex.runtime import environment, registry, sku
from collectivex.runtime.detect import Machine
from collectivex.runtime.errors import UserError

LAPTOP = Machine("cpu", (), "AMD EPYC", 2)
SERVER = Machine("nvidia", ("NVIDIA H200",) * 8, "Xeon", 192)


def pool(**changes: Any) -> dict[str, Any]:
    """A valid pool with a scheduler and a network."""
    return {
        "schema": "collectivex.sku.v1",
        "name": "pool",
        "title": "for a test",
        "vendor": "nvidia",
        "arch": "sm90",
        "product": "h200",
        "gpus_per_node": 8,
        "scale_up": {"kind": "nvlink4", "domain": 8, "links": 18, "GBps": 450, "source": "datasheet"},
        "scale_out": {"kind": "infiniband", "nics": 8, "GBps": 50, "source": "datasheet"},
        "mechanism": "slurm",
        "image": "vendor/image:1.2",
        "env": {"NCCL_IB_HCA": "=mlx5_0,mlx5_1"},
        "refuse": [{"backend": "deepep", "reason": "its kernels need sm100"}],
        "limits": [],
        **changes,
    }


def load(tmp_path: Path, data: dict[str, Any], machine: Machine | None = None) -> sku.Sku:
    path = tmp_path / "pool.yaml"
    path.write_text(yaml.safe_dump(data))
    return sku.load_sku(str(path), machine)


def test_local_is_the_cpu_where_there_are_no_gpus() -> None:
    """Four ranks on gloo, whatever the number of cores; the cores stand in the topology class."""
    loaded = sku.load_sku("local", LAPTOP)
    assert (loaded.vendor, loaded.device, loaded.default_ranks) == ("cpu", "cpu", 4)
    assert loaded.topology_class == "amd-epyc-cpu-2x1"
    assert loaded.all_limits() == []


def test_local_is_the_gpus_where_there_are_some() -> None:
    """One rank per GPU. The link is not known, so the class compares with no declared pool."""
    loaded = sku.load_sku("local", SERVER)
    assert (loaded.device, loaded.default_ranks) == ("cuda", 8)
    assert loaded.topology_class == "h200-unstated-8x1"


def test_a_class_says_product_link_and_gpus_by_nodes(tmp_path: Path) -> None:
    """The pools of one product differ in class by their links and size, and by nothing measured. On one node
    the network says nothing."""
    assert sku.load_sku("h200x4-nvlink").topology_class == "h200-nvlink4-4x1"
    assert load(tmp_path, pool()).topology_class == "h200-nvlink4-8x1"
    assert load(tmp_path, pool()).at(2).topology_class == "h200-nvlink4-8x2-infiniband"
    assert load(tmp_path, pool(scale_out=None)).at(2).topology_class == "h200-nvlink4-8x2"


def test_ranks_default_to_one_per_gpu_of_every_node(tmp_path: Path) -> None:
    """Two nodes of eight."""
    assert load(tmp_path, pool()).at(2).default_ranks == 16


def test_limits_are_the_links_then_what_the_file_adds(tmp_path: Path) -> None:
    """In the form of the result schema, each with its source."""
    extra = {"name": "hbm", "GBps": 4800, "source": "datasheet", "kind": "datasheet"}
    names = [limit["name"] for limit in load(tmp_path, pool(limits=[extra])).all_limits()]
    assert names == ["scale_up", "scale_out", "hbm"]


def test_a_node_with_all_its_nics_is_the_limit_of_the_network(tmp_path: Path) -> None:
    """8 NICs of 50 GB/s are 400 GB/s of a node, however many ranks share them; a link's limit is a GPU's."""
    up, out = load(tmp_path, pool()).all_limits()
    assert (up["GBps"], out["GBps"]) == (450, 400)


def test_trays_of_one_nvlink_domain_are_one_domain() -> None:
    """72 GPUs at 4 a tray are 18 trays; a board of 8 is one node; a link nobody declared says nothing."""
    assert sku.load_sku("gb200-nv").nodes_per_domain == 18
    assert sku.load_sku("gb300-nv").nodes_per_domain == 18
    assert sku.load_sku("b200-dgxc-slurm").nodes_per_domain == 1
    assert sku.load_sku("local", SERVER).nodes_per_domain is None


def test_nodes_of_several_racks_are_another_class(tmp_path: Path) -> None:
    """Two trays of one rack and 36 of two measure different wires."""
    rack = {"kind": "nvl72", "domain": 72, "links": 18, "GBps": 900, "source": "datasheet"}
    loaded = load(tmp_path, pool(product="gb200", gpus_per_node=4, scale_up=rack))
    assert loaded.at(2).topology_class == "gb200-nvl72-4x2"
    assert loaded.at(18).topology_class == "gb200-nvl72-4x18"
    assert loaded.at(36).topology_class == "gb200-nvl72-4x36-2domains-infiniband"


def test_a_machine_without_scheduler_has_one_node() -> None:
    """Processes are started here and nowhere else."""
    with pytest.raises(UserError, match="'h200x4-nvlink' starts processes on one machine, not on 2 nodes"):
        sku.load_sku("h200x4-nvlink").at(2)


# What a limit's source says where the number comes from others than its vendor.
UNREAD = "the datasheet itself was not read"
PUBLIC = ("docs.nvidia.com", "nvidia.com", "rocm.blogs.amd.com", "github.com/", "MLPerf")


@pytest.mark.parametrize("name", sku.names())
def test_every_limit_says_where_it_was_read_or_that_it_was_not(name: str) -> None:
    """A number from memory under the name of a datasheet is a claim that nobody has checked."""
    for limit in sku.load_sku(name, SERVER).all_limits():
        assert UNREAD in limit["source"] or any(place in limit["source"] for place in PUBLIC), limit


@pytest.mark.parametrize(
    ("name", "per_link"),
    [("h100-dgxc", 25), ("h200-dgxc", 25), ("b200-dgxc", 50), ("b200-dgxc-slurm", 50), ("b300", 50)]
    + [("gb200-nv", 50), ("gb300-nv", 50), ("mi300x-amds", 64), ("mi325x-amds", 64), ("mi355x-amds", 76.8)],
)
def test_a_scale_up_limit_is_its_links(name: str, per_link: float) -> None:
    """GB/s each way of NVLink 4 and 5 (18 links) and of Infinity Fabric (a link to each of seven peers)."""
    link = sku.load_sku(name).scale_up
    assert link is not None
    assert link.GBps == pytest.approx(link.links * per_link)
    assert link.links == (7 if name.startswith("mi") else 18)


@pytest.mark.parametrize(
    ("name", "nodes", "rate"), [("h100-dgxc", 2, 400), ("h200-dgxc", 2, 400), ("b200-dgxc-slurm", 8, 400)]
)
def test_pools_with_a_stated_network_have_several_nodes(name: str, nodes: int, rate: float) -> None:
    """3.2 Tb/s a node in all three: 16 ports of 200 Gb/s or 8 of 400. One node more is refused."""
    loaded = sku.load_sku(name).at(nodes)
    assert {x["name"]: x["GBps"] for x in loaded.all_limits()}["scale_out"] == rate
    with pytest.raises(UserError, match=f"jobs of at most {nodes} nodes"):
        loaded.at(nodes + 1)


@pytest.mark.parametrize("name", ["h200x2-nvlink", "h200x4-nvlink"])
def test_multicast_is_off_on_the_shared_h200_machines(name: str) -> None:
    """A multicast group left behind by a crash takes the GPUs of the whole host out of service."""
    loaded = sku.load_sku(name)
    assert set(environment.multicast_settings(loaded.env).values()) == {"off"}
    assert (loaded.env["NCCL_IB_DISABLE"], loaded.env["EP_DISABLE_GIN"]) == ("1", "1")
    link = loaded.scale_up
    assert link is not None
    assert link.links * 25 == link.GBps == 450


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (pool(vendr="x"), "pool.yaml:vendr: unknown key"),
    (pool(vendr="x"), "did you mean 'vendor'?"),
    (pool(vendor="nvida"), "pool.yaml:vendor: 'nvida' is not one of nvidia, amd, cpu, auto; did you mean"),
    (pool(gpus_per_node="8"), 'pool.yaml:gpus_per_node: "8" is not of types'),
    (pool(gpus_per_node=None), "pool.yaml:gpus_per_node: only a pool with `vendor: auto`"),
    (pool(product=None), "pool.yaml:product: only a pool with `vendor: auto`"),
    (pool(gpus_per_node=0), "pool.yaml:gpus_per_node: 0 does not fit vendor nvidia"),
    (pool(vendor="cpu"), "pool.yaml:gpus_per_node: 8 does not fit vendor cpu"),
    (pool(name="other"), "pool.yaml:name: 'other' is not the name of the file"),
    (pool(scale_up={"kind": "nvlink4"}), "pool.yaml:scale_up: needs the key 'GBps'"),
    (pool(mechanism="mpi"), "pool.yaml:mechanism: 'mpi' is not one of process, slurm, docker"),
    (pool(image="x; rm -rf /"), 'pool.yaml:image: "x; rm -rf /" does not match'),
    (pool(env={"A": "$(id)"}), 'pool.yaml:env.A: "$(id)" does not match'),
    (pool(env={"A": 1}), 'pool.yaml:env.A: 1 is not of type "string"'),
    (pool(env={"a b": "1"}), "pool.yaml:env"),
    (pool(refuse=[{"backend": "x"}]), "pool.yaml:refuse[0]: needs the key 'reason'"),
]


@pytest.mark.parametrize(("data", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_reported_as_file_key_problem(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    """Before anything is allocated; shell metacharacters are refused in every field that reaches a shell."""
    with pytest.raises(UserError) as error:
        load(tmp_path, data)
    assert said in error.value.message


def test_an_unknown_sku_names_the_known_ones() -> None:
    """`h20` is near nothing in particular, but the list is there."""
    with pytest.raises(UserError, match=r"no SKU named 'h20'; have: .*h200x4-nvlink"):
        sku.load_sku("h20")


@pytest.mark.parametrize("name", sku.names())
def test_every_sku_of_ours_loads_and_refuses_only_backends_that_exist(name: str) -> None:
    """A reason for a backend that nobody knows would never be shown."""
    assert set(sku.load_sku(name, LAPTOP).refuse) <= set(registry.names())
