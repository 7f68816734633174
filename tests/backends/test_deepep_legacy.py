"""DeepEP's V1 adapter against a stand-in that moves rows and enforces the library's rules."""

from __future__ import annotations

import sys
from dataclasses import replace

import deepep_fake
import exchange_job
import pytest
import torch
from deepep_fake import Broken, on_ranks
from exchange_job import failed, whole

from collectivex.backends import _deepep_buffer, deepep_legacy
from collectivex.backends._deepep_buffer import ll_capacity
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.deepep_legacy import FACTS, Backend
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.types import Case, Moe, Routing


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """DeepEP main, as far as an import can tell."""
    for name, module in deepep_fake.main_package().items():
        monkeypatch.setitem(sys.modules, name, module)
    before = deepep_fake.Destroyable.alive
    yield
    deepep_fake.Destroyable.alive = before


def case(variant: str = "normal", dtype: str = "bf16", ranks: int = 4, **fields) -> Case:
    mode = {"normal": "normal", "cached": "cached", "ll": "low-latency"}[variant]
    spread = fields.pop("spread", "even")
    shape = Moe("small", 2048 if variant == "ll" else 256, 4, 16, 6, dtype, Routing(spread=spread))
    shape = replace(shape, **fields.pop("shape", {}))
    return Case("deepep_legacy", variant, mode, shape, ranks, **fields)


@pytest.mark.parametrize("spread", ["even", "linear", "one-empty"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("variant", ["normal", "cached", "ll"])
def test_every_variant_passes_the_whole_oracle(variant, dtype, spread) -> None:
    """Calls with changing inputs, the chain, repeated calls; ranks with fewer and with no tokens."""
    assert [] == failed(on_ranks(case(variant, dtype, spread=spread), Backend, whole))


@pytest.mark.parametrize("variant", ["normal", "ll"])
def test_two_ranks_pass_too(variant) -> None:
    """Two ranks, where a token often has several experts on one rank; one token, padded to four slots."""
    assert [] == failed(on_ranks(case(variant, ranks=2, shape={"tokens": 1}), Backend, whole))


def test_every_buffer_is_destroyed() -> None:
    """None is left when the backend closes: the library warns of a leak, or hangs in a destructor."""
    before = deepep_fake.Destroyable.alive
    on_ranks(case(), Backend, lambda *_: None)
    on_ranks(case("ll"), Backend, lambda *_: None)
    assert before == deepep_fake.Destroyable.alive


def test_a_larger_case_gets_a_larger_buffer_and_a_smaller_one_keeps_it() -> None:
    """Normal buffers grow; the one that is too small is destroyed first."""

    def work(exchange, problem, variant, device):
        return exchange.buffer.nvl

    small, large = (on_ranks(case(shape={"hidden": h}), Backend, work)[0] for h in (256, 512))
    assert small < large


def test_the_low_latency_buffer_fits_every_number_of_tokens_it_offers() -> None:
    """NVSHMEM cannot start twice: the buffer is sized for the largest case at the first one."""
    sizes = {
        on_ranks(case("ll", shape={"tokens": t}), Backend, lambda e, *_: e.buffer.rdma)[0] for t in (1, 6)
    }
    assert 1 == len(sizes)
    assert sizes.pop() >= deepep_fake.Buffer.get_low_latency_rdma_size_hint(1024, 2048, 4, 16)


def test_flags_are_cleaned_when_the_number_of_experts_changes() -> None:
    """The flags of 8 experts do not lie where those of 16 did; the fake refuses dirty ones."""

    def work(exchange, problem, variant, device):
        exchange.buffer.qps = problem.local_experts  # over NVLink there are none
        return whole(exchange, problem, variant, device)

    cases = [case("ll", shape={"experts": e}) for e in (16, 8)]
    assert [] == failed(exchange_job.on_ranks(cases, Backend, work, deepep_fake.Group))


@pytest.mark.parametrize(("tokens", "slots"), [(1, 4), (4, 4), (5, 8), (512, 512)])
def test_slots_are_a_multiple_of_four(tokens, slots) -> None:
    """buffer.hpp: (num_ranks * num_max_dispatch_tokens_per_rank) % 4 == 0, at any number of ranks."""
    assert slots == ll_capacity(tokens)


def test_the_requested_number_of_sms_is_the_one_in_force_and_the_next_case_has_the_default() -> None:
    """num_sms is an attribute of the library's class: it must not leak."""
    realised = on_ranks(case(knobs=(("num_sms", 24),)), Backend, lambda e, *_: e.realised)
    assert [{"num_sms": 24}] * 4 == realised
    deepep_fake.Buffer.num_sms = 20
    assert [{"num_sms": 20}] * 4 == on_ranks(case(), Backend, lambda e, *_: e.realised)


def test_low_latency_rows_are_staged_apart_from_the_library() -> None:
    """Staged rows survive later dispatches, and every slot of no token is NaN."""

    def work(exchange, problem, variant, device):
        state = exchange.dispatch()
        received = exchange.received(state)
        staged = exchange.stage(state, torch.ones_like(received.rows, dtype=torch.bfloat16))
        exchange.combine(state, staged)
        return int((staged == 1).all(2).sum()), int(staged.isnan().all(2).sum()), len(received.rows)

    for ones, nans, rows in on_ranks(case("ll"), Backend, work):
        assert rows == ones
        assert 4 * 4 * 8 - rows == nans


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("third result", "outstanding"),
        ("other routing", "another routing"),
        ("short rows", "as many rows"),
        ("odd slots", "divides by 4"),
    ],
)
def test_the_fake_notices_an_adapter_that_breaks_a_rule(broken, rule, monkeypatch) -> None:
    """Each rule the fake claims to enforce is one that can fail."""

    def work(exchange, problem, variant, device):
        if broken == "third result":
            for _ in range(3):
                exchange.dispatch()
        elif broken == "short rows":
            state = exchange.dispatch()
            exchange.combine(state, exchange.received(state).rows[:-1])
        elif broken == "other routing":
            exchange.known.handle[3].add_(1)
            exchange.dispatch()
        else:
            exchange.dispatch()

    if broken == "odd slots":
        monkeypatch.setattr(_deepep_buffer, "ll_capacity", lambda tokens: tokens + tokens % 2 + 1)
    kind = {"third result": "ll", "odd slots": "ll", "other routing": "cached"}.get(broken, "normal")
    with pytest.raises(Broken, match=rule):
        on_ranks(case(kind, ranks=2), Backend, work)


