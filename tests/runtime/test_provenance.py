"""Provenance: its form, what it reads, and that nothing private is in it."""

import json
import platform
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collectivex.backends.base import Facts, Source
from collectivex.runtime import detect, loaded, machine, nvml, provenance
from collectivex.runtime.ranks import run_threads
from collectivex.runtime.settings import NAMES, WORDS
from collectivex.runtime.smi import Links

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "schema/result.v1.json").read_text())
VALIDATOR = jsonschema_rs.validator_for({"$ref": "#/$defs/provenance", "$defs": SCHEMA["$defs"]})
FACTS = Facts("mine", "Mine", Source("git", "somebody/mine", "abc123", "newest"), (), ("cpu",))
CLOCK = {"gpu": 0, "sm_mhz": 1980, "power_w": None, "throttle": "hw-thermal"}


def test_what_is_collected_has_the_form_of_the_schema():
    """On this machine, as it is, on every rank the same; hosts one per rank."""
    told = run_threads(3, lambda ranks: provenance.collect(FACTS, {"mine": "1.2"}, ranks, "key"))

    assert told[0] == told[1] == told[2]
    VALIDATOR.validate(told[0])
    assert told[0]["hosts"] == [told[0]["host"]] * 3
    assert told[0]["python"] == platform.python_version()
    assert told[0]["backend"] == {
        "name": "mine",
        "source": "git: somebody/mine",
        "pin": "abc123",
        "versions": {"mine": "1.2"},
    }


def test_a_described_gpu_machine_has_the_form_of_the_schema(monkeypatch):
    """With GPUs, links, libraries, NICs, an image and clocks."""
    library = loaded.Loaded("nccl", "2.30.4", "2.28.9", "site-packages/nvidia/nccl/lib/libnccl.so.2")
    gpu = {"name": "NVIDIA H200", "arch": "sm_90", "memory_bytes": 150754820096, "sms": 132}
    nic = {
        "name": "mlx5_0",
        "port": 1,
        "rate_gbps": 400,
        "rate": None,
        "link_layer": "InfiniBand",
        "state": "ACTIVE",
    }
    monkeypatch.setattr(loaded, "libraries", lambda redactor, torch: [library])
    monkeypatch.setattr(machine, "gpus", lambda torch: [gpu])
    monkeypatch.setattr(machine, "links", lambda: Links("nvlink", 18, 478.1, (("X", "NV18"), ("NV18", "X"))))
    monkeypatch.setattr(machine, "nics", lambda: [nic])
    monkeypatch.setattr(machine, "driver", lambda: "580.95.05")
    image = {"reference": "vendor/pytorch:25.10", "digest": "sha256:0", "arch": "x86_64"}
    told = provenance.describe(FACTS, {}, "key", image)
    told["clocks"] = {"before": [CLOCK], "after": []}

    VALIDATOR.validate(told)
    assert told["links"] == {"kind": "nvlink", "per_gpu": 18}
    assert told["libraries"] == [vars(library)]
    assert told["image"] == image


def test_findings_are_read_off_the_finished_document():
    """A library of another version than torch was built with, and a GPU that was too hot before the case."""
    told = {
        "libraries": [{"name": "nccl", "version": "2.30.4", "build_version": "2.28.9", "path": "p"}],
        "clocks": {"before": [CLOCK], "after": [{**CLOCK, "throttle": "gpu-idle"}]},
    }

    assert provenance.findings(told) == [
        "nccl 2.30.4 is loaded, but torch was built with 2.28.9",
        "GPU 0 was held back before: hw-thermal",
    ]


def test_clocks_are_gathered_in_rank_order(monkeypatch):
    """Each rank reads its own GPU, found by its UUID; the record is numbered by the rank."""
    seen = []

    def clocks(uuid=None):
        seen.append(uuid)
        return [{**CLOCK, "gpu": 0, "sm_mhz": int(uuid[-1])}]

    properties = lambda device: SimpleNamespace(uuid=f"0badcafe-{device}")  # noqa: E731
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(get_device_properties=properties))
    )
    monkeypatch.setattr(machine, "clocks", clocks)
    found = run_threads(
        3, lambda ranks: provenance.clocks(ranks, SimpleNamespace(kind="cuda", torch_device=9 - ranks.rank))
    )

    assert [(r["gpu"], r["sm_mhz"]) for r in found[2]] == [(0, 9), (1, 8), (2, 7)]
    assert sorted(seen) == ["GPU-0badcafe-7", "GPU-0badcafe-8", "GPU-0badcafe-9"]


