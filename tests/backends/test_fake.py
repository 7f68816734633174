"""The fake: honest it is right in every model, and every fault of its table turns the oracle red."""

import gzip
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from exchange_job import failed
from faking import (
    check_collective,
    check_moe,
    check_moe_repeated,
    collective_case,
    moe_case,
    on_ranks,
)

from collectivex.backends import fake
from collectivex.backends._fake_plan import Plan
from collectivex.backends._fake_rows import BREAKS
from collectivex.backends.base import Context, MissingLibrary
from collectivex.backends.fake import FAULTS, Backend
from collectivex.runtime.device import CpuDevice, ManualDevice
from collectivex.runtime.errors import UserError
from collectivex.runtime.ranks import run_threads
from collectivex.runtime.types import COLLECTIVE_OPS, MODES, Case, Moe, Routing

MODELS = ("rank-sum", "expert-sum", "weighted-sum", "expert-sum-partials", "weighted-sum-partials")
CHECKED = ("dispatch", "combine", "inputs")
# How many calls it takes until a fault has struck.
CALLS = {"corruption-1-in-70": 70, "late-corruption": 51}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("model", MODELS)
def test_an_honest_exchange_is_green(model: str, dtype: str, ranks: int):
    """Every layout, combine model, cast, dtype and number of ranks; uneven and empty ones; all modes."""
    for spread, mode in (("even", "normal"), ("linear", "low-latency"), ("one-empty", "cached")):
        case = moe_case(model, dtype, ranks, spread=spread, mode=mode)

        assert Backend().why_not(case) is None
        assert failed(check_moe(case)) == []


@pytest.mark.parametrize("model", MODELS)
def test_honest_repeated_calls_are_green(model: str):
    """The fast form of the check raises no false alarm, with a rank without tokens either."""
    for dtype in ("bf16", "fp8"):
        assert failed(check_moe_repeated(moe_case(model, dtype, 2, spread="one-empty"), 7)) == []


def test_a_rank_that_receives_nothing_is_green():
    """One token, one pick: three of four ranks receive no row at all, and still stage and combine."""
    shape = Moe("tiny", 32, 1, 16, 1, "bf16", Routing(spread="one-empty"))

    assert failed(check_moe(moe_case(shape=shape))) == []
    assert failed(check_moe_repeated(moe_case(shape=shape), 3)) == []


def test_no_tokens_at_all_is_green():
    """T = 0 on every rank: nothing to send, nothing wrong."""
    shape = Moe("none", 256, 4, 16, 0, "fp8")

    assert failed(check_moe(moe_case(shape=shape, ranks=2))) == []
    assert failed(check_moe_repeated(moe_case(shape=shape, ranks=2), 2)) == []


@pytest.mark.parametrize("mode", MODES["collective"])
@pytest.mark.parametrize("op", COLLECTIVE_OPS)
def test_honest_collectives_are_green(op: str, mode: str):
    """Every operation, dtype and number of ranks, from the least size up."""
    for ranks in (1, 2, 4):
        for dtype, size in (("float32", 4000), ("bfloat16", 2), ("float16", 998)):
            if op == "all_to_all_v":
                size = max(size, 16 * ranks)
            case = collective_case(op, dtype, ranks, mode=mode, size=size)

            assert Backend().why_not(case) is None
            assert failed(check_collective(case, 3)) == []


def moe_faults() -> list[str]:
    return [name for name, fault in FAULTS.items() if fault.kind in CHECKED and "moe" in fault.families]


def meaningful(case: Case) -> bool:
    return Backend().why_not(case) is None


@pytest.mark.parametrize("name", moe_faults())
def test_every_moe_fault_turns_the_oracle_red(name: str):
    """In every combine model and dtype where the fault means something; and it does in some."""
    ranks = 1 if name in CALLS else 2
    cases = [moe_case(model, "bf16", ranks, fault=name) for model in MODELS]
    cases += [moe_case("weighted-sum", "fp8", ranks, fault=name)]
    cases += [moe_case("expert-sum", "fp8", ranks, fault=name, mode="low-latency")]
    cases += [moe_case("rank-sum", "bf16", 1, fault=name, mode="low-latency")]
    cases += [moe_case("rank-sum", "bf16", 4, fault=name)] if ranks > 1 else []
    cases = [case for case in cases if meaningful(case)]

    assert cases
    for case in cases:
        assert failed(check_moe_repeated(case, CALLS[name]) if name in CALLS else check_moe(case))


@pytest.mark.parametrize("name", sorted(set(moe_faults()) - {"wrong-count", "wrong-source"}))
def test_every_moe_fault_turns_the_repeated_check_red(name: str):
    """Also what only dispatch does wrong. Not looked at are reported counts and sources."""
    for model, dtype in (("rank-sum", "bf16"), ("weighted-sum", "fp8")):
        case = moe_case(model, dtype, 1 if name in CALLS else 2, fault=name)
        if meaningful(case):
            assert failed(check_moe_repeated(case, CALLS.get(name, 3)))


