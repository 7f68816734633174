"""The site file: account, partition, node lists, folders. Facts of a place, which never enter results.

Where it is: --site, else $COLLECTIVEX_SITE, else ~/.config/collectivex/site.yaml. Its form is
schema/site.v1.json; docs/launching.md has an example.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import environment, yamlfile
from .errors import UserError, unknown
from .fabric import Fabric
from .sku import Sku
from .slurm import Request, request

WAIT_MINUTES = 240


@dataclass(frozen=True)
class Pool:
    """What a site adds to one SKU. Everything is optional here; `require` says what a mechanism needs."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    nodelist: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    gpu_option: str | None = ""
    time_minutes: int | None = None
    wait_minutes: int = WAIT_MINUTES
    image: str | None = None
    image_file: str | None = None
    image_folder: str | None = None
    import_on: str = "login"
    stage_folder: str | None = None
    python: str | None = None
    interface: str | None = None
    devices: tuple[str, ...] = ()
    gid_index: int | None = None
    traffic_class: int | None = None

    def request(self, sku: Sku, nodes: int) -> Request:
        """What to ask the scheduler for: the pool's facts with this site's."""
        asked = replace(
            request(sku, nodes),
            account=self.account,
            partition=self.partition,
            qos=self.qos,
            reservation=self.reservation,
            nodelist=self.nodelist,
            exclude=self.exclude,
        )
        if self.gpu_option != "":  # null in the file: this scheduler does not count GPUs
            asked = replace(asked, gpu_option=self.gpu_option)
        return replace(asked, time_minutes=self.time_minutes) if self.time_minutes else asked

    def fabric(self, sku: Sku) -> Fabric:
        """The network with this site's names for it."""
        known = sku.fabric()
        return replace(
            known,
            devices=self.devices or known.devices,
            interface=self.interface,
            gid_index=self.gid_index,
            traffic_class=self.traffic_class,
        )


def load_pool(path: str | None, sku: Sku) -> Pool:
    """What the site file says of a SKU. Raises UserError for every mistake in it, and for what the SKU's
    mechanism needs and it does not say, before anything is allocated."""
    file = Path(path) if path else environment.site_file()
    if file is None:
        if sku.mechanism == "slurm":
            hint = "see docs/launching.md; --site or COLLECTIVEX_SITE names the file"
            raise UserError(f"SKU {sku.name!r} is started by Slurm, which needs a site file", hint)
        return Pool()
    if not file.is_file():
        raise UserError(f"no site file {file}", "--site or COLLECTIVEX_SITE names it; see docs/launching.md")
    pools = yamlfile.read(file, "site")["pools"]
    if sku.name not in pools:
        if sku.mechanism == "slurm":
            raise unknown("pool in the site file", sku.name, pools)
        return Pool()
    entry: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in pools[sku.name].items()}
    pool = Pool(**entry)
    _require(file, sku, pool)
    return pool


def _require(file: Path, sku: Sku, pool: Pool) -> None:
    problems = []
    key = f"pools.{sku.name}"
    if sku.container != "none":
        if not (pool.image or sku.image or pool.image_file):
            problems.append((f"{key}.image", f"the SKU names no image, and {sku.container} needs one"))
        needs_file = sku.container in ("pyxis", "apptainer")
        if needs_file and not (pool.image_folder or pool.image_file):
            problems.append((f"{key}.image_folder", f"is needed: where {sku.container} finds the image"))
    yamlfile.refuse(file, problems)