def test_amd_clocks_are_read_once_per_node(monkeypatch):
    """The kernel's files give all GPUs of a node at once."""
    monkeypatch.setattr(machine, "clocks", lambda: [{"gpu": 0}, {"gpu": 1}])
    found = run_threads(2, lambda ranks: provenance.clocks(ranks, SimpleNamespace(kind="hip")))

    assert found[0] == [{"gpu": 0}, {"gpu": 1}]


def test_a_cpu_has_no_clock_records():
    """Nothing is asked and nothing gathered."""
    assert provenance.clocks(None, SimpleNamespace(kind="cpu")) == []


# ------------------------------------------------------------------------------------------------ leaks

PRIVATE = {
    "host": "gpu17-rack3.acme.internal",
    "user": "jdoe",
    "home": "/srv/people/jdoe",
    "key": "AKIAIOSFODNN7EXAMPLE",
    "secret": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "password": "hunter2hunter2",
    "ipv4": "10.11.12.13",
    "ipv6": "fd00:1234::17",
}


def surround(monkeypatch, **more):
    """An environment, host and process full of private names."""
    variables = {
        "HOSTNAME": PRIVATE["host"],
        "USER": PRIVATE["user"],
        "LOGNAME": PRIVATE["user"],
        "HOME": PRIVATE["home"],
        "AWS_ACCESS_KEY_ID": PRIVATE["key"],
        "AWS_SECRET_ACCESS_KEY": PRIVATE["secret"],
        "DB_PASSWORD": PRIVATE["password"],
        "MASTER_ADDR": PRIVATE["ipv4"],
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_USER": PRIVATE["user"],
        "SLURM_JOB_NODELIST": PRIVATE["host"],
        "SLURM_SUBMIT_DIR": PRIVATE["home"] + "/bench",
        **more,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: PRIVATE["host"])


def leaked(told):
    text = json.dumps(told)
    return [name for name, value in PRIVATE.items() if value in text or value.split(".acme")[0] in text]


def test_nothing_private_is_in_provenance(monkeypatch):
    """Host, user, home, secrets and addresses stand in the environment, in the settings, in the paths of
    libraries, in what the backend says and in the image's name; none of them is in the result."""
    maps = "".join(
        f"7f{i}0-7f{i}1 r-xp 0 fe:01 {i} {path}\n"
        for i, path in enumerate(
            (f"{PRIVATE['home']}/nccl/libnccl.so.2", "/v/site-packages/jdoe_ep/libmpi.so")
        )
    )
    real = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: maps if self == Path("/proc/self/maps") else real(self, **how)
    )
    surround(
        monkeypatch,
        NCCL_DEBUG_FILE=f"{PRIVATE['home']}/log.%h",
        NCCL_TOPO_FILE=f"/data/{PRIVATE['user']}.xml",
        NCCL_COMM_ID=f"{PRIVATE['ipv4']}:29500",
        NCCL_HOSTID=PRIVATE["host"],
        NCCL_SOCKET_IFNAME="gpu17-rack3",
        UCCL_SOCKET_IFNAME=PRIVATE["ipv6"],
        MORI_RDMA_DEVICES=PRIVATE["user"],
        NVSHMEM_HCA_LIST=PRIVATE["key"],
    )
    versions = {
        "mine": f"1.2 by {PRIVATE['user']}@{PRIVATE['host']} in {PRIVATE['home']}/src at {PRIVATE['ipv4']}",
        "other": f"{PRIVATE['secret']} {PRIVATE['password']} {PRIVATE['ipv6']} {PRIVATE['key']}",
    }
    image = {"reference": f"registry.local/{PRIVATE['user']}/x", "digest": None, "arch": None}
    told = provenance.describe(FACTS, versions, "key", image, [provenance.host_hash("key")])

    VALIDATOR.validate(told)
    assert leaked(told) == []
    assert len(told["libraries"]) == 2  # they are there, without what was private in their paths
    assert told["environment"]["NCCL_SOCKET_IFNAME"].startswith("hash:")
    assert told["scheduler"] == {"kind": "slurm", "job_id": 17}


def test_the_leak_test_can_fail():
    """The detector finds a value that is there."""
    assert leaked({"x": f"on {PRIVATE['host']}"}) == ["host"]


