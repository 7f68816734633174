"""UCCL-EP without a GPU: the adapter against recorded signatures and a fake that keeps the rules."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import uccl_fake
from exchange_job import Steps, failed, on_ranks, whole

from collectivex.backends import uccl_ep
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.uccl_ep import FACTS, Backend
from collectivex.runtime import oracle
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.problem import MoeProblem
from collectivex.runtime.types import Case, Moe, Routing

VARIANTS = [v.name for v in FACTS.variants]


def case(variant: str = "normal", dtype: str = "bf16", ranks: int = 4, **fields: Any) -> Case:
    found = next(v for v in FACTS.variants if v.name == variant)
    knobs, nodes = fields.pop("knobs", ()), fields.pop("nodes", 1)
    hidden = 2048 if variant == "ll" else 256
    shape = Moe("small", hidden, 4, 16, 9, dtype, Routing(spread=fields.pop("spread", "even")))
    return Case("uccl_ep", variant, found.mode, replace(shape, **fields), ranks, nodes, knobs=knobs)


def run(monkeypatch, cases: Case | list[Case], work=whole, world: uccl_fake.World | None = None) -> list[Any]:
    """`work` for each case in one process, on every rank, with the fake in the place of the library."""
    world = world or uccl_fake.World((cases if isinstance(cases, Case) else cases[0]).ranks)
    for name, module in world.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(uccl_ep, "LARGEST_LL", 32)
    return on_ranks(cases, Backend, work, lambda ranks: uccl_fake.Group(ranks.rank, ranks.size))


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_whole_oracle(monkeypatch, variant: str, dtype: str) -> None:
    """Rows, ids, weights, sources and sums are exact, from the first call to a chain."""
    assert [] == failed(run(monkeypatch, case(variant, dtype)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_may_have_fewer_tokens(monkeypatch, variant: str) -> None:
    """Uneven tokens change nothing as long as every rank has some."""
    assert [] == failed(run(monkeypatch, case(variant, spread="linear")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_on_two_ranks_is_exchanged(monkeypatch, variant: str) -> None:
    """The smallest decode step: low-latency slots are rounded up to what TMA takes."""
    assert [] == failed(run(monkeypatch, case(variant, ranks=2, tokens=1)))


def test_weights_that_combine_forgets_turn_the_check_red(monkeypatch) -> None:
    """The low-latency combine multiplies: without it the sum is another."""
    world = uccl_fake.World(4, faults=("no-weights",))
    assert any(": combined:" in f for f in failed(run(monkeypatch, case("ll"), world=world)))


def test_one_buffer_of_each_mode_serves_all_cases(monkeypatch) -> None:
    """A second of the same mode aborts the process: cases of both modes, sizes and dtypes share two."""
    world = uccl_fake.World(2)
    cases = [case(v, d, ranks=2, tokens=t) for t in (4, 9) for v in VARIANTS for d in ("bf16", "fp8")]
    assert [] == failed(run(monkeypatch, cases, world=world))
    assert 2 == world.log.count("new ll") == world.log.count("new normal")
    assert 4 == world.log.count("destroy")


def test_a_larger_case_gets_a_new_buffer_after_the_old_one_is_destroyed(monkeypatch) -> None:
    """More SMs need longer queues. The fake raises where the old buffer still exists."""
    world = uccl_fake.World(2)
    cases = [case(ranks=2), case(ranks=2, knobs=(("num_sms", 24),)), case(ranks=2)]
    assert [] == failed(run(monkeypatch, cases, world=world))
    assert 2 * 2 == world.log.count("new normal")
    assert ["new normal"] * 2 + ["destroy"] * 2 + ["new normal"] * 2 + ["destroy"] * 2 == world.log


@pytest.mark.parametrize("nics", [True, False])
def test_without_a_nic_the_low_latency_buffer_is_given_device_memory(monkeypatch, nics: bool) -> None:
    """The extension would take host memory and wait for ever (the fake raises); the result says so."""

    def work(exchange: Any, problem: MoeProblem, variant: Any, device: Any) -> list[Any]:
        return [exchange.buffer.ours, exchange.realised["device_memory_given"]]

    expected = [not nics, int(not nics)]
    assert [expected] * 2 == run(monkeypatch, case("ll", ranks=2), work, uccl_fake.World(2, nics=nics))


def test_the_declared_window_says_that_a_function_of_the_library_is_replaced() -> None:
    """Whoever reads what `ll` contains reads on which memory it was measured; the others are as declared."""
    windows = {v.name: " ".join(v.window.values()) for v in FACTS.variants}
    assert windows["ll"].count("in place of uccl.ep.get_rdma_buffer") == 2
    assert {"normal", "cached"} == {name for name, said in windows.items() if "get_rdma_buffer" not in said}


def test_another_number_of_experts_has_its_flags_cleaned(monkeypatch) -> None:
    """They lie elsewhere in the same memory; the fake raises where they were not cleaned."""
    world = uccl_fake.World(2)
    cases = [case("ll", ranks=2), case("ll", ranks=2, experts=8), case("ll", ranks=2)]
    assert [] == failed(run(monkeypatch, cases, world=world))
    assert 2 * 2 == world.log.count("clean")
    assert 2 == world.log.count("new ll")


def test_the_number_of_sms_that_is_applied_is_told(monkeypatch) -> None:
    """The knob as the library's class has it, and its default again for the next case."""

    def work(exchange: Any, problem: MoeProblem, variant: Any, device: Any) -> list[Any]:
        return [exchange.realised["num_sms"]]

    asked = [case(ranks=2, knobs=(("num_sms", 8),)), case(ranks=2)]
    assert [[8, 20]] * 2 == run(monkeypatch, asked, work)


