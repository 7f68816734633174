"""The command line. Handlers are imported when they are called: `cx --help` loads no package but ours."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .errors import CollectiveXError, UserError, unknown
from .types import CONTRACT, REGIMES

# Packages of the host half by the name they are imported under.
_PACKAGES = {
    "yaml": "PyYAML",
    "jsonschema_rs": "jsonschema-rs",
    "rich": "rich",
    "jinja2": "Jinja2",
    "matplotlib": "matplotlib",
    "shtab": "shtab",
}
_INSTALL = "`pip install .` in the checkout installs what CollectiveX needs; `make bench` does it in a .venv"
_TORCH = "use the python of a container that has it, or `pip install 'collectivex[cpu]'` for a CPU"
HIDDEN = ("worker", "rank", "health", "install")  # what the launchers start, in the place where ranks run
_FORMATS = ("table", "json")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 all well, 1 some cell is not, 2 the user must change
    something, 3 infrastructure."""
    try:
        return _run(argv)
    except CollectiveXError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        missing = _missing_package(error)
        if missing is None:
            raise
        print(f"error: {missing}", file=sys.stderr)
        return missing.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cx list backends | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    module, _, function = args.handler.partition(":")
    handler: Callable[[argparse.Namespace], int] = getattr(
        importlib.import_module(module, __package__), function or "command"
    )
    code = handler(args)
    sys.stdout.flush()
    return code


def _missing_package(error: ModuleNotFoundError) -> UserError | None:
    """The error for a package that the user has to install, or None when the missing module is our bug."""
    name = (error.name or "").partition(".")[0]
    if name in _PACKAGES:
        return UserError(f"this command needs the Python package {_PACKAGES[name]}", _INSTALL)
    if name == "torch":
        return UserError("measuring needs torch, and this Python has none", _TORCH)
    return None


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ours: `error:` and `hint:` with the nearest name."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"see `{self.prog} --help`")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            command = self.commands()[known.command]
            options = [option for action in command._actions for option in action.option_strings]
            what = "option" if rest[0].startswith("-") else "argument"
            if what == "option":
                raise unknown(f"option of `{command.prog}`", rest[0].partition("=")[0], options)
            raise UserError(f"unexpected argument {rest[0]!r}", f"see `{command.prog} --help`")
        return known

    def commands(self) -> dict[str, Parser]:
        """The sub-commands by name; none for a sub-command itself."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            have = [choice for choice in action.choices if choice not in HIDDEN]
            raise unknown(str(action.metavar or action.dest).lower(), str(value), have)


class Version(argparse.Action):
    """Prints `collectivex 0.1.0 (contract ...)`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        from collectivex import __version__

        print(f"collectivex {__version__} (contract {CONTRACT})")
        parser.exit()


def parser() -> Parser:
    """The whole command line; `handler` of the result names the function to call."""
    top = Parser(
        prog="cx",
        description="Which communication library is fastest, and correct, on these GPUs?",
        epilog="exit codes: 0 every cell is ok or unsupported, 1 some cell is not,\n"
        "            2 you must change something, 3 the machine or scheduler failed",
    )
    top.add_argument("--version", action=Version, help="the version, and that of the measurement contract")
    commands = top.add_subparsers(dest="command", metavar="command", required=True, parser_class=Parser)
    for add in (
        _run_command,
        _launch,
        _sweep,
        _list,
        _plan,
        _validate,
        _summarize,
        _plot,
        _prepare,
        _doctor,
        _completion,
        _worker,
        _rank,
        _health,
        _install,
    ):
        add(commands)
    return top


def _run_command(commands: Any) -> None:
    p = _command(commands, "run", ".execute", "measure a suite on this machine")
    _execution_options(p, "local")


def _launch(commands: Any) -> None:
    p = _command(
        commands, "launch", ".launch", "measure a suite on a machine pool: Slurm, containers, or here"
    )
    _execution_options(p, None)
    p.add_argument("--site", metavar="FILE", help="accounts, partitions, folders; default: $COLLECTIVEX_SITE")


def _sweep(commands: Any) -> None:
    p = _command(commands, "sweep", ".sweep", "print one launcher call per SKU, suite and backend")
    p.add_argument(
        "--suite", action="extend", type=_names, required=True, metavar="SUITE", help="one or several"
    )
    p.add_argument("--sku", action="extend", type=_names, required=True, metavar="SKU", help="one or several")
    _matrix_options(p)
    p.add_argument("--out", default="out", metavar="DIR", help="folder above the results; default: out")


def _execution_options(p: Parser, sku: str | None) -> None:
    default = f"; default: {sku}" if sku else ""
    p.add_argument("--suite", required=True, metavar="SUITE", help="name or path; see `cx list suites`")
    p.add_argument("--sku", default=sku, required=sku is None, metavar="SKU", help=f"name or path{default}")
    _matrix_options(p)
    p.add_argument("--out", metavar="DIR", help="folder for the results; default: out/<suite>-<UTC time>")
    p.add_argument("--resume", action="store_true", help="skip the cells that --out already holds completed")
    p.add_argument("--fail-fast", action="store_true", help="stop at the first cell that is not ok")
    p.add_argument("--deadline", type=_seconds, metavar="S", help="seconds per cell, instead of the suite's")
    p.add_argument(
        "--only", action="append", metavar="TEXT", help="only cells whose id contains TEXT; may be repeated"
    )
    p.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")


def _list(commands: Any) -> None:
    p = _command(commands, "list", ".listing", "show what there is to choose from")
    what = ("backends", "suites", "skus", "workloads")
    p.add_argument("what", choices=what, metavar="list", help=", ".join(what))
    names = "some of the list only; of a backend everything that it declares"
    p.add_argument("names", nargs="*", metavar="name", help=names)
    _format(p, _FORMATS)