def test_combine_of_a_wrong_rank_order_turns_the_oracle_red() -> None:
    """The fake is no yes-man: rows staged in reverse give a wrong answer."""

    def work(exchange, problem, variant, device):
        exchange.stage = lambda state, rows: rows.flip(0).contiguous()
        return whole(exchange, problem, variant, device)

    assert any("combined" in line for line in failed(on_ranks(case(), Backend, work)))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (case(ranks=3, shape={"experts": 18}), "2, 4 and 8 ranks"),
        (case(ranks=16, nodes=2), "one node"),
        (case(shape={"hidden": 136}), "hidden 136"),
        (case(shape={"topk": 33, "experts": 64}), "at most 32 experts"),
        (case(shape={"experts": 8192}), "1024 experts a rank"),
        (case(knobs=(("num_sms", 7),)), "even"),
        (case(knobs=(("sms", 8),)), "no knob 'sms'"),
        (case("ll", knobs=(("num_sms", 8),)), "ll has no knobs"),
        (case("ll", shape={"hidden": 1024}), "compiled for hidden"),
        (case("ll", shape={"topk": 12}), "at most 11"),
        (case("ll", shape={"tokens": 2048}), "1024 tokens a rank"),
    ],
)
def test_every_limit_is_said_in_one_sentence(changed, reason) -> None:
    """Answered on a laptop, without the library."""
    found = Backend().why_not(changed)
    assert found is not None
    assert reason in found
    assert "\n" not in found


def test_the_queue_depth_allows_the_largest_low_latency_case() -> None:
    """legacy.py: nvshmem_qp_depth >= (num_max_dispatch_tokens_per_rank + 1) * 2, from the environment."""
    assert int(FACTS.env["NVSHMEM_QP_DEPTH"]) >= 2 * (ll_capacity(deepep_legacy.LARGEST_LL) + 1)


def test_the_fake_has_the_signatures_of_the_pinned_source() -> None:
    """So what the adapter passes exists there, by name."""
    assert [] == deepep_fake.unlike(deepep_fake.Buffer, deepep_fake.signatures("deepep-dd758ca")["Buffer"])
    assert deepep_legacy.PIN.startswith("dd758ca")


@pytest.mark.parametrize("what", ["absent", "nccl", "older", "hybrid"])
def test_what_is_not_the_pinned_library_is_refused_with_a_hint(what, monkeypatch) -> None:
    """Missing, refusing to be imported, of another version, of the other branch."""
    if what == "hybrid":
        monkeypatch.delattr(sys.modules["deep_ep"], "ElasticBuffer")
    elif what == "older":
        monkeypatch.setattr(sys.modules["deep_ep"], "__version__", "1.2.1")
    elif what == "absent":
        monkeypatch.setitem(sys.modules, "deep_ep", None)
    else:

        def refuse(name: str):
            raise AssertionError("Invalid NCCL versions")

        monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(MissingLibrary, match="cx prepare --backend deepep_legacy"):
        Backend().setup(Context(None, ManualDevice()))


def test_versions_name_the_package_and_its_extension() -> None:
    """As loaded."""
    backend = Backend()
    backend.setup(Context(None, ManualDevice()))
    assert {"deep_ep": "2.1.0", "deep_ep._C": "_C.so"} == backend.versions()


def test_what_may_be_captured_never_waits_for_the_host() -> None:
    """The uncached normal dispatch waits for the counts; the others do not."""
    assert {"normal": False, "cached": True, "ll": True} == {v.name: v.graph_safe for v in FACTS.variants}
