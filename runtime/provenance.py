"""Where a number comes from: the software as loaded, the machine as found, the settings as they stand.

Read after set-up, so that what a library loaded and changed is seen. Only what schema/result.v1.json lists
under `provenance`, hosts as keyed hashes, and free text scrubbed once more at the end. Standard library only.
"""

from __future__ import annotations

import platform
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collectivex import __version__

from . import environment, loaded, machine, smi
from .commands import run
from .redact import Redactor, keyed_hash
from .scrub import scrub

if TYPE_CHECKING:
    from ..backends.base import Facts
    from .device import Device
    from .ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
# What decides a number. Results and documents may change without making the code another one.
CODE = ("backends", "collectivex", "launchers", "runtime", "schema", "suites")
GIT_TIMEOUT_S = 10.0


def collect(
    facts: Facts,
    versions: Mapping[str, str],
    ranks: Ranks,
    key: str,
    image: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """The `provenance` of a result without its clocks, equal on every rank. Collective over `ranks`.

    versions   what the backend says of its library after set-up
    key        environment.user_key of whoever started the run, so that equal hosts hash equally
    hosts      one hash per rank, in rank order; everything else is rank 0's
    """
    hosts = ranks.all_gather(host_hash(key))
    return ranks.from_zero(describe(facts, versions, key, image, hosts) if ranks.rank == 0 else {})


def describe(
    facts: Facts,
    versions: Mapping[str, str],
    key: str,
    image: Mapping[str, str | None] | None = None,
    hosts: Sequence[str] = (),
) -> dict[str, Any]:
    """What this process can say alone. See `collect`."""
    torch = sys.modules.get("torch")
    redactor = Redactor(environment.private())
    boot, links = machine.boot_id(), machine.links()
    told = {
        "collectivex": {"version": __version__, **checkout(ROOT)},
        "python": platform.python_version(),
        "torch": str(torch.__version__) if torch else None,
        "platform": platform.platform(),
        "cpu": machine.cpu(),
        "gpus": machine.gpus(torch),
        "driver": machine.driver(),
        "cuda": torch.version.cuda if torch else None,
        "rocm": torch.version.hip if torch else None,
        "libraries": [vars(library) for library in loaded.libraries(redactor, torch)],
        "backend": {
            "name": facts.name,
            "source": f"{facts.source.kind}: {facts.source.name}",
            "pin": facts.source.pin,
            "versions": {name: scrub(version) for name, version in versions.items()},
        },
        "image": dict(image) if image else None,
        "environment": environment.communication_settings(key),
        "links": {"kind": links.kind, "per_gpu": links.per_gpu} if links else None,
        "scheduler": environment.scheduler_facts(),
        "nics": machine.nics(),
    }
    hashes = {
        "host": host_hash(key),
        "hosts": list(hosts),
        "boot": keyed_hash(key, "boot", boot) if boot else None,
    }
    return {**redactor.tree(told), **hashes}


def host_hash(key: str) -> str:
    """12 hex digits that stand for this host's name."""
    return keyed_hash(key, "host", socket.gethostname())


def clocks(ranks: Ranks, device: Device) -> list[dict[str, smi.Value]]:
    """One record per GPU in use, now, in rank order and on every rank; "gpu" is the rank. Collective.

    For right before and right after a case. Empty on CPU. AMD GPUs are read per node, by its first rank.
    """
    if device.kind == "cpu":
        return []
    mine: list[dict[str, smi.Value]] = []
    if device.kind == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(device.torch_device)
        mine = [{**record, "gpu": ranks.rank} for record in machine.clocks(f"GPU-{properties.uuid}")]
    elif ranks.local_rank == 0:
        mine = [{**record, "gpu": ranks.rank + i} for i, record in enumerate(machine.clocks())]
    return [record for of_rank in ranks.all_gather(mine) for record in of_rank]


def findings(provenance: Mapping[str, Any]) -> list[str]:
    """What a reader of the result must know, in sentences: two copies of a library, a version other than the
    one compiled against, GPUs held back. For the `warnings` of a result whose provenance is complete."""
    said = loaded.findings(loaded.Loaded(**library) for library in provenance.get("libraries", ()))
    for when, records in provenance.get("clocks", {}).items():
        said += smi.slowed(records, when)
    return said


# ------------------------------------------------------------------------------------------------- git


def checkout(root: Path) -> dict[str, str | bool | None]:
    """{"git_commit", "git_dirty"} of the checkout at `root`; None for what cannot be known (a wheel, a plain
    copy). Dirty: a file that decides numbers differs from the commit or is not in it. Without the program git
    the commit is read from .git itself. A staged copy says in its file REVISION what it is a copy of
    ("<commit>" or "<commit> dirty")."""
    staged = root / "REVISION"
    if staged.is_file():
        commit, _, dirty = staged.read_text().strip().partition(" ")
        return {"git_commit": _sha(commit), "git_dirty": bool(dirty)}
    if not (root / ".git").exists():
        return {"git_commit": None, "git_dirty": None}
    commit = (_git(root, "rev-parse", "HEAD") or "").strip() or commit_from_files(root)
    changed = _git(root, "status", "--porcelain", "--", *CODE)
    return {"git_commit": commit, "git_dirty": None if changed is None else bool(changed.strip())}


def _git(root: Path, *arguments: str) -> str | None:
    """Output of git, or None when it is missing, slow or refuses. In a container the checkout belongs to
    somebody else and may be mounted read-only."""
    argv = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", str(root), *arguments]
    done = run(argv, timeout_s=GIT_TIMEOUT_S, env=environment.without_git())
    return done.out if done.code == 0 else None


def commit_from_files(root: Path) -> str | None:
    """The commit that HEAD names, through a worktree's .git file, a loose ref or packed-refs."""
    try:
        folder = root / ".git"
        if folder.is_file():
            folder = root / folder.read_text().removeprefix("gitdir:").strip()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return _sha(head)
        name = head.removeprefix("ref: ")
        common = folder / "commondir"
        shared = folder / common.read_text().strip() if common.is_file() else folder
        for loose in (folder / name, shared / name):
            if loose.is_file():
                return _sha(loose.read_text().strip())
        packed = re.search(
            rf"^([0-9a-f]{{40,64}}) {re.escape(name)}$", (shared / "packed-refs").read_text(), re.MULTILINE
        )
    except OSError:
        return None
    return packed[1] if packed else None


def _sha(text: str) -> str | None:
    return text if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) else None
