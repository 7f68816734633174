"""The matrix: suite x SKU x backends -> every requested cell, with the reason where one cannot run."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..backends.base import Facts, Variant
from . import registry
from .errors import UserError
from .sku import Sku
from .suite import Group, Suite
from .types import Case, Cell, Collective, Moe, Shape

ON_DEVICE = ("graph", "kernel")  # regimes that need a GPU and a graph-safe variant


@dataclass(frozen=True)
class Planned:
    """One requested cell. `unsupported` is the reason why it cannot run, or None; `position` its place in the
    order of measuring, from 0."""

    cell: Cell
    unsupported: str | None = None
    position: int = 0


def expand(
    suite: Suite,
    sku: Sku,
    backends: Sequence[str] | None = None,
    ranks: int | None = None,
    nodes: int | None = None,
    runs: int | None = None,
) -> list[Planned]:
    """Every requested cell, in the order of measuring.

    backends   instead of the suite's own selection; may name hidden ones
    ranks      over all nodes; default: one per GPU, 4 per node on CPUs, or the most below that which
               divide the experts of every workload (6 GPUs and 16 experts: 4)
    runs       instead of the suite's own number; each run is the whole matrix once, in an order of its own
               when the suite is shuffled

    Raises UserError for names that do not exist, more ranks than GPUs, and shapes that no backend could run
    (experts not divisible by ranks).
    """
    sku = sku.at(nodes or 1)
    ranks = default_ranks(suite, sku) if ranks is None else _ranks(sku, ranks)
    _refuse_unknown(suite, backends)
    cases: list[tuple[Case, str | None]] = []
    asked: dict[tuple[object, ...], tuple[Group, Case]] = {}
    for group in suite.groups:
        _refuse_impossible(suite, group, ranks)
        for case, reason in _group_cases(suite, group, sku, backends, ranks):
            same = case.backend, case.variant, case.mode, case.shape, case.knobs
            earlier = asked.setdefault(same, (group, case))
            if earlier[1] is case:
                cases.append((case, reason))
            elif earlier[1].id != case.id:
                raise _contradiction(suite, group, case, earlier[0])
    return _ordered(suite, cases, runs or suite.runs)


def default_ranks(suite: Suite, sku: Sku) -> int:
    """The most ranks that the pool has GPUs for and that share out the experts of every workload evenly."""
    experts = {workload.experts for group in suite.groups for workload in group.workloads}
    most = sku.default_ranks
    fitting = (r for r in range(most, 0, -sku.nodes) if not any(count % r for count in experts))
    return next(fitting, most)


def _ranks(sku: Sku, ranks: int) -> int:
    if ranks < 1:
        raise UserError(f"{ranks} ranks", "use --ranks 1 or more")
    if ranks % sku.nodes:
        raise UserError(f"{ranks} ranks cannot be spread evenly over {sku.nodes} nodes")
    have = sku.gpus_per_node * sku.nodes
    if sku.device != "cpu" and ranks > have:
        raise UserError(
            f"{ranks} ranks need {ranks} GPUs; SKU {sku.name!r} has {have}",
            f"use --ranks {have} or less, or another --sku",
        )
    return ranks


def _refuse_unknown(suite: Suite, backends: Sequence[str] | None) -> None:
    for name in backends or ():
        registry.load(name)
    for group in suite.groups:
        for i, name in enumerate(group.backends or ()):
            try:
                registry.load(name)
            except UserError as error:
                raise suite.refuse(f"{group.key}.backends[{i}]", error.message) from error


def _refuse_impossible(suite: Suite, group: Group, ranks: int) -> None:
    for i, workload in enumerate(group.workloads):
        if workload.experts % ranks:
            problem = f"{workload.experts} experts of {workload.name} cannot be divided over {ranks} ranks"
            error = suite.refuse(f"{group.key}.workloads[{i}]", problem)
            error.hint = "choose --ranks so that every rank owns the same number of experts"
            raise error


def _contradiction(suite: Suite, group: Group, case: Case, other: Group) -> UserError:
    """Two groups may ask for the same case; they may not ask for it with different sampling or regimes."""
    again = f"asks for {case.shape.label} {case.mode} again"
    return suite.refuse(group.key, f"{again}, with other regimes or sampling than {other.key}")


def _group_cases(
    suite: Suite, group: Group, sku: Sku, backends: Sequence[str] | None, ranks: int
) -> Iterator[tuple[Case, str | None]]:
    selected = backends or group.backends or registry.visible()
    shapes = list(group.shapes())
    for name in selected:
        backend = registry.load(name)
        refused = _refused_here(backend.facts, sku)
        for mode in group.modes:
            offered = [v for v in backend.facts.variants if (v.family, v.mode) == (group.family, mode)]
            if group.variants is not None:
                offered = [v for v in offered if v.name in group.variants]
            for shape in shapes:
                fitting = [v for v in offered if _fits(v, shape)]
                for variant in fitting or [None]:
                    case = _case(suite, group, sku, backend.facts, mode, variant, shape, ranks)
                    reason = refused
                    if reason is None and variant is None:
                        reason = _nothing_fits(backend.facts, group, mode, shape, offered)
                    yield case, reason or backend.why_not(case)


def _case(
    suite: Suite,
    group: Group,
    sku: Sku,
    facts: Facts,
    mode: str,
    variant: Variant | None,
    shape: Shape,
    ranks: int,
) -> Case:
    on_device = sku.device != "cpu" and variant is not None and variant.graph_safe
    own = facts.regimes  # an external program has its own clock, whatever is asked for
    return Case(
        backend=facts.name,
        variant=variant.name if variant else "",
        mode=mode,
        shape=shape,
        ranks=ranks,
        nodes=sku.nodes,
        regimes=own or tuple(r for r in group.regimes if on_device or r not in ON_DEVICE),
        sampling=group.sampling,
        deadline_s=suite.deadline_s,
        knobs=group.knobs,
    )


def _fits(variant: Variant, shape: Shape) -> bool:
    return shape.dtype in variant.dtypes and (isinstance(shape, Moe) or shape.op in variant.ops)


def _refused_here(facts: Facts, sku: Sku) -> str | None:
    """What follows from backend and pool alone."""
    if facts.name in sku.refuse:
        return f"{sku.name}: {sku.refuse[facts.name]}"
    if sku.device not in facts.devices:
        return f"{facts.name} runs on {', '.join(facts.devices)}; {sku.name} has {sku.device}"
    if facts.regimes and sku.nodes > 1:
        return _no_mpi(facts, sku)
    return None


def _no_mpi(facts: Facts, sku: Sku) -> str | None:
    """Why an external program cannot be started on several nodes of this pool, or None."""
    if sku.mpi == "none":
        return f"{facts.name} is an MPI program on several nodes; {sku.name} states no `mpi` for srun"
    if sku.container == "podman":
        return f"{facts.name} is an MPI program on several nodes; podman hands on nothing of srun's MPI"
    return None


def _nothing_fits(facts: Facts, group: Group, mode: str, shape: Shape, offered: list[Variant]) -> str:
    """Why no variant of a backend does this (shape, mode)."""
    if group.family not in facts.families:
        return f"{facts.name} has no {group.family} operations"
    if not offered and group.variants is not None:
        return f"{facts.name} has no {mode} variant named {' or '.join(group.variants)}"
    if not offered:
        have = _list(v.mode for v in facts.variants if v.family == group.family)
        return f"{facts.name} has no {mode} mode; it has {have}"
    if isinstance(shape, Collective) and not any(shape.op in v.ops for v in offered):
        return f"{facts.name} has no {mode} {shape.op}; it has {_list(op for v in offered for op in v.ops)}"
    return f"{facts.name} has no {mode} {shape.dtype}; it has {_list(d for v in offered for d in v.dtypes)}"


def _list(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _ordered(suite: Suite, cases: list[tuple[Case, str | None]], runs: int) -> list[Planned]:
    """Run after run; within one the cells of a backend together, since they share a group of processes, and
    the backends in reverse in odd runs (A B, B A, ...)."""
    planned: list[tuple[Cell, str | None]] = []
    for run in range(runs):
        order = list(cases)
        if suite.order == "shuffled":
            random.Random(f"{suite.seed}/{run}").shuffle(order)
        by_backend: dict[str, list[tuple[Cell, str | None]]] = {}
        for case, reason in order:
            by_backend.setdefault(case.backend, []).append((Cell(case, run), reason))
        groups = list(by_backend.values())
        for group in reversed(groups) if run % 2 else groups:
            planned += group
    return [Planned(cell, reason, position) for position, (cell, reason) in enumerate(planned)]
