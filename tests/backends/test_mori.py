"""MoRI without AMD hardware: the adapter against the recorded signatures and a fake that keeps the rules."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import exchange_job
import mori_fake
import pytest
import torch
from exchange_job import failed, on_ranks

from collectivex.backends import _mori_exchange as exchange_module
from collectivex.backends import _mori_versions as versions
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.mori import FACTS, Backend
from collectivex.runtime import fp8, oracle
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.errors import UserError
from collectivex.runtime.ranks import ThreadRanks
from collectivex.runtime.types import Case, Moe, Routing

TAGS = ("v1.1.1", "v1.2.0", "v1.2.1", "v1.2.2")
REGISTER = "torch.distributed.distributed_c10d._register_process_group"
VARIANTS = [v.name for v in FACTS.variants]


def case(variant: str, dtype: str = "bf16", ranks: int = 4, **fields: Any) -> Case:
    found = next(v for v in FACTS.variants if v.name == variant)
    nodes = fields.pop("nodes", 2 if variant.startswith("internode") else 1)
    spread = fields.pop("spread", "even")
    shape = fields.pop("shape", Moe("small", 256, 4, 16, 9, dtype, Routing(spread=spread)))
    return Case("mori", variant, found.mode, shape, ranks, nodes, **fields)


class Job:
    """The ranks of one job as threads, with the fake in the place of the library."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ranks: int = 4, tag: str = "v1.2.2"):
        self.world = mori_fake.World(ranks, tag)
        for name, module in self.world.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(REGISTER, lambda name, group: self.world.groups.add(name))
        for name, value in FACTS.env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MORI_SHMEM_HEAP_SIZE", raising=False)

    def run(self, asked: Case, work: Callable[..., Any]) -> list[Any]:
        return on_ranks(asked, Backend, work, lambda ranks: "world")


def whole(*given: Any) -> list[Any]:
    return exchange_job.whole(*given, staged_once=False)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes_the_whole_oracle(monkeypatch, variant: str, dtype: str) -> None:
    """Rows, ids, weights, sums and casts are exact in every kernel, from the first call to a graph."""
    assert [] == failed(Job(monkeypatch).run(case(variant, dtype), whole))


@pytest.mark.parametrize("spread", ["linear", "one-empty"])
@pytest.mark.parametrize("variant", ["intranode", "intranode-ll-registered", "async-ll", "internode-v1"])
def test_ranks_may_have_fewer_tokens_or_none(monkeypatch, variant: str, spread: str) -> None:
    """Uneven tokens change nothing: buffers are as large as the fullest rank needs."""
    assert [] == failed(Job(monkeypatch).run(case(variant, spread=spread), whole))


def test_on_gfx942_rows_travel_in_the_fnuz_format(monkeypatch) -> None:
    """The format follows the device, not the name of the dtype: the largest fnuz value is 240, not 448."""
    monkeypatch.setattr(fp8, "format_of", lambda device: fp8.E4M3FNUZ)
    seen: list[Any] = []

    def work(exchange, problem, variant, device):
        seen.append((problem.amplitude, exchange.op.config.data_type))
        return whole(exchange, problem, variant, device)

    assert [] == failed(Job(monkeypatch).run(case("intranode", "fp8"), work))
    assert {(120, torch.float8_e4m3fnuz)} == set(seen)


def test_four_nodes_of_two_ranks_round_once_per_node(monkeypatch) -> None:
    """The V1 kernels cast what leaves a node: with `final` casts the same rows would be called wrong."""
    asked = case("internode-v1", ranks=8, nodes=4, shape=Moe("wide", 256, 8, 32, 40))

    def as_final(exchange, problem, variant, device):
        other = replace(variant, casts="final")
        return oracle.check_exchange(exchange, problem, other, 0, device)

    assert [] == failed(Job(monkeypatch, 8).run(asked, whole))
    assert failed(Job(monkeypatch, 8).run(asked, as_final))


# ------------------------------------------------------------------------------------------ rules, broken


class Positional(exchange_module.Exchange):
    def combine(self, state, staged):
        return self.op.combine(staged, None, self.indices)[0][: self.problem.tokens]


class WideIds(exchange_module.Exchange):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self.indices = self.indices.long()


class StridedIds(exchange_module.Exchange):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self.indices = self.indices.t().contiguous().t()


class ReceivedRouting(exchange_module.Exchange):
    def combine(self, state, staged):
        rows = state.experts[: int(state.total)].contiguous()
        out, _ = self.op.combine(input=staged, weights=None, indices=rows)
        return out[: self.problem.tokens]


class ForeignBuffer(exchange_module.Exchange):
    def stage(self, state, rows):
        return rows


