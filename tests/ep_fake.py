"""What the fakes of NVIDIA-side libraries share: ranks as threads, and signatures as recorded."""

from __future__ import annotations

import inspect
import json
import threading
from dataclasses import field, make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from collectivex.runtime.ranks import ThreadRanks

SIGNATURES = Path(__file__).parent / "fixtures" / "signatures"


class Rule(Exception):
    """A rule of the library's contract was broken."""


def must(kept: bool, rule: str) -> None:
    if not kept:
        raise Rule(rule)


def recorded(name: str) -> dict[str, Any]:
    return json.loads((SIGNATURES / f"{name}.json").read_text())


def dataclass_of(record: dict[str, Any], name: str, **defaults: Any) -> Any:
    """A class with exactly the recorded fields, None where no default is given."""
    names = record["fields"][name]
    assert set(defaults) <= set(names)
    return make_dataclass(name, [(n, Any, field(default=defaults.get(n))) for n in names])


class Place:
    """Which rank the calling thread is. A fake's calls meet there, so that a rank that raises frees the
    others."""

    def __init__(self) -> None:
        self.local = threading.local()

    def enter(self, ranks: ThreadRanks) -> None:
        self.local.ranks = ranks

    @property
    def ranks(self) -> ThreadRanks:
        return self.local.ranks


def shuffled(rows: list[Any], seed: int) -> list[Any]:
    """The library's order within a group of rows is nobody's promise: another one in every call."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order]


def unlike(fake: ModuleType, name: str) -> str | None:
    """The parameters of `Class.method` in the module of a fake, if their names, order or kinds are not those
    of its RECORD."""
    found: Any = fake
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = found.fget if isinstance(found, property) else found
    found = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name not in ("self", "cls")]
    mine = [[p.name, p.kind.name] for p in parameters]
    return None if mine == fake.RECORD["functions"][name] else str(mine)