@pytest.mark.parametrize("rule", ["three results", "combine twice", "rows missing", "foreign handle"])
def test_an_adapter_that_breaks_a_rule_is_stopped_by_the_fake(monkeypatch, rule: str) -> None:
    """Results held at once, results combined, the number of rows and whose handle it is: each raises."""

    def work(exchange: Any, problem: MoeProblem, variant: Any, device: Any) -> list[str]:
        state = exchange.dispatch()
        staged = exchange.stage(state, oracle.chain_rows(exchange.received(state), problem, variant))
        try:
            if rule == "three results":
                exchange.dispatch()
                exchange.dispatch()
            elif rule == "rows missing":
                exchange.combine(state, staged[1:])
            elif rule == "foreign handle":
                exchange.combine(state._replace(handle=(None, *state.handle[1:])), staged)
            else:
                exchange.combine(state, staged)
                exchange.combine(state, staged)
        except uccl_fake.Refused as error:
            return [str(error)]
        return ["nothing"]

    variant, expected = {
        "three results": ("ll", "there are two buffers: no more than two results are held"),
        "combine twice": ("ll", "nothing was dispatched"),
        "rows missing": ("normal", "as many rows as came"),
        "foreign handle": ("normal", "a handle of this buffer"),
    }[rule]
    assert [[expected]] * 4 == run(monkeypatch, case(variant), work)


def test_uccl_is_known_by_what_is_loaded_not_by_its_name(monkeypatch) -> None:
    """A `deep_ep` whose Buffer takes `is_intranode` is UCCL's wrapper."""
    world = uccl_fake.World(2)
    monkeypatch.setattr(world, "modules", lambda: uccl_fake.World.modules(world, "deep_ep"))
    assert [] == failed(run(monkeypatch, case(ranks=2), world=world))


def test_deepep_itself_is_refused(monkeypatch) -> None:
    """The same package name without that argument is another library."""

    class Buffer:
        def __init__(self, group: Any, num_nvl_bytes: int = 0):
            return None

    package = ModuleType("deep_ep")
    vars(package).update(Buffer=Buffer)
    monkeypatch.setitem(sys.modules, "uccl_deepep", None)
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    with pytest.raises(
        MissingLibrary, match=r"uccl_deepep cannot be imported .*deep_ep is DeepEP itself.*install"
    ):
        Backend().setup(Context(None, None))  # pyright: ignore[reportArgumentType]


