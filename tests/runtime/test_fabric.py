"""The network table: each library's own spelling, and no fall back to sockets published as RDMA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from collectivex.runtime.fabric import Fabric, by_rank, fallen_back, settings

IB = Fabric("infiniband", ("mlx5_0", "mlx5_1:2"), "eth0", rails=True)
ROCE = Fabric("roce", ("ionic_0",), gid_index=3, traffic_class=96, small_mr=True)


def test_one_node_needs_no_network() -> None:
    """Variables of a network would only be noise in the results of one node."""
    assert settings(IB, "nvidia", 1) == {}


def test_infiniband_in_every_spelling() -> None:
    """NCCL exact with `=`, NVSHMEM with ports, UCCL exact, and NCCL forbidden to fall back."""
    assert settings(IB, "nvidia", 2) == {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_CROSS_NIC": "0",
        "NCCL_IB_HCA": "=mlx5_0,mlx5_1:2",
        "NCCL_IB_MERGE_NICS": "0",
        "NCCL_NET": "IB",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "eth0",
        "NVSHMEM_ENABLE_NIC_PE_MAPPING": "1",
        "NVSHMEM_HCA_LIST": "mlx5_0:1,mlx5_1:2",
        "UCCL_IB_HCA": "=mlx5_0,mlx5_1:2",
        "UCCL_SOCKET_IFNAME": "eth0",
    }


def test_roce_on_amd_adds_address_class_and_heap() -> None:
    """GID and traffic class exist on RoCE only; a NIC that registers little gets a small MoRI heap."""
    assert settings(ROCE, "amd", 2) == {
        "MORI_RDMA_DEVICES": "ionic_0",
        "MORI_RDMA_TC": "96",
        "MORI_SHMEM_HEAP_SIZE": "2G",
        "NCCL_IB_GID_INDEX": "3",
        "NCCL_IB_HCA": "=ionic_0",
        "NCCL_IB_MERGE_NICS": "0",
        "NCCL_IB_TC": "96",
        "NCCL_NET": "IB",
        "UCCL_IB_GID_INDEX": "3",
        "UCCL_IB_HCA": "=ionic_0",
        "UCCL_IB_TC": "96",
    }


def test_gid_is_for_roce_only() -> None:
    """On InfiniBand it would pick a wrong address."""
    found = settings(replace(IB, gid_index=3, traffic_class=9), "nvidia", 2)
    assert not any("GID" in name or name.endswith("_TC") for name in found)


def test_nvlink_between_nodes_is_switched_on() -> None:
    """Trays of one domain speak NVLink, not the network."""
    found = settings(Fabric(mnnvl=True), "nvidia", 2)
    assert found == {"MC_FORCE_MNNVL": "1", "NCCL_CUMEM_ENABLE": "1", "NCCL_MNNVL_ENABLE": "1"}


@pytest.mark.parametrize(
    "line",
    [
        "n1:12:12 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>",
        "n1:12:12 [0] NCCL INFO Using network Socket",
    ],
)
def test_a_fall_back_to_sockets_is_seen(line: str) -> None:
    """Both wordings of NCCL, on any rank."""
    good = "n1:12:12 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB\nn1:12:12 [0] NCCL INFO Using network IB"
    told = fallen_back(IB, 2, [(0, good), (11, line)])
    assert told == "rank 11 fell back to sockets; this pool's network is infiniband"
    assert fallen_back(IB, 2, [(0, good), (1, good)]) is None
    assert fallen_back(IB, 1, [(0, line)]) is None
    assert fallen_back(Fabric("tcp"), 2, [(0, line)]) is None


@pytest.mark.parametrize("name", ["rank{}.log", "process{}/all_reduce.log", "process{}/nccl-debug.71.log"])
def test_a_log_is_of_the_rank_in_its_name(tmp_path: Path, name: str) -> None:
    """Sorted by name 10 comes before 2, and the logs of an earlier attempt before both."""
    logs = {
        tmp_path / f"nccl.r0.{attempt}" / name.format(rank): rank for attempt in (0, 1) for rank in range(12)
    }
    for path, rank in logs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"said by {rank}")
    assert list(by_rank(sorted(logs))) == [(logs[path], f"said by {logs[path]}") for path in sorted(logs)]