def _plan(commands: Any) -> None:
    p = _command(commands, "plan", ".planning", "show the matrix, with what is unsupported and why")
    p.add_argument("--suite", metavar="SUITE", help="name or path; default: the totals of every suite")
    p.add_argument("--sku", metavar="SKU", help="name or path; default: the totals of every SKU")
    _matrix_options(p)
    _format(p, _FORMATS)


def _validate(commands: Any) -> None:
    p = _command(commands, "validate", ".validate", "check result folders: schema, ids, hashes, statistics")
    _folders(p)
    p.add_argument("--published", action="store_true", help="also what only published results must fulfil")


def _summarize(commands: Any) -> None:
    p = _command(commands, "summarize", ".summary", "results as a table; the exit code is the gate")
    _folders(p)
    _format(p, ("text", "markdown", "json"))
    percentiles = ("p50", "p90", "p95", "p99", "mean", "max")
    _choice(p, "--percentile", percentiles, "which one over iterations the tables show", default="p50")
    _choice(p, "--regime", REGIMES, "only tables of this regime; may be repeated", action="append")


def _plot(commands: Any) -> None:
    p = _command(commands, "plot", "..plot.command", "figures and the offline report from results")
    _folders(p)
    p.add_argument("--out", required=True, metavar="OUT", help="folder for the pictures")


def _prepare(commands: Any) -> None:
    p = _command(commands, "prepare", ".prepare", "install a backend's library from its upstream pin")
    p.add_argument(
        "--backend", type=_names, action="extend", required=True, metavar="NAMES", help="may be repeated"
    )
    p.add_argument("--sku", metavar="SKU", help="inside the image of this pool; default: with this Python")
    p.add_argument("--site", metavar="FILE", help="accounts, partitions, folders; default: $COLLECTIVEX_SITE")
    p.add_argument("--force", action="store_true", help="again, even if the pinned one is there")


def _doctor(commands: Any) -> None:
    p = _command(commands, "doctor", ".doctor", "what this machine has, and what each backend lacks")
    _format(p, ("text", "json"))


def _completion(commands: Any) -> None:
    p = _command(commands, "completion", ".cli:completion", "print a shell completion script")
    p.add_argument("shell", choices=("bash", "zsh", "tcsh"), metavar="shell", help="bash, zsh or tcsh")


def _worker(commands: Any) -> None:
    """One rank. Hidden: `cx run` and the launchers start it."""
    p = commands.add_parser("worker")
    p.set_defaults(handler=".worker")
    p.add_argument("--cases", required=True, metavar="FILE")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--parent", type=int, metavar="PID", help="end when this process does")


def _rank(commands: Any) -> None:
    """Starts workers where srun or a container puts us. Hidden."""
    p = commands.add_parser("rank")
    p.set_defaults(handler=".ranker")
    p.add_argument("--cases", required=True, metavar="FILE")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--local", type=_count, metavar="N")
    p.add_argument("--launcher", choices=("torchrun", "mpi"))


def _health(commands: Any) -> None:
    """One node's report. Hidden."""
    p = commands.add_parser("health")
    p.set_defaults(handler=".health")
    p.add_argument("--vendor", required=True, metavar="VENDOR")
    p.add_argument("--out", required=True, metavar="DIR")


def _install(commands: Any) -> None:
    """Into a folder, where we are. Hidden."""
    p = commands.add_parser("install")
    p.set_defaults(handler=".install")
    p.add_argument("--backend", required=True, metavar="NAME")
    p.add_argument("--libraries", required=True, metavar="DIR")
    p.add_argument("--arch", metavar="ARCH")
    p.add_argument("--cache", required=True, metavar="DIR")
    p.add_argument("--force", action="store_true")


def _command(commands: Any, name: str, handler: str, what: str) -> Parser:
    p = commands.add_parser(name, help=what, description=what)
    p.set_defaults(handler=handler)
    return p


def _matrix_options(p: Parser) -> None:
    p.add_argument(
        "--backend",
        action="extend",
        type=_names,
        metavar="NAME",
        help="one or several, comma-separated; may be repeated; default: the suite's choice",
    )
    p.add_argument("--ranks", type=_count, metavar="N", help="in all; default: one per GPU, 4 on a CPU")
    p.add_argument("--nodes", type=_count, metavar="N", help="default: 1")
    p.add_argument("--runs", type=_count, metavar="N", help="fresh processes per cell; default: the suite's")


def _folders(p: Parser) -> None:
    p.add_argument("dirs", nargs="+", metavar="DIR", help="an execution's folder, or one above several")


def _format(p: Parser, formats: Sequence[str]) -> None:
    _choice(p, "--format", formats, f"default: {formats[0]}", default=formats[0])


def _choice(p: Parser, option: str, choices: Sequence[str], what: str, **how: Any) -> None:
    """An option of few values, which its help lists."""
    name = option.removeprefix("--")
    p.add_argument(option, choices=choices, metavar=name.upper(), help=f"{', '.join(choices)}; {what}", **how)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("no name given")
    return names


def completion(args: argparse.Namespace) -> int:
    """Print a completion script that knows the suites, SKUs and backends of this installation."""
    import shtab

    from . import registry, sku, suite

    known = {"--suite": suite.names(), "--sku": sku.names(), "--backend": registry.visible()}
    known["names"] = [*known["--backend"], *known["--suite"], *known["--sku"]]  # of `cx list`
    top = parser()
    for command in top.commands().values():
        for action in command._actions:
            for option in action.option_strings or [action.dest]:
                if option in known:
                    action.choices = known[option]
    print(shtab.complete(top, args.shell))
    return 0
