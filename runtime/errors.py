"""The two ways to end early that are not bugs.

    CollectiveXError
    +-- UserError    the user must change something          exit 2
    +-- InfraError   scheduler, image, node, GPU, disk       exit 3

Both print `error: ...` and `hint: ...` and never a traceback. Everything else is our bug and always
shows one. Standard library only: both halves import this.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CollectiveXError(Exception):
    """An end that the message explains; `hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UserError(CollectiveXError):
    """A wrong name, file, value or missing package: the user must change something."""

    exit_code = 2


class InfraError(CollectiveXError):
    """The machine, scheduler, image or disk failed us."""

    exit_code = 3


def unknown(kind: str, name: str, have: Iterable[str], hint: str | None = None) -> UserError:
    """`no SKU named 'h20'; have: ...`, with the nearest name as the hint, or those that begin like it."""
    known = sorted(have)
    near = difflib.get_close_matches(name, known, n=1)
    longer = [other for other in known if name and other.startswith(name)]
    if hint is None and (near or longer):
        hint = f"did you mean {' or '.join(map(repr, near or longer))}?"
    return UserError(
        f"no {kind} named {name!r}; have: {', '.join(known) or 'none'}", hint or "names are written in full"
    )
