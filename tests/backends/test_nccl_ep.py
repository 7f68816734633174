"""NCCL EP without a GPU: the adapter against the recorded signatures and a fake that keeps the rules."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import nccl_ep_fake
import pytest
import torch
from ep_fake import Rule, unlike
from exchange_job import failed, on_ranks, whole

from collectivex.backends import nccl_ep
from collectivex.backends.base import MissingLibrary
from collectivex.backends.nccl_ep import FACTS, Backend
from collectivex.runtime.types import Case, Moe, Routing

RUN = [(v.mode, v.name) for v in FACTS.variants]
MAPPED = "7f0000000000-7f0000001000 r-xp 00000000 08:01 {} /somewhere/{}/libnccl.so.2\n"


def case(mode: str, variant: str, dtype: str = "bf16", ranks: int = 4, **fields: Any) -> Case:
    spread = fields.pop("spread", "even")
    shape = fields.pop("shape", Moe("small", 2048, 3, 8, 3, dtype, Routing(spread=spread)))
    return Case("nccl_ep", variant, mode, shape, ranks, **fields)


class Job:
    """The ranks of one job as threads, with the fake in the place of the library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, **modules: Any):
        self.world = nccl_ep_fake.World()
        for name, module in self.world.modules(**modules).items():
            monkeypatch.setitem(sys.modules, name, module)
        stream = SimpleNamespace(cuda_stream=nccl_ep_fake.STREAM)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        self.maps = tmp_path / "maps"
        self.maps.write_text(MAPPED.format(11, "new"))
        monkeypatch.setattr(nccl_ep, "MAPS", str(self.maps))

    def run(self, asked: Case, work: Callable[..., Any]) -> list[Any]:
        return on_ranks(asked, Backend, work, self.world.place.enter)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Job:
    return Job(monkeypatch, tmp_path)


@pytest.mark.parametrize(("mode", "variant"), RUN)
def test_every_variant_passes_the_whole_oracle(job: Job, mode: str, variant: str) -> None:
    """Rows, ids, weights, sums and casts are exact; what came outlives combine; teardown is in order."""
    assert [] == failed(job.run(case(mode, variant), whole))
    for rank in range(4):
        assert ["handle", "group", "communicator"] == [what for r, what in job.world.log if r == rank]


@pytest.mark.parametrize("variant", ["expert-major", "rank-major"])
@pytest.mark.parametrize("spread", ["linear", "one-empty"])
def test_low_latency_ranks_may_have_fewer_tokens_or_none(job: Job, variant: str, spread: str) -> None:
    """Uneven tokens change nothing: the capacity is that of the fullest rank."""
    assert [] == failed(job.run(case("low-latency", variant, spread=spread), whole))


@pytest.mark.parametrize("mode", ["normal", "cached"])
def test_high_throughput_ranks_may_have_fewer_tokens(job: Job, mode: str) -> None:
    """Uneven tokens pass; a rank without any is refused beforehand, as the library would fail on it."""
    assert [] == failed(job.run(case(mode, "high-throughput", spread="linear", ranks=2), whole))
    with pytest.raises(Rule, match="without tokens"):
        job.run(case(mode, "high-throughput", spread="one-empty"), whole)


def test_the_routing_is_exchanged_in_the_window_unless_it_is_cached(job: Job) -> None:
    """New expert ids reach a normal dispatch; a cached one still has the old, and says so."""

    def work(exchange, problem, variant, device):
        problem.topk_idx.copy_((problem.topk_idx + 1) % problem.shape.experts)
        problem.barrier()
        exchange.dispatch()
        return exchange.counts.tolist()

    assert job.run(case("normal", "high-throughput"), work)
    with pytest.raises(Rule, match="last update"):
        job.run(case("cached", "high-throughput"), work)


def test_the_capacity_is_a_multiple_of_four(job: Job) -> None:
    """3 tokens get room for 4: the library copies metadata in 16-byte pieces."""
    found = job.run(case("normal", "high-throughput"), lambda e, p, v, d: (e.capacity, len(e.rows)))
    assert [(4, 16)] * 4 == found


def test_after_an_error_on_one_rank_close_waits_for_nobody(job: Job) -> None:
    """The other ranks are elsewhere: a collective teardown would turn a failure into a time-out."""

    def work(exchange, problem, variant, device):
        if problem.rank == 1:
            raise ValueError("only here")
        return whole(exchange, problem, variant, device)

    with pytest.raises(ValueError, match="only here"):
        job.run(case("low-latency", "expert-major"), work)
    assert [] == job.world.log


# Each rule of the contract, broken by an adapter that does one thing differently.


def broken(name: str) -> Callable[..., Any]:
    def work(exchange: Any, problem: Any, variant: Any, device: Any) -> Any:
        ep = exchange.ep
        if name == "two dispatches":
            exchange.dispatch()
        elif name == "weights at dispatch":
            exchange.inputs = ep.DispatchInputs(tokens=exchange.tokens, topk_weights=exchange.weights)
        elif name == "no weights":
            exchange.inputs = ep.DispatchInputs(tokens=exchange.tokens)
        elif name == "no weights at combine":
            exchange.into = ep.CombineOutputs(tokens=ep.Tensor(exchange.combined))
        elif name == "int64 ids":
            exchange.out.topk_idx = ep.Tensor(exchange.ids.long())
        elif name == "compact staging":
            exchange.stage = lambda state, rows: exchange.staged(rows)
        elif name == "other stream":
            torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
        elif name == "group first":
            exchange.group.destroy()
            exchange.handle.destroy()
        return whole(exchange, problem, variant, device)

    return work