class LateCount(exchange_module.Exchange):
    def received(self, state):
        state.combined = False
        return super().received(state)


class PlainAsync(exchange_module.Exchange):
    def dispatch(self):
        out = self.op.dispatch(
            input=self.problem.x,
            weights=self.weights,
            scales=None,
            indices=self.indices,
            **self.kernel.launch,
        )
        return exchange_module.State(*out)


class HalfCombine(exchange_module.Exchange):
    def combine(self, state, staged):
        launch = self.kernel.launch
        del launch["rdma_block_num"]
        out, _ = self.op.combine_send(input=staged, weights=None, indices=self.indices, **launch)
        return out[: self.problem.tokens]


class Immortal(exchange_module.Exchange):
    def close(self):
        return None


class Bare(exchange_module.Exchange):
    """Calls without their launch: what the configuration says then holds, and on newer tags not even that."""

    def dispatch(self):
        out = self.op.dispatch(
            input=self.problem.x,
            weights=self.weights,
            scales=None,
            indices=self.indices,
            block_num=self.kernel.block_num + 1,
        )
        return exchange_module.State(*out)


BREAKS = [
    (Positional, "intranode", "positional"),
    (WideIds, "intranode", "torch.int64"),
    (StridedIds, "intranode", "contiguous False"),
    (ReceivedRouting, "intranode", "routing that this rank dispatched with"),
    (ForeignBuffer, "intranode-registered", "registered buffer"),
    (ForeignBuffer, "intranode-ll-registered", "registered buffer"),
    (PlainAsync, "async-ll", "without a finished dispatch"),
    (HalfCombine, "async-ll", "dispatch twice"),
    (Immortal, "intranode", "operator lived"),
]


@pytest.mark.parametrize(("broken", "variant", "rule"), BREAKS, ids=lambda v: getattr(v, "__name__", v))
def test_an_adapter_that_breaks_a_rule_is_caught(monkeypatch, broken, variant, rule) -> None:
    """Each rule of the library has teeth: the same work with one line of the adapter changed fails."""
    monkeypatch.setattr(exchange_module, "Exchange", broken)
    job = Job(monkeypatch)
    kept: list[Any] = []

    def work(exchange, *rest):
        kept.append(exchange)
        return whole(exchange, *rest)

    with pytest.raises(mori_fake.Broken, match=rule):
        job.run(case(variant), work)


def test_a_count_read_after_combine_is_caught(monkeypatch) -> None:
    """combine zeroes the count: rows that came would look as if none had."""
    monkeypatch.setattr(exchange_module, "Exchange", LateCount)

    assert any(
        "missing" in text or "row" in text for text in failed(Job(monkeypatch).run(case("intranode"), whole))
    )


def test_a_launch_other_than_promised_is_caught(monkeypatch) -> None:
    """What `realised` says is compared with what the library says it launched."""
    monkeypatch.setattr(exchange_module, "Exchange", Bare)

    with pytest.raises(
        RuntimeError, match=r"launched dispatch with \(81, 0, 16\), it had promised \(80, 0, 16\)"
    ):
        Job(monkeypatch).run(case("intranode"), whole)


def test_nobody_dispatches_before_all_have_their_buffers(monkeypatch) -> None:
    """Without the barrier after construction a fast rank would write into memory that is not there yet."""
    job = Job(monkeypatch)

    def work(exchange, problem, variant, device):
        exchange.combine(exchange.dispatch(), torch.zeros(40, 256, dtype=torch.bfloat16))

    job.run(case("intranode"), work)
    monkeypatch.setattr(ThreadRanks, "barrier", lambda self: None)
    with pytest.raises(mori_fake.Broken, match="not allocated"):
        Job(monkeypatch).run(case("intranode"), work)


def test_the_process_group_is_registered_as_default(monkeypatch) -> None:
    """MoRI looks the group up by name; under another name it finds none."""
    job = Job(monkeypatch)
    monkeypatch.setattr(REGISTER, lambda name, group: None)

    with pytest.raises(mori_fake.Broken, match="registered as 'default'"):
        job.run(case("intranode"), whole)


def test_the_heap_goes_once_on_every_rank_after_the_operators(monkeypatch) -> None:
    """Teardown in order, so that no process aborts after its results are written."""
    job = Job(monkeypatch)
    job.run(case("intranode"), whole)
    gc.collect()

    assert 4 == job.world.finalized
    assert {0} == set(job.world.alive.values())


# ------------------------------------------------------------------------------------------------- knobs


def realised(exchange: Any, *rest: Any) -> dict[str, Any]:
    return dict(exchange.realised)