FRAMES = st.sampled_from(
    ["{}", "/a/{}/b", "{},eth0", "^{}", "={}:1", "x={};y", "{}:29500", "pre_{}", "{}.log", " {} "]
)


@given(st.sampled_from(sorted(NAMES | WORDS)), st.sampled_from(sorted(PRIVATE.values())), FRAMES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_setting_lets_anything_private_through(name, value, frame):
    """Any private value, in any of these surroundings, in any variable that may be published."""
    with pytest.MonkeyPatch.context() as patch:
        surround(patch, **{name: frame.format(value)})
        assert leaked(provenance.environment.communication_settings("key")) == []


# -------------------------------------------------------------------------------------------------- git


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with one commit, and a way to run git in it."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "checkout"
    (root / "runtime").mkdir(parents=True)
    (root / "runtime/a.py").write_text("1\n")

    def git(*arguments):
        identity = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
        argv = ["git", *identity, "-C", str(root), *arguments]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    return root, git


def test_a_clean_checkout_says_its_commit(repository):
    """Documents and results may differ: they decide no number."""
    root, git = repository
    (root / "results").mkdir()
    (root / "results/x.json").write_text("{}")

    assert provenance.checkout(root) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": False}


@pytest.mark.parametrize("file", ["runtime/a.py", "runtime/new.py"])
def test_changed_or_unknown_code_is_dirty(repository, file):
    """Also a file that git does not know yet: a new backend decides numbers."""
    root, git = repository
    (root / file).write_text("2\n")

    assert provenance.checkout(root)["git_dirty"] is True


def test_a_hook_of_another_repository_does_not_answer(repository, monkeypatch, tmp_path):
    """In a git hook GIT_DIR points elsewhere."""
    root, git = repository
    commit = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))

    assert provenance.checkout(root)["git_commit"] == commit


@pytest.mark.parametrize("packed", [False, True])
def test_without_git_the_commit_is_read_from_its_files(repository, monkeypatch, packed):
    """Vendor containers often lack the program. Loose and packed references; dirty or not stays open."""
    root, git = repository
    commit = git("rev-parse", "HEAD")
    if packed:
        git("pack-refs", "--all")
    monkeypatch.setenv("PATH", "/nowhere")

    assert provenance.checkout(root) == {"git_commit": commit, "git_dirty": None}


def test_a_linked_worktree_is_read_through_its_file(repository, monkeypatch, tmp_path):
    """There .git is a file that names a folder, which names the common one."""
    root, git = repository
    git("worktree", "add", "-q", "-b", "side", str(tmp_path / "side"))
    monkeypatch.setenv("PATH", "/nowhere")

    assert provenance.checkout(tmp_path / "side")["git_commit"] == provenance.checkout(root)["git_commit"]


@pytest.mark.parametrize("head", ["", "ref: refs/heads/none\n", "not a commit\n"])
def test_a_damaged_repository_has_no_commit(tmp_path, monkeypatch, head):
    """Nothing is guessed."""
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/HEAD").write_text(head)
    monkeypatch.setenv("PATH", "/nowhere")

    assert provenance.checkout(tmp_path) == {"git_commit": None, "git_dirty": None}


def test_a_wheel_has_no_commit(tmp_path):
    """Without .git nobody is asked, and nothing fails."""
    assert provenance.checkout(tmp_path) == {"git_commit": None, "git_dirty": None}


@pytest.mark.gpu
def test_a_real_gpu_describes_itself():
    """Arch and memory through torch, clocks by UUID, NCCL or RCCL as loaded with a version of its own."""
    import torch

    assert torch.cuda.is_available()
    told = provenance.describe(FACTS, {}, "key")
    VALIDATOR.validate(told)

    assert told["gpus"][0]["sms"] > 0
    versions = {library["name"]: library["version"] for library in told["libraries"]}
    assert versions.get("nccl") or versions.get("rccl")
    if detect.machine().vendor == "nvidia":
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        assert [record["gpu"] for record in nvml.clocks(uuid)] == [0]


@pytest.mark.parametrize(("text", "dirty"), [("a" * 40 + "\n", False), ("a" * 40 + " dirty\n", True)])
def test_a_staged_copy_says_what_it_is_a_copy_of(tmp_path, text, dirty):
    """Without a .git folder the commit comes from the file that staging left."""
    (tmp_path / "REVISION").write_text(text)

    assert {"git_commit": "a" * 40, "git_dirty": dirty} == provenance.checkout(tmp_path)
