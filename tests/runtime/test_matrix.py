"""The matrix: every requested cell exactly once, with the reason where one cannot run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collectivex.backends import base
from collectivex.backends.base import Facts, Source, Variant
from collectivex.runtime import matrix, registry, sku, suite
from collectivex.runtime.detect import Machine
from collectivex.runtime.errors import UserError
from collectivex.runtime.matrix import Planned, expand
from collectivex.runtime.suite import Group, Suite, Workload
from collectivex.runtime.types import Case, Routing, Sampling

LOCAL = sku.load_sku("local", Machine("cpu", (), "AMD EPYC", 2))
H200 = sku.load_sku("h200x4-nvlink")
TINY = Workload("tiny", 512, 4, 16, "a test")


def variant(name: str, mode: str, dtypes: Sequence[str] = ("bf16",), **fields: Any) -> Variant:
    return Variant(name, mode, tuple(dtypes), {}, **fields)


class Stub:
    """A backend that is nothing but its facts and one limit."""

    def __init__(self, name: str, *variants: Variant, limit: int = 1 << 60, **fields: Any):
        fields = {"devices": ("cpu", "cuda"), **fields}
        self.facts = Facts(name, name, Source("bundled", name, "1", "a test"), variants=variants, **fields)
        self.limit = limit

    def why_not(self, case: Case) -> str | None:
        reason = base.why_not(self.facts, case)
        if reason is None and case.family == "moe" and case.shape.tokens > self.limit:
            return f"{self.facts.name} takes {self.limit} tokens"
        return reason


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the registry by some stubs."""

    def install(*stubs: Stub) -> None:
        have = {stub.facts.name: stub for stub in stubs}
        real = registry.load

        def load(name: str) -> Any:
            return have[name] if name in have else real(name)

        monkeypatch.setattr(registry, "load", load)
        monkeypatch.setattr(registry, "visible", lambda: [n for n in have if not have[n].facts.hidden])

    return install


def moe(**fields: Any) -> Group:
    fields = {"dtypes": ("bf16",), "modes": ("normal",), "tokens": (1, 64), **fields}
    regimes = ("fresh", "chained", "graph", "kernel")
    common = {"regimes": regimes, "sampling": Sampling(), "workloads": (TINY,), "routing": (Routing(),)}
    return Group(**{"key": "groups[0]", "family": "moe", **common, **fields})


def collective(**fields: Any) -> Group:
    fields = {"ops": ("all_reduce",), "dtypes": ("float32",), "modes": ("out-of-place",), **fields}
    common = {"regimes": ("fresh", "chained"), "sampling": Sampling(), "sizes": (1024,)}
    return Group(**{"key": "groups[0]", "family": "collective", **common, **fields})


def a_suite(*groups: Group, **fields: Any) -> Suite:
    numbered = tuple(replace(g, key=f"groups[{i}]") for i, g in enumerate(groups))
    return Suite("mine", "a test", Path("mine.yaml"), 30.0, numbered, **fields)


def told(planned: Sequence[Planned]) -> list[tuple[str, str, int, str | None]]:
    """(backend, variant, tokens, reason) of MoE cells."""
    return [
        (p.cell.case.backend, p.cell.case.variant, p.cell.case.shape.tokens, p.unsupported)  # type: ignore[union-attr]
        for p in planned
    ]


def test_every_variant_of_the_mode_is_a_cell(backends: Any) -> None:
    """Two variants times two token counts, and nothing of other modes."""
    backends(Stub("a", variant("x", "normal"), variant("y", "normal"), variant("z", "cached")))
    found = told(expand(a_suite(moe()), LOCAL))
    assert found == [("a", "x", 1, None), ("a", "y", 1, None), ("a", "x", 64, None), ("a", "y", 64, None)]


