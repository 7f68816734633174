"""symm_mem: what it declares, how it lays out memory; then the real backend and its kernels on processes that
share memory, in Triton's interpreter, under the oracle. Without GPUs the kernels still compile for them.
"""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectivex.backends import symm_mem
from collectivex.backends._symm_exchange import combine_launch, dispatch_launch
from collectivex.backends._symm_window import Kernel, Window
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.symm_mem import Backend
from collectivex.runtime import routing
from collectivex.runtime.device import CpuDevice
from collectivex.runtime.ranks import run_threads
from collectivex.runtime.types import MODES, Case, Collective, Moe

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parents[1] / "backends").glob("*symm*.py"))
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton (a CPU is enough)"
)


def moe(
    mode: str = "low-latency", hidden: int = 7168, ranks: int = 4, nodes: int = 1, dtype: str = "bf16"
) -> Case:
    return Case("symm_mem", "one-sided", mode, Moe("x", hidden, 8, 256, 128, dtype), ranks, nodes)


def all_reduce(
    variant: str, size: int, dtype: str = "bfloat16", mode: str = "in-place", ranks: int = 4
) -> Case:
    return Case("symm_mem", variant, mode, Collective("all_reduce", size, dtype), ranks)


# --- what it declares


def test_every_mode_and_placement_is_offered():
    """The exchange in all MoE modes, both all-reduces in and out of place, all graph-safe."""
    variants = symm_mem.FACTS.variants

    assert {v.mode for v in variants if v.family == "moe"} == set(MODES["moe"])
    reduces = {(v.name, v.mode) for v in variants if v.family == "collective"}
    assert reduces == {(name, mode) for name in ("one-shot", "two-shot") for mode in MODES["collective"]}
    assert all(v.graph_safe for v in variants)


