"""The DeepEP V2 adapter against a stand-in that moves rows and enforces the library's rules."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import deepep_fake
import pytest
import torch
from deepep_fake import Broken, on_ranks
from exchange_job import failed, whole

from collectivex.backends import _deepep, deepep
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.deepep import FACTS, Backend
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.types import Case, Moe, Routing


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """DeepEP main, as far as an import can tell."""
    for name, module in deepep_fake.main_package().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_deepep, "CAPACITY", 64)


def case(variant: str = "plain", mode: str = "normal", dtype: str = "bf16", ranks: int = 4, **fields) -> Case:
    routing = Routing(spread=fields.pop("spread", "even"))
    shape = replace(Moe("small", 256, 4, 16, 12, dtype, routing), **fields.pop("shape", {}))
    return Case("deepep", variant, mode, shape, ranks, **fields)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("mode", ["normal", "cached", "low-latency"])
@pytest.mark.parametrize("variant", ["plain", "expand"])
def test_every_variant_passes_the_whole_oracle(variant, mode, dtype) -> None:
    """Calls with changing inputs, the chain over rows staged once, repeated calls."""
    assert [] == failed(on_ranks(case(variant, mode, dtype), Backend, whole))


@pytest.mark.parametrize("spread", ["linear", "one-empty"])
@pytest.mark.parametrize("mode", ["normal", "cached", "low-latency"])
@pytest.mark.parametrize("variant", ["plain", "expand"])
def test_ranks_may_have_fewer_tokens_or_none(variant, mode, spread) -> None:
    """The library wants only that no rank has more than the capacity."""
    assert [] == failed(on_ranks(case(variant, mode, spread=spread), Backend, whole))


@pytest.mark.parametrize("variant", ["plain", "expand"])
def test_two_ranks_and_one_token_pass(variant) -> None:
    """Where a token often has several experts on one rank, whose sum expand casts."""
    found = on_ranks(case(variant, ranks=2, shape={"tokens": 1}), Backend, whole)
    assert [] == failed(found)


def test_expanded_rows_are_not_summed_in_one_cast() -> None:
    """combine.cuh with allow_multiple_reduction casts each rank's sum: declared final, the oracle is red."""

    def work(exchange, problem, variant, device):
        return whole(exchange, problem, replace(variant, casts="final"), device)

    assert any("combined" in line for line in failed(on_ranks(case("expand", ranks=2), Backend, work)))


@pytest.mark.parametrize(("tokens", "expected"), [(1, 8192), (8192, 8192), (8193, 16384), (40000, 65536)])
def test_one_capacity_serves_the_whole_ladder(tokens, expected, monkeypatch) -> None:
    """Kernels are compiled for the capacity: a ladder of 14 numbers of tokens must not compile 14 times."""
    monkeypatch.undo()
    assert expected == _deepep.capacity(tokens)


def test_without_a_host_wait_the_received_tensors_have_worst_case_size() -> None:
    """capacity * ranks rows, and times the picks a rank can have where they are expanded."""

    def rows(exchange, *_):
        return len(exchange.dispatch().rows)

    assert 4 * 64 == on_ranks(case(mode="low-latency"), Backend, rows)[0]
    assert 4 * 64 * 4 == on_ranks(case("expand", "low-latency"), Backend, rows)[0]
    assert 4 * 12 >= on_ranks(case(), Backend, rows)[0]


def test_rows_that_nobody_may_read_are_staged_as_nan() -> None:
    """A library that reads past the counts is caught by the oracle."""

    def work(exchange, problem, variant, device):
        state = exchange.dispatch()
        staged = exchange.stage(state, exchange.received(state).rows)
        return len(exchange.received(state).rows), int(staged.isnan().all(1).sum()), len(staged)

    for valid, nan, total in on_ranks(case(mode="low-latency"), Backend, work):
        assert (total - valid, 256) == (nan, total)


@pytest.mark.parametrize(
    ("knobs", "links", "realised"),
    [
        ((("num_sms", 24),), 430.0, {"num_sms": 24}),
        ((), 430.0, {"num_sms": 4}),  # the fake's rule without a number given: it knows better than we
        ((), 0.0, {"num_sms": 16, "assumed_nvlink_gbs": 430.3}),
    ],
)
def test_the_number_of_sms_is_asked_for_or_the_librarys_rule(knobs, links, realised, monkeypatch) -> None:
    """A machine that hides its NVLinks makes the library choose 4 SMs: then it is told what NVLink 4 has."""
    for name, module in deepep_fake.main_package(links).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Backend, "_capability", lambda self: 9)
    found = on_ranks(case(knobs=knobs), Backend, lambda e, *_: dict(e.realised))[0]
    assert {"num_max_tokens_per_rank": 64, **realised} == found


@pytest.mark.parametrize("mode", ["normal", "cached", "low-latency"])
def test_every_call_gets_the_sms_that_were_asked_for(mode) -> None:
    """Dispatch without a handle and with one, and combine."""

    def work(exchange, problem, variant, device):
        whole(exchange, problem, variant, device)
        return set(exchange.buffer.sms)

    for used in on_ranks(case(mode=mode, knobs=(("num_sms", 24),)), Backend, work):
        assert {("dispatch", 24), ("combine", 24)} == used