def test_a_variant_without_the_dtype_is_left_out_when_another_has_it(backends: Any) -> None:
    """fp8 through the variant that does fp8: one cell, not one more that is unsupported."""
    backends(Stub("a", variant("x", "normal"), variant("y", "normal", ("bf16", "fp8"))))
    found = expand(a_suite(moe(dtypes=("bf16", "fp8"), tokens=(1,))), LOCAL)
    pairs = [(p.cell.case.variant, p.cell.case.shape.dtype, p.unsupported) for p in found]
    assert pairs == [("x", "bf16", None), ("y", "bf16", None), ("y", "fp8", None)]


def test_what_no_variant_offers_is_one_unsupported_cell_with_the_reason(backends: Any) -> None:
    """So that coverage can be computed: (backend, shape, mode) was asked, and did not exist."""
    backends(
        Stub("no_mode", variant("x", "cached")),
        Stub("no_dtype", variant("x", "low-latency", ("fp8",)), variant("y", "low-latency", ("fp8",))),
        Stub("no_family", variant("", "out-of-place", family="collective")),
    )
    found = told(expand(a_suite(moe(modes=("low-latency",), tokens=(1,))), LOCAL))
    assert found == [
        ("no_mode", "", 1, "no_mode has no low-latency mode; it has cached"),
        ("no_dtype", "", 1, "no_dtype has no low-latency bf16; it has fp8"),
        ("no_family", "", 1, "no_family has no moe operations"),
    ]


def test_an_operation_that_is_not_offered_says_which_are(backends: Any) -> None:
    """Collectives have operations where MoE has variants."""
    has = variant("", "out-of-place", ("float32",), family="collective", ops=("all_gather",))
    backends(Stub("a", has))
    (planned,) = expand(a_suite(collective()), LOCAL)
    assert planned.unsupported == "a has no out-of-place all_reduce; it has all_gather"


def test_the_limits_of_a_backend_and_of_the_pool_are_reasons(backends: Any) -> None:
    """why_not answers here, without the library; the pool's refusal comes first."""
    backends(
        Stub("small", variant("x", "normal"), limit=8),
        Stub("bad", variant("x", "normal")),
        Stub("gpu_only", variant("x", "normal"), devices=("cuda",)),
    )
    pool = replace(LOCAL, refuse={"bad": "its driver is too old"})
    found = {(b, t): reason for b, _, t, reason in told(expand(a_suite(moe()), pool))}
    assert found["small", 1] is None
    assert found["small", 64] == "small takes 8 tokens"
    assert found["bad", 1] == "local: its driver is too old"
    assert found["gpu_only", 1] == "gpu_only runs on cuda; local has cpu"


def test_graph_and_kernel_need_a_gpu_and_a_graph_safe_variant(backends: Any) -> None:
    """They are dropped in planning: a regime that cannot exist is no failure and no cell."""
    backends(Stub("a", variant("safe", "normal", graph_safe=True), variant("not", "normal")))
    for pool, name, regimes in (
        (H200, "safe", ("fresh", "chained", "graph", "kernel")),
        (H200, "not", ("fresh", "chained")),
        (LOCAL, "safe", ("fresh", "chained")),
    ):
        cells = expand(a_suite(moe()), pool)
        assert {p.cell.case.regimes for p in cells if p.cell.case.variant == name} == {regimes}


def test_backends_are_those_asked_for_then_the_suites_then_all_visible(backends: Any) -> None:
    """A hidden backend runs only when it is named."""
    x = variant("x", "normal")
    backends(Stub("a", x), Stub("b", x), Stub("quiet", x, hidden=True))
    group = moe(tokens=(1,))

    def used(group: Group, names: list[str] | None = None) -> list[str]:
        return [p.cell.case.backend for p in expand(a_suite(group), LOCAL, names)]

    assert used(group) == ["a", "b"]
    assert used(replace(group, backends=("b",))) == ["b"]
    assert used(replace(group, backends=("b",)), ["quiet", "a"]) == ["quiet", "a"]


