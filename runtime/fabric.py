"""The network of a pool: facts once, and each library's own spelling of them by a pure function.

The facts stand in the SKU (`scale_out`), what only a site knows (names of interface and devices) in its file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

RDMA = ("infiniband", "roce")


@dataclass(frozen=True)
class Fabric:
    """transport   "infiniband", "roce" or "tcp"
    devices       RDMA devices to use, "mlx5_0" or with a port "mlx5_0:1"; empty: each library's own choice
    interface     for rendezvous and sockets; None: each library's own choice
    gid_index     RoCE only: which address of the port
    traffic_class RoCE only: the priority that the switches keep lossless
    rails         NIC k of every node is on the same switch, and reaches only NICs k
    small_mr      the NIC cannot register more than 4 GiB of GPU memory at once
    mnnvl         NVLink between nodes: peers of one domain share memory through fabric handles
    """

    transport: str = "tcp"
    devices: tuple[str, ...] = ()
    interface: str | None = None
    gid_index: int | None = None
    traffic_class: int | None = None
    rails: bool = False
    small_mr: bool = False
    mnnvl: bool = False


def settings(fabric: Fabric, vendor: str, nodes: int) -> dict[str, str]:
    """Environment variables for every library, by name. None on one node, where no network is used.

    Names and meaning: NCCL user guide (environment variables), NVSHMEM documentation, the UCCL and MoRI
    sources. NCCL_NET=IB makes NCCL fail where it would otherwise go on over sockets.
    """
    if nodes == 1:
        return {}
    found = {
        **_nccl(fabric),
        **(_nvshmem(fabric) if vendor == "nvidia" else {}),
        **(_mori(fabric) if vendor == "amd" else {}),
        **_uccl(fabric),
    }
    return dict(sorted(found.items()))


def _nccl(fabric: Fabric) -> dict[str, str]:
    """NCCL and RCCL. "=" before the list makes its names exact: mlx5_1 alone also means mlx5_10."""
    found = {}
    if fabric.interface:
        found["NCCL_SOCKET_IFNAME"] = f"={fabric.interface}"
        found["GLOO_SOCKET_IFNAME"] = fabric.interface
    if fabric.transport in RDMA:
        found["NCCL_NET"] = "IB"
        found["NCCL_IB_MERGE_NICS"] = "0"
        if fabric.devices:
            found["NCCL_IB_HCA"] = "=" + ",".join(fabric.devices)
        if fabric.rails:
            found["NCCL_CROSS_NIC"] = "0"
    if fabric.transport == "roce":
        found |= _given("NCCL_IB_GID_INDEX", fabric.gid_index)
        found |= _given("NCCL_IB_TC", fabric.traffic_class)
    if fabric.mnnvl:
        found |= {"NCCL_CUMEM_ENABLE": "1", "NCCL_MNNVL_ENABLE": "1", "MC_FORCE_MNNVL": "1"}
    return found


def _nvshmem(fabric: Fabric) -> dict[str, str]:
    """NVSHMEM wants every device with its port."""
    found = {}
    if fabric.interface:
        found["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] = fabric.interface
    if fabric.transport in RDMA and fabric.devices:
        found["NVSHMEM_HCA_LIST"] = ",".join(d if ":" in d else f"{d}:1" for d in fabric.devices)
        found["NVSHMEM_ENABLE_NIC_PE_MAPPING"] = "1"
    if fabric.transport == "roce":
        found |= _given("NVSHMEM_IB_GID_INDEX", fabric.gid_index)
        found |= _given("NVSHMEM_IB_TRAFFIC_CLASS", fabric.traffic_class)
    return found


def _uccl(fabric: Fabric) -> dict[str, str]:
    """UCCL reads NCCL's spelling under its own names; "=" guards against its prefix match too."""
    found = {}
    if fabric.interface:
        found["UCCL_SOCKET_IFNAME"] = fabric.interface
    if fabric.transport in RDMA and fabric.devices:
        found["UCCL_IB_HCA"] = "=" + ",".join(fabric.devices)
    if fabric.transport == "roce":
        found |= _given("UCCL_IB_GID_INDEX", fabric.gid_index)
        found |= _given("UCCL_IB_TC", fabric.traffic_class)
    return found


def _mori(fabric: Fabric) -> dict[str, str]:
    """MoRI names devices without ports. Its heap is one memory region, which some NICs limit."""
    found = {}
    if fabric.interface:
        found["MORI_SOCKET_IFNAME"] = fabric.interface
    if fabric.transport in RDMA and fabric.devices:
        found["MORI_RDMA_DEVICES"] = ",".join(d.partition(":")[0] for d in fabric.devices)
    if fabric.transport == "roce":
        found |= _given("MORI_RDMA_TC", fabric.traffic_class)
    if fabric.small_mr:
        found["MORI_SHMEM_HEAP_SIZE"] = "2G"
    return found


def _given(name: str, value: int | None) -> dict[str, str]:
    return {} if value is None else {name: str(value)}


# What NCCL_DEBUG=INFO says of the network it chose.
_CHOSEN = re.compile(r"NCCL INFO (?:Using network (\S+)|NET/(IB|Socket|Plugin) ?: Using)")
_RANK = re.compile(r"/(?:rank(\d+)\.log|process(\d+)/[^/]+)$")
EVIDENCE = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}


def fallen_back(fabric: Fabric, nodes: int, logs: Iterable[tuple[int, str]]) -> str | None:
    """Why a run over several nodes must not be published as RDMA, from what NCCL logged; None when it may.

    logs   (rank, text), see `by_rank`; ranks that say nothing of a network did not use NCCL's
    """
    if nodes == 1 or fabric.transport not in RDMA:
        return None
    for rank, text in logs:
        chosen = [a or b for a, b in _CHOSEN.findall(text)]
        if any(name == "Socket" for name in chosen):
            return f"rank {rank} fell back to sockets; this pool's network is {fabric.transport}"
    return None


def by_rank(logs: Iterable[Path]) -> Iterator[tuple[int, str]]:
    """(rank, text) of what ranks printed, rank<k>.log, and of what their processes of a program over several
    nodes did, process<k>/*.log."""
    for path in logs:
        found = _RANK.search(path.as_posix())
        assert found is not None, path
        yield int(found[1] or found[2]), path.read_text(errors="replace")
