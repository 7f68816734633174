"""The process environment: who this rank is, which settings may enter a result, what a child inherits.

The only file that reads `os.environ`. Every reader takes the mapping as an argument, so tests pass their own.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .errors import UserError
from .launched import RankEnvironment, read_rank
from .redact import SECRET_NAME, Private, Redactor
from .settings import publishable

# ------------------------------------------------------------------------------------ ranks and scheduler


def rank_environment(
    master_address: str | None = None,
    master_port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> RankEnvironment:
    """Who this process is, from torchrun (also what `cx run` sets), Open MPI, MPICH or Slurm.

    The master comes from the arguments, else MASTER_ADDR and MASTER_PORT; on one node the address defaults to
    loopback. Raises UserError when the variables are incomplete or contradict each other.
    """
    return read_rank(os.environ if environ is None else environ, master_address, master_port)


_OWN = {
    "slurm": ("SLURM_",),
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpi": ("OMPI_COMM_WORLD_", "PMI_", "MPI_"),
}


def step_rank(
    address: str, port: int, environ: Mapping[str, str] | None = None, launcher: str = "slurm"
) -> RankEnvironment:
    """Who this process is among those that `launcher` ("slurm", "torchrun" or "mpi") started, whatever
    another launcher's variables say that leaked into it."""
    env = os.environ if environ is None else environ
    return read_rank({n: v for n, v in env.items() if n.startswith(_OWN[launcher])}, address, port)


_SLURM_FACTS = {
    "job_id": "SLURM_JOB_ID",
    "step_id": "SLURM_STEP_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "restarts": "SLURM_RESTART_COUNT",
    "nodes": "SLURM_JOB_NUM_NODES",
    "tasks": "SLURM_STEP_NUM_TASKS",
}


def inside_allocation(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process belongs to a Slurm job."""
    return "SLURM_JOB_ID" in (os.environ if environ is None else environ)


def slurm_job(environ: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """(job id, how often it was requeued) of the Slurm job that we are in, or None. A task of a step of
    somebody else's is in one too: the launcher is the batch script or a shell, not a rank."""
    env = os.environ if environ is None else environ
    job = env.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"[0-9]{1,12}", job):
        return None
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    return job, int(restarts) if restarts.isdecimal() else 0


def inherited(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment, for a child."""
    return dict(os.environ if environ is None else environ)


def scheduler_facts(environ: Mapping[str, str] | None = None) -> dict[str, str | int] | None:
    """Numbers of the job, or None outside one. No account, partition, node list, user or job name."""
    env = os.environ if environ is None else environ
    if not inside_allocation(env):
        return None
    facts: dict[str, str | int] = {"kind": "slurm"}
    for fact, name in _SLURM_FACTS.items():
        if re.fullmatch(r"[0-9]{1,12}", env.get(name, "")):
            facts[fact] = int(env[name])
    return facts


# --------------------------------------------------------------------------------------------- settings


def communication_settings(key: str, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that steer communication, as they may be published (see settings.py), sorted by name.

    Read it after set-up: without `environ` it reads the C environment, where NCCL puts what it found in
    nccl.conf.
    """
    return publishable(_live() if environ is None else environ, key, Redactor(private()))


def _live() -> dict[str, str]:
    """The environment as C sees it. `os.environ` is a copy made at start: what a library sets afterwards
    with setenv (NCCL does, for every line of nccl.conf) is not in it."""
    try:
        block = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    except (OSError, ValueError):
        return dict(os.environ)
    out: dict[str, str] = {}
    index = 0
    while block and (entry := block[index]) is not None:
        name, _, value = entry.decode(errors="surrogateescape").partition("=")
        out.setdefault(name, value)
        index += 1
    return out


# --------------------------------------------------------------------------------------------- children

# NVLink multicast (NVLS) off, in the spelling each library really honours. On some machines a program that
# uses multicast takes the GPUs of the whole host out of service, so a child must never lose these.
MULTICAST_OFF = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "MSCCLPP_FORCE_DISABLE_NVLS": "1",
}
_OFF_WORDS = {"0": ("0", "false", "no", "off"), "1": ("1", "true", "yes", "on")}


