"""What the knobs of the fake mean: which fault strikes in which call, and how long each component takes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..runtime.device import ManualDevice
from ..runtime.errors import UserError
from ..runtime.types import Case
from .base import Context

LATENCY_US = {"dispatch": 10.0, "combine": 20.0, "call": 5.0}


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    kind        where: in what "dispatch" delivers, in what "combine" or a collective returns, in the
                "inputs", in the "knobs", with the "process" (of the last rank only), in the "time" of a call
    only        says of a case whether the fault means anything there
    every       of so many calls one goes wrong
    first_call  the calls before it are good
    """

    does: str
    kind: Literal["dispatch", "combine", "inputs", "knobs", "process", "time"]
    families: tuple[str, ...] = ("moe",)
    only: Callable[[Case], bool] = lambda case: True
    every: int = 1
    first_call: int = 0

    def active(self, call: int) -> bool:
        """Whether it strikes in this call, counted from 0."""
        return call >= self.first_call and (call + 1) % self.every == 0


@dataclass
class Plan:
    """What the knobs of a case ask for on this rank: which fault, and how long each component takes."""

    name: str | None
    fault: Fault | None
    last_rank: bool
    clock: ManualDevice | None
    samples_us: Mapping[str, Sequence[float]]
    realised: Mapping[str, int | float | str]
    spent: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, context: Context, faults: Mapping[str, Fault]) -> Plan:
        knobs, ranks, device = dict(case.knobs), context.ranks, context.device
        name, _, first = str(knobs.get("fault", "")).partition("@")
        fault = faults[name] if name else None
        if fault is not None and first:
            fault = replace(fault, first_call=int(first))
        samples = {name: [us] for name, us in LATENCY_US.items()}
        samples |= _latencies(knobs.get("latency_us"))
        samples |= _replayed(knobs.get("replay"), ranks.rank)
        realised = dict(knobs)
        if name == "knob-ignored":
            realised["fault"] = "none"
        clock = device if isinstance(device, ManualDevice) else None
        return cls(name or None, fault, ranks.rank == ranks.size - 1, clock, samples, realised)

    def strikes(self, name: str, call: int) -> bool:
        return self.name == name and self.fault is not None and self.fault.active(call)

    def enter(self, call: int) -> None:
        """The faults that end or stop a process; called where a library would be entered."""
        if self.fault is None or self.fault.kind not in ("process", "time") or not self.fault.active(call):
            return
        if self.name == "slow":
            time.sleep(1)
            if self.clock is not None:
                self.clock.spend(1e6)
        elif self.last_rank and self.name is not None and self.name in _PROCESS:
            _PROCESS[self.name]()

    def spend(self, component: str) -> None:
        if self.clock is None:
            return
        at = self.spent.get(component, 0)
        self.spent[component] = at + 1
        samples = self.samples_us[component]
        self.clock.spend(samples[at % len(samples)])


def _hang() -> None:
    while True:
        time.sleep(3600)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
    _hang()  # the signal may reach another thread first


def _out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("fake out of memory, as asked")


def _error() -> None:
    raise RuntimeError("fake error, as asked")


_PROCESS: Mapping[str, Callable[[], object]] = {
    "hang": _hang,
    "crash": crash,
    "exit-nonzero": lambda: os._exit(11),
    "exit-without-result": lambda: os._exit(0),
    "sys-exit": lambda: sys.exit(0),
    "out-of-memory": _out_of_memory,
    "error": _error,
}


def _latencies(knob: int | float | str | None) -> dict[str, list[float]]:
    """Samples per component from `latency_us` or an inline `replay`. Raises UserError."""
    if knob is None:
        return {}
    if not isinstance(knob, str):
        return {name: [float(knob)] for name in LATENCY_US}
    samples = {}
    for part in knob.split(","):
        name, _, values = part.partition("=")
        try:
            samples[name] = [float(v) for v in values.split(":")]
        except ValueError:
            raise UserError(
                f"{part!r} is no latency of the fake", "write dispatch=12.5 or call=5:6:7"
            ) from None
        if name not in LATENCY_US:
            raise UserError(f"the fake has no component {name!r}; it has {', '.join(LATENCY_US)}")
    return samples


def _replayed(knob: int | float | str | None, rank: int) -> dict[str, list[float]]:
    """As `_latencies`, or from the samples sidecar (collectivex.samples.v1) of that path: this rank's part of
    each component's first series, "fresh" ones before others."""
    if not isinstance(knob, str) or not knob.endswith(".json.gz"):
        return _latencies(knob)
    try:
        document = json.loads(gzip.decompress(Path(knob).read_bytes()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot replay {knob}: {error}", "give the path of a samples sidecar") from error
    samples: dict[str, list[float]] = {}
    for series in sorted(document["series"], key=lambda s: s["regime"] != "fresh"):
        if series["component"] in LATENCY_US:
            per_rank = series["per_rank_us"]
            samples.setdefault(series["component"], per_rank[rank % len(per_rank)])
    return samples
