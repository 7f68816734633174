"""MSCCL++ EP without a GPU: the adapter against the recorded signatures and a fake that keeps the rules."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import mscclpp_fake
import pytest
import torch
from ep_fake import Rule, unlike
from exchange_job import Steps, failed, on_ranks, whole

from collectivex.backends import _mscclpp_exchange as adapter
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.mscclpp_ep import FACTS, Backend
from collectivex.runtime import oracle
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.errors import InfraError
from collectivex.runtime.ranks import ThreadRanks, run_threads
from collectivex.runtime.types import Case, Moe, Routing

RUN = [(v.mode, v.name, d) for v in FACTS.variants for d in v.dtypes]


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_collected():
    """As in a worker: `close` collects garbage, and need not look at all that pytest has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def case(mode: str, variant: str, dtype: str = "bf16", ranks: int = 4, **fields: Any) -> Case:
    spread = fields.pop("spread", "even")
    shape = fields.pop("shape", Moe("small", 4096, 3, 8, 3, dtype, Routing(spread=spread)))
    return Case("mscclpp_ep", variant, mode, shape, ranks, **fields)


class Group:
    def __init__(self, ranks: ThreadRanks):
        self.rank, self.size = (lambda: ranks.rank), (lambda: ranks.size)


class Job:
    """The ranks of one job as threads, with the fake in the place of the library. `left` is what is alive of
    it after an exchange was closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **modules: Any):
        self.world = mscclpp_fake.World()
        for name, module in self.world.modules(**modules).items():
            monkeypatch.setitem(sys.modules, name, module)

    def run(self, asked: Case | list[Case], work: Callable[..., Any]) -> list[Any]:
        job = self

        class Watched(Backend):
            def close(self) -> None:
                job.left = list(job.world.alive)  # while the exchange itself is still referred to
                super().close()

        def group(ranks: ThreadRanks) -> Group:
            self.world.place.enter(ranks)
            return Group(ranks)

        return on_ranks(asked, Watched, work, group)


@pytest.mark.parametrize(("mode", "variant", "dtype"), RUN)
def test_every_variant_passes_the_whole_oracle(monkeypatch, mode: str, variant: str, dtype: str) -> None:
    """Rows, ids, weights, sums and casts are exact, whatever order the library delivers in; and nothing of
    the communicator outlives `close`, because its destructor is collective."""
    job = Job(monkeypatch)
    assert [] == failed(job.run(case(mode, variant, dtype), whole))
    assert [] == job.left


@pytest.mark.parametrize(
    "variant", ["expert-major", "expert-major-direct", "rank-major", "rank-major-direct"]
)
@pytest.mark.parametrize("spread", ["linear", "one-empty"])
def test_latency_ranks_may_have_fewer_tokens_or_none(monkeypatch, variant: str, spread: str) -> None:
    """Uneven tokens change nothing: the capacity is that of the fullest rank."""
    assert [] == failed(Job(monkeypatch).run(case("low-latency", variant, spread=spread), whole))


@pytest.mark.parametrize("mode", ["normal", "cached"])
def test_throughput_ranks_may_have_fewer_tokens(monkeypatch, mode: str) -> None:
    """Uneven tokens pass; a rank without any is refused beforehand, as the library would refuse it."""
    assert [] == failed(Job(monkeypatch).run(case(mode, "throughput", spread="linear", ranks=2), whole))
    with pytest.raises(Rule, match="without tokens"):
        Job(monkeypatch).run(case(mode, "throughput", spread="one-empty"), whole)


def test_after_an_error_on_one_rank_close_waits_for_nobody(monkeypatch) -> None:
    """The other ranks are elsewhere: a barrier would turn a failure into a time-out."""
    monkeypatch.setattr(adapter, "_abandoned", [])

    def work(exchange, problem, variant, device):
        if problem.rank == 1:
            raise ValueError("only here")
        return whole(exchange, problem, variant, device)

    with pytest.raises(ValueError, match="only here"):
        Job(monkeypatch).run(case("low-latency", "expert-major"), work)
    assert adapter._abandoned


def test_the_blocks_that_are_asked_for_are_those_applied(monkeypatch) -> None:
    """The library's own number is reported, asked for or not."""
    seen = {}
    for mode, variant, knobs in (
        ("low-latency", "expert-major", ()),
        ("low-latency", "expert-major", (("num_blocks", 60),)),
        ("normal", "throughput", ()),
    ):
        asked = case(mode, variant, knobs=knobs)
        seen[mode, knobs] = Job(monkeypatch).run(asked, lambda e, p, v, d: dict(e.realised))[0]
    assert [{"num_blocks": 130}, {"num_blocks": 60}, {"num_blocks": 20}] == list(seen.values())


def test_a_cache_that_the_library_does_not_take_is_noticed(monkeypatch) -> None:
    """It would silently run the uncached path, and the row would be called cached."""

    def work(exchange, problem, variant, device):
        problem.topk_idx = problem.topk_idx.clone()
        return whole(exchange, problem, variant, device)

    with pytest.raises(RuntimeError, match="did not take the cached routing"):
        Job(monkeypatch).run(case("cached", "throughput"), work)


