"""The JSON Schemas under schema/, and validation errors as `key: problem` a person can act on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "schema"


@cache
def schema(name: str) -> dict[str, Any]:
    """The schema document `schema/<name>.v1.json`."""
    return json.loads((FOLDER / f"{name}.v1.json").read_text(encoding="utf-8"))


@cache
def validator(name: str) -> Any:
    """A compiled `jsonschema_rs` validator of `schema/<name>.v1.json`."""
    import jsonschema_rs

    return jsonschema_rs.Draft202012Validator(schema(name))


def problems(name: str, data: Any) -> Iterator[tuple[str, str]]:
    """Every violation of a schema as (key path, what is wrong), in the schema's order."""
    for error in validator(name).iter_errors(data):
        yield from _explain(schema(name), error)


def key_path(parts: Iterable[str | int]) -> str:
    """`["groups", 1, "ops", 0]` -> `groups[1].ops[0]`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` when a known name is close, else nothing."""
    near = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _explain(document: dict[str, Any], error: Any) -> Iterator[tuple[str, str]]:
    path, kind = list(error.instance_path), error.kind
    if kind.name == "additionalProperties":
        known = _at(document, error.schema_path[:-1]).get("properties", {})
        for key in kind.unexpected:
            yield key_path([*path, key]), f"unknown key; have: {', '.join(known)}{nearest(key, known)}"
    elif kind.name == "enum":
        options = ", ".join(map(str, kind.options))
        close = nearest(error.instance, [o for o in kind.options if isinstance(o, str)])
        yield key_path(path), f"{error.instance!r} is not one of {options}{close}"
    elif kind.name == "required":
        yield key_path(path), f"needs the key {kind.property!r}"
    elif kind.name == "const":
        yield key_path(path), f"{error.instance!r} is not {kind.expected_value!r}"
    elif kind.name in ("type", "pattern"):
        meaning = _at(document, error.schema_path[:-1]).get("description")
        yield key_path(path), error.message + (f" ({meaning})" if meaning else "")
    else:
        yield key_path(path), error.message


def _at(document: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        document = document[part]
    return document
