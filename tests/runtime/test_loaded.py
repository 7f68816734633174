"""What is mapped into a process, and what it says of itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime import loaded
from collectivex.runtime.loaded import Loaded, findings, parse_maps, safe_path
from collectivex.runtime.redact import Private, Redactor

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/machine"
NOBODY = Redactor(Private())


def names(fixture):
    return [m.name for m in parse_maps((FIXTURES / fixture).read_text())]


def test_the_libraries_of_a_cuda_process_are_found_once_each():
    """Three mappings per file, one entry; torch, NCCL, CUDA, NVSHMEM, verbs."""
    found = names("maps-cuda.txt")

    assert found == ["torch_cuda", "torch_cpu", "nccl", "cudart", "cuda", "nvshmem_host", "ibverbs"]


def test_extension_modules_and_amd_libraries_are_recognised():
    """By their file names, or by folder and file where the name alone is too plain (uccl/ep)."""
    found = parse_maps((FIXTURES / "maps-extensions.txt").read_text())

    assert [m.name for m in found] == [
        "deep_ep",
        "deep_ep",
        "hybrid_ep",
        "uccl",
        "mscclpp",
        "mscclpp",
        "mori",
        "rccl",
        "amdhip64",
        "nccl_ep",
        "nccl_net",
        "cudart",
        "gloo",
    ]
    assert found[-1].path == "/data/my projects/username/libgloo.so"


def test_only_executable_mappings_of_the_libraries_themselves_count():
    """A file that is merely read was not loaded; libncclx and libcudadevrt are other libraries."""
    assert names("maps-not-loaded.txt") == []


def test_one_file_under_two_names_is_one_library():
    """Device and inode decide, not the path."""
    assert names("maps-one-file-two-names.txt") == ["nccl"]


def test_a_deleted_file_is_still_loaded():
    """Upgraded under a running process: the path is given without the kernel's remark."""
    (found,) = parse_maps((FIXTURES / "maps-deleted.txt").read_text())

    assert found.path.endswith("/libnccl.so.2")
    assert loaded.version_of(found) is None


def test_maps_cut_short_lose_only_their_last_line():
    """What stands whole before it is still read."""
    assert names("maps-truncated.txt") == ["torch_cuda", "torch_cpu"]


@given(st.text())
def test_no_text_makes_the_parser_fail(junk):
    """Nor does any junk yield a library without a path."""
    assert all(m.path.startswith("/") for m in parse_maps(junk))


# --------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "/home/x/v/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2",
            "site-packages/nvidia/nccl/lib/libnccl.so.2",
        ),
        (
            "/usr/lib/python3/dist-packages/torch/lib/libtorch_cuda.so",
            "dist-packages/torch/lib/libtorch_cuda.so",
        ),
        ("/usr/lib/x86_64-linux-gnu/libnccl.so.2.27.3", "/usr/lib/x86_64-linux-gnu/libnccl.so.2.27.3"),
        (
            "/usr/local/cuda-13.0/lib64/libcudart.so.13.0.96",
            "/usr/local/cuda-13.0/lib64/libcudart.so.13.0.96",
        ),
        ("/opt/rocm-6.4.1/lib/librccl.so.1.0.60401", "/opt/rocm-6.4.1/lib/librccl.so.1.0.60401"),
        ("/home/x/src/nccl/build/lib/libnccl.so.2", "libnccl.so.2"),
        ("/scratch/project/libnccl.so.2", "libnccl.so.2"),
        ("/usr/local/people/x/libnccl.so.2", "libnccl.so.2"),
        ("/root/.cache/torch_extensions/py312_cu130/deep_ep_cpp/deep_ep_cpp.so", "deep_ep_cpp.so"),
    ],
)
def test_paths_keep_what_a_distribution_decided_and_nothing_else(path, expected):
    """From site-packages on, system folders whole, of everything else the base name."""
    assert safe_path(path, NOBODY) == expected


def test_a_user_name_in_a_kept_part_is_replaced():
    """Also a package may be called after its author."""
    assert (
        safe_path("/v/site-packages/jdoe_ep/ep.so", Redactor(Private(users=("jdoe",))))
        == "site-packages/<user>_ep/ep.so"
    )


# ------------------------------------------------------------------------------------------ versions


@pytest.mark.parametrize(
    ("code", "version"), [(22703, "2.27.3"), (23004, "2.30.4"), (2804, "2.8.4"), (20905, "2.9.5")]
)
def test_nccl_version_codes(code, version):
    """NCCL_VERSION of nccl.h, and its older form up to 2.8."""
    assert loaded.nccl_version(code) == version


@pytest.mark.parametrize(("code", "version"), [(13000, "13.0"), (12080, "12.8"), (11080, "11.8")])
def test_cuda_version_codes(code, version):
    """CUDART_VERSION of cuda_runtime_api.h: 1000 * major + 10 * minor."""
    assert loaded.cuda_version(code) == version


