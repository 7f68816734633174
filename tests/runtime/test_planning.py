"""`cx plan` and `cx list`: plans as golden files, and what the tables and JSON say."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import collectivex
from collectivex.backends import nccl_tests
from collectivex.runtime import cli, declared, detect, listing, planning, registry, sku, suite
from collectivex.runtime.types import case_from_json

HOME = Path(collectivex.__file__).parents[1]
LAPTOP = detect.Machine("cpu", (), "AMD EPYC", 2)


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """`local` is the same machine wherever the tests run."""
    monkeypatch.setattr(detect, "machine", lambda: LAPTOP)


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("pool", sku.names())
@pytest.mark.parametrize("name", suite.names())
def test_a_plan_is_its_golden_file(
    capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None], name: str, pool: str
) -> None:
    """A change of suite, SKU or backend shows in review as what it changes in the matrix."""
    golden(f"plan/{name}.{pool}.txt", said(capsys, "plan", "--suite", name, "--sku", pool))


def test_golden_plans_are_those_of_what_exists(request: pytest.FixtureRequest) -> None:
    """No golden file stays behind when a suite or SKU goes."""
    folder = request.path.parent.parent / "golden" / "plan"
    expected = {f"{s}.{k}.txt" for s in suite.names() for k in sku.names()}
    assert {p.name for p in folder.iterdir()} == expected


@pytest.mark.parametrize(
    ("pool", "nodes", "head", "domains"),
    [
        ("gb200-nv", "2", "gb200-nvl72-4x2): 8 ranks, 2 nodes in 1 scale-up domain,", [0] * 8),
        (
            "b200-dgxc-slurm",
            "2",
            "-8x2-infiniband-ndr): 16 ranks, 2 nodes in 2 scale-up domains,",
            [0] * 8 + [1] * 8,
        ),
        ("h100-dgxc", "1", "h100-nvlink4-8x1): 8 ranks, 1 node, 1 run", [0] * 8),
    ],
)
def test_a_plan_tells_nodes_of_one_nvlink_domain_from_nodes_on_a_network(
    capsys: pytest.CaptureFixture[str], pool: str, nodes: str, head: str, domains: list[int]
) -> None:
    """Which traffic is scale-up can be read before anything runs."""
    argv = ("plan", "--suite", "smoke", "--sku", pool, "--nodes", nodes)
    assert head in said(capsys, *argv).splitlines()[0]
    assert json.loads(said(capsys, *argv, "--format", "json"))["domains"] == domains


def test_json_holds_every_cell_with_its_case(capsys: pytest.CaptureFixture[str]) -> None:
    """Cell ids follow from the cases, positions count up, totals add up."""
    plan = json.loads(
        said(capsys, "plan", "--suite", "smoke", "--sku", "local", "--runs", "2", "--format", "json")
    )
    assert plan["schema"] == planning.PLAN_SCHEMA
    for position, cell in enumerate(plan["cells"]):
        assert cell["position"] == position
        assert cell["cell_id"] == f"{case_from_json(cell['case']).id}.r{cell['run']}"
    totals = plan["totals"]
    assert totals["cells"] == len(plan["cells"]) == totals["to_run"] + totals["unsupported"]


def test_json_is_written_a_cell_a_line_and_says_what_the_data_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cells are encoded one by one, cases once: the text is that of the whole document all the same."""
    (plan,) = planning.make(["smoke"], ["local"])
    text = said(capsys, "plan", "--suite", "smoke", "--sku", "local", "--format", "json")
    assert json.loads(text) == json.loads(json.dumps(planning.to_json(plan)))
    assert text.count("\n") == len(plan.cells) + 2


def test_leaving_out_suite_and_sku_gives_the_totals_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each pair; in JSON the list of their plans."""
    lines = said(capsys, "plan").splitlines()
    assert len(lines) == 2 + len(suite.names()) * len(sku.names())
    plans = json.loads(said(capsys, "plan", "--suite", "smoke", "--format", "json"))
    assert [p["sku"] for p in plans] == sku.names()


def test_options_of_plan_mean_what_they_mean_for_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The backend and the ranks are those asked for."""
    argv = [
        "plan",
        "--suite",
        "smoke",
        "--sku",
        "local",
        "--backend",
        "fake",
        "--ranks",
        "2",
        "--format",
        "json",
    ]
    cases = [cell["case"] for cell in json.loads(said(capsys, *argv))["cells"]]
    assert {(c["backend"], c["ranks"]) for c in cases} == {("fake", 2)}


@pytest.mark.parametrize(
    ("what", "key", "names"),
    [
        ("backends", "backend", registry.visible),
        ("suites", "suite", suite.names),
        ("skus", "sku", sku.names),
        ("workloads", "workload", lambda: list(suite.load_workloads())),
    ],
)
def test_lists_name_everything(
    capsys: pytest.CaptureFixture[str], what: str, key: str, names: Callable[[], list[str]]
) -> None:
    """As a table for people and as JSON for programs, the same rows."""
    rows: list[dict[str, Any]] = json.loads(said(capsys, "list", what, "--format", "json"))
    assert [row[key] for row in rows] == names()
    table = said(capsys, "list", what).partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[2:]] == names()