@pytest.mark.parametrize(
    ("name", "mode", "variant", "rule"),
    [
        ("two dispatches", "low-latency", "expert-major", "in turns"),
        ("weights at dispatch", "low-latency", "expert-major", "at combine"),
        ("no weights at combine", "low-latency", "expert-major", "weights at combine"),
        ("compact staging", "low-latency", "expert-major", "dispatch layout"),
        ("no weights", "low-latency", "rank-major", "weights at dispatch"),
        ("int64 ids", "low-latency", "rank-major", "int32"),
        ("no weights", "normal", "high-throughput", "takes the weights"),
        ("other stream", "low-latency", "rank-major", "current stream"),
        ("group first", "cached", "high-throughput", "handle before group"),
    ],
)
def test_an_adapter_that_breaks_a_rule_is_caught(
    job: Job, monkeypatch, name: str, mode: str, variant: str, rule: str
) -> None:
    """The fake raises where the library would assert, hang or read the wrong rows."""
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.current_stream)  # put back afterwards
    with pytest.raises(Rule, match=rule):
        job.run(case(mode, variant), broken(name))


@pytest.mark.parametrize(("mode", "variant"), RUN[:1])
def test_the_declared_casts_are_those_of_the_kernels(job: Job, mode: str, variant: str) -> None:
    """Judged by partial sums cast on each rank, the expert-major exchange is red."""

    def work(exchange, problem, declared, device):
        return whole(exchange, problem, replace(declared, casts="rank-partials"), device)

    shape = Moe("small", 2048, 6, 8, 3, "bf16")
    assert any("combined" in f for f in failed(job.run(case(mode, variant, shape=shape), work)))


# What is loaded.


def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, **modules: Any) -> Job:
    job = Job(monkeypatch, tmp_path, **modules)
    nccl_ep._import()
    return job


def test_a_missing_library_is_said_with_what_to_do(monkeypatch) -> None:
    """Package, version and where it must stand are in the message."""
    for name in ("nccl", "nccl.core", "nccl.ep"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingLibrary, match=r"nccl.ep cannot be imported.*nccl4py==0\.3\.1"):
        nccl_ep._import()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"nccl4py": "0.4.0"}, "this is nccl4py 0.4.0"),
        ({"nccl": "2.28.9"}, "NCCL 2.28.9 is loaded, libnccl_ep needs 2.30"),
        ({"ep": None}, "libnccl_ep.so cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, tmp_path, modules: Any, message: str) -> None:
    """Another release, torch's own NCCL, no libnccl_ep: each is said as it is."""
    with pytest.raises(MissingLibrary, match=message):
        setup(monkeypatch, tmp_path, **modules)


def test_two_mapped_nccls_are_refused(monkeypatch, tmp_path) -> None:
    """The communicator of one and the kernels of the other would share nothing but their names."""
    job = setup(monkeypatch, tmp_path)
    job.maps.write_text(MAPPED.format(11, "new") + MAPPED.format(12, "old"))
    with pytest.raises(MissingLibrary, match="2 copies of NCCL are mapped.*new.*old"):
        nccl_ep._import()


def test_versions_are_those_of_the_loaded_libraries(job: Job) -> None:
    """Three versions and the name of the extension; no path of the machine."""
    library = Backend()
    library.nccl = sys.modules["nccl"]
    expected = {"nccl4py": "0.3.1", "nccl": "2.30.7", "nccl_ep": "0.1.0", "extension": "libnccl_ep.so"}
    assert expected == library.versions()


# What cannot run.


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (case("low-latency", "expert-major", "fp8"), "has no fp8"),
        (case("low-latency", "expert-major", shape=Moe("w", 1024, 3, 8, 3)), "hidden 2048, 2560.*not 1024"),
        (case("low-latency", "rank-major", shape=Moe("w", 2048, 10, 16, 3)), "at most 9 experts"),
        (case("low-latency", "rank-major", shape=Moe("w", 2048, 3, 256, 3), ranks=64), "at most 32 ranks"),
        (case("low-latency", "expert-major", shape=Moe("w", 7168, 8, 256, 8192)), "8192 tokens.*150 GB"),
        (case("low-latency", "expert-major", nodes=2), "GIN"),
        (case("normal", "high-throughput", shape=Moe("w", 2048, 3, 8, 8193)), "8192 tokens a rank"),
        (case("normal", "high-throughput", shape=Moe("w", 2044, 3, 8, 3)), "no multiple of 8"),
        (case("normal", "high-throughput", shape=Moe("w", 2048, 2, 6, 3), ranks=2), "multiple of 4 experts"),
        (case("cached", "high-throughput", spread="one-empty"), "a rank without tokens"),
        (case("cached", "high-throughput", knobs=(("num_sms", 8),)), "no knob"),
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
    assert [] == [v for m, v in RUN if Backend().why_not(case(m, v, shape=shape, ranks=ranks))]


# Signatures.


@pytest.mark.parametrize("name", sorted(set(nccl_ep_fake.RECORD["functions"]) - {"get_version"}))
def test_the_fake_has_the_recorded_signatures(name: str) -> None:
    """What the adapter passes to the fake it can pass to the library: names, order and kinds are recorded."""
    assert unlike(nccl_ep_fake, name) is None


@pytest.mark.parametrize(("mode", "variant"), RUN)
def test_there_is_room_for_all_that_all_ranks_may_send(job: Job, mode: str, variant: str) -> None:
    """Every token of every rank may come to one of them."""

    def work(exchange, problem, variant, device):
        config = exchange.group.config
        return config.max_recv_tokens_per_rank, config.max_dispatch_tokens_per_rank

    for received, sent in job.run(case(mode, variant), work):
        assert 4 * sent == received
