"""What a process printed, made fit for a record: private names gone (see redact.py), paths made short."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path

from . import environment
from .redact import Redactor

_PACKAGES = re.compile(r"/[^\s\"']*/(?:site|dist)-packages/")


@lru_cache(maxsize=1)
def _redactor() -> Redactor:
    return Redactor(environment.private())


def scrub(text: str) -> str:
    """`text` without what would tell where it was printed. Lines and their order stay."""
    for prefix in (str(Path(__file__).resolve().parent.parent), sys.prefix, sys.base_prefix):
        text = text.replace(prefix + "/", "")
    return _redactor().text(_PACKAGES.sub("", text))
