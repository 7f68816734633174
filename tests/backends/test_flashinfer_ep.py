"""FlashInfer without a GPU: the adapter against recorded signatures and a fake that keeps the rules."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import flashinfer_fake
import pytest
import torch
from exchange_job import Steps, failed, whole

from collectivex.backends import flashinfer_ep
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.flashinfer_ep import FACTS, Backend, OneSided
from collectivex.runtime import oracle, routing
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.problem import MoeProblem
from collectivex.runtime.ranks import ThreadRanks, run_threads
from collectivex.runtime.types import Case, Moe, Routing

VARIANTS = [v.name for v in FACTS.variants]


def case(variant: str = "one-sided", dtype: str = "bf16", ranks: int = 4, **fields: Any) -> Case:
    shape = Moe("small", 256, 4, 16, 9, dtype, Routing(spread=fields.pop("spread", "even")))
    return Case("flashinfer_ep", variant, "low-latency", replace(shape, **fields), ranks)


def run(monkeypatch, asked: Case, work=None, world: flashinfer_fake.World | None = None) -> list[Any]:
    """`work(backend, exchange, problem)`, or all checks, on every rank, with the fake in the place of the
    library."""
    world = world or flashinfer_fake.World(asked.ranks)
    for name, module in world.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(flashinfer_ep, "SLOTS", 64)
    shape = asked.shape
    assert isinstance(shape, Moe)
    table = routing.build(shape, asked.ranks)

    def one(ranks: ThreadRanks) -> Any:
        backend, device = Backend(), ManualDevice()
        backend.setup(Context(ranks, device, group="world"))
        problem = MoeProblem.build(shape, ranks, table, device)
        exchange = backend.moe(asked, problem)
        try:
            if work is not None:
                return work(backend, exchange, problem)
            return whole(exchange, problem, backend.facts.variant(asked), device)
        finally:
            exchange.close()
            backend.close()

    return run_threads(asked.ranks, one)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_whole_oracle(monkeypatch, variant: str, dtype: str) -> None:
    """Rows, ids, weights and sums are exact through both entry points, from the first call to a chain."""
    assert [] == failed(run(monkeypatch, case(variant, dtype)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spread", ["linear", "one-empty"])
def test_ranks_may_have_fewer_tokens_or_none(monkeypatch, variant: str, spread: str) -> None:
    """Every rank passes the size of the fullest one."""
    assert [] == failed(run(monkeypatch, case(variant, spread=spread)))


def test_a_single_token_on_two_ranks_is_exchanged(monkeypatch) -> None:
    """The smallest decode step."""
    assert [] == failed(run(monkeypatch, case(ranks=2, tokens=1)))


def test_a_slot_that_the_library_forgot_to_mark_turns_the_check_red(monkeypatch) -> None:
    """Only the id -1 makes a slot empty: a poisoned one is not taken for it."""
    world = flashinfer_fake.World(4, faults=("unmarked",))
    assert failed(run(monkeypatch, case(), world=world))


def test_sums_kept_in_bf16_turn_the_check_red(monkeypatch) -> None:
    """The combine model of versions before 0.6.16 is another one."""
    world = flashinfer_fake.World(4, faults=("bf16-sums",))
    assert any(": combined:" in f for f in failed(run(monkeypatch, case(), world=world)))


def test_cases_share_one_workspace_and_a_larger_one_is_made_when_needed(monkeypatch) -> None:
    """64 slots on 4 ranks are 16 tokens: 9 and 16 tokens share them, 17 do not."""
    world = flashinfer_fake.World(4)

    def work(backend: Backend, exchange: Any, problem: MoeProblem) -> tuple[int, int]:
        first = exchange.library
        backend.moe(case(tokens=16), problem)
        shared = len(backend.made)
        bigger = MoeProblem.build(
            replace(problem.shape, tokens=17),
            backend.context.ranks,
            routing.build(replace(problem.shape, tokens=17), 4),
            ManualDevice(),
        )
        assert backend.moe(case(tokens=17), bigger).library is not first
        return shared, len(backend.made)

    assert [(1, 2)] * 4 == run(monkeypatch, case(), work, world)


@pytest.mark.parametrize("rule", ["twice", "int64", "foreign pointer"])
def test_an_adapter_that_breaks_a_rule_is_stopped_by_the_fake(monkeypatch, rule: str) -> None:
    """Two dispatches in a row, 64-bit ids, a payload that is not the workspace's: each raises."""

    def work(backend: Any, exchange: OneSided, problem: MoeProblem) -> str:
        state = exchange.dispatch() if rule != "int64" else None
        try:
            if rule == "twice":
                exchange.dispatch()
            elif rule == "int64":
                exchange.experts = problem.topk_idx
                exchange.dispatch()
            else:
                staged = exchange.stage(
                    state, oracle.chain_rows(exchange.received(state), problem, FACTS.variants[0])
                )
                exchange._combine(staged, in_workspace=True)
        except (AssertionError, TypeError, RuntimeError) as error:
            return type(error).__name__
        return "nothing"

    expected = {"twice": "AssertionError", "int64": "TypeError", "foreign pointer": "RuntimeError"}[rule]
    assert [expected] * 4 == run(monkeypatch, case(), work)


