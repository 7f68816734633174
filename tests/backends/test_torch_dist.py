"""torch.distributed over real gloo ranks: every operation and exchange, judged by the oracle."""

from __future__ import annotations

import json
import subprocess
import threading
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from collectivex.backends.base import Context
from collectivex.backends.torch_dist import FACTS, Backend
from collectivex.runtime import fp8, oracle, routing
from collectivex.runtime.device import ManualDevice
from collectivex.runtime.problem import MoeProblem
from collectivex.runtime.processes import worker_command
from collectivex.runtime.ranks import ThreadRanks
from collectivex.runtime.types import COLLECTIVE_OPS, PROGRAM_OPS, Case, Collective, Moe

HEAD = """\
schema: collectivex.suite.v1
name: {}
description: {}
runs: 1
order: declared
deadline_s: 60
sampling: {{warmup_iterations: 1, warmup_s: 0, trials: 1, iterations: 2, chain_blocks: 4, chain_block: 1}}
groups:
"""
SUITE = (
    HEAD.format("gloo", "every path of torch_dist, small")
    + """\
  - family: collective
    ops: [all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, sendrecv]
    dtypes: [float32, bfloat16, float16]
    sizes: [4, 100, 4KiB]
    modes: [out-of-place]
    regimes: [fresh, chained]
  - family: collective
    ops: [all_reduce]
    dtypes: [float32, bfloat16]
    sizes: [100]
    modes: [in-place]
    regimes: [fresh, chained]
  - family: moe
    workloads: [tiny]
    dtypes: [bf16, fp8]
    tokens: [1, 9]
    modes: [normal, cached, low-latency]
    routing:
      - {kind: uniform}
      - {kind: zipf, skew: 1.2, spread: linear}
      - {kind: uniform, spread: one-empty}
    regimes: [fresh, chained]
    sampling: {checked_calls: 5}
"""
)


@pytest.fixture(scope="module", params=[1, 2, 4])
def run(request, tmp_path_factory) -> tuple[int, list[dict]]:
    return request.param, records_of("gloo", SUITE, request.param, tmp_path_factory)


