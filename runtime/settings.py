"""Which environment variables steer communication, and how their values may be published.

Allow lists: a variable that is not named here never enters a result. Of the values only numbers, switches and
(for the names that take them) short words survive; anything else could be a path, a host or an address and is
hashed. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .redact import SECRET_NAME, Redactor, keyed_hash

PREFIXES = (
    *("NCCL_", "RCCL_", "NVSHMEM_", "UCCL_", "MORI_", "MSCCLPP_", "GLOO_", "ROCSHMEM_"),
    *("TORCH_SYMM_MEM_", "TORCH_NCCL_", "EP_JIT_", "FI_EFA_"),
)
NAMES = frozenset(
    {
        *("EP_DISABLE_GIN", "EP_REUSE_NCCL_COMM", "EP_BUFFER_DEBUG", "EP_SUPPRESS_NCCL_CHECK"),
        *("EP_AVOID_RECORD_STREAM", "EP_NIC_NAME", "EP_OVERRIDE_RDMA_SL", "EP_NCCL_ROOT_DIR"),
        *("EP_NVSHMEM_ROOT_DIR", "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN", "USE_MNNVL", "MC_FORCE_MNNVL"),
        *("CUDA_DEVICE_MAX_CONNECTIONS", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
        *("HSA_NO_SCRATCH_RECLAIM", "HSA_ENABLE_SDMA", "HSA_FORCE_FINE_GRAIN_PCIE", "GPU_MAX_HW_QUEUES"),
        *("HIP_LAUNCH_BLOCKING", "AMD_SERIALIZE_KERNEL", "OMP_NUM_THREADS", "FI_PROVIDER"),
    }
)
# Which devices is the machine's business; how many is the reader's.
COUNTED = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# Interfaces, devices, algorithms: one word, or a list of words.
WORDS = frozenset(
    {
        *("NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY", "NCCL_IB_HCA", "NCCL_OOB_NET_IFNAME", "NCCL_NET"),
        *("NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_LEVEL", "NCCL_NET_GDR_LEVEL", "NCCL_SHM_LEVEL"),
        *("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "GLOO_SOCKET_IFNAME"),
        *("NVSHMEM_BOOTSTRAP", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "NVSHMEM_REMOTE_TRANSPORT"),
        *("NVSHMEM_HCA_LIST", "NVSHMEM_HCA_PE_MAPPING", "NVSHMEM_IBGDA_NIC_HANDLER"),
        *("UCCL_SOCKET_IFNAME", "UCCL_IB_HCA", "MORI_SOCKET_IFNAME", "MORI_RDMA_DEVICES"),
        *("MORI_SHMEM_MODE", "MORI_SHMEM_HEAP_TYPE", "EP_NIC_NAME", "FI_PROVIDER"),
        *("CUDA_DEVICE_ORDER", "CUDA_MODULE_LOADING"),
    }
)

_NUMBER = re.compile(r"[+-]?\d{1,13}(?:\.\d{1,6})?\s?[kKmMgG]?i?[bB]?|0x[0-9a-fA-F]{1,16}|")
_SWITCHES = frozenset({"true", "false", "yes", "no", "on", "off"})
# An interface name has at most 15 characters (IFNAMSIZ); eth0.100 is a VLAN, mlx5_0:1 a port.
_WORD = r"\^?[A-Za-z][\w+-]{0,15}(?:\.\d{1,4})?(?::\d{1,4}){0,2}"
_WORD_LIST = re.compile(rf"[=^]{{0,2}}{_WORD}(?:[,;]{_WORD})*")


def publishable(env: Mapping[str, str], key: str, redactor: Redactor) -> dict[str, str]:
    """The settings in `env` that may enter a result, sorted by name.

    Values that are not plain become `hash:<12 hex>`, keyed, so that equal settings of one installation stay
    recognisable; of a path only the base name counts. Visible devices become `count:<n>`.
    """
    found = {name: f"count:{len([x for x in env[name].split(',') if x])}" for name in COUNTED if name in env}
    for name, value in env.items():
        if (name in NAMES or name.startswith(PREFIXES)) and not SECRET_NAME.search(name):
            found[name] = _value(name, value.strip(), key, redactor)
    return dict(sorted(found.items()))


def _value(name: str, value: str, key: str, redactor: Redactor) -> str:
    plain = _NUMBER.fullmatch(value) or value.lower() in _SWITCHES
    words = name in WORDS and _WORD_LIST.fullmatch(value)
    if (plain or words) and not redactor.touches(value):
        return value
    return "hash:" + keyed_hash(key, name, value.rsplit("/", 1)[-1])
