"""What `cx doctor` says about the machine: processors, links, health, and the limits ranks run into."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import environment, machine, smi
from .smi import Links

GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One finding. state: "ok", "warn" (works, but read the hint) or "missing"."""

    section: str
    name: str
    state: str
    value: str
    hint: str | None = None


def machine_lines(gpus: Sequence[Mapping[str, smi.Value]] | None, links: Links | None) -> list[Line]:
    """Processors, links, driver, health. gpus: those that torch sees, when it sees any."""
    cpu, found = machine.cpu(), gpus or machine.gpus()
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else cpu["cores"]
    cores = f"{cpu['cores']} cores" + (f", {usable} usable" if usable != cpu["cores"] else "")
    lines = [Line("machine", "CPU", "ok", f"{cpu['model']}, {cores}")]
    if not found:
        lines.append(Line("machine", "GPUs", "ok", "none: backends run on the CPU"))
        return lines + nic_lines()
    first = found[0]
    size = first["memory_bytes"]
    memory = f", {size / GIB:.0f} GiB" if isinstance(size, int) else ""
    alike = "" if all(gpu["name"] == first["name"] for gpu in found) else " (not all alike)"
    value = f"{len(found)} x {first['name']} ({first['arch'] or 'arch unknown'}{memory}){alike}"
    lines.append(Line("machine", "GPUs", "warn" if alike else "ok", value))
    if len(found) > 1:
        lines.append(link_line(links))
    driver = machine.driver()
    lines.append(Line("machine", "driver", "ok" if driver else "warn", driver or "version unknown"))
    return lines + health_lines(machine.clocks()) + multicast_lines() + nic_lines()


def link_line(links: Links | None) -> Line:
    if links is None:
        hint = "nvidia-smi topo -m and rocm-smi --showtopotype tell; in some virtual machines neither does"
        return Line("machine", "links", "warn", "unknown", hint)
    count = f", {links.per_gpu} per GPU" if links.per_gpu else ""
    rate = f", {links.GBps:.0f} GB/s per GPU and direction" if links.GBps else ""
    hint = (
        "GPUs without direct links exchange through PCIe or host memory" if links.kind != "nvlink" else None
    )
    state = "ok" if links.kind in ("nvlink", "xgmi") else "warn"
    return Line("machine", "links", state, links.kind + count + rate, hint if state == "warn" else None)


def health_lines(clocks: Sequence[dict[str, smi.Value]]) -> list[Line]:
    """Throttling and memory errors; one line when all is well."""
    hint = "numbers from this GPU are not the library's: let it cool, or have it looked at"
    lines = [Line("machine", "health", "warn", said, hint) for said in smi.slowed(clocks, "just now")]
    for record in clocks:
        if record.get("ecc_uncorrected"):
            said = f"GPU {record['gpu']} has {record['ecc_uncorrected']} uncorrected memory errors"
            lines.append(Line("machine", "health", "warn", said, "reset or replace it"))
    if clocks and not lines:
        hottest = max(
            (r["temperature_c"] for r in clocks if isinstance(r["temperature_c"], (int, float))), default=None
        )
        heat = f", at most {hottest:g} C" if hottest is not None else ""
        untold = [
            what
            for what, name in (("throttling", "throttle"), ("memory errors", "ecc_uncorrected"))
            if any(record.get(name) is None for record in clocks)
        ]
        if untold:
            said = f"unknown: {' and '.join(untold)}{heat}"
            lines.append(Line("machine", "health", "warn", said, "no tool or driver file here tells"))
        else:
            said = f"no GPU throttled, no uncorrected memory errors{heat}"
            lines.append(Line("machine", "health", "ok", said))
    return lines


def multicast_lines(environ: Mapping[str, str] | None = None) -> list[Line]:
    """Whether the switches for NVLink multicast agree."""
    states = environment.multicast_settings(environ)
    said = ", ".join(f"{name} {state}" for name, state in states.items())
    if "off" not in states.values():
        return [Line("machine", "NVLink multicast", "ok", f"left to the libraries ({said})")]
    if "on" in states.values():
        hint = "one forbids it, another asks for it: no rank will be started until they agree"
        return [Line("machine", "NVLink multicast", "warn", said, hint)]
    unset = [name for name, state in states.items() if state == "unset"]
    hint = (
        f"ranks get {', '.join(f'{n}={environment.MULTICAST_OFF[n]}' for n in unset)} as well"
        if unset
        else None
    )
    return [Line("machine", "NVLink multicast", "warn" if unset else "ok", f"off ({said})", hint)]


def nic_lines() -> list[Line]:
    found = machine.nics()
    if not found:
        return []
    lines = []
    for nic in found:
        up = nic["state"] == "ACTIVE"
        value = f"{nic['name']}:{nic['port']} {nic['link_layer']} {nic['rate_gbps']} Gb/s {nic['state']}"
        hint = None if up else "a port that is not ACTIVE carries nothing: see ibstat"
        lines.append(Line("machine", "NIC", "ok" if up else "warn", value, hint))
    return lines


def limit_lines(shm: Path = Path("/dev/shm")) -> list[Line]:
    """Disk, shared memory, process limits and loopback: what makes ranks fail with odd messages."""
    lines = [_space("disk here", Path.cwd(), 2, "results and logs of a sweep need about that much")]
    if shm.is_dir():
        hint = "NCCL and gloo exchange through it: docker run --ipc=host, or --shm-size=16g"
        lines.append(_space(str(shm), shm, 1, hint))
    elif sys.platform == "linux":
        lines.append(Line("limits", str(shm), "missing", "absent", "mount a tmpfs there"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    hint = None if unlimited or not machine.nics() else "RDMA registers memory: ulimit -l unlimited"
    lines.append(Line("limits", "locked memory", "warn" if hint else "ok", _limit(locked, "KiB", 1024), hint))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files != resource.RLIM_INFINITY and files < 1024
    hint = "ranks open a socket per peer and channel: ulimit -n 65536" if few else None
    lines.append(Line("limits", "open files", "warn" if few else "ok", _limit(files, "", 1), hint))
    trouble = loopback_trouble()
    hint = "ranks on one machine meet at 127.0.0.1: bring up lo, or lift the sandbox" if trouble else None
    lines.append(
        Line("limits", "loopback ports", "missing" if trouble else "ok", trouble or "bind and connect", hint)
    )
    return lines


def _space(name: str, path: Path, wanted_gib: float, hint: str) -> Line:
    usage = shutil.disk_usage(path)
    few = usage.free < wanted_gib * GIB
    value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    return Line("limits", name, "warn" if few else "ok", value, hint if few else None)


def _limit(value: int, unit: str, scale: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // scale} {unit}".strip()


def loopback_trouble() -> str | None:
    """Why a process here cannot listen on 127.0.0.1 and be reached there, or None."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            socket.create_connection(server.getsockname(), timeout=2.0).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