def records_of(name: str, suite: str, ranks: int, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp(f"{name}{ranks}")
    (folder / f"{name}.yaml").write_text(suite)
    argv = worker_command()
    argv = argv[: argv.index("worker")]
    argv += ["run", "--suite", str(folder / f"{name}.yaml"), "--backend", "torch_dist"]
    argv += ["--ranks", str(ranks), "--out", str(folder / "out")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    files = list((folder / "out" / "cells").glob("*.json"))
    assert files, done.stderr
    return [json.loads(Path(file).read_text()) for file in files]


def test_every_operation_is_right_at_every_size_spread_and_dtype(run) -> None:
    """Sizes that divide over no ranks, ranks without tokens, skew: all proven, none skipped."""
    _, records = run

    wrong = {r["identity"]["case_id"]: r["reason"] for r in records if r["status"] != "ok"}
    assert {} == wrong
    assert 7 * 3 * 3 + 2 + 2 * 2 * 3 * 3 == len(records)


UNEVEN = (
    HEAD.format("uneven", "what has a root or split sizes")
    + """\
  - family: collective
    ops: [gather, scatter, all_to_all_v]
    dtypes: [float32, bfloat16, float16]
    sizes: [64, 1000, 4KiB]
    modes: [out-of-place]
    regimes: [fresh, chained]
"""
)


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def uneven(request, tmp_path_factory) -> tuple[int, list[dict]]:
    return request.param, records_of("uneven", UNEVEN, request.param, tmp_path_factory)


def test_what_has_a_root_or_split_sizes_is_right_on_every_number_of_ranks(uneven) -> None:
    """Sizes that divide over no ranks among them: all proven, none skipped, with the bytes of nccl-tests."""
    ranks, records = uneven

    wrong = {r["identity"]["case_id"]: r["reason"] for r in records if r["status"] != "ok"}
    assert {} == wrong
    assert 3 * 3 * 3 == len(records)
    moved = {r["bytes"]["size"] for r in records if r["case"]["shape"]["op"] == "all_to_all_v"}
    few, several = {64, 992, 4096}, {48, 960, 4080}  # of 64, 1000 and 4096 bytes
    assert (few if ranks < 3 else several) == moved
    assert {"hardware"} == {r["backend"]["validated"] for r in records}


def test_every_operation_has_run_on_cpus_and_on_nvidia_gpus_and_none_on_amd() -> None:
    """Of one name, mode and backend: told apart by the operation. The pattern of one program is not its."""
    for op in (*COLLECTIVE_OPS, *PROGRAM_OPS):
        case = Case("torch_dist", "", "out-of-place", Collective(op, 4096, "float32"), 4)
        variant = FACTS.variant(case)
        assert variant is not None
        assert {FACTS.proven(kind, variant) for kind in ("cpu", "cuda")} == {"hardware"}
        assert FACTS.proven("hip", variant) == "contract-only"
        reason = Backend().why_not(case)
        assert reason == ("torch_dist has no out-of-place hypercube" if op == "hypercube" else None)


def test_an_uneven_exchange_of_nothing_is_refused() -> None:
    """Below 16 bytes for each rank no part is left; a first byte more, and one is."""
    reasons = {
        size: Backend().why_not(
            Case("torch_dist", "", "out-of-place", Collective("all_to_all_v", size, "bfloat16"), 4)
        )
        for size in (63, 64)
    }

    said = "all_to_all_v rounds shares down to 16 bytes: nothing is left of 63 bytes"
    assert {63: said, 64: None} == reasons


def test_the_padded_exchange_says_what_it_puts_on_the_wire(run) -> None:
    """Every slot of every destination, filled or not: R * T rows of values, ids and weights."""
    ranks, records = run
    record = next(
        r
        for r in records
        if r["case"]["variant"] == "padded" and r["case"]["shape"]["tokens"] == 9
        if r["case"]["shape"]["dtype"] == "bf16"
    )

    shape = record["case"]["shape"]
    row = 2 * shape["hidden"] + 8 * shape["topk"]
    assert [ranks * 9 * row] * ranks == [wire["dispatch"] for wire in record["bytes"]["wire"]]


def test_a_single_rank_moves_nothing_to_others(run) -> None:
    """All rows of one rank are its own; of more ranks, what is sent is received."""
    ranks, records = run
    record = next(r for r in records if r["case"]["variant"] == "full")

    sent = [r["rows_sent"]["scale_up"] for r in record["bytes"]["ranks"]]
    received = [r["rows_received"]["scale_up"] for r in record["bytes"]["ranks"]]
    assert sum(sent) == sum(received)
    assert (ranks == 1) == (sum(sent) == 0)


@pytest.mark.parametrize(("op", "mode"), list(product(COLLECTIVE_OPS, ["out-of-place", "in-place"])))
def test_what_is_offered_in_place_is_all_reduce_alone(op, mode) -> None:
    """Everything else in place is refused in a sentence."""
    case = Case("torch_dist", "", mode, Collective(op, 1024, "float32"), 4)

    reason = Backend().why_not(case)

    assert (reason is None) == (mode == "out-of-place" or op == "all_reduce")
    assert reason is None or reason == f"torch_dist has no in-place {op}"


def test_experts_that_do_not_divide_are_refused() -> None:
    """One sentence with both numbers."""
    case = Case("torch_dist", "full", "normal", Moe("odd", 256, 2, 10, 4), 4)

    assert "10 experts cannot be divided over 4 ranks" == Backend().why_not(case)


def test_the_nccl_that_torch_was_compiled_with_is_not_its_version(monkeypatch) -> None:
    """Another may be loaded: the provenance's libraries tell which, from the mapped file."""
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 18, 5))
    backend, device = Backend(), ManualDevice()
    device.kind = "cuda"
    backend.setup(Context(ThreadRanks(0, 1, threading.Barrier(1), [None]), device, None))

    assert backend.versions() == {"torch": torch.__version__}


def test_every_window_is_declared() -> None:
    """What is inside each timed component is said, for every variant."""
    for variant in FACTS.variants:
        expected = {"call"} if variant.family == "collective" else {"dispatch", "combine"}
        assert expected == set(variant.window)


@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("variant", ["full", "cached", "padded"])
def test_fp8_rows_keep_the_format_of_the_device(monkeypatch, variant: str, name: str) -> None:
    """On gfx942 it is e4m3fnuz: the same bits read as e4m3fn would be half the value."""
    monkeypatch.setattr(fp8, "format_of", lambda device: fp8.FORMATS[name])
    shape = Moe("one", 256, 2, 8, 5, "fp8")
    case = Case("torch_dist", variant, next(v.mode for v in FACTS.variants if v.name == variant), shape, 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks, device = ThreadRanks(0, 1, threading.Barrier(1), [None]), ManualDevice()
        backend = Backend()
        backend.setup(Context(ranks, device, dist.group.WORLD))
        problem = MoeProblem.build(shape, ranks, routing.build(shape, 1), device)
        exchange = backend.moe(case, problem)
        assert fp8.FORMATS[name].dtype == exchange.received(exchange.dispatch()).rows.dtype
        found = FACTS.variant(case)
        assert found is not None
        checks = oracle.check_exchange(exchange, problem, found, 1, device)
    finally:
        dist.destroy_process_group()
    assert [] == [c for c in checks if not c.passed]