def test_a_variant_filter_that_meets_nothing_is_unsupported(backends: Any) -> None:
    """Not silently the other variants."""
    backends(Stub("a", variant("x", "normal"), variant("y", "normal")))
    group = moe(tokens=(1,), variants=("y",))
    assert told(expand(a_suite(group), LOCAL)) == [("a", "y", 1, None)]
    (planned,) = expand(a_suite(replace(group, variants=("z",))), LOCAL)
    assert planned.unsupported == "a has no normal variant named z"


def test_a_knob_that_the_backend_does_not_have_is_unsupported(backends: Any) -> None:
    """A knob is never silently ignored."""
    backends(Stub("a", variant("x", "normal"), knobs=("sms",)), Stub("b", variant("x", "normal")))
    found = told(expand(a_suite(moe(tokens=(1,), knobs=(("sms", 24),))), LOCAL))
    assert [reason for *_, reason in found] == [None, "b has no knob 'sms'; it has none"]


def test_the_same_case_from_two_groups_is_one_cell(backends: Any) -> None:
    """Each requested cell ends as exactly one record."""
    backends(Stub("a", variant("x", "normal")))
    found = expand(a_suite(moe(tokens=(1, 64)), moe(tokens=(64, 512))), LOCAL)
    assert [t for _, _, t, _ in told(found)] == [1, 64, 512]
    assert len({p.cell.id for p in found}) == 3


def test_the_same_shape_with_other_sampling_is_a_contradiction(backends: Any) -> None:
    """Two rows of one backend in one column, from different efforts, would be the reader's riddle."""
    backends(Stub("a", variant("x", "normal")))
    other = moe(sampling=Sampling(trials=1))
    with pytest.raises(
        UserError, match=r"mine\.yaml:groups\[1\]: asks for tiny-t1-bf16-uniform normal again"
    ):
        expand(a_suite(moe(), other), LOCAL)


def test_experts_that_ranks_do_not_divide_name_file_and_key() -> None:
    """16 experts over 3 ranks: no backend could, so the user must choose."""
    with pytest.raises(UserError) as error:
        expand(a_suite(collective(), moe()), LOCAL, ranks=3)
    said = "mine.yaml:groups[1].workloads[0]: 16 experts of tiny cannot be divided over 3 ranks"
    assert error.value.message == said
    assert error.value.hint


@pytest.mark.parametrize(
    ("pool", "ranks", "nodes", "said"),
    [
        (H200, 8, None, "8 ranks need 8 GPUs; SKU 'h200x4-nvlink' has 4"),
        (LOCAL, 0, None, "0 ranks"),
        (H200, None, 2, "starts processes on one machine"),
        (replace(LOCAL, mechanism="slurm"), 3, 2, "3 ranks cannot be spread evenly over 2 nodes"),
    ],
)
def test_ranks_that_do_not_fit_the_pool_are_refused(
    pool: sku.Sku, ranks: int | None, nodes: int | None, said: str
) -> None:
    """Fewer GPUs than ranks, uneven nodes, no nodes: before anything starts."""
    with pytest.raises(UserError, match=said):
        expand(a_suite(collective()), pool, ranks=ranks, nodes=nodes)


def test_ranks_may_exceed_cores_on_a_cpu() -> None:
    """gloo ranks share cores: four on a laptop of two is the default."""
    (planned,) = expand(a_suite(collective()), LOCAL, ["torch_dist"], ranks=8)
    assert planned.cell.case.ranks == 8


def test_unknown_backends_are_errors_at_the_place_that_named_them() -> None:
    """On the command line a name; in a suite the key."""
    with pytest.raises(UserError, match="no backend named 'depep'"):
        expand(a_suite(collective()), LOCAL, ["depep"])
    with pytest.raises(UserError, match=r"mine\.yaml:groups\[0\]\.backends\[1\]: no backend named 'depep'"):
        expand(a_suite(collective(backends=("torch_dist", "depep"))), LOCAL)