@pytest.mark.parametrize(
    "name", [n for n, fault in FAULTS.items() if fault.kind in CHECKED and "collective" in fault.families]
)
def test_every_collective_fault_turns_the_oracle_red(name: str):
    """In every operation, in place and out of place, where the fault means something; and it does in some."""
    ranks = 2 if name in CALLS else 4
    cases = [
        collective_case(op, "float32", ranks, fault=name, mode=mode)
        for op in COLLECTIVE_OPS
        for mode in MODES["collective"]
    ]
    cases = [case for case in cases if meaningful(case)]

    assert cases
    for case in cases:
        assert failed(check_collective(case, CALLS.get(name, 2)))


def test_every_fault_is_proven_somewhere():
    """A new fault is of a kind that a test here proves, and what it breaks exists."""
    proven_elsewhere = {"knobs", "process", "time"}

    for name, fault in FAULTS.items():
        assert fault.kind in {*CHECKED, *proven_elsewhere}
        assert fault.families
        if fault.kind == "dispatch":
            assert name == "stale-dispatch" or name in BREAKS
    assert set(BREAKS) <= set(FAULTS)
    assert len(moe_faults()) >= 20


def test_a_corruption_of_one_call_in_70_is_found_in_300():
    """The oracle sees every strike and names the first; 300 calls miss such a rate once in 75."""
    (detail,) = failed(check_moe_repeated(moe_case("weighted-sum", ranks=1, fault="corruption-1-in-70"), 300))

    assert "4 of 300 calls wrong; first: call 69: 1 combined rows wrong, first: token 11" in detail
    assert math.isclose((1 - 1 / 70) ** 300, 0.0133, rel_tol=0.01)


def test_the_corruption_keeps_the_norm_of_the_row():
    """Like the real one (DeepEP issue 700): no NaN, the norm right, only an elementwise check can see it."""

    def outputs(fault: str | None) -> torch.Tensor:
        def work(exchange, problem, variant, device):
            state = exchange.dispatch()
            rows = fake_step(exchange.received(state), problem, variant)
            return exchange.combine(state, exchange.stage(state, rows)).clone()

        return on_ranks(moe_case(ranks=1, fault=fault), work)[0]

    from collectivex.runtime.experts import expert_step as fake_step

    good, bad = outputs(None), outputs("late-corruption@0")

    assert not torch.equal(good, bad)
    assert torch.equal(good.float().norm(dim=1), bad.float().norm(dim=1))


def test_a_fault_can_start_later():
    """`nan@2`: the third call is the first bad one."""
    (detail,) = failed(check_moe_repeated(moe_case(ranks=1, fault="nan@2"), 5))

    assert "3 of 5 calls wrong; first: call 2" in detail


def test_an_ignored_knob_shows_in_what_was_realised():
    """Requested and realised differ, for both families; without the fault they agree."""
    for fault, same in (("knob-ignored", False), ("nan", True)):
        case = moe_case(ranks=1, fault=fault)
        realised = on_ranks(case, lambda exchange, *_: dict(exchange.realised))[0]
        assert (realised == dict(case.knobs)) is same


# Time


def timed(knobs: dict, device: ManualDevice, calls: int = 3) -> list[float]:
    """Microseconds of each dispatch and combine in turn."""
    case = moe_case(ranks=1, knobs=tuple(knobs.items()))

    def work(exchange, problem, variant, device):
        state = exchange.dispatch()
        staged = exchange.stage(
            state, torch.zeros(len(exchange.received(state).rows), 256, dtype=torch.bfloat16)
        )
        found = []
        for _ in range(calls):
            marks = [device.mark()]
            state = exchange.dispatch()
            marks.append(device.mark())
            exchange.combine(state, staged)
            marks.append(device.mark())
            found += [device.elapsed_us(a, b) for a, b in zip(marks, marks[1:], strict=False)]
        return found

    return on_ranks(case, work)[0]


def test_the_manual_clock_moves_by_what_was_asked_for():
    """Defaults, one number for all, one for each, a recorded list (whose first dispatch came before)."""
    device = ManualDevice()

    assert timed({}, device, 1) == [10, 20]
    assert timed({"latency_us": 7.5}, device, 1) == [7.5, 7.5]
    assert timed({"latency_us": "dispatch=1.5,combine=2"}, device, 1) == [1.5, 2]
    assert timed({"replay": "dispatch=1:2:3,combine=9"}, device) == [2, 9, 3, 9, 1, 9]


def test_a_sidecar_can_be_replayed(tmp_path):
    """The fresh series of each component, this rank's part, cycled."""
    series = [
        {"component": "dispatch", "regime": "chained", "trials": 1, "per_sample": 8, "per_rank_us": [[99.0]]},
        {
            "component": "dispatch",
            "regime": "fresh",
            "trials": 1,
            "per_sample": 1,
            "per_rank_us": [[4.0, 5.0]],
        },
        {"component": "roundtrip", "regime": "fresh", "trials": 1, "per_sample": 1, "per_rank_us": [[1.0]]},
    ]
    path = tmp_path / "x.json.gz"
    path.write_bytes(
        gzip.compress(json.dumps({"schema": "collectivex.samples.v1", "series": series}).encode())
    )

    assert timed({"replay": str(path)}, ManualDevice()) == [5, 20, 4, 20, 5, 20]