def test_the_launch_asked_for_is_the_launch_realised(monkeypatch) -> None:
    """Knobs reach the library; what it says it applies is what is recorded."""
    asked = case("intranode", knobs=(("block_num", 64), ("warps", 4)))

    (first, *_) = Job(monkeypatch).run(asked, realised)

    assert {"block_num": 64, "rdma_block_num": 0, "warps": 4} == {
        k: first[k] for k in ("block_num", "rdma_block_num", "warps")
    }
    assert ("IntraNode", "external", "MANUAL") == (
        first["kernel"],
        first["combine_input"],
        first["launch_mode"],
    )


def test_an_automatic_launch_shows_in_what_is_realised(monkeypatch) -> None:
    """With AUTO the library ignores what a call asks for: the result then differs from the knob."""
    job = Job(monkeypatch)
    monkeypatch.setenv("MORI_EP_LAUNCH_CONFIG_MODE", "AUTO")

    (first, *_) = job.run(case("intranode", knobs=(("block_num", 64),)), realised)

    assert (128, "AUTO") == (first["block_num"], first["launch_mode"])
    assert "MANUAL" == FACTS.env["MORI_EP_LAUNCH_CONFIG_MODE"]


def test_what_moves_async_rows_is_recorded(monkeypatch) -> None:
    """SDMA engines or compute units: the pool decides, the result tells."""
    job = Job(monkeypatch)
    monkeypatch.setenv("MORI_ENABLE_SDMA", "1")

    assert "1" == job.run(case("async-ll"), realised)[0]["sdma"]


# ---------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize("tag", TAGS)
def test_every_recorded_tag_is_recognised_and_driven(monkeypatch, tag: str) -> None:
    """The same calls fit every tag that the adapter claims, by name and by nothing else."""
    job = Job(monkeypatch, tag=tag)
    library = Backend()

    assert [] == failed(job.run(case("intranode"), whole))
    job.world.groups.add("default")
    library.setup(Context(ThreadRanks(0, 1, job.world.barrier, [None]), ManualDevice(), "world"))
    assert tag in library.versions()["mori signatures"]
    assert ("unknown" if tag == "v1.1.1" else tag[1:]) == library.versions()["mori"]


def test_recorded_digests_are_those_of_the_recorded_signatures() -> None:
    """The adapter carries digests only; they are made from the files that were read from the sources."""
    digests = {tag: versions.digest(mori_fake.record(tag)) for tag in (*TAGS, "v1.1.0")}

    assert {digests[tag] for tag in TAGS} == set(versions.RECORDED)
    assert all(tag in versions.RECORDED[digests[tag]] for tag in TAGS)
    assert [digests["v1.1.0"]] == list(versions.REFUSED)


def test_a_tag_that_hides_its_launch_is_refused(monkeypatch) -> None:
    """v1.1.0 cannot prove what it launched."""
    with pytest.raises(MissingLibrary, match=r"v1\.1\.0 does not tell"):
        Job(monkeypatch, tag="v1.1.0").run(case("intranode"), whole)


def test_a_library_without_a_parameter_we_pass_is_named(monkeypatch) -> None:
    """A renamed parameter is one sentence before anything runs, not a TypeError in the middle."""
    job = Job(monkeypatch)
    parameters = [p for p in job.world.record["op"]["combine"] if p[0] != "rdma_block_num"]
    job.world.record["op"]["combine"] = parameters
    for name, module in job.world.modules().items():
        monkeypatch.setitem(sys.modules, name, module)

    with pytest.raises(MissingLibrary, match=r"has no combine\(rdma_block_num\)"):
        job.run(case("intranode"), whole)


def test_an_unrecorded_library_with_all_parameters_is_driven_and_labelled(monkeypatch) -> None:
    """A new optional parameter does no harm; the result says that nobody has recorded this version."""
    job = Job(monkeypatch)
    job.world.record["op"]["combine"].append(["novelty", "keyword", "None"])
    for name, module in job.world.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    ops, shmem = sys.modules["mori.ops"], sys.modules["mori.shmem"]

    assert [] == failed(job.run(case("intranode"), whole))
    assert versions.identify(ops, shmem).startswith("unrecorded-")


def test_a_kernel_that_a_tag_lacks_is_named(monkeypatch) -> None:
    """IntraNodeLL came with v1.2.0."""
    with pytest.raises(MissingLibrary, match=r"has no IntraNodeLL; it came with v1\.2\.0"):
        Job(monkeypatch, tag="v1.1.1").run(case("intranode-ll"), whole)


def test_a_missing_library_says_how_to_get_it(monkeypatch) -> None:
    """Where to build it from, and at which tag."""
    monkeypatch.setitem(sys.modules, "mori", None)

    with pytest.raises(MissingLibrary, match=r"build https://github.com/ROCm/mori at v1\.2\.2"):
        Backend().setup(Context(ThreadRanks(0, 1, None, [None]), ManualDevice()))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ limits

