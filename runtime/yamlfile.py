"""YAML documents of ours: read strictly, validated, and every mistake reported as `file:key: problem`."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from . import schemas
from .errors import UserError

ROOT = Path(__file__).resolve().parent.parent
_SHOWN = 12


def read(path: Path, schema: str) -> Any:
    """The content of a YAML file that satisfies `schema/<schema>.v1.json`. Raises UserError otherwise."""
    data = parse(path)
    if data is None:
        raise UserError(f"{shown(path)}: is empty", f"see schema/{schema}.v1.json for what belongs there")
    try:
        problems = list(schemas.problems(schema, data))
    except ValueError as error:  # a date, a set, a key that is a number, an alias to itself
        hint = "use text, numbers, true, false, null, lists, and mappings whose keys are text"
        raise UserError(f"{shown(path)}: holds what JSON cannot: {error}", hint) from error
    refuse(path, problems, f"schema/{schema}.v1.json says what such a file holds")
    return data


def parse(path: Path) -> Any:
    """YAML without schema: one document, no key twice, no tab, UTF-8. Raises UserError with file:line."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(path)}: is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    try:
        return yaml.load(text, _loader())
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{shown(path)}:{_line(error)}: {_what(error)}") from error
    except yaml.YAMLError as error:  # a control character: the reader knows no line
        raise UserError(f"{shown(path)}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{shown(path)}: is nested too deeply") from error


def refuse(path: Path, problems: Iterable[tuple[str, str]], hint: str | None = None) -> None:
    """Raise one UserError that lists all problems of a file, or return when there is none."""
    lines = [f"{shown(path)}:{key}: {what}" if key else f"{shown(path)}: {what}" for key, what in problems]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN} more"]
    if lines:
        raise UserError("\n       ".join(lines), hint)


def shown(path: Path) -> str:
    """The path as people know it: `suites/smoke.yaml` for our own files, else as it was given."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@cache
def _loader() -> type:
    import yaml

    class Strict(yaml.SafeLoader):  # not the C parser: it names no tab, and deep nesting exhausts its stack
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            first: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in first:
                    problem = f"the key {key.value!r} is here a second time, first in line {first[key.value]}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                first[key.value] = key.start_mark.line + 1
            return super().construct_mapping(node, deep)

    return Strict


def _line(error: Any) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


def _what(error: Any) -> str:
    problem = error.problem or str(error)
    if "'\\t'" in problem:
        return "a tab; YAML is indented with spaces"
    return f"{problem} {error.context}" if error.context else problem
