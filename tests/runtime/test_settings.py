"""Which settings may enter a result."""

import pytest

from collectivex.runtime.redact import Private, Redactor
from collectivex.runtime.settings import publishable

NOBODY = Redactor(Private())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_NVLS_ENABLE", "0"),
        ("NCCL_BUFFSIZE", "4194304"),
        ("NVSHMEM_SYMMETRIC_SIZE", "4G"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker0"),
        ("NCCL_SOCKET_IFNAME", "=eth0"),
        ("NCCL_SOCKET_IFNAME", "bond0.100"),
        ("NCCL_IB_HCA", "=mlx5_0:1,mlx5_1:1"),
        ("NCCL_ALGO", "Ring,Tree"),
        ("NCCL_NET", "IB"),
        ("NVSHMEM_HCA_PE_MAPPING", "mlx5_0:1:2,mlx5_1:1:2"),
        ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
        ("MSCCLPP_FORCE_DISABLE_NVLS", "true"),
        ("OMP_NUM_THREADS", "4"),
        ("HSA_NO_SCRATCH_RECLAIM", "1"),
        ("NCCL_DEBUG", "INFO"),
        ("NCCL_IB_TC", "0x6a"),
        ("NCCL_ALGO", ""),
    ],
)
def test_numbers_switches_and_words_are_shown(name, value):
    """What says how the library was told to work is published as it stands."""
    assert publishable({name: value}, "key", NOBODY) == {name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_DEBUG_FILE", "/home/username/nccl.%h.log"),
        ("NCCL_TOPO_FILE", "/etc/topo.xml"),
        ("NCCL_NET_PLUGIN", "/opt/thing/libnccl-net.so"),
        ("NCCL_COMM_ID", "10.0.0.1:29500"),
        ("NCCL_HOSTID", "gpu17"),
        ("NCCL_SOCKET_IFNAME", "10.0.0.1"),
        ("NCCL_SOCKET_IFNAME", "fe80::1"),
        ("NCCL_ALGO", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
        ("NCCL_NET", "AKIAIOSFODNN7EXAMPLE"),
        ("EP_JIT_CACHE_DIR", "/home/username/.deep_ep"),
        ("MSCCLPP_SOMETHING_NEW", "free text"),
        ("NCCL_BUFFSIZE", "12345678901234"),
    ],
)
def test_paths_hosts_addresses_and_free_text_are_hashed(name, value):
    """Allow-listed names whose value is not plain keep only a keyed hash."""
    shown = publishable({name: value}, "key", NOBODY)[name]

    assert shown.startswith("hash:")
    assert len(shown) == len("hash:") + 12


def test_the_hash_of_a_path_is_that_of_its_base_name_under_this_key():
    """The same topology file in another folder is recognised; under another key it is not."""
    first = publishable({"NCCL_TOPO_FILE": "/a/topo.xml"}, "key", NOBODY)

    assert first == publishable({"NCCL_TOPO_FILE": "/b/topo.xml"}, "key", NOBODY)
    assert first != publishable({"NCCL_TOPO_FILE": "/a/topo.xml"}, "other", NOBODY)


@pytest.mark.parametrize(
    ("value", "count"), [("0,1,2,3", 4), ("", 0), ("GPU-0badcafe,GPU-0badcaff", 2), ("7", 1)]
)
def test_visible_devices_are_counted(value, count):
    """How many devices is published, which ones is not."""
    assert publishable({"CUDA_VISIBLE_DEVICES": value}, "key", NOBODY) == {
        "CUDA_VISIBLE_DEVICES": f"count:{count}"
    }


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "MASTER_ADDR", "AWS_SECRET_ACCESS_KEY", "NCCL_TOKEN", "UCCL_API_KEY"]
)
def test_other_names_and_names_of_secrets_are_absent(name):
    """Nothing outside the allow list is there, not even as a hash; nor is what calls itself a secret."""
    assert publishable({name: "1"}, "key", NOBODY) == {}


def test_a_plain_word_that_is_this_host_is_hashed():
    """An interface list may hold what is really the name of this host."""
    here = Redactor(Private(hosts=("gpu17",)))

    assert publishable({"NCCL_SOCKET_IFNAME": "gpu17"}, "key", here)["NCCL_SOCKET_IFNAME"].startswith("hash:")
