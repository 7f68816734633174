"""The DeepEP hybrid-ep adapter against a stand-in that moves rows and enforces the library's rules."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import deepep_fake
import pytest
from deepep_fake import Broken, on_ranks
from exchange_job import failed, whole

from collectivex.backends import _deepep, deepep_hybrid
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.deepep_hybrid import FACTS, Backend
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.types import Case, Moe, Routing


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """The hybrid-ep branch, as far as an import can tell."""
    for name, module in deepep_fake.hybrid_package().items():
        monkeypatch.setitem(sys.modules, name, module)


def case(variant: str = "plain", mode: str = "normal", dtype: str = "bf16", ranks: int = 4, **fields) -> Case:
    routing = Routing(spread=fields.pop("spread", "even"))
    shape = Moe("small", 512 if dtype == "fp8" else 256, 4, 16, 12, dtype, routing)
    return Case("deepep_hybrid", variant, mode, replace(shape, **fields.pop("shape", {})), ranks, **fields)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("variant", FACTS.variants, ids=lambda v: f"{v.name}-{v.mode}")
def test_every_variant_passes_the_whole_oracle(variant, dtype, ranks) -> None:
    """Calls with changing inputs, the chain over rows staged once, repeated calls; 12 tokens suit 2 ranks."""
    assert [] == failed(on_ranks(case(variant.name, variant.mode, dtype, ranks), Backend, whole))


def test_unpermuted_rows_are_not_summed_in_one_cast() -> None:
    """permute.cu casts each rank's sum to bf16: declared final, the oracle is red."""

    def work(exchange, problem, variant, device):
        return whole(exchange, problem, replace(variant, casts="final"), device)

    assert any("combined" in line for line in failed(on_ranks(case("permute", ranks=2), Backend, work)))


@pytest.mark.parametrize("variant", FACTS.variants, ids=lambda v: f"{v.name}-{v.mode}")
def test_only_the_normal_mode_waits_for_the_host(variant) -> None:
    """A handle alone is not enough for plain: without num_dispatched_tokens the library synchronises."""

    def work(exchange, problem, v, device):
        before = exchange.buffer.waits
        exchange.dispatch()
        return exchange.buffer.waits - before

    expected = 1 if variant.mode == "normal" else 0
    assert [expected] * 4 == on_ranks(case(variant.name, variant.mode), Backend, work)
    assert variant.graph_safe == (expected == 0)


def test_probabilities_of_other_ranks_are_not_taken_for_weights() -> None:
    """Only this rank's columns of the dispatched probabilities are written; the fake fills the others."""
    checks = on_ranks(case(), Backend, whole)
    weights = [c for of_rank in checks for c in of_rank if c.name == "weights"]
    assert weights
    assert all(c.passed for c in weights)


def test_asked_sms_are_what_the_buffer_says_it_applied() -> None:
    """Read back from the library's configuration; its own defaults where nothing is asked."""
    knobs = (("num_sms_combine_api", 32), ("num_sms_dispatch_api", 16))
    asked = on_ranks(case(knobs=knobs), Backend, lambda e, *_: dict(e.realised))[0]
    default = on_ranks(case(), Backend, lambda e, *_: dict(e.realised))[0]
    sizes = {"max_num_of_tokens_per_rank": 8192}
    assert {"num_sms_dispatch_api": 16, "num_sms_combine_api": 32, **sizes} == asked
    assert {"num_sms_dispatch_api": 24, "num_sms_combine_api": 24, **sizes} == default


@pytest.mark.parametrize(
    ("broken", "rule"), [("short rows", "as many rows"), ("float rows", "bf16"), ("too few", "overflow")]
)
def test_the_fake_notices_an_adapter_that_breaks_a_rule(broken, rule) -> None:
    """Each rule the fake claims to enforce is one that can fail."""

    def work(exchange, problem, variant, device):
        if broken == "too few":
            exchange.sizes = {**exchange.sizes, "num_permuted_tokens": 1}
        state = exchange.dispatch()
        rows = exchange.received(state).rows
        exchange.combine(state, rows.float() if broken == "float rows" else rows[:-1])

    c = case("permute", "low-latency") if broken == "too few" else case()
    with pytest.raises(Broken, match=rule):
        on_ranks(c, Backend, work)


