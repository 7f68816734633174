"""Node health: a GPU that is missing, throttled, of another kind or occupied is not measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collectivex.runtime import health
from collectivex.runtime.commands import Done
from collectivex.runtime.health import Unhealthy, Wanted

MACHINE = Path(__file__).resolve().parents[1] / "fixtures/machine"
IDLE = "0x0000000000000001"
TWO = f"0, NVIDIA H200, 5, 143771, {IDLE}\n1, NVIDIA H200, 5, 143771, {IDLE}\n"
WANTED = Wanted("nvidia", 2, "h200")


def seen(text: str, **more: Any) -> dict[str, Any]:
    return {"node": "n1", "gpus": health.nvidia_gpus(text), "error": None, **more}


def test_a_healthy_node_has_no_problem() -> None:
    """Idling is no throttling, 5 MiB is no neighbour."""
    assert health.judge(seen(TWO), WANTED) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TWO.splitlines()[0], "a node has 1 of 2 GPUs"),
        (TWO.replace(IDLE, "0x0000000000000048", 1), "GPU 0 is held back: hw-slowdown, hw-thermal"),
        (TWO.replace(" 5,", " 81920,", 1), "GPU 0 has 80.0 GiB of its memory in use"),
        (TWO.replace("H200", "H100"), "GPU 0 is a NVIDIA H100, not of the product h200"),
        ("", "a node has 0 of 2 GPUs"),
    ],
)
def test_each_fault_is_named(text: str, problem: str) -> None:
    """One sentence each, without the node's name."""
    assert problem in health.judge(seen(text), WANTED)


def test_a_power_cap_under_load_is_normal() -> None:
    """It is the GPU's own work."""
    assert health.judge(seen(TWO.replace(IDLE, "0x0000000000000004")), WANTED) == []


def test_a_tool_that_fails_is_a_fault() -> None:
    """Open failure would publish whatever comes."""
    found = health.report("nvidia", lambda *a, **k: Done(9, err="NVIDIA-SMI has failed"))
    assert "NVIDIA-SMI has failed" in health.judge(found, WANTED)[0]


def test_older_drivers_are_asked_under_the_older_name() -> None:
    """Before 535 the throttle reasons had another name."""
    asked = []

    def execute(argv: list[str], **more: Any) -> Done:
        asked.append(argv[1])
        return (
            Done(0, TWO)
            if "throttle_reasons" in argv[1]
            else Done(2, 'Field "x" is not a valid field to query.')
        )

    assert len(health.report("nvidia", execute)["gpus"]) == 2
    assert len(asked) == 2


def test_amd_memory_counts_too() -> None:
    """rocm-smi's JSON, with its warning lines before it."""
    card = {"Card Series": "AMD Instinct MI300X", "VRAM Total Used Memory (B)": "34359738368"}
    text = "WARNING: x\n" + json.dumps({"card0": card})
    found = {"node": "n1", "gpus": health.amd_gpus(text), "error": None}
    assert health.judge(found, Wanted("amd", 1, "mi300x")) == ["GPU 0 has 32.0 GiB of its memory in use"]


CARDS = json.dumps({f"card{i}": {"Card Series": "AMD Instinct MI300X"} for i in range(2)})


def amd(option: str, violations: str) -> Any:
    """A node whose amd-smi knows only this option of `metric`."""

    def execute(argv: list[str], **more: Any) -> Done:
        if argv[0] == "rocm-smi":
            return Done(0, CARDS)
        if option not in argv:
            return Done(2, err=f"amd-smi metric: error: unrecognized arguments: {argv[2]}")
        return Done(0, (MACHINE / violations).read_text())

    return execute


@pytest.mark.parametrize("option", ["--throttle", "--violation"])
def test_a_hot_amd_gpu_is_held_back(option: str) -> None:
    """By ROCm 6.3's option and by 7.0's. Its power cap is its own work, its temperature is not."""
    found = health.report("amd", amd(option, "amd-smi-throttle-63.json"))
    assert [gpu["throttle"] for gpu in found["gpus"]] == [[], ["socket-thermal"]]
    assert health.judge(found, Wanted("amd", 2)) == ["GPU 1 is held back: socket-thermal"]
    assert health.untold([found]) is None


@pytest.mark.parametrize(
    "execute",
    [
        amd("--nothing", "amd-smi-throttle-63.json"),  # an older amd-smi
        amd("--violation", "amd-smi-throttle-na.json"),  # an older GPU
        amd("--violation", "rocm-smi-failed.txt"),  # it ends well and says nothing
        lambda argv, **more: Done(0, CARDS) if argv[0] == "rocm-smi" else Done(127),
        lambda argv, **more: (
            Done(0, json.dumps({"card0": {}, "card1": {}, "card2": {}}))
            if argv[0] == "rocm-smi"
            else Done(0, (MACHINE / "amd-smi-throttle-63.json").read_text())
        ),  # the two tools see different GPUs
    ],
    ids=["older tool", "older gpu", "empty", "no tool", "other gpus"],
)
def test_an_amd_tool_that_does_not_tell_leaves_it_unknown(execute: Any) -> None:
    """Unknown is not fine: it is said, though nothing is stopped for it."""
    found = health.report("amd", execute)
    assert [gpu["throttle"] for gpu in found["gpus"]] == [None] * len(found["gpus"])
    count = len(found["gpus"])
    assert health.judge(found, Wanted("amd", 2)) == []
    assert (
        health.untold([found])
        == f"whether {count} of {count} GPUs are throttled is unknown: no tool here tells"
    )


def test_an_nvidia_gpu_that_hides_its_reasons_is_unknown_too() -> None:
    """Some virtual machines answer [N/A]."""
    found = seen(TWO.replace(IDLE, "[N/A]", 1))
    assert [gpu["throttle"] for gpu in found["gpus"]] == [None, []]
    assert health.untold([found]) == "whether 1 of 2 GPUs are throttled is unknown: no tool here tells"


def test_what_is_unknown_is_said_before_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, once for all nodes, without their names."""
    (tmp_path / "n1.json").write_text(json.dumps(seen(TWO.replace(IDLE, "[N/A]"))))
    health.check(tmp_path, 1, WANTED, "before")
    assert capsys.readouterr().err == (
        "note: before measuring: whether 2 of 2 GPUs are throttled is unknown: no tool here tells\n"
    )


def test_a_node_that_does_not_answer_is_a_fault(tmp_path: Path) -> None:
    """Two nodes asked, one report."""
    (tmp_path / "n1.json").write_text(json.dumps(seen(TWO)))
    with pytest.raises(Unhealthy, match="before measuring: 1 of 2 nodes answered"):
        health.check(tmp_path, 2, WANTED, "before")


def test_the_bad_node_is_named_for_the_scheduler_only(tmp_path: Path) -> None:
    """`nodes` is for --exclude; the message goes into records."""
    (tmp_path / "n1.json").write_text(json.dumps(seen(TWO)))
    (tmp_path / "n2.json").write_text(json.dumps({**seen(""), "node": "n2"}))
    with pytest.raises(Unhealthy) as caught:
        health.check(tmp_path, 2, WANTED, "before")
    assert caught.value.nodes == ("n2",)
    assert "n2" not in caught.value.message