@pytest.mark.parametrize("name", registry.visible())
def test_a_backend_by_name_says_everything_that_it_declares(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Every window of every variant, layouts, casts, knobs and limits: in JSON as declared, and as text."""
    facts = registry.load(name).facts
    (row,) = json.loads(said(capsys, "list", "backends", name, "--format", "json"))
    text = " ".join(said(capsys, "list", "backends", name).split())
    assert (row["knobs"], row["index dtype"]) == (list(facts.knobs), facts.index_dtype)
    assert len(row["variants"]) == len(facts.variants)
    for variant, told in zip(facts.variants, row["variants"], strict=True):
        assert (told["mode"], told["variant"], told["window"]) == (
            variant.mode,
            variant.name,
            dict(variant.window),
        )
        assert told["graph safe"] == variant.graph_safe
        if variant.family == "moe":
            told_of_rows = (told["receive layout"], told["combine model"], told["casts"])
            assert told_of_rows == (variant.layout, variant.combine, variant.casts)
        for what in variant.window.values():
            assert " ".join(what.split()) in text
    for fact in (facts.title, facts.source.pin, *facts.knobs, *row["limits"]):
        assert fact in text


def test_limits_are_what_a_backend_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody keeps a second list: the sentences are those of `why_not`, without what the variants say."""
    limits = declared.limits(registry.load("uccl_ep"))
    assert "uccl_ep is driven on one node only" in limits
    assert "uccl 0.1.1 takes no rank without tokens" in limits
    assert not any("collective operations" in limit for limit in limits)
    assert "refuses, of the cases of our suites" in said(capsys, "list", "backends", "uccl_ep")


def test_limits_are_told_on_a_machine_whose_gpus_no_suite_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 experts cannot be divided over three GPUs, which is no reason not to list a backend."""
    three = detect.Machine("nvidia", ("H200",) * 3, "Xeon", 8)
    monkeypatch.setattr(detect, "machine", lambda: three)
    assert sku.load_sku("local").at(1).default_ranks == 3
    assert "uccl_ep is driven on one node only" in declared.limits(registry.load("uccl_ep"))


def test_the_table_of_backends_says_where_there_is_more(capsys: pytest.CaptureFixture[str]) -> None:
    """The window does not fit into a column; what to type for it stands below."""
    assert "cx list backends NAME" in said(capsys, "list", "backends").splitlines()[-1]
    assert "NAME" not in said(capsys, "list", "suites")


def test_names_narrow_every_list(capsys: pytest.CaptureFixture[str]) -> None:
    """In the order in which they were given."""
    rows = json.loads(said(capsys, "list", "suites", "smoke", "ep-core", "--format", "json"))
    assert [row["suite"] for row in rows] == ["smoke", "ep-core"]
    assert said(capsys, "list", "skus", "local").splitlines()[2].startswith("local ")


def test_backends_show_what_they_are_worth(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether a backend has run on its hardware stands in every list of backends."""
    rows = json.loads(said(capsys, "list", "backends", "--format", "json"))
    assert all(
        row["validated"] == "contract-only" or set(row["validated"]) <= set(row["runs on"]) for row in rows
    )
    assert ["cpu", "cuda"] == next(row["validated"] for row in rows if row["backend"] == "torch_dist")
    assert all(row["pin"] and row["modes/variants"] for row in rows)


def test_a_plan_names_what_has_never_run_on_such_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    """torch_dist is proven on NVIDIA GPUs, which says nothing of RCCL."""
    amd = said(capsys, "plan", "--suite", "ep-quick", "--sku", "mi300x-amds").splitlines()[-1]
    nvidia = said(capsys, "plan", "--suite", "ep-quick", "--sku", "h200-dgxc").splitlines()[-1]
    assert amd.startswith("contract-only, never run on such hardware: ")
    assert "torch_dist padded" in amd
    assert "torch_dist" not in nvidia


def test_what_has_never_run_is_named_by_operation_where_others_have(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its mode where another mode of it has. Where nothing has, the name of the backend says it all."""
    told = ("plan", "--suite", "nccl-tests", "--sku", "h200x4-nvlink")
    assert "contract-only" not in said(capsys, *told)
    everything, *others = nccl_tests.FACTS.variants
    some = tuple(op for op in everything.ops if op != "all_reduce")
    ran, never = replace(everything, ops=("all_reduce",)), replace(everything, ops=some, validated=())
    changed = replace(nccl_tests.FACTS, variants=(ran, never, *(replace(v, validated=()) for v in others)))
    monkeypatch.setattr(nccl_tests.Backend, "facts", changed)
    names = "all_gather, in-place all_reduce, all_to_all, all_to_all_v, broadcast, gather, hypercube, reduce"
    line = said(capsys, *told).splitlines()[-1]
    assert line.endswith(f"such hardware: nccl_tests ({names}, reduce_scatter, scatter, sendrecv)")
    ways = {
        row["backend"]: row["modes/variants"]
        for row in json.loads(said(capsys, "list", "backends", "--format", "json"))
    }
    assert "out-of-place [all_reduce]" in ways["nccl_tests"]
    assert "out-of-place [hypercube] (contract-only)" in ways["nccl_tests"]
    argv = ("plan", "--suite", "collectives-core", "--sku", "mi300x-amds", "--backend", "rccl_tests")
    assert said(capsys, *argv).splitlines()[-1].endswith("such hardware: rccl_tests")


def test_a_backend_whose_variants_differ_by_operation_says_by_which(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a list as in a plan; one that does not differ is not drowned in operations."""
    rows = json.loads(said(capsys, "list", "backends", "--format", "json"))
    ways = {row["backend"]: row["modes/variants"] for row in rows}
    assert {"out-of-place [gather scatter all_to_all_v]", "in-place"} < set(ways["torch_dist"])
    assert "out-of-place [hypercube]" in ways["nccl_tests"]


def test_table_columns_are_aligned_and_never_cut() -> None:
    """Wide cells make wide columns; nothing is left at the end of a line."""
    text = listing.table(["a", "bb"], [["xxx", "1"], ["y", "a long sentence"]])
    assert text.splitlines() == ["a    bb", "---  ---------------", "xxx  1", "y    a long sentence"]