@pytest.mark.parametrize(
    "knobs", [{"latency_us": "fast"}, {"latency_us": "think=1"}, {"replay": "/no/such.json.gz"}]
)
def test_a_latency_that_makes_no_sense_is_the_users_error(knobs: dict):
    """Neither a number nor a component nor a file: one clear error."""
    with pytest.raises(UserError):
        timed(knobs, ManualDevice())


def test_no_time_is_spent_on_a_real_device():
    """A CPU's clock is not the fake's to move."""

    def one(ranks):
        backend = Backend()
        backend.setup(Context(ranks, CpuDevice()))
        call = backend.collective(case, case.shape)
        began = time.perf_counter()
        call.run()
        return time.perf_counter() - began

    case = collective_case("all_reduce", ranks=1, knobs=(("latency_us", 5e6),))

    assert run_threads(1, one)[0] < 1


def test_slow_takes_a_second_of_both_clocks(monkeypatch):
    """So that deadlines can be tested: real time passes, and the manual clock shows it."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    assert timed({"fault": "slow"}, ManualDevice(), 1) == [1e6 + 10, 20]
    assert slept == [1, 1]


# Processes


def enter(name: str, last_rank: bool = True) -> None:
    Plan(name, FAULTS[name], last_rank, None, {}, {}).enter(0)


@pytest.mark.parametrize(
    ("name", "error"),
    [("out-of-memory", torch.OutOfMemoryError), ("error", RuntimeError), ("sys-exit", SystemExit)],
)
def test_faults_that_raise_do_so_on_the_last_rank_only(name: str, error: type):
    """The others go on, and wait for it."""
    enter(name, last_rank=False)
    with pytest.raises(error):
        enter(name)


@pytest.mark.parametrize(("name", "code"), [("crash", -11), ("exit-nonzero", 11), ("exit-without-result", 0)])
def test_faults_that_end_the_process_end_it_at_once(name: str, code: int):
    """With the signal or exit code that they promise and nothing after."""
    program = (
        "from collectivex.backends.fake import FAULTS\n"
        "from collectivex.backends._fake_plan import Plan\n"
        f"Plan({name!r}, FAULTS[{name!r}], True, None, {{}}, {{}}).enter(0)\n"
        "print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (code, "")


def test_hang_hangs(monkeypatch):
    """It sleeps again whenever it wakes."""

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise TimeoutError

    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(TimeoutError):
        enter("hang")


def test_a_missing_library_says_so_when_a_case_is_opened():
    """MissingLibrary, on the last rank."""
    with pytest.raises(MissingLibrary):
        on_ranks(moe_case(ranks=1, fault="missing-library"), lambda *_: None)


def test_crash_in_close_waits_for_close(monkeypatch):
    """The case itself is good; the crash comes with the teardown."""
    crashed: list[int] = []
    monkeypatch.setattr(fake, "crash", lambda: crashed.append(1))

    def one(ranks):
        backend = Backend()
        backend.setup(Context(ranks, ManualDevice()))
        case = collective_case("all_reduce", ranks=2, fault="crash-in-close")
        backend.collective(case, case.shape).run()
        assert not crashed
        ranks.barrier()
        backend.close()

    run_threads(2, one)

    assert crashed == [1]


def test_every_process_fault_is_one_of_these():
    """A new process fault without a proof fails here."""
    named = {"out-of-memory", "error", "sys-exit", "crash", "exit-nonzero", "exit-without-result", "hang"}
    named |= {"missing-library", "crash-in-close"}

    assert {name for name, fault in FAULTS.items() if fault.kind == "process"} == named
    assert {name for name, fault in FAULTS.items() if fault.kind in ("knobs", "time")} == {
        "knob-ignored",
        "slow",
    }


# Contract


def test_the_fake_says_why_not():
    """Unknown faults and faults without meaning are refused in a sentence, before anything runs."""
    why_not = Backend().why_not

    assert "no fault 'gremlin'" in (why_not(moe_case(fault="gremlin")) or "")
    assert "cannot start at call 'soon'" in (why_not(moe_case(fault="nan@soon")) or "")
    assert "means nothing" in (why_not(moe_case(dtype="bf16", fault="wrong-scale")) or "")
    assert "means nothing" in (why_not(collective_case("all_reduce", fault="dropped-row")) or "")
    assert "has no normal/expand" in (why_not(moe_case("expand")) or "")
    assert why_not(moe_case(fault="nan@5")) is None


def test_the_fake_loads_without_torch():
    """It is asked on laptops."""
    program = "import sys, collectivex.backends.fake; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
