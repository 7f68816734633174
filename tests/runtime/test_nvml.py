"""NVML through ctypes, against a library that follows nvml.h."""

import ctypes

import pytest

from collectivex.runtime import machine, nvml, smi


class Nvml:
    """The functions used, with the argument types and status codes of nvml.h."""

    def __init__(self, gpus, unsupported=()):
        self.gpus, self.unsupported = gpus, unsupported

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = 1 + index.value
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        found = [i for i, gpu in enumerate(self.gpus) if gpu["uuid"] == uuid]
        handle._obj.value = 1 + found[0] if found else None
        return 0 if found else 6  # NVML_ERROR_NOT_FOUND

    def nvmlDeviceGetGpuFabricInfo(self, handle, info):
        assert ctypes.sizeof(info._obj) == 28  # nvmlGpuFabricInfo_t: 16 + 4 + 4 + 1, padded to 4
        told = self.gpus[handle.value - 1].get("fabric")
        if told is None:
            return 3  # NVML_ERROR_NOT_SUPPORTED
        cluster, clique, state, status = told
        ctypes.memmove(info, cluster, 16)
        info._obj.clique, info._obj.state, info._obj.status = clique, state, status
        return 0

    def __getitem__(self, name):
        def call(handle, *arguments):
            *which, out = arguments
            if name in self.unsupported:
                return 3  # NVML_ERROR_NOT_SUPPORTED
            value = self.gpus[handle.value - 1][
                (name.removeprefix("nvmlDeviceGet"), *(w.value for w in which))
            ]
            wide = name in ("nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetCurrentClocksThrottleReasons")
            assert isinstance(out._obj, ctypes.c_ulonglong if wide else ctypes.c_uint)
            out._obj.value = value
            return 0

        return call


def gpu(uuid, sm_mhz, reasons=0):
    return {
        "uuid": uuid,
        ("ClockInfo", 1): sm_mhz,  # NVML_CLOCK_SM
        ("ClockInfo", 2): 3201,  # NVML_CLOCK_MEM
        ("Temperature", 0): 41,
        ("PowerUsage",): 119520,
        ("EnforcedPowerLimit",): 700000,
        ("CurrentClocksThrottleReasons",): reasons,
        ("TotalEccErrors", 0, 0): 5,  # corrected, volatile
        ("TotalEccErrors", 1, 0): 0,  # uncorrected, volatile
    }


@pytest.fixture
def two(monkeypatch):
    library = Nvml([gpu(b"GPU-a", 1980), gpu(b"GPU-b", 345, 0x40)])
    monkeypatch.setattr(nvml, "_library", lambda: library)
    return library


def test_every_gpu_is_read_with_units_that_people_use(two):
    """Milliwatts become watts; the fields are those of the nvidia-smi query."""
    first, second = nvml.clocks()

    assert first == {
        "gpu": 0,
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "temperature_c": 41,
        "power_w": 119.52,
        "power_limit_w": 700.0,
        "ecc_corrected": 5,
        "ecc_uncorrected": 0,
        "throttle": "none",
    }
    assert (second["gpu"], second["throttle"]) == (1, "hw-thermal")
    assert list(first) == [name for _, name in smi.CLOCK_FIELDS]


def test_one_gpu_is_found_by_its_uuid(two):
    """CUDA's order of devices is not NVML's; the UUID is the same in both. An unknown one gives nothing."""
    assert [record["sm_mhz"] for record in machine.clocks("GPU-b")] == [345]
    assert machine.clocks("MIG-c") == []


def test_what_a_gpu_does_not_support_is_none(two):
    """A status other than success is no value."""
    two.unsupported = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEccErrors")
    first = nvml.clocks()[0]

    assert (first["power_w"], first["ecc_corrected"], first["sm_mhz"]) == (None, None, 1980)


def test_without_the_library_there_is_no_answer(monkeypatch):
    """None says: ask somebody else."""

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    nvml._library.cache_clear()
    assert nvml.clocks() is None
    nvml._library.cache_clear()


CLUSTER = bytes(range(16))


@pytest.mark.parametrize(
    ("told", "identity"),
    [
        ((CLUSTER, 32766, 3, 0), "000102030405060708090a0b0c0d0e0f.32766"),
        ((bytes(16), 0, 3, 0), None),  # HGX boards: up, but no cluster beyond the node
        ((CLUSTER, 1, 2, 0), None),  # registration in progress
        ((CLUSTER, 1, 3, 999), None),  # ended with an error
        (None, None),  # no fabric at all
    ],
)
def test_a_fabric_is_its_cluster_and_clique_once_it_is_up(two, told, identity):
    """States and fields of nvmlGpuFabricInfo_t; NCCL takes an all-zero cluster for none as well."""
    two.gpus[1]["fabric"] = told
    assert nvml.fabric("GPU-b") == identity
    assert nvml.fabric("GPU-c") is None


def test_an_older_driver_has_no_fabric_to_ask_for(monkeypatch):
    """The function came with driver 535; a missing symbol is an AttributeError of ctypes."""

    class Older:
        def nvmlDeviceGetHandleByUUID(self, uuid, handle):
            return 0

    monkeypatch.setattr(nvml, "_library", Older)
    assert nvml.fabric("GPU-a") is None
    monkeypatch.setattr(nvml, "_library", lambda: None)
    assert nvml.fabric("GPU-a") is None