# Each rule of the contract, broken by an adapter that does one thing differently.


def broken(name: str) -> Callable[..., Any]:
    def work(exchange: Any, problem: Any, variant: Any, device: Any) -> Any:
        if name == "two dispatches":
            exchange.dispatch()
        elif name == "int32 ids":
            problem.topk_idx = problem.topk_idx.to(torch.int32)
        elif name == "no weights":
            problem.topk_weights = None
        elif name == "strided rows":
            problem.x = problem.x.repeat(1, 2)[:, ::2]
        elif name == "compact staging":
            exchange.stage = lambda state, rows: rows
        elif name == "foreign buffer":
            exchange.combine = lambda state, rows: exchange.comm.combine(
                rows, state.handle, out=exchange.combined
            )
        elif name == "float32 staging":
            stage = exchange.stage
            exchange.stage = lambda state, rows: stage(state, rows).float()
        return whole(exchange, problem, variant, device)

    return work


@pytest.mark.parametrize(
    ("name", "variant", "rule"),
    [
        ("two dispatches", "expert-major", "in turns"),
        ("int32 ids", "expert-major", "int64"),
        ("no weights", "expert-major", "weights are float32"),
        ("strided rows", "expert-major", "contiguous bf16"),
        ("compact staging", "expert-major", "dispatch layout"),
        ("foreign buffer", "rank-major-direct", "library's buffer"),
        ("float32 staging", "expert-major-direct", "contiguous bf16"),
    ],
)
def test_an_adapter_that_breaks_a_rule_is_caught(monkeypatch, name: str, variant: str, rule: str) -> None:
    """The fake raises where the library would fail, hang or read the wrong rows."""
    with pytest.raises(Rule, match=rule):
        Job(monkeypatch).run(case("low-latency", variant), broken(name))


@pytest.mark.parametrize(
    ("variant", "casts"), [("expert-major", "final"), ("expert-major-direct", "rank-partials")]
)
def test_the_declared_casts_are_those_of_the_kernels(monkeypatch, variant: str, casts: str) -> None:
    """Either combine mode judged by the other's casts is red: the declaration is no matter of taste."""

    def work(exchange, problem, declared, device):
        return whole(exchange, problem, replace(declared, casts=casts), device)

    shape = Moe("small", 4096, 6, 8, 3, "bf16")
    assert any(
        "combined" in f for f in failed(Job(monkeypatch).run(case("low-latency", variant, shape=shape), work))
    )


def test_rows_kept_from_the_pool_are_copies(monkeypatch) -> None:
    """combine puts the expert output into the receive pool, under the rows that were looked at."""

    def work(exchange, problem, variant, device):
        state = exchange.dispatch()
        received = exchange.received(state)
        before = received.rows.clone()
        exchange.combine(state, exchange.stage(state, oracle.chain_rows(received, problem, variant)))
        return bool((received.rows == before).all()) and not bool((state.out.tokens == before).all())

    assert [True] * 4 == Job(monkeypatch).run(case("normal", "throughput"), work)


@pytest.mark.parametrize(("variant", "own"), [("throughput", True), ("throughput-in-place", False)])
def test_only_rows_of_our_own_are_copied_into_the_pool(monkeypatch, variant: str, own: bool) -> None:
    """The library copies whatever does not lie in its pool: in place, combine gets the pool's own address."""

    def work(exchange, problem, variant, device):
        state = exchange.dispatch()
        staged = exchange.stage(state, oracle.chain_rows(exchange.received(state), problem, variant))
        given = []
        combine = exchange.comm.combine
        exchange.comm.combine = lambda rows, handle: given.append(rows.data_ptr()) or combine(rows, handle)
        exchange.combine(state, staged)
        return given != [state.out.tokens.data_ptr()]

    assert [own] * 4 == Job(monkeypatch).run(case("cached", variant), work)


def test_a_chain_in_place_gives_back_what_came_with_the_present_inputs(monkeypatch) -> None:
    """Rank-local reduction reads the buffer that dispatch fills: expert output of a check does not last, and
    a chain whose dispatch moved nothing is red."""

    def work(exchange, problem, variant, device):
        problem.fill(1)
        good = exchange.combine(exchange.dispatch(), None)
        first = oracle.check_chain(good.clone(), problem, variant)
        problem.fill(2)  # what the library still holds is of input set 1
        return [first.passed, oracle.check_chain(good, problem, variant).passed]

    assert [[True, False]] * 4 == Job(monkeypatch).run(case("low-latency", "rank-major"), work)


def test_ranks_outside_one_ipc_domain_are_the_machines_fault(monkeypatch) -> None:
    """Not a wrong answer of the library: the case ends as infra."""
    job = Job(monkeypatch)
    job.world.available = False
    with pytest.raises(InfraError, match="CUDA-IPC"):
        job.run(case("low-latency", "expert-major"), whole)


# What is loaded.