def test_hip_version_codes():
    """HIP_VERSION of hip_version.h: major * 10000000 + minor * 100000 + patch."""
    assert loaded.hip_version(60443484) == "6.4.43484"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022",
            "Open MPI 4.1.4",
        ),
        ("Open MPI v5.0.6, package: Open MPI someone@buildhost Distribution, ident: 5.0.6", "Open MPI 5.0.6"),
        ("MPICH Version:\t4.0.2\nMPICH Release date:\tThu Apr  7 12:34:45 CDT 2022", "MPICH 4.0.2"),
        ("Intel(R) MPI Library 2021.12 for Linux* OS\n", "Intel MPI 2021.12"),
        ("Somebody's MPI", None),
    ],
)
def test_an_mpi_is_named_without_the_machine_it_was_built_on(text, version):
    """MPI_Get_library_version tells more than may be published."""
    assert loaded.mpi_version(text) == version


# ------------------------------------------------------------------------------------------ findings


def test_two_copies_of_one_library_are_a_finding():
    """With the version of each, because that is what differs."""
    said = findings(
        [Loaded("nccl", "2.27.3", None, "a/libnccl.so.2"), Loaded("nccl", "2.30.4", None, "libnccl.so.2")]
    )

    assert said == ["2 different nccl are mapped: a/libnccl.so.2 (2.27.3) and libnccl.so.2 (2.30.4)"]


@pytest.mark.parametrize(
    ("loaded_version", "built", "count"),
    [
        ("2.30.4", "2.28.9", 1),
        ("2.28.9", "2.28.3", 0),
        ("13.0", "12.8", 1),
        (None, "2.28.9", 0),
        ("2.28.9", None, 0),
    ],
)
def test_another_major_or_minor_than_torch_was_built_with_is_a_finding(loaded_version, built, count):
    """Patches may differ; what is unknown cannot."""
    assert len(findings([Loaded("nccl", loaded_version, built, "p")])) == count


def test_several_files_of_an_extension_are_normal():
    """MSCCL++ is a library and a module; that is no finding."""
    assert findings([Loaded("mscclpp", None, None, "a"), Loaded("mscclpp", None, None, "b")]) == []


def test_build_versions_come_from_torch():
    """torch.cuda.nccl.version() is the version torch was compiled with; on ROCm that is RCCL's."""

    class Torch:
        class version:
            cuda, hip = None, "6.4.43484"

        class distributed:
            is_available = is_nccl_available = staticmethod(lambda: True)

        class cuda:
            class nccl:
                version = staticmethod(lambda: (2, 22, 3))

    assert loaded.build_versions(Torch) == {"amdhip64": "6.4.43484", "rccl": "2.22.3"}
    assert loaded.build_versions(None) == {}


# ------------------------------------------------------------------------- real libraries, real maps

LIBRARY = "int ncclGetVersion(int *v) { *v = %d; return %d; }\n"
PROGRAM = """
import ctypes, json, sys
from collectivex.runtime import loaded
from collectivex.runtime.redact import Private, Redactor
for path in sys.argv[1:]:
    ctypes.CDLL(path)
found = loaded.libraries(Redactor(Private()))
print(json.dumps([[vars(x) for x in found], loaded.findings(found)]))
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_versions_come_from_the_mapped_files_themselves(tmp_path):
    """Two libraries called libnccl are compiled, loaded and asked: each gives its own version."""
    paths = []
    for folder, code, status in (("a/site-packages/nvidia", 22703, 0), ("b", 23004, 0), ("c", 1, 5)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nccl.c").write_text(LIBRARY % (code, status))
        paths.append(tmp_path / folder / "libnccl.so.2")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", paths[-1], tmp_path / folder / "nccl.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found, said = json.loads(done.stdout)
    told = {(x["path"], x["version"]) for x in found if x["name"] == "nccl"}

    assert told == {
        ("site-packages/nvidia/libnccl.so.2", "2.27.3"),
        ("libnccl.so.2", "2.30.4"),
        ("libnccl.so.2", None),
    }
    assert len(said) == 1
    assert said[0].startswith("3 different nccl are mapped")


ASK = """
import sys
from collectivex.runtime import loaded
version = loaded.version_of(loaded.Mapped("nccl", sys.argv[1], "x"))
print(version, sys.argv[1] in open("/proc/self/maps").read())
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_asking_never_loads_a_library(tmp_path):
    """A good library that is not mapped gives no version, and is not mapped afterwards either."""
    (tmp_path / "nccl.c").write_text(LIBRARY % (22703, 0))
    path = tmp_path / "libnccl.so.2"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, tmp_path / "nccl.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ASK, path], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["None", "False"]
