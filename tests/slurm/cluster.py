"""A real Slurm on this host for tests: a controller, and nodes that are network, mount, pid, ipc and uts
namespaces on a bridge, each with its own address, hostname and /tmp. Needs root and Debian's Slurm packages.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NET, BRIDGE = "10.91.7", "cxbr0"
PACKAGES = (
    "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge squashfs-tools libslurm-dev gcc libc6-dev "
    "libpmix-dev openmpi-bin"  # for MPI programs; without them their tests are skipped
)

CONF = """\
ClusterName=cxtest
SlurmctldHost={host}({net}.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort=16917
SlurmdPort=16918
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
EnforcePartLimits=ALL
MpiDefault=none
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
SlurmdTimeout=10
MessageTimeout=10
TCPTimeout=2
KillWait=3
InactiveLimit=0
MinJobAge=300
GresTypes=gpu
PlugStackConfig={folder}/plugstack.conf
NodeName=n[1-{nodes}] NodeAddr={net}.[11-{last}] CPUs=8 RealMemory=8000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=01:00:00 State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None; installs what root and apt-get can install."""
    if os.geteuid() != 0:
        return "a real Slurm needs root"
    tools = ("slurmctld", "slurmd", "munged", "mksquashfs", "gcc")
    if all(map(shutil.which, tools)) and Path("/usr/include/slurm/spank.h").exists():
        return None
    if not shutil.which("apt-get"):
        return "Slurm is not installed, and there is no apt-get"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (
        ["apt-get", "update"],
        ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES.split()],
    ):
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            return f"apt-get cannot install Slurm: {done.stderr.strip()[-200:]}"
    return None


def pyxis() -> Path | None:
    """The real plugin, where it is installed ($CX_TEST_PYXIS, or Slurm's own folder) and enroot is as well;
    outside /tmp, of which every node has its own. Else the tests build the stand-in beside this file."""
    usual = Path("/usr/lib/x86_64-linux-gnu/slurm-wlm/spank_pyxis.so")
    path = Path(os.environ.get("CX_TEST_PYXIS", usual))
    return path if path.is_file() and shutil.which("enroot") else None


def must(*argv: str, **more: object) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


class Cluster:
    """`nodes` nodes named n1, n2, ...; `env` is what Slurm's commands need to find it."""

    def __init__(self, folder: Path, shared: list[Path], nodes: int = 2):
        self.folder, self.shared, self.nodes = folder, [folder, *shared], nodes
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.pyxis = pyxis()
        self.inits: dict[str, subprocess.Popen[bytes]] = {}
        self.controller: subprocess.Popen[bytes] | None = None
        self.munged: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._clean_network()
        for name in ("state", "dev"):
            (self.folder / name).mkdir(parents=True)
        self._write_files()
        self._network()
        self._munge()
        argv = ["slurmctld", "-D", "-i", "-f", str(self.folder / "slurm.conf")]
        self.controller = self._background(argv, "controller.out")
        self._until("controller", lambda: " is UP" in self.run("scontrol", "ping").stdout)
        for i in range(1, self.nodes + 1):
            self.start_node(f"n{i}")
        self.wait_idle()

    def _write_files(self) -> None:
        text = CONF.format(
            host=socket.gethostname(), net=NET, folder=self.folder, nodes=self.nodes, last=10 + self.nodes
        )
        (self.folder / "slurm.conf").write_text(text)
        for i in range(4):
            os.mknod(self.folder / "dev" / f"gpu{i}", 0o20666, os.makedev(195, i))
        gres = f"NodeName=n[1-{self.nodes}] Name=gpu File={self.folder}/dev/gpu[0-3]\n"
        (self.folder / "gres.conf").write_text(gres)
        hosts = [f"{NET}.{10 + i} n{i}" for i in range(1, self.nodes + 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))
        share = [p for p in ("/usr", "/bin", "/lib", "/lib64", "/etc") if Path(p).exists()]
        share += [str(p) for p in python_folders()]
        if self.pyxis is None:
            plugin = self.folder / "image_plugin.so"
            must("gcc", "-O1", "-fPIC", "-shared", "-o", str(plugin), str(HERE / "image_plugin.c"))
            (self.folder / "plugstack.conf").write_text(f"required {plugin} share={':'.join(share)}\n")
        else:
            (self.folder / "plugstack.conf").write_text(f"required {self.pyxis}\n")
            self._enroot(share)
        self.image()

    def _enroot(self, share: list[str]) -> None:
        """What an administrator and a home folder tell enroot: mounts into every container, and data on the
        node. /etc stays the image's, whose `environment` has its PATH."""
        mounts = self.folder / "enroot" / "mounts.d"
        mounts.mkdir(parents=True)
        options = "none x-create=dir,rbind,ro,nosuid"
        lines = [f"{path} {path} {options}" for path in share if path != "/etc"]
        (mounts / "50-host.fstab").write_text("\n".join([*lines, ""]))
        self.env |= {
            "ENROOT_CONFIG_PATH": str(self.folder / "enroot"),
            "XDG_DATA_HOME": "/tmp/data",
            "XDG_CACHE_HOME": "/tmp/cache",
        }

    def image(self) -> Path:
        """A squashfs image whose /image/bin/python3 is the Python that runs the tests."""
        root, file = self.folder / "rootfs", self.folder / "image.sqsh"
        for name in ("image/bin", "tmp", "run", "usr", "root"):
            (root / name).mkdir(parents=True, exist_ok=True)
        python = root / "image" / "bin" / "python3"
        python.write_text(f'#!/bin/sh\nCX_IN_IMAGE=1 exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc" / "environment").write_text("PATH=/image/bin:/usr/bin:/bin\n")
        must("mksquashfs", str(root), str(file), "-noappend", "-quiet", "-all-root")
        return file

    def _network(self) -> None:
        must("ip", "link", "add", BRIDGE, "type", "bridge")
        must("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        must("ip", "link", "set", BRIDGE, "up")
        for i in range(1, self.nodes + 1):
            space, ours = f"cx-n{i}", f"cxv{i}"
            must("ip", "netns", "add", space)
            must("ip", "link", "add", ours, "type", "veth", "peer", "name", "eth0", "netns", space)
            must("ip", "link", "set", ours, "master", BRIDGE, "up")
            for words in ("link set lo up", "link set eth0 up", f"addr add {NET}.{10 + i}/24 dev eth0"):
                must("ip", "-n", space, *words.split())

    def _clean_network(self) -> None:
        """What a test run that was killed left behind, by our own names."""
        for i in range(1, self.nodes + 1):
            subprocess.run(["ip", "netns", "del", f"cx-n{i}"], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"cxv{i}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)

    def _munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
            return
        must("install", "-d", "-o", "munge", "-g", "munge", "-m", "755", "/run/munge")
        argv = [
            "setpriv",
            "--reuid=munge",
            "--regid=munge",
            "--clear-groups",
            "munged",
            "--foreground",
            "--force",
        ]
        self.munged = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._until(
            "munge", lambda: subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0
        )

    def start_node(self, name: str) -> None:
        """Start a node, or start it again after `crash`."""
        spaces = ["--uts", "--mount", "--pid", "--ipc", "--fork", "--mount-proc", "--kill-child"]
        argv = ["nsenter", f"--net=/run/netns/cx-{name}", "unshare", *spaces, "--"]
        argv += [
            "bash",
            str(HERE / "node.sh"),
            name,
            str(self.folder),
            *map(str, self.shared),
            *map(str, python_folders()),
        ]
        self.inits[name] = self._background(argv, f"node.{name}.out")

    def _background(self, argv: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(argv, env=self.env, stdout=file, stderr=file, start_new_session=True)

    def crash(self, name: str) -> None:
        """The node is gone at once, with everything on it."""
        self.inits[name].kill()
        self.inits[name].wait()

    def run(self, *argv: str, timeout: float = 60, **more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload]
            argv,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            **more,
        )

    def jobs(self) -> list[str]:
        """`id state name user` of every job that is not over."""
        return self.run("squeue", "-h", "-o", "%i %T %j %u").stdout.splitlines()

    def wait_idle(self, names: str = "") -> None:
        """Until these nodes (default: all) have nothing to do."""

        def idle() -> bool:
            which = ["-n", names] if names else []
            states = self.run("sinfo", "-h", "-N", "-o", "%T", *which).stdout.split()
            return bool(states) and set(states) == {"idle"}

        self._until("idle nodes", idle)

    def _until(self, what: str, done: object, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not done():  # type: ignore[operator]
            assert time.monotonic() < until, f"no {what} within {seconds} s; see {self.folder}"
            time.sleep(0.1)

    def stop(self) -> None:
        for process in (*self.inits.values(), self.controller, self.munged):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGKILL if process is not self.munged else signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        self._clean_network()


def python_folders() -> list[Path]:
    """Where the Python of the tests and its packages are."""
    return sorted({Path(p).resolve() for p in (sys.prefix, sys.base_prefix)} - {Path("/usr")})