def setup(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> None:
    for name in ("mscclpp", "mscclpp.ep", "mscclpp.mscclpp_ep_cpp", "mscclpp.ext", "mscclpp.ext.ep"):
        monkeypatch.setitem(sys.modules, name, modules.get(name))
    Backend().setup(Context(ThreadRanks(0, 1, None, [None]), ManualDevice(), None))  # type: ignore[arg-type]


def test_a_missing_library_is_said_with_what_to_do(monkeypatch) -> None:
    """The repository and the commit stand in the message."""
    with pytest.raises(MissingLibrary, match="mscclpp cannot be imported.*build.*3d02152b"):
        setup(monkeypatch, {})


def test_the_older_line_is_recognised_and_refused(monkeypatch) -> None:
    """mscclpp.ext.ep.Buffer is another interface: the message says so, not that something is missing."""
    names = ("mscclpp", "mscclpp.ext", "mscclpp.ext.ep")
    with pytest.raises(MissingLibrary, match=r"older mscclpp\.ext\.ep\.Buffer"):
        setup(monkeypatch, {name: ModuleType(name) for name in names})


def test_an_mscclpp_without_ep_is_not_the_older_line(monkeypatch) -> None:
    """A plain release has neither."""
    with pytest.raises(MissingLibrary, match=r"mscclpp\.ep cannot be imported"):
        setup(monkeypatch, {"mscclpp": ModuleType("mscclpp")})


def test_another_commit_is_refused(monkeypatch) -> None:
    """The adapter's declarations were read in one commit's kernels."""
    with pytest.raises(MissingLibrary, match="0.9.0.*written for 3d02152b"):
        setup(monkeypatch, mscclpp_fake.World().modules("gdeadbeef"))


def test_versions_say_commit_and_extension(monkeypatch) -> None:
    """As the loaded library reports them; no path of the machine."""
    job, found = Job(monkeypatch), []

    def one(ranks: ThreadRanks) -> None:
        job.world.place.enter(ranks)
        library = Backend()
        library.setup(Context(ranks, ManualDevice(), Group(ranks)))
        found.append(library.versions())

    run_threads(1, one)
    expected = {"mscclpp": "0.9.0+ep.3d02152b", "commit": "g3d02152b"}
    assert [{**expected, "extension": "mscclpp_ep_cpp.abi3.so"}] == found


# What cannot run.


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (case("low-latency", "expert-major", shape=Moe("w", 2048, 4, 16, 5)), "hidden 4096, 4352.*not 2048"),
        (case("low-latency", "expert-major", shape=Moe("w", 4096, 10, 16, 5)), "at most 9 experts"),
        (case("low-latency", "expert-major", shape=Moe("w", 7168, 8, 256, 8192)), "8192 tokens.*150 GB"),
        (case("low-latency", "expert-major", knobs=(("num_blocks", 131),)), "not between 6 and 130"),
        (case("low-latency", "expert-major", nodes=2), "one CUDA-IPC domain"),
        (case("normal", "throughput", "fp8"), "has no fp8"),
        (case("normal", "throughput", shape=Moe("w", 9216, 4, 16, 5)), "multiple of 16 bytes up to 16384"),
        (case("normal", "throughput", shape=Moe("w", 4096, 4, 15, 5), ranks=3), "not 3"),
        (case("normal", "throughput", shape=Moe("w", 4096, 4, 16, 16385)), "65536 rows"),
        (case("normal", "throughput", shape=Moe("w", 4096, 4, 516, 5)), "128 experts per rank"),
        (case("cached", "throughput", spread="one-empty"), "a rank without tokens"),
        (case("cached", "throughput", knobs=(("num_blocks", 0),)), "not a positive number"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(asked: Case, reason: str) -> None:
    """Each limit was read in the sources; the sentence has the number."""
    assert re.search(reason, Backend().why_not(asked) or "")


@pytest.mark.parametrize("tokens", [1, 512, 4096])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_deepseek_ladder_can_run(tokens: int, ranks: int) -> None:
    """Every variant takes 7168/8/256 from 1 to 4096 tokens."""
    shape = Moe("deepseek-v3", 7168, 8, 256, tokens)
    refused = [v for m, v, _ in RUN if Backend().why_not(case(m, v, shape=shape, ranks=ranks))]
    assert [] == refused


# Signatures.


@pytest.mark.parametrize("name", sorted(mscclpp_fake.RECORD["functions"]))
def test_the_fake_has_the_recorded_signatures(name: str) -> None:
    """What the adapter passes to the fake it can pass to the library: names, order and kinds are recorded."""
    assert unlike(mscclpp_fake, name) is None


def test_every_case_has_a_bootstrap_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that carries a second communicator still maps what the first one freed."""
    cases = [
        case("low-latency", "expert-major"),
        case("normal", "throughput"),
        case("low-latency", "rank-major"),
    ]
    assert [] == failed(Job(monkeypatch).run(cases, whole))


def test_nothing_is_freed_that_a_peer_may_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks are done before the communicator goes, and it is gone on all before the bootstrap goes."""
    steps = Steps(monkeypatch)
    Job(monkeypatch).run(case("low-latency", "expert-major", ranks=2), whole)
    assert [["synchronize", *["barrier"] * 3]] * 2 == [mine[-4:] for mine in steps.of.values()]
