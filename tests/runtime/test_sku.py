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
    """The pools of one product differ in class by their link and size, and by nothing measured."""
    assert sku.load_sku("h200x4-nvlink").topology_class == "h200-nvlink4-4x1"
    assert load(tmp_path, pool()).at(2).topology_class == "h200-nvlink4-8x2"


def test_ranks_default_to_one_per_gpu_of_every_node(tmp_path: Path) -> None:
    """Two nodes of eight."""
    assert load(tmp_path, pool()).at(2).default_ranks == 16


def test_limits_are_the_links_then_what_the_file_adds(tmp_path: Path) -> None:
    """In the form of the result schema, each with its source."""
    extra = {"name": "hbm", "GBps": 4800, "source": "datasheet", "kind": "datasheet"}
    names = [limit["name"] for limit in load(tmp_path, pool(limits=[extra])).all_limits()]
    assert names == ["scale_up", "scale_out", "hbm"]


def test_a_machine_without_scheduler_has_one_node() -> None:
    """Processes are started here and nowhere else."""
    with pytest.raises(UserError, match="'h200x4-nvlink' starts processes on one machine, not on 2 nodes"):
        sku.load_sku("h200x4-nvlink").at(2)


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