def test_another_version_is_refused(monkeypatch) -> None:
    """Wrapper and extension change together: only the pinned one is driven."""
    with pytest.raises(MissingLibrary, match=r"uccl 0\.0\.1\.post6 is loaded, this fits 0\.1\.1"):
        run(monkeypatch, case(ranks=2), world=uccl_fake.World(2, "0.0.1.post6"))


def test_versions_are_those_that_are_loaded(monkeypatch) -> None:
    """The package's own version, the extension's file and which wrapper it was."""
    world = uccl_fake.World(2)
    for name, module in world.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    backend = Backend()
    backend.setup(Context(None, ManualDevice()))  # pyright: ignore[reportArgumentType]
    expected = {"uccl": "0.1.1", "uccl.ep": "uccl/ep.abi3.so", "wrapper": "uccl_deepep"}
    assert expected == backend.versions()


V3 = {"hidden": 7168, "topk": 8, "experts": 256}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (case(**V3, tokens=8192), None),
        (case("cached", "fp8", **V3, tokens=1), None),
        (case("ll", "fp8", **V3, tokens=1024), None),
        (case("ll", **V3, tokens=2048), "uccl_ep ll is given memory for 1024 tokens a rank, not 2048"),
        (case("ll", topk=10), "uccl_ep ll takes at most 9 experts a token, not 10"),
        (
            case("ll", hidden=3072),
            "uccl_ep ll is compiled for hidden 2048, 2560, 4096, 5120, 6144, 7168, 8192, not 3072",
        ),
        (
            case("ll", knobs=(("num_sms", 24),)),
            "uccl_ep ll has no knobs; num_sms is one of its normal kernels",
        ),
        (
            case(hidden=8192),
            "uccl_ep stages half a row in 8192 bytes of shared memory: hidden 8192 is too large",
        ),
        (case(dtype="fp8", hidden=8192), None),
        (case(hidden=40), "uccl_ep moves rows in two halves of 16-byte words: hidden 40 does not divide"),
        (case(topk=33, experts=64), "uccl_ep takes at most 32 experts a token, not 33"),
        (case(experts=8192), "uccl_ep takes at most 1024 experts a rank, not 2048"),
        (case(knobs=(("num_sms", 7),)), "uccl_ep pairs SMs: num_sms must be even, not 7"),
        (case(ranks=16), "uccl_ep's kernels exist for 2, 4 and 8 ranks, not for 16"),
        (case(spread="one-empty"), "uccl 0.1.1 takes no rank without tokens"),
        (case(nodes=2), "uccl_ep is driven on one node only"),
    ],
)
def test_limits_are_told_in_one_sentence(asked: Case, reason: str | None) -> None:
    """What the kernels are compiled for and what the extension asserts, answered without the library."""
    assert reason == Backend().why_not(asked)


def test_nothing_is_freed_or_cleared_that_a_peer_may_still_read(monkeypatch) -> None:
    """All ranks are done before a buffer is destroyed, and before and after its flags are cleared: neither
    the kernel that clears them nor the one that comes next waits for the others."""
    steps = Steps(monkeypatch)
    steps.watch(uccl_fake._Buffer, "destroy")
    steps.watch(uccl_fake._Buffer, "clean_low_latency_buffer")
    steps.watch(uccl_fake._Buffer, "low_latency_dispatch")
    run(monkeypatch, [case("ll", ranks=2), case("ll", ranks=2, experts=8)])
    assert [["synchronize", "barrier"]] * 2 == steps.around("destroy")
    assert [["synchronize", "barrier"] * 2] * 2 == steps.around("clean_low_latency_buffer", after=2)