def test_poison_covers_every_receive_slot_and_nothing_else(monkeypatch) -> None:
    """Rows, scales, ids and weights of the workspace; the counters before them stay as they are."""

    def work(backend: Any, exchange: Any, problem: MoeProblem) -> tuple[int, int]:
        assert not exchange.outputs()
        state = exchange.dispatch()
        outputs = exchange.outputs()
        before = exchange.library.workspace[: flashinfer_fake.AUX_BYTES].clone()
        oracle.poison(outputs)
        assert torch.equal(before, exchange.library.workspace[: flashinfer_fake.AUX_BYTES])
        assert torch.isnan(outputs[0].float()).all()
        exchange.combine(state, torch.zeros(4, 9, 256, dtype=torch.bfloat16))
        return len(outputs), sum(view.numel() * view.element_size() for view in outputs)

    assert [(4, 4 * 9 * (256 + 4 * 2 + 4 * 4 + 4 * 4))] * 4 == run(monkeypatch, case(dtype="fp8"), work)


@pytest.mark.parametrize("version", ["0.6.15.post1", "0.5.2", "unknown"])
def test_a_version_with_another_combine_model_is_refused(monkeypatch, version: str) -> None:
    """Before 0.6.16 sums are in bf16: the message says what is there and how to get the right one."""
    with pytest.raises(MissingLibrary, match=rf"{version} is older .*float32; 0\.7\.2 is pinned.*cx prepare"):
        run(monkeypatch, case(), world=flashinfer_fake.World(4, version))


@pytest.mark.parametrize("version", ["0.8.0", "1.0.0rc1"])
def test_a_version_that_nobody_has_tried_is_refused(monkeypatch, version: str) -> None:
    """Its signatures and rules may be others."""
    with pytest.raises(MissingLibrary, match=rf"{version} is newer than 0\.7, the last .*cx prepare"):
        run(monkeypatch, case(), world=flashinfer_fake.World(4, version))


def test_a_missing_library_says_how_to_get_it(monkeypatch) -> None:
    """No traceback of an import, but the name and the remedy."""
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(MissingLibrary, match=r"flashinfer-python 0\.7\.2 cannot be imported .*cx prepare"):
        Backend().setup(Context(None, None))  # pyright: ignore[reportArgumentType]


def test_an_installation_without_the_newer_entry_point_still_has_the_older(monkeypatch) -> None:
    """Only the variant that needs flashinfer.moe_ep is missing."""
    world = flashinfer_fake.World(4)
    monkeypatch.setattr(world, "modules", lambda: flashinfer_fake.World.modules(world, moe_ep=False))
    assert [] == failed(run(monkeypatch, case(), world=world))
    with pytest.raises(MissingLibrary, match="moe_ep of flashinfer-python .* cannot be imported"):
        run(monkeypatch, case("moe-ep"), world=world)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (case(topk=8), None),
        (case(topk=3), "flashinfer_ep has no kernel for top-3; it has 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 22"),
        (case(ranks=128, experts=128), "flashinfer_ep works with up to 64 ranks; 128 were asked for"),
        (case(dtype="fp4"), "flashinfer_ep one-sided has no fp4; it has bf16, fp8"),
    ],
)
def test_limits_are_told_in_one_sentence(asked: Case, reason: str | None) -> None:
    """What the kernels are compiled for, answered without the library."""
    assert reason == Backend().why_not(asked)


def test_versions_are_those_that_are_loaded(monkeypatch) -> None:
    """Version and commit as the package itself says."""
    found = run(monkeypatch, case(), lambda backend, *_: dict(backend.versions()))
    assert [{"flashinfer": "0.7.2", "flashinfer commit": "d84335d8"}] * 4 == found


def test_a_rank_waits_for_its_peers_before_it_ends(monkeypatch) -> None:
    """Workspaces live until the process ends, and a peer may still read this one's."""
    steps = Steps(monkeypatch)
    run(monkeypatch, case(ranks=2), lambda *_: None)
    assert [["synchronize", "barrier"]] * 2 == [mine[-2:] for mine in steps.of.values()]
