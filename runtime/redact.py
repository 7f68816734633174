"""What may leave this machine in a result: keyed hashes instead of names, and a scrub of free text.

Allow lists come first (see environment.py, loaded.py); `Redactor` is the second line, for text that others
wrote: version strings, paths, the tail of a rank's stderr. Pure functions of their arguments.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Names that identify nobody; replacing them would only blind the reader ("nvidia" is also a package path).
GENERIC = frozenset({"root", "localhost", "nobody", "user", "ubuntu", "nvidia", "runner", "admin", "none"})
# Shorter names are replaced only where they stand alone: a user called "al" must not eat "all_reduce".
_STANDS_ALONE = 6

# Variables whose values are kept out of everything.
SECRET_NAME = re.compile(r"SECRET|TOKEN(?!IZERS)|PASSW|CREDENTIAL|(^|_)KEY($|_)", re.IGNORECASE)

_HOMES = re.compile(r"/(?:home|Users)/[^/\s:;,'\"]+")
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*")
_AWS_HOST = re.compile(r"\bip(?:-\d{1,3}){4}\b(?:\.[A-Za-z0-9-]+)*")
_MAC = re.compile(r"(?<![0-9A-Fa-f:])(?:[0-9A-Fa-f]{2}[:-]){5,7}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:])")
_ADDRESS = re.compile(
    r"(?<![A-Za-z0-9.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*)(?![A-Za-z0-9])"
)
_SECRETS = re.compile(
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS access key id
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|hf_|nvapi-|xox[abprs]-|sk-)[A-Za-z0-9_-]{16,}"
    r"|(?i:(?<=token=)|(?<=secret=)|(?<=password=)|(?<=apikey=)|(?<=api_key=))[^\s&;,'\"]+"
)
# An AWS secret key is 40 characters of base64. A git commit is 40 too, but all lower-case hex.
_BASE64_40 = re.compile(r"(?<![A-Za-z0-9/+=])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])")


def keyed_hash(key: str, purpose: str, text: str) -> str:
    """12 hex digits of HMAC-SHA256(key, purpose, text): equal for equal text of one installation, and not to
    be found by trying all host names, as a plain hash would be."""
    message = f"{purpose}\0{text}".encode(errors="surrogateescape")
    return hmac.new(key.encode(), message, hashlib.sha256).hexdigest()[:12]


@dataclass(frozen=True)
class Private:
    """What names this machine, its people and their secrets, as environment.private() finds it."""

    hosts: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()


class Redactor:
    """Replaces private names, home folders, addresses and things that look like secrets in text."""

    def __init__(self, private: Private):
        self._homes = sorted({h.rstrip("/") for h in private.homes if h.count("/") >= 2}, key=len)[::-1]
        self._secrets = sorted(set(private.secrets), key=len, reverse=True)
        users = _names(private.users)
        labels = [h.split(".")[0] for h in private.hosts if not _is_address(h)]
        hosts = _names([*private.hosts, *labels])
        self._words = [*((_word(h, r"(?:\.[A-Za-z0-9-]+)*"), "<host>") for h in hosts)]
        self._words += [(_word(u, ""), "<user>") for u in users]

    def text(self, value: str) -> str:
        """`value` with everything private replaced: `~`, `<host>`, `<user>`, `<address>`, `<secret>`."""
        for secret in self._secrets:
            value = value.replace(secret, "<secret>")
        for home in self._homes:
            value = re.sub(re.escape(home) + r"(?![A-Za-z0-9_])", "~", value)
        value = _HOMES.sub("~", value)
        value = _SECRETS.sub("<secret>", value)
        value = _BASE64_40.sub(_secret_40, value)
        value = _EMAIL.sub("<address>", value)
        value = _AWS_HOST.sub("<host>", value)
        for pattern, label in self._words:
            value = pattern.sub(label, value)
        value = _MAC.sub("<address>", value)
        return _ADDRESS.sub(_address, value)

    def touches(self, value: str) -> bool:
        """Whether `value` holds anything private."""
        return self.text(value) != value

    def tree(self, value: Any) -> Any:
        """A JSON value with `text` applied to every string in it; keys stay."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {k: self.tree(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.tree(v) for v in value]
        return value


def _names(values: Sequence[str]) -> list[str]:
    kept = {v for v in values if len(v) >= 2 and v.lower() not in GENERIC and not _is_address(v)}
    return sorted(kept, key=len, reverse=True)


def _is_address(text: str) -> bool:
    """Addresses have a rule of their own, which spares loopback."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _word(name: str, tail: str) -> re.Pattern[str]:
    if len(name) >= _STANDS_ALONE:
        return re.compile(re.escape(name) + tail, re.IGNORECASE)
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}{tail}(?![A-Za-z0-9])")


def _secret_40(match: re.Match[str]) -> str:
    text = match.group()
    mixed = re.search("[A-Z]", text) and re.search("[a-z]", text) and re.search("[0-9]", text)
    return "<secret>" if mixed else text


def _address(match: re.Match[str]) -> str:
    text = match.group()
    for candidate in (text, text.rstrip(".:")):  # "fe80::1: refused" ends in a colon of the sentence
        try:
            address = ipaddress.ip_address(candidate)
        except ValueError:
            continue
        if address.is_loopback or address.is_unspecified:
            return text
        return "<address>" + text[len(candidate) :]
    return text