def test_runs_repeat_the_matrix_and_positions_count_on(backends: Any) -> None:
    """Three runs of four cells: twelve positions, every cell once in every run."""
    backends(Stub("a", variant("x", "normal")))
    found = expand(a_suite(moe(tokens=(1, 2, 4, 8))), LOCAL, runs=3)
    assert [p.position for p in found] == list(range(12))
    assert Counter(p.cell.run for p in found) == {0: 4, 1: 4, 2: 4}
    assert len({p.cell.id for p in found}) == 12


def test_the_plan_is_in_the_order_of_measuring(backends: Any) -> None:
    """The cells of a backend share processes, so they come together, and odd runs go through the backends
    backwards; `position` in a result is this place, also under --only."""
    backends(Stub("a", variant("x", "normal")), Stub("b", variant("x", "normal")))
    found = expand(a_suite(moe(tokens=(1, 2)), moe(tokens=(4,))), LOCAL, runs=2)
    names = "".join(p.cell.case.backend for p in found)
    assert names == "aaabbbbbbaaa"
    assert [p.position for p in found] == list(range(12))


def test_a_shuffled_suite_has_another_order_in_each_run_and_the_same_tomorrow(backends: Any) -> None:
    """Drift of the machine must not fall on the same cells each time, and a plan must be repeatable."""
    backends(Stub("a", variant("x", "normal")))
    group = moe(tokens=tuple(range(1, 41)))

    def order(seed: int) -> list[list[int]]:
        found = expand(a_suite(group, order="shuffled", seed=seed), LOCAL, runs=2)
        return [[t for _, _, t, _ in told([p for p in found if p.cell.run == run])] for run in (0, 1)]

    first, second = order(1)
    assert sorted(first) == sorted(second) == list(range(1, 41))
    assert first != second != list(range(1, 41))
    assert order(1) == [first, second]
    assert order(2) != [first, second]
    # the algorithm of random.shuffle is part of what a published `position` means
    assert expand(a_suite(group, order="shuffled", seed=1), LOCAL)[0].cell.case.shape.tokens == first[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", suite.names())
@pytest.mark.parametrize("pool", [LOCAL, H200], ids=["local", "h200x4"])
def test_every_cell_of_our_suites_runs_or_says_why_not(name: str, pool: sku.Sku) -> None:
    """Every reason is one sentence, and the baseline runs somewhere in every suite."""
    found = expand(suite.load_suite(name), pool)
    assert all(p.unsupported is None or p.unsupported.strip() for p in found)
    assert any(p.unsupported is None and p.cell.case.backend == "torch_dist" for p in found)
    assert len({p.cell.id for p in found}) == len(found)


def test_the_regimes_that_need_a_device_are_regimes() -> None:
    """The planner's list is a part of types.REGIMES."""
    from collectivex.runtime.types import REGIMES

    assert set(matrix.ON_DEVICE) < set(REGIMES)


def test_programs_are_offered_wherever_libraries_are() -> None:
    """AMD's pools are Slurm with containers: rccl_tests runs there on one node."""
    for pool in ("mi300x-amds", "mi355x-amds"):
        planned = expand(suite.load_suite("collectives-core"), sku.load_sku(pool), ["rccl_tests"], runs=1)
        assert None in {p.unsupported for p in planned}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mpi": "pmix"}, None),
        ({}, "states no `mpi` for srun"),
        ({"mpi": "pmix", "container": "podman"}, "podman hands on nothing of srun's MPI"),
    ],
)
def test_programs_on_several_nodes_need_mpi(changes: dict[str, str], said: str | None) -> None:
    """One process for each GPU, which find each other by what srun tells them."""
    pool = replace(sku.load_sku("b200-dgxc-slurm"), **changes)
    planned = expand(suite.load_suite("collectives-core"), pool, ["nccl_tests"], nodes=2, runs=1)
    reasons = {p.unsupported for p in planned}
    assert None in reasons if said is None else all(said in (reason or "") for reason in reasons)