@pytest.mark.parametrize("variant", ["plain", "permute"])
def test_a_swapped_row_turns_the_oracle_red(variant) -> None:
    """The fake is no yes-man."""

    def work(exchange, problem, v, device):
        exchange.stage = lambda state, rows: rows.flip(0).contiguous()
        return whole(exchange, problem, v, device)

    assert any("combined" in line for line in failed(on_ranks(case(variant), Backend, work)))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (case(ranks=8, nodes=2), "one node"),
        (case(shape={"hidden": 264}), "divides by 16"),
        (case(dtype="fp8", shape={"hidden": 768}), "divides by 512"),
        (case(ranks=2, shape={"experts": 18}), "divides by 4"),
        (case(spread="linear"), "equal tokens"),
        (case(spread="one-empty"), "equal tokens"),
        (case(shape={"tokens": 0}), "a token on every rank"),
        (case(ranks=2, shape={"tokens": 1}), "must divide by 4"),
        (case(ranks=2, shape={"tokens": 65}), "must divide by 4"),
        (case("plain", "low-latency"), "has no low-latency/plain"),
    ],
)
def test_every_limit_is_said_in_one_sentence(changed, reason) -> None:
    """Answered on a laptop, without the library."""
    found = Backend().why_not(changed)
    assert found is not None
    assert reason in found
    assert "\n" not in found


@pytest.mark.parametrize(("tokens", "ranks"), [(1, 4), (3, 4), (2, 2), (64, 2), (66, 2), (128, 2)])
def test_tokens_that_the_last_chunk_can_hold_are_offered(tokens, ranks) -> None:
    """executor.cu: (T mod 64) * ranks * 4 bytes must divide by 16."""
    assert Backend().why_not(case(ranks=ranks, shape={"tokens": tokens})) is None


def test_the_fake_has_the_signatures_of_the_pinned_source() -> None:
    """So what the adapter passes exists there, by name."""
    recorded = deepep_fake.signatures("deepep_hybrid-94a9f8f")["HybridEPBuffer"]
    assert [] == deepep_fake.unlike(deepep_fake.HybridEPBuffer, recorded)
    assert deepep_hybrid.PIN.startswith("94a9f8f")


@pytest.mark.parametrize("what", ["absent", "main"])
def test_what_is_not_the_pinned_library_is_refused_with_a_hint(what, monkeypatch) -> None:
    """Missing, or DeepEP main, whose package has the same name."""
    if what == "main":
        monkeypatch.delattr(sys.modules["deep_ep"], "HybridEPBuffer")
    else:
        monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(MissingLibrary, match="cx prepare --backend deepep_hybrid"):
        Backend().setup(Context(None, ManualDevice()))


def test_a_package_that_does_not_say_its_version_is_unknown() -> None:
    """hybrid-ep has no __version__: where it was not installed as a package, nobody knows."""
    backend = Backend()
    backend.setup(Context(None, ManualDevice()))
    said = backend.versions()
    assert "unknown" == said["deep_ep"]
    assert "hybrid_ep_cpp.so" == said["hybrid_ep_cpp"]


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("1.2.1+94a9f8f", True),
        ("1.2.1+94a9f8f6b1460000000000000000000000000000", True),
        ("1.2.1+mine", True),
        ("1.2.1", True),
        ("1.2.1+0123abc", False),
        ("1.3.0+94a9f8f", False),
        ("1.1.0", False),
    ],
)
def test_another_version_than_the_pinned_one_is_refused(said, taken, monkeypatch, tmp_path) -> None:
    """As the loaded file was installed; another package of that name elsewhere on the path says nothing."""
    file = tmp_path / "deep_ep" / "__init__.py"

    class Installed:
        version = said

        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(_deepep.metadata, "distribution", lambda name: Installed())
    backend = Backend()
    backend.setup(Context(None, ManualDevice()))
    assert "unknown" == backend.versions()["deep_ep"]
    monkeypatch.setattr(sys.modules["deep_ep"], "__file__", str(file), raising=False)
    if taken:
        backend.setup(Context(None, ManualDevice()))
        assert said == backend.versions()["deep_ep"]
    else:
        with pytest.raises(MissingLibrary, match=r"the adapter fits 1\.2\.1\+94a9f8f"):
            backend.setup(Context(None, ManualDevice()))


def test_what_the_adapter_reads_of_the_library_is_there() -> None:
    """Places in the tuples that are its handles, fields of its configuration, and the whole commit."""
    recorded = deepep_fake.signatures("deepep_hybrid-94a9f8f")
    reads = recorded["reads"]
    assert (
        "local_expert_routing_map"
        == reads["dispatch: handle"][4]
        == reads["dispatch_with_permute: handle"][4]
    )
    assert "tokens_per_expert" == reads["dispatch_with_permute: handle"][7]
    source = Path(str(deepep_hybrid.__file__)).read_text()
    applied = set(re.findall(r"\bapplied\.(\w+)", source))
    assert applied
    assert applied <= set(reads["configurer.buffer_config"])
    assert recorded["commit"].startswith(deepep_hybrid.PIN)