@pytest.mark.parametrize("mode", MODES["moe"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_deepseek_shapes_are_possible(mode: str, dtype: str, ranks: int):
    """Nothing is refused of the shapes that the suites ask for on one node."""
    assert Backend().why_not(moe(mode, ranks=ranks, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (moe(nodes=2, ranks=8), "one node"),
        (moe(hidden=7172), "multiple of 8"),
        (moe(ranks=128), "64 ranks"),
        (all_reduce("one-shot", 64 << 20), "16 MiB"),
        (all_reduce("two-shot", 1000), "16-byte words"),
        (all_reduce("two-shot", 1 << 20, ranks=3), "3 ranks"),
    ],
)
def test_limits_are_told_in_a_sentence(case: Case, words: str):
    """A case beyond a limit is refused with the limit, on a machine without torch symmetric memory."""
    reason = Backend().why_not(case)

    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("size", [1024, 16 << 20])
@pytest.mark.parametrize("variant", ["one-shot", "two-shot"])
def test_sizes_of_the_suite_are_possible(variant: str, size: int):
    """Both all-reduces take the sizes of collectives-core up to the limit of one-shot."""
    assert Backend().why_not(all_reduce(variant, size)) is None


def test_multicast_is_off_and_never_named():
    """The environment switches multicast off before torch is imported, and no code path could use it."""
    assert symm_mem.FACTS.env["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    assert symm_mem.FACTS.env["TORCH_SYMMMEM"] == "CUDA"
    assert len(SOURCES) == 5
    for source in SOURCES:
        assert re.search(r"multimem|multicast_ptr|inline_asm", source.read_text()) is None, source


def test_without_triton_the_library_is_missing(monkeypatch: pytest.MonkeyPatch):
    """Set-up says what is needed instead of failing at the first kernel."""
    monkeypatch.setitem(sys.modules, "triton", None)

    with pytest.raises(MissingLibrary, match="needs Triton"):
        Backend().setup(Context(SimpleNamespace(), CpuDevice()))


def test_torch_has_what_is_called():
    """Signatures of the installed torch (2.9 to 2.13) for the calls that Window makes."""
    import torch.distributed._symmetric_memory as symmetric
    from torch._C._distributed_c10d import _SymmetricMemory

    inspect.signature(symmetric.empty).bind(16, dtype=torch.uint8, device=torch.device("cpu"))
    inspect.signature(symmetric.rendezvous).bind(torch.empty(0), "group")
    assert callable(_SymmetricMemory.get_buffer)


# --- launches


@given(st.integers(4, 2048).map(lambda n: 8 * n), st.integers(1, 8192))
def test_programs_cover_every_column_and_no_more_tokens_than_there_are(hidden: int, tokens: int):
    """The parts of a row reach its end, in tiles that fit registers; groups do not outnumber tokens."""
    for launch, most in ((dispatch_launch(hidden, tokens), 264), (combine_launch(hidden, tokens), 1056)):
        columns = launch.columns(hidden)
        assert columns["PARTS"] * columns["CHUNK"] >= hidden
        assert columns["CHUNK"] % 128 == 0
        assert columns["CHUNK"] <= columns["TILE"] <= 8192
        assert columns["TILE"] & (columns["TILE"] - 1) == 0
        assert 1 <= launch.groups <= tokens
        assert launch.programs <= max(most, launch.parts)


# --- the window


KERNELS = SimpleNamespace(CONTROL=64, UNIT=128)


def windows(size: int, make) -> list:
    """`make(context, symmetric)` on ranks that are threads, with the fake's rules."""
    from symm_ranks import Symmetric

    arenas = [torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(size)]

    def one(ranks):
        context = Context(ranks, CpuDevice(), Symmetric.GROUP)
        return make(context, Symmetric(ranks, [a[-a.data_ptr() % 128 :] for a in arenas]))

    return run_threads(size, one)


@pytest.fixture(autouse=True)
def _helpers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))


def test_peers_are_found_by_distance():
    """Our address plus a distance is the same place in that rank's buffer, in both directions."""
    made = windows(3, lambda context, symmetric: Window(context, symmetric, KERNELS, 4096))

    bases = [window.buffer.data_ptr() for window in made]
    for mine, window in zip(bases, made, strict=True):
        assert [mine + 128 * distance for distance in window.peers.tolist()] == bases


def test_regions_are_apart_and_counters_start_at_zero():
    """Named regions neither touch each other nor the control block; laying out again zeroes the counters."""
    regions = {"a": 100, "b": 0, "c": 512}
    size = Window.needed(KERNELS, regions)

    def make(context, symmetric):
        window = Window(context, symmetric, KERNELS, size)
        window.lay_out(regions)
        window.control.fill_(7)
        window.region("a", (5, 5), torch.float32).fill_(1)
        window.region("c", (256,), torch.bfloat16).fill_(2)
        kept = window.region("a", (25,), torch.float32).tolist(), window.control.tolist()
        window.lay_out({"all": 512})
        return kept, window.control.tolist(), window.buffer.numel()

    for (floats, words), zeroed, bytes_ in windows(2, make):
        assert floats == [1.0] * 25
        assert words == [7] * 64
        assert zeroed == [0] * 64
        assert bytes_ == size


@pytest.mark.parametrize(("name", "shift"), [("elsewhere", 256), ("unaligned", 16)])
def test_buffers_that_are_not_alike_are_refused(name: str, shift: int):
    """A tensor at another offset than the peers', or addresses apart by no whole number of lines: no pointer
    arithmetic could be right, so no kernel runs."""

    def make(context, symmetric):
        if name == "elsewhere" and context.ranks.rank == 1:
            fake, buffer = symmetric.rendezvous, torch.zeros(8192, dtype=torch.uint8)
            symmetric.empty = lambda size, **_: buffer
            real = symmetric.arenas[1][:4096]
            symmetric.fresh[real.data_ptr()] = 0
            symmetric.rendezvous = lambda tensor, group: fake(real, group)
        if name == "unaligned":
            symmetric.arenas = [arena[shift * rank :] for rank, arena in enumerate(symmetric.arenas)]
        return Window(context, symmetric, KERNELS, 4096)

    with pytest.raises(RuntimeError, match="not laid out alike"):
        windows(2, make)


def test_a_compiled_kernel_gets_its_arguments_in_the_order_of_its_parameters():
    """Arguments, then the constants wherever they were written; the grid has three dimensions."""

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launched.append((grid, arguments))

    class Function:
        arg_names = ("x", "count", "A", "B")

        def warmup(self, *given, **options):
            warmed.append((given, options))
            return Compiled()

    launched, warmed = [], []
    kernel = Kernel(Function(), 5, 8, ("x", 3), {"B": 2, "A": 1})
    kernel()
    kernel()

    assert warmed == [(("x", 3), {"grid": (5,), "num_warps": 8, "A": 1, "B": 2})]
    assert launched == [((5, 1, 1), ("x", 3, 1, 2))] * 2


# --- the backend and its kernels, interpreted


def run(script: str, *arguments: str, **env: str) -> dict:
    argv = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout=400
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def two_ranks() -> dict:
    names = "modes shapes launches counted skew collectives wire turns absent".split()
    return run("symm_ranks.py", "2", *names, TRITON_INTERPRET="1")


def assert_green(of_ranks: list[dict[str, list]], checks: int) -> None:
    """Every rank ran that many checks of every kind, and none failed."""
    for rank, found in enumerate(of_ranks):
        for name, (count, failed) in found.items():
            assert failed == [], f"rank {rank}, {name}"
            assert count == checks, name


@needs_triton
def test_every_mode_and_dtype_passes_the_oracle(two_ranks: dict):
    """Payload bit for bit, sources, experts, weights, combined rows, inputs, and repeated calls."""
    assert_green(two_ranks["modes"], 15)
    assert len(two_ranks["modes"][0]) == 6


@needs_triton
def test_odd_shapes_pass_the_oracle(two_ranks: dict):
    """One token, fp8 rows in parts, a part that ends within a block of columns, uneven and missing tokens."""
    assert_green(two_ranks["shapes"], 15)


@needs_triton
def test_any_launch_gives_the_right_rows(two_ranks: dict):
    """Slots count on over several tokens of a program and over idle programs."""
    assert_green(two_ranks["launches"], 7)


@needs_triton
def test_rows_are_counted_over_blocks_of_tokens(two_ranks: dict):
    """Before no token, within a block, at its end and beyond it, with a pick that is none."""
    for found, expected in two_ranks["counted"][0]:
        assert found == expected


@needs_triton
def test_late_ranks_read_no_stale_or_early_rows(two_ranks: dict):
    """12 pairs without a barrier, ranks late in turns, input that changes: nothing is lost or overwritten."""
    assert_green([{"skew": found} for found in two_ranks["skew"]], 72)


@needs_triton
def test_all_reduces_are_exact(two_ranks: dict):
    """Both kinds, in place and out of place, three dtypes, four calls each over the same buffers."""
    assert_green(two_ranks["collectives"], 8)
    assert len(two_ranks["collectives"][0]) == 12


@needs_triton
def test_three_ranks_pass_the_oracle():
    """A number of ranks that is no power of two: vectors over ranks have a lane too many."""
    found = run("symm_ranks.py", "3", "skew", "collectives", TRITON_INTERPRET="1")

    assert_green([{"skew": checks} for checks in found["skew"]], 72)
    assert_green(found["collectives"], 8)


@needs_triton
def test_wire_bytes_are_those_of_the_routing(two_ranks: dict):
    """Rows to the other rank times row, scale and metadata bytes, a count, and a signal of each program."""
    table = routing.build(Moe("test", 128, 4, 8, 6, "fp8"), 2)
    to = [[int((ids // 4 == there).any(1).sum()) for there in range(2)] for ids in table.experts]

    for rank, found in enumerate(two_ranks["wire"]):
        other = 1 - rank
        assert found["counts"] == [to[0][rank], to[1][rank]]
        # fp8: 128 bytes and a float32 scale; 4 ids, 4 weights and a number are 9 words, padded to 12
        dispatch = to[rank][other] * (128 + 4 + 12 * 4) + 4 + 4 * found["programs"]
        assert found["wire"] == {"dispatch": dispatch, "combine": to[other][rank] * 2 * 128 + 4}


@needs_triton
def test_calls_out_of_turn_are_refused(two_ranks: dict):
    """A second dispatch, staged rows that have been overwritten, a second combine."""
    for said in two_ranks["turns"]:
        assert [words in text for words, text in zip(("again", "overwritten", "without"), said, strict=True)]


@needs_triton
def test_a_rank_that_stays_away_ends_the_wait_once(two_ranks: dict):
    """The other rank gives up after its polls and says so; its next call does not wait for them again."""
    found = two_ranks["absent"][0]

    assert "no signal from all peers within 5000 polls" in found["said"]
    assert found["seconds"][1] < found["seconds"][0] / 3


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return run("symm_compiled.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@needs_triton
def test_kernels_compile_for_nvidia_and_move_16_byte_words(compiled: dict):
    """For sm_90, as the backend calls them: rows in 16-byte words, release and acquire of system scope."""
    assert len(compiled) == 8
    for name, targets in compiled.items():
        found = targets["sm_90"]["instructions"]
        assert [word for word in found if re.search(r"\.b(8|16)$", word)] == [], name
        atomics = {word.split(".", 1)[1] for word in found if word.startswith(("atom", "red"))}
        assert atomics == {"global.sys.release.add.u32"}, name
        assert found["ld.global.sys.acquire.b32"] >= 2, name
        assert found["ld.global.v4.b32"] >= 2, name
        assert found["st.global.v4.b32"] >= 1, name


@needs_triton
def test_kernels_compile_for_amd_without_assuming_that_peers_are_near(compiled: dict):
    """For gfx942: nothing spilled, wide words, and no window whose addresses are taken to be within 2 GiB."""
    windows = {"rows", "scales", "meta", "control", "staged", "inbox", "result"}
    for name, targets in compiled.items():
        found = targets["gfx942"]
        assert found["spilled"] == 0, name
        assert [w for w in found["instructions"] if re.search(r"(byte|short)$", w)] == [], name
        assert "private" in found["bounded"], "the assumption has another name: look again"
        assert windows & set(found["bounded"]) == set(), name


@needs_triton
def test_compiled_kernels_are_launched_with_every_argument(compiled: dict):
    """What the driver is handed counts as many arguments as the kernel has parameters."""
    for targets in compiled.values():
        for found in targets.values():
            assert found["arguments"] == found["parameters"]