def test_sms_that_were_not_used_are_told(monkeypatch) -> None:
    """What counts is the library's word: its handle says what dispatch used."""
    honest = deepep_fake.ElasticBuffer._handle

    def other(self, *given):
        handle = honest(self, *given)
        handle.num_sms = 4
        return handle

    monkeypatch.setattr(deepep_fake.ElasticBuffer, "_handle", other)

    def work(exchange, problem, variant, device):
        whole(exchange, problem, variant, device)
        return exchange.realised["num_sms"]

    assert [4] * 4 == on_ranks(case(knobs=(("num_sms", 24),)), Backend, work)


def test_buffers_are_kept_by_size_and_all_destroyed() -> None:
    """One buffer for every dtype and variant of a size; none is left when the backend closes."""
    before = deepep_fake.Destroyable.alive
    on_ranks(case(), Backend, lambda *_: None)
    assert before == deepep_fake.Destroyable.alive


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ("no sms", "num_sms=0"),
        ("other layout", "other layout"),
        ("short rows", "as many rows"),
        ("float rows", "contiguous bf16"),
        ("other routing", "another routing"),
    ],
)
def test_the_fake_notices_an_adapter_that_breaks_a_rule(broken, rule) -> None:
    """Each rule the fake claims to enforce is one that can fail."""

    def work(exchange, problem, variant, device):
        if broken == "no sms":
            exchange.sms = 0
        elif broken == "other layout":
            exchange.expand = True
        elif broken == "other routing":
            exchange.known.handle.recv_src_metadata[:, 0] += 1
        state = exchange.dispatch()
        rows = exchange.received(state).rows
        exchange.combine(state, rows.float() if broken == "float rows" else rows[:-1])

    mode = "cached" if broken in ("other layout", "other routing") else "normal"
    with pytest.raises(Broken, match=rule):
        on_ranks(case(mode=mode, ranks=2), Backend, work)


def test_a_swapped_row_turns_the_oracle_red() -> None:
    """The fake is no yes-man."""

    def work(exchange, problem, variant, device):
        stage = exchange.stage
        exchange.stage = lambda state, rows: stage(state, rows.flip(0).contiguous())
        return whole(exchange, problem, variant, device)

    for variant in ("plain", "expand"):
        lines = failed(on_ranks(case(variant, "low-latency"), Backend, work))
        assert any("combined" in line for line in lines)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (case(ranks=8, nodes=2), "one node"),
        (case(shape={"hidden": 384}), "256 columns"),
        (case(shape={"topk": 33, "experts": 64}), "at most 32 experts"),
        (case(shape={"experts": 2080}, ranks=16), "at most 2048 experts"),
        (case(shape={"experts": 512}, ranks=1), "256 a rank"),
        (case(knobs=(("num_sms", 0),)), "positive"),
        (case(knobs=(("num_qps", 1),)), "no knob 'num_qps'"),
        (case("folded"), "has no normal/folded"),
    ],
)
def test_every_limit_is_said_in_one_sentence(changed, reason) -> None:
    """Answered on a laptop, without the library."""
    found = Backend().why_not(changed)
    assert found is not None
    assert reason in found
    assert "\n" not in found


def test_the_fake_has_the_signatures_of_the_pinned_source() -> None:
    """So what the adapter passes exists there, by name."""
    recorded = deepep_fake.signatures("deepep-dd758ca")["ElasticBuffer"]
    assert [] == deepep_fake.unlike(deepep_fake.ElasticBuffer, recorded)
    assert deepep.PIN.startswith("dd758ca")


@pytest.mark.parametrize("what", ["absent", "older", "hybrid"])
def test_what_is_not_the_pinned_library_is_refused_with_a_hint(what, monkeypatch) -> None:
    """Missing, of another version, of the other branch."""
    if what == "hybrid":
        monkeypatch.delattr(sys.modules["deep_ep"], "ElasticBuffer")
    elif what == "older":
        monkeypatch.setattr(sys.modules["deep_ep"], "__version__", "2.0.0")
    else:
        monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(MissingLibrary, match="cx prepare --backend deepep`"):
        Backend().setup(Context(None, ManualDevice()))


def test_sources_are_the_cases_numbers_not_the_buffers() -> None:
    """The library numbers tokens by its capacity; index 3 of rank 2 at 12 tokens a rank is token 27."""

    def work(exchange, problem, variant, device):
        return exchange._global_ids(torch.tensor([2 * 64 + 3], dtype=torch.int32)).tolist()

    assert [[27]] * 4 == on_ranks(case(), Backend, work)


def test_only_the_host_wait_forbids_capture() -> None:
    """normal waits for the counts; cached and low-latency do not."""
    assert {"normal": False, "cached": True, "low-latency": True} == {
        v.mode: v.graph_safe for v in FACTS.variants
    }


def test_what_the_adapter_reads_of_the_library_is_there() -> None:
    """Attributes of the handle and the buffer, the helper for the links, and the whole commit of the pin."""
    recorded = deepep_fake.signatures("deepep-dd758ca")
    source = Path(str(deepep.__file__)).read_text()
    of_handle = set(re.findall(r"\bhandle\.(\w+)", source))
    assert "num_sms" in of_handle
    assert of_handle <= set(recorded["reads"]["EPHandle"])
    assert "num_max_tokens_per_rank" in recorded["reads"]["ElasticBuffer"]
    assert "utils.envs.get_nvlink_gbs" in recorded["reads"]
    assert recorded["commit"].startswith(deepep.PIN)