def multicast_settings(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variable -> "off", "on" or "unset" (the library decides) for NVLink multicast."""
    env = os.environ if environ is None else environ
    out = {}
    for name, off in MULTICAST_OFF.items():
        value = env.get(name, "").strip().lower()
        out[name] = "unset" if not value else "off" if value in _OFF_WORDS[off] else "on"
    return out


def child_environment(
    extra: Mapping[str, str],
    rank: RankEnvironment | None = None,
    environ: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of a process we start: ours, then `extra`, then the variables of its rank. A search
    path in `extra` may have an entry `$NAME`, its own name: what it is here, in a container the image's.

    One multicast switch turned off here means that this machine must not use multicast: the child then has
    all four off. Raises UserError when `extra`, or another variable of ours, would turn one on.
    """
    env = os.environ if environ is None else environ
    ours = {name: _with_inherited(name, value, env) for name, value in extra.items()}
    child = {**env, **ours, **(rank.variables() if rank else {})}
    off = [name for name, state in multicast_settings(env).items() if state == "off"]
    if off:
        for name, state in multicast_settings(child).items():
            if state == "on":
                problem = (
                    f"{name}={child[name]} turns NVLink multicast on, but {off[0]}={env[off[0]]} forbids it"
                )
                raise UserError(problem, f"remove {name}, or set {name}={MULTICAST_OFF[name]}")
        child.update(MULTICAST_OFF)
    return child


def for_elsewhere(extra: Mapping[str, str], environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """`extra` for a process that may not inherit our environment, as in a container: with the multicast
    switches off where one of ours is. Raises UserError like `child_environment`."""
    child_environment(extra, environ=environ)
    off = "off" in multicast_settings(environ).values()
    return {**extra, **(MULTICAST_OFF if off else {})}


_LAUNCHED = re.compile(r"SLURM_|SBATCH_|SALLOC_|PMI_|PMIX_|OMPI_(?!MCA_)|MPI_LOCAL")
_RANK_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def without_ranks(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment without what launchers and schedulers say of ranks, jobs and steps."""
    env = os.environ if environ is None else environ
    return {n: v for n, v in env.items() if not _LAUNCHED.match(n) and n not in _RANK_NAMES}


def _with_inherited(name: str, value: str, env: Mapping[str, str]) -> str:
    if f"${name}" not in value.split(os.pathsep):
        return value
    entries = (path_list(name, env) if entry == f"${name}" else [entry] for entry in value.split(os.pathsep))
    return os.pathsep.join(entry for some in entries for entry in some)


def cuda_home(environ: Mapping[str, str] | None = None) -> Path | None:
    """The toolkit that $CUDA_HOME names."""
    env = os.environ if environ is None else environ
    return Path(env["CUDA_HOME"]) if env.get("CUDA_HOME") else None


def build_jobs(environ: Mapping[str, str] | None = None) -> int:
    """How many compilers may run at once: $MAX_JOBS as torch's builds read it, else one for each core."""
    env = os.environ if environ is None else environ
    asked = env.get("MAX_JOBS", "")
    return int(asked) if asked.isdecimal() and int(asked) else os.cpu_count() or 1


def libraries_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where prepared libraries lie: $CX_LIBRARIES, else a folder of the cache."""
    env = os.environ if environ is None else environ
    asked = env.get("CX_LIBRARIES")
    return Path(asked).absolute() if asked else cache_dir(environ) / "libraries"


def path_list(name: str, environ: Mapping[str, str] | None = None) -> list[str]:
    """The entries of a search path such as PYTHONPATH, without empty ones (the current folder)."""
    env = os.environ if environ is None else environ
    return [entry for entry in env.get(name, "").split(os.pathsep) if entry]


def visible_gpus(environ: Mapping[str, str] | None = None) -> int | None:
    """How many GPUs CUDA_VISIBLE_DEVICES (or HIP_, ROCR_) leaves, or None where nothing is hidden."""
    env = os.environ if environ is None else environ
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in env:
            listed = [entry.strip() for entry in env[name].split(",")]
            # the runtimes stop at the first entry that is no device: "0,-1,1" leaves one
            stop = next(
                (i for i, entry in enumerate(listed) if entry in ("", "-1", "NoDevFiles")), len(listed)
            )
            return stop
    return None


def die_with_parent(by: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel end this process when the thread that started it ends (Linux; elsewhere nothing).

    parent   its process, which may have ended before we could ask: then this one ends now
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(by), 0, 0, 0)
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), by)


def without_git(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our environment without GIT_*: a git hook's GIT_DIR would answer for another repository."""
    env = os.environ if environ is None else environ
    return {name: value for name, value in env.items() if not name.startswith("GIT_")}


# ------------------------------------------------------------------------------------- folders and names


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """$XDG_CACHE_HOME/collectivex, else ~/.cache/collectivex, else one in the temporary folder."""
    return _user_folder("XDG_CACHE_HOME", ".cache", environ)


def _user_folder(variable: str, default: str, environ: Mapping[str, str] | None) -> Path:
    env = os.environ if environ is None else environ
    for base in (env.get(variable, ""), os.path.join(env.get("HOME", ""), default)):
        if os.path.isabs(base):  # the XDG specification: relative paths are to be ignored
            return Path(base) / "collectivex"
    return Path(tempfile.gettempdir()) / f"collectivex-{os.getuid()}"


def site_file(environ: Mapping[str, str] | None = None) -> Path | None:
    """The facts of this site: $COLLECTIVEX_SITE, else $XDG_CONFIG_HOME/collectivex/site.yaml where it is."""
    env = os.environ if environ is None else environ
    if env.get("COLLECTIVEX_SITE"):
        return Path(env["COLLECTIVEX_SITE"])
    path = _user_folder("XDG_CONFIG_HOME", ".config", environ) / "site.yaml"
    return path if path.is_file() else None


def user_key(fallback: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    """32 random bytes in hex, one per installation: $XDG_STATE_HOME/collectivex/key, mode 0600, made at first
    use. With it a host has the same hash in every result.

    Where the file can neither be read nor made, `fallback` (one key for the execution, so that its ranks
    agree), else a key of this process alone.
    """
    path = _user_folder("XDG_STATE_HOME", ".local/state", environ) / "key"
    with contextlib.suppress(OSError):
        for _ in range(2):
            key = _read_key(path)
            if key is not None:
                return key
            _make_key(path)
    return fallback if fallback is not None else secrets.token_hex(32)


def _read_key(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return None
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text
    path.unlink()
    return None


def _make_key(path: Path) -> None:
    """Linking a finished file into place: of several ranks at once one wins, none reads half a key."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".key-")
    try:
        os.write(handle, secrets.token_hex(32).encode())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.close(handle)
        os.unlink(temporary)


def private(environ: Mapping[str, str] | None = None) -> Private:
    """What names this machine, its people and their secrets (see redact.Redactor)."""
    env = os.environ if environ is None else environ
    host_names = ("HOSTNAME", "HOST", "SLURMD_NODENAME", "SLURM_SUBMIT_HOST", "MASTER_ADDR")
    user_names = ("USER", "LOGNAME", "SUDO_USER", "USERNAME", "SLURM_JOB_USER", "SLURM_JOB_ACCOUNT")
    hosts = [socket.gethostname(), *(env.get(name, "") for name in host_names)]
    users = [env.get(name, "") for name in user_names]
    homes = [env.get("HOME", ""), env.get("SLURM_SUBMIT_DIR", "")]
    with contextlib.suppress(KeyError):  # a container's user id need not have a passwd entry
        entry = pwd.getpwuid(os.getuid())
        users.append(entry.pw_name)
        homes.append(entry.pw_dir)
    hidden = tuple(value for name, value in env.items() if SECRET_NAME.search(name) and len(value) >= 8)
    return Private(tuple(filter(None, hosts)), tuple(filter(None, users)), tuple(filter(None, homes)), hidden)
