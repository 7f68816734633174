"""Containers for tests by the real podman of this host: its own storage and configuration in one folder, and
a registry with one image that holds no files but a `python3`, which is the Python of the tests.

The host's files are mounted into every container by containers.conf, as a site does with a driver's folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import program_pool

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
# Debian's defaults need privileges and cgroups that a virtual machine may not have; runc and cgroupfs do not.
CONTAINERS = """\
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=32768:32768"]
volumes = [{volumes}]
"""
STORAGE = """\
[storage]
driver = "vfs"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
"""
REGISTRIES = """\
[[registry]]
location = "{location}"
insecure = true
"""


class PodmanHost:
    """`env` is what podman needs to use this folder; `image` a reference with a tag, `digest` its digest."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.served: dict[str, tuple[str, bytes]] = {}
        self.digest = self._image()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        location = f"127.0.0.1:{self.server.server_port}"
        self.image = f"{location}/cx/python:1"
        share = [Path(p) for p in ("/usr", "/bin", "/lib", "/lib64", "/etc") if Path(p).exists()]
        share += sorted({Path(p).resolve() for p in (sys.prefix, sys.base_prefix)} - {Path("/usr")})
        volumes = ", ".join(f'"{path}:{path}:ro"' for path in share)
        texts = {
            "CONTAINERS_CONF": CONTAINERS.format(volumes=volumes),
            "CONTAINERS_STORAGE_CONF": STORAGE.format(folder=folder),
            "CONTAINERS_REGISTRIES_CONF": REGISTRIES.format(location=location),
        }
        self.env = dict(os.environ)
        for name, text in texts.items():
            path = folder / f"{name.lower()}.toml"
            path.write_text(text)
            self.env[name] = str(path)

    def _image(self) -> str:
        """One layer, a configuration and a manifest; returns the manifest's digest."""
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for name in ("image", "image/bin", "tmp"):
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
                tar.addfile(entry)
            text = f'#!/bin/sh\nCX_IN_IMAGE=1 exec {sys.executable} "$@"\n'.encode()
            entry = tarfile.TarInfo("image/bin/python3")
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text))
        diff = "sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/image/bin:/usr/bin:/bin"], "Entrypoint": ["/bin/false"]},
            "rootfs": {"type": "layers", "diff_ids": [diff]},
        }
        layers = [self._blob("application/vnd.oci.image.layer.v1.tar", layer.getvalue())]
        about = self._blob("application/vnd.oci.image.config.v1+json", json.dumps(config).encode())
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": about, "layers": layers}
        return str(self._blob(MANIFEST, json.dumps(manifest).encode())["digest"])

    def _blob(self, kind: str, data: bytes) -> dict[str, str | int]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.served[digest] = (kind, data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        host = self

        class Registry(BaseHTTPRequestHandler):
            """Manifests and blobs by digest, and the one tag."""

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                kind, data = host.served.get(
                    host.digest if name == "1" else name, ("application/json", b"{}")
                )
                self.send_response(200 if len(data) > 2 or self.path == "/v2/" else 404)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Docker-Content-Digest", "sha256:" + hashlib.sha256(data).hexdigest())
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: pytest's output is for tests."""

        return Registry

    def write_pool(self, folder: Path) -> Path:
        """A SKU file of one machine whose ranks podman starts."""
        keys = {"mechanism": "docker", "container": "podman", "image": self.image}
        return Path(program_pool.write_pool(folder, "box", env={"GLOO_LOG_LEVEL": "ERROR"}, **keys))

    def podman(self, *words: str) -> str:
        done = subprocess.run(
            ["podman", *words], env=self.env, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"podman {words}: {done.stdout}{done.stderr}"
        return done.stdout

    def containers(self) -> list[str]:
        """Names of all containers there are, running or not."""
        return self.podman("ps", "--all", "--format={{.Names}}").split()

    def close(self) -> None:
        self.podman("rm", "--all", "--force", "--time=0")
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@contextlib.contextmanager
def podman_host() -> Iterator[PodmanHost]:
    with tempfile.TemporaryDirectory(prefix="cx-podman-", ignore_cleanup_errors=True) as folder:
        found = PodmanHost(Path(folder))
        try:
            yield found
        finally:
            found.close()
