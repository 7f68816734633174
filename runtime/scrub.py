"""What a process printed, made fit for a record: private names gone (see redact.py), paths made short."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path

from . import environment
from .redact import Private, Redactor

_PACKAGES = re.compile(r"/[^\s\"']*/(?:site|dist)-packages/")
# A folder of this machine (/tmp/x/library/file.so), but not what every machine has (/usr/lib/…, /dev/shm/…).
_FOLDERS = re.compile(
    r"(?<![\w.:/~>…-])/(?!(?:usr|opt|lib\d*|bin|sbin|proc|sys|dev|etc|run)/)(?:[^\s\"'/:,;()]+/)+"
    r"(?=[^\s\"'/:,;()]+/[^\s\"'/:,;()]+)"
)


_also: list[Private] = []


def also_hide(private: Private) -> None:
    """More names that must not be told from now on: the nodes and accounts that a launcher has to do with."""
    _also.append(private)
    _redactor.cache_clear()


@lru_cache(maxsize=1)
def _redactor() -> Redactor:
    known = [environment.private(), *_also]
    merged = ([name for one in known for name in getattr(one, kind)] for kind in Private.__dataclass_fields__)
    return Redactor(Private(*map(tuple, merged)))


def folders(text: str) -> list[str]:
    """The folders of some machine that `text` names."""
    return sorted({found.group() for found in _FOLDERS.finditer(text)})


def scrub(text: str) -> str:
    """`text` without what would tell where it was printed. Lines and their order stay.

    Of a path in a folder of this machine the last two parts stay.
    """
    for prefix in (str(Path(__file__).resolve().parent.parent), sys.prefix, sys.base_prefix):
        text = text.replace(prefix + "/", "")
    return _FOLDERS.sub("…/", _redactor().text(_PACKAGES.sub("", text)))
