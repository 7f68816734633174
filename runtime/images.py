"""Container images: a tag is resolved to its digest, and imported once per digest and architecture.

The imported file is made under a temporary name, verified, and renamed: whoever sees <digest>.<arch>.sqsh
sees a whole image. A lock keeps two from importing the same one; a lock whose holder shows no life is taken
over. (Two who do that at the same moment both import, and the second rename replaces equal with equal.)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .commands import Run, must, run
from .errors import InfraError, UserError

IMPORT_S = 3600.0
STALE_S = 120.0  # a lock that its holder has not touched for so long is nobody's
TOUCH_S = 20.0
TRIES = 3
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
_ACCEPT = (
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """registry/repository:tag, perhaps with the digest it must have."""

    registry: str
    repository: str
    tag: str
    digest: str | None

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.repository}:{self.tag}"

    @property
    def enroot(self) -> str:
        """For `enroot import`, by tag: given a bare digest it asks for a password and waits."""
        return f"docker://{self.registry}#{self.repository}:{self.tag}"


def parse(text: str) -> Reference:
    """`lmsysorg/sglang:v1`, `ghcr.io/o/n:v1@sha256:...`, `nvcr.io#nvidia/pytorch:25.01-py3`. UserError for a
    reference without a tag: a digest alone cannot be imported, and no tag at all means a moving one."""
    text, _, digest = text.partition("@")
    if digest and not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise UserError(f"image {text}@{digest}: {digest!r} is not a sha256 digest")
    rest, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:
        raise UserError(
            f"image {text!r} has no tag", "name one, with its digest after it if it must not move"
        )
    registry, mark, repository = rest.partition("#")
    if not mark:
        first, slash, others = rest.partition("/")
        registered = slash and ("." in first or ":" in first or first == "localhost")
        registry, repository = (first, others) if registered else ("docker.io", rest)
    if registry == "docker.io" and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(registry, repository, tag, digest or None)


def fetch(url: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    """One HTTP request: status, lower-case headers, body."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, b""
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise InfraError(f"the image registry does not answer: {error}") from error


def resolve(image: Reference, ask: Callable[..., tuple[int, dict[str, str], bytes]] = fetch) -> str:
    """The digest that the tag has now, from the registry, anonymously. Raises InfraError when it does not
    say, or when the reference demands another digest."""
    host = "registry-1.docker.io" if image.registry == "docker.io" else image.registry
    url = f"https://{host}/v2/{image.repository}/manifests/{image.tag}"
    code, headers, _ = ask(url, {"Accept": _ACCEPT})
    if code == 401:
        token = _token(headers.get("www-authenticate", ""), image, ask)
        code, headers, _ = ask(url, {"Accept": _ACCEPT, "Authorization": f"Bearer {token}"})
    digest = headers.get("docker-content-digest", "")
    if code != 200 or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        raise InfraError(
            f"the registry does not know image {image.name} (HTTP {code})", "see the SKU's image"
        )
    if image.digest not in (None, digest):
        raise InfraError(f"image {image.name} has moved: it is {digest}, not {image.digest}")
    return digest


def _token(challenge: str, image: Reference, ask: Callable[..., tuple[int, dict[str, str], bytes]]) -> str:
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    if "realm" not in fields:
        raise InfraError(f"image {image.name} is not public", "give the site file an image_file")
    url = f"{fields['realm']}?service={fields.get('service', '')}&scope=repository:{image.repository}:pull"
    code, _, body = ask(url, {})
    if code != 200:
        raise InfraError(
            f"image {image.name} is not public (HTTP {code})", "give the site file an image_file"
        )
    answer: dict[str, Any] = json.loads(body)
    return str(answer.get("token") or answer["access_token"])


def file_name(digest: str, arch: str) -> str:
    return f"{digest.removeprefix('sha256:')}.{arch}.sqsh"


def verify(path: Path, before: Sequence[str] = (), execute: Run = run) -> None:
    """Whether a squashfs file can be listed to its end and holds a root file system."""
    listed = execute([*before, "unsquashfs", "-l", str(path)], timeout_s=600)
    text = must(f"verifying image {path.name}", listed, "the file is damaged; delete it")
    if not re.search(r"^squashfs-root/(usr|bin)\b", text, re.MULTILINE):
        raise InfraError(f"image {path.name} holds no root file system", "delete it")


def ensure(
    image: Reference,
    arch: str,
    folder: Path,
    say: Say,
    before: Sequence[str] = (),
    execute: Run = run,
    ask: Callable[..., tuple[int, dict[str, str], bytes]] = fetch,
) -> tuple[Path, str]:
    """(squashfs file, digest) of an image, imported unless it is there.

    before   what a command starts with to run on a compute node; empty: here
    say      is told each phase, because an import takes long and says nothing
    Raises InfraError when it cannot be had.
    """
    say(f"image: resolving {image.name}")
    digest = resolve(image, ask)
    path = folder / file_name(digest, arch)
    if path.is_file():
        return path, digest
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{path.name}.lock", say):
        if not path.is_file():
            _import(image, arch, path, say, before, execute)
            if resolve(image, ask) != digest:
                path.unlink()
                raise InfraError(f"image {image.name} moved while it was imported", "start again")
    return path, digest


def import_argv(image: Reference, arch: str, target: Path, before: Sequence[str] = ()) -> list[str]:
    return [*before, "enroot", "import", f"--arch={_ARCH[arch]}", f"--output={target}", image.enroot]


def _import(image: Reference, arch: str, path: Path, say: Say, before: Sequence[str], execute: Run) -> None:
    """Import under a temporary name, verify, make it readable for all, flush, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    last = None
    for attempt in range(TRIES):
        say(f"image: importing {image.name} for {arch} (try {attempt + 1} of {TRIES})")
        last = execute(import_argv(image, arch, temporary, before), timeout_s=IMPORT_S)
        if last.code == 0:
            break
        say(f"image: that failed: {last.said}")
        temporary.unlink(missing_ok=True)
    assert last is not None
    try:
        must(f"importing image {image.name}", last, "is the image public, and is there room to unpack it?")
        say("image: verifying")
        verify(temporary, before, execute)
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, say: Say, stale_s: float = STALE_S, wait_s: float = IMPORT_S) -> Iterator[None]:
    """One holder at a time over a shared file system, where flock is not dependable: the file is made with
    O_EXCL, its holder touches it, and a file left untouched for `stale_s` is taken over."""
    until, told = time.monotonic() + wait_s, False
    mine = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    while not _take(path, mine):
        with contextlib.suppress(FileNotFoundError):
            if _age(path) > stale_s:
                say("image: taking over a lock whose holder shows no life")
                path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.stale"))
                continue
        if not told:
            say("image: somebody else imports it; waiting")
            told = True
        if time.monotonic() > until:
            raise InfraError(f"the image's lock {path.name} was not free within {wait_s:g} s")
        time.sleep(min(1.0, stale_s / 4))
    ended = threading.Event()
    thread = threading.Thread(target=_keep_alive, args=(path, ended, stale_s / 6), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() == mine:
                path.unlink()
        for left in path.parent.glob(f"{path.name}.*.stale"):
            left.unlink(missing_ok=True)


def _take(path: Path, mine: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(mine)
    return True


def _age(path: Path) -> float:
    """By the file server's own clock: a fresh file's time is now, whatever the clock here says."""
    probe = path.with_name(f".{secrets.token_hex(6)}.now")
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now - path.stat().st_mtime


def _keep_alive(path: Path, ended: threading.Event, every_s: float) -> None:
    while not ended.wait(every_s):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