DEEPSEEK = Moe("deepseek-v3", 7168, 8, 256, 128)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (case("intranode", nodes=2), "mori intranode works within one node; 2 were asked for"),
        (
            case("internode-v1", nodes=1),
            "mori internode-v1 is for two nodes or more; intranode is the kernel for one",
        ),
        (
            case("intranode", ranks=16, shape=DEEPSEEK),
            "mori has room for 8 ranks a node; 16 were asked for",
        ),
        (
            case("async-ll", ranks=6, shape=replace(DEEPSEEK, experts=252)),
            "mori needs a power of two of ranks a node; 6 were asked for",
        ),
        (
            case("intranode-ll", shape=replace(DEEPSEEK, topk=9)),
            "mori IntraNodeLL looks at 8 picks of a token only; top-k is 9",
        ),
        (
            case("intranode", shape=replace(DEEPSEEK, topk=64)),
            "mori takes fewer than 64 picks a token; top-k is 64",
        ),
        (case("intranode", shape=replace(DEEPSEEK, tokens=0)), "mori needs room for one token at least"),
        (case("intranode", ranks=8, shape=replace(DEEPSEEK, topk=9)), None),
        (case("internode-v1-ll", ranks=32, nodes=4, shape=DEEPSEEK), None),
    ],
)
def test_each_limit_is_one_sentence(asked: Case, reason: str | None) -> None:
    """What the kernels cannot do is said on a laptop, before anything is allocated."""
    assert reason == Backend().why_not(asked)


def test_a_ninth_pick_really_is_lost_by_intranode_ll(monkeypatch) -> None:
    """The limit stands for a wrong answer: without it, the oracle finds tokens that never came."""
    asked = case("intranode-ll", shape=Moe("nine", 256, 9, 36, 40))

    assert any(
        "came 0 times, expected 1" in text for text in failed(Job(monkeypatch).run(asked, first_check))
    )


def first_check(exchange: Any, problem: Any, variant: Any, device: Any) -> list[Any]:
    received = exchange.received(exchange.dispatch())
    return oracle.check_dispatch(received, problem, variant, 0)


def test_the_heap_is_computed_as_the_library_allocates_it() -> None:
    """By hand, IntraNode, R=8, H=7168, K=8, M=4096, bf16: the reference gives half of 1.87 GiB for 2 bytes an
    element, for values alone; ids, weights and source maps come on top."""
    shape = replace(DEEPSEEK, tokens=4096)
    rows = 8 * 4096
    xfer = 7168 * 2 + 8 * 4 * 2 + 4
    by_hand = rows * xfer + rows * 14336 + 4096 * 14336 + 5 * rows * 32 + rows * 32 * 4

    assert by_hand == exchange_module.heap_bytes(shape, 8, 8, "IntraNode")
    assert 0.93 < by_hand / 2**30 < 0.96


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({}, True),
        ({"MORI_SHMEM_HEAP_SIZE": "2G"}, True),
        ({"MORI_SHMEM_HEAP_SIZE": "512M"}, False),
        ({"MORI_SHMEM_HEAP_SIZE": "512MiB", "MORI_SHMEM_MODE": "isolation"}, True),
        ({"MORI_SHMEM_HEAP_SIZE": "1GiB", "MORI_SHMEM_MODE": "vmm_heap"}, True),
    ],
)
def test_a_heap_too_small_is_refused_before_the_library_aborts(settings: dict[str, str], fits: bool) -> None:
    """The pool says what its NIC can register; a case beyond it names both figures."""
    shape = replace(DEEPSEEK, tokens=4096)
    if fits:
        exchange_module.check_heap(shape, 8, 8, "IntraNode", settings)
        return
    with pytest.raises(UserError, match=r"needs 0\.9\d GiB of symmetric heap, it has 0\.50 GiB"):
        exchange_module.check_heap(shape, 8, 8, "IntraNode", settings)


def test_the_pools_heap_size_reaches_the_check(monkeypatch) -> None:
    """MORI_SHMEM_HEAP_SIZE is read where a library would read it: from the process environment."""
    job = Job(monkeypatch)
    monkeypatch.setenv("MORI_SHMEM_HEAP_SIZE", "1K")

    with pytest.raises(UserError, match="0.00 GiB"):
        job.run(case("intranode"), whole)


def test_it_is_labelled_as_never_run_on_its_hardware() -> None:
    """Until it has run there, every place that shows it says so; it offers itself for AMD devices alone."""
    assert ("contract-only", ("hip",), "int32") == (FACTS.proven("hip"), FACTS.devices, FACTS.index_dtype)
