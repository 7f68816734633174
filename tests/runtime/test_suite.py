"""Suites: what they mean, and that every mistake is reported as `file:key: problem`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime import schemas, suite
from collectivex.runtime.errors import UserError
from collectivex.runtime.types import (
    COLLECTIVE_OPS,
    DTYPES,
    FAMILIES,
    MODES,
    PROGRAM_OPS,
    PROGRAM_REGIMES,
    REGIMES,
    Routing,
    Sampling,
)


def small(**changes: Any) -> dict[str, Any]:
    """A valid suite with one group of each family."""
    return {
        "schema": "collectivex.suite.v1",
        "name": "mine",
        "description": "for a test",
        "deadline_s": 30,
        "groups": [
            {
                "family": "collective",
                "ops": ["all_reduce"],
                "dtypes": ["float32"],
                "sizes": ["1KiB", "4KiB"],
                "modes": ["out-of-place"],
            },
            {
                "family": "moe",
                "workloads": ["tiny"],
                "dtypes": ["bf16"],
                "tokens": {"from": 1, "to": 64, "factor": 4},
                "modes": ["normal"],
            },
        ],
        **changes,
    }


def load(tmp_path: Path, data: Any) -> suite.Suite:
    path = tmp_path / "mine.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return suite.load_suite(str(path))


def problem(tmp_path: Path, data: Any) -> str:
    """What loading says, without the folder."""
    with pytest.raises(UserError) as error:
        load(tmp_path, data)
    assert error.value.exit_code == 2
    return error.value.message.replace(f"{tmp_path}/", "")


def changed(group: int, **changes: Any) -> dict[str, Any]:
    data = small()
    data["groups"][group].update(changes)
    return data


def test_a_ladder_holds_both_ends_and_every_step(tmp_path: Path) -> None:
    """{from: 1, to: 64, factor: 4} is 1, 4, 16, 64."""
    assert load(tmp_path, small()).groups[1].tokens == (1, 4, 16, 64)


def test_every_shape_of_the_product_appears_once(tmp_path: Path) -> None:
    """Two ops, two types, two sizes: eight shapes, the size running fastest."""
    data = changed(0, ops=["all_reduce", "all_gather"], dtypes=["float32", "bfloat16"])
    shapes = list(load(tmp_path, data).groups[0].shapes())
    assert len(shapes) == len(set(shapes)) == 8
    assert [s.label for s in shapes[:3]] == [
        "all_reduce-1024B-float32",
        "all_reduce-4096B-float32",
        "all_reduce-1024B-bfloat16",
    ]


def test_sampling_of_a_group_overrides_that_of_the_suite(tmp_path: Path) -> None:
    """What neither says is the default of types.Sampling; seconds are floats, whatever was written."""
    data = changed(1, sampling={"trials": 3, "budget_s": 1})
    loaded = load(tmp_path, {**data, "sampling": {"trials": 2, "iterations": 9}})
    assert loaded.groups[0].sampling == Sampling(trials=2, iterations=9)
    assert loaded.groups[1].sampling == Sampling(trials=3, iterations=9, budget_s=1.0)
    assert isinstance(loaded.groups[1].sampling.budget_s, float)


def test_fresh_and_chained_are_always_measured(tmp_path: Path) -> None:
    """A group adds regimes to them, in the order of types.REGIMES."""
    loaded = load(tmp_path, changed(0, regimes=["kernel"]))
    assert [g.regimes for g in loaded.groups] == [("fresh", "chained", "kernel"), ("fresh", "chained")]


def test_a_suite_may_bring_shapes_of_its_own(tmp_path: Path) -> None:
    """A user's model needs no change to the repository."""
    data = changed(1, workloads=["ours"])
    data["workloads"] = {"ours": {"hidden": 256, "topk": 2, "experts": 8, "source": "our config"}}
    (shape, *_) = load(tmp_path, data).groups[1].shapes()
    assert (shape.label, shape.family) == ("ours-t1-bf16-uniform", "moe")


def test_routing_equals_whether_skew_is_written_as_integer_or_not(tmp_path: Path) -> None:
    """1 and 1.0 must give the same case id and comparison key."""
    one, real = ({"kind": "zipf", "skew": skew} for skew in (1, 1.0))
    found = [load(tmp_path, changed(1, routing=[r])).groups[1].routing for r in (one, real)]
    assert found[0] == found[1] == (Routing("zipf", 1.0),)
    assert isinstance(found[0][0].skew, float)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (changed(0, ops=["all_reduec"]), "mine.yaml:groups[0].ops[0]: 'all_reduec' is not one of"),
    (changed(0, ops=["all_reduec"]), "did you mean 'all_reduce'?"),
    (changed(0, oops=[]), "mine.yaml:groups[0].oops: unknown key; have: family, ops"),
    (changed(0, tokens=[1]), "mine.yaml:groups[0].tokens: unknown key"),
    (changed(0, sizes=["1KB"]), "mine.yaml:groups[0].sizes[0]: "),
    (changed(0, sizes=["1KB"]), "(bytes: 1024, 1KiB, 4MiB)"),
    (changed(0, sizes=["1KiB", 1024]), "mine.yaml:groups[0].sizes[1]: 1024 is there twice"),
    (changed(0, sizes=7), "mine.yaml:groups[0].sizes: 7 is not of types"),
    (changed(0, sizes={"from": "1KiB", "to": "1MiB"}), "mine.yaml:groups[0].sizes: needs the key 'factor'"),
    (
        changed(0, sizes={"from": "1KiB", "to": "1MiB", "factor": 3}),
        "mine.yaml:groups[0].sizes.to: '1MiB' is not '1KiB' times a power of 3",
    ),
    (changed(0, sizes={"from": "0B", "to": "1MiB", "factor": 2}), "sizes.from: a ladder cannot start at 0"),
    (changed(0, sizes={"from": "1MiB", "to": "1KiB", "factor": 2}), "groups[0].sizes.to: '1KiB' is not"),
    (changed(0, modes=["normal"]), "mine.yaml:groups[0].modes[0]: 'normal' is not one of out-of-place"),
    (changed(0, family="moo"), "mine.yaml:groups[0].family: 'moo' is not one of collective, moe"),
    (changed(0, dtypes=[]), "mine.yaml:groups[0].dtypes: [] has less than 1 item"),
    (changed(0, sampling={"trails": 3}), "mine.yaml:groups[0].sampling.trails: unknown key"),
    (changed(0, sampling={"trails": 3}), "did you mean 'trials'?"),
    (changed(0, sampling={"trials": "3"}), 'mine.yaml:groups[0].sampling.trials: "3" is not of type'),
    (changed(1, workloads=["tinny"]), "mine.yaml:groups[1].workloads[0]: no workload named 'tinny'"),
    (changed(1, tokens=[-1]), "mine.yaml:groups[1].tokens[0]: -1 is less than the minimum of 0"),
    (changed(1, routing=[{"kind": "zipf"}]), "mine.yaml:groups[1].routing[0]: needs the key 'skew'"),
    (
        changed(1, routing=[{"kind": "uniform", "skew": 1.0}]),
        "mine.yaml:groups[1].routing[0].skew: uniform routing has no skew",
    ),
    (small(name="other"), "mine.yaml:name: 'other' is not the name of the file"),
    (small(schema="collectivex.suite.v2"), "mine.yaml:schema: 'collectivex.suite.v2' is not"),
    (small(groups=[]), "mine.yaml:groups: [] has less than 1 item"),
    (small(runs=0), "mine.yaml:runs: 0 is less than the minimum of 1"),
    (small(deadline_s="soon"), 'mine.yaml:deadline_s: "soon" is not of type "number"'),
    (
        small(workloads={"w": {"hidden": 8, "topk": 9, "experts": 8, "source": "x"}}),
        "mine.yaml:workloads.w.topk: 9 of 8 experts cannot be picked",
    ),
    (
        small(workloads={"tiny": {"hidden": 8, "topk": 1, "experts": 8, "source": "x"}}),
        "mine.yaml:workloads.tiny: is already a shape of suites/workloads.yaml",
    ),
    (
        small(workloads={"w": {"hidden": 16, "topk": 2, "experts": 8, "source": "x"}}),
        "mine.yaml:workloads.w.hidden: 16 is below 32, the columns in which the oracle codes a row",
    ),
    (
        small(groups=[{**small()["groups"][0], "sizes": [3, 4]}]),
        "mine.yaml:groups[0].sizes: 3 bytes are no whole number of float32 elements",
    ),
]


@pytest.mark.parametrize(("data", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_mistake_is_reported_as_file_key_problem(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    """The file, the key in it, what is wrong, and the nearest name where there is one."""
    assert said in problem(tmp_path, data)


def test_rows_that_fp8_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    """One scale stands for 128 values; 100 values have no whole block."""
    data = changed(1, workloads=["w"], dtypes=["bf16", "fp8"])
    data["workloads"] = {"w": {"hidden": 100, "topk": 1, "experts": 8, "source": "x"}}
    assert "mine.yaml:groups[1].workloads[0]: rows of 100 values" in problem(tmp_path, data)


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    """Correcting a file is one round, not one per typo."""
    data = changed(0, ops=["all_reduec"], dtypes=["float33"])
    text = problem(tmp_path, data)
    assert "groups[0].ops[0]" in text
    assert "groups[0].dtypes[0]" in text


TEXTS = [
    ("", "mine.yaml: is empty"),
    ("# only a comment\n", "mine.yaml: is empty"),
    ("name: mine\nname: other\n", "mine.yaml:2: the key 'name' is here a second time, first in line 1"),
    ("{a: 1, a: 2}", "mine.yaml:1: the key 'a' is here a second time"),
    ("name: x\ngroups:\n\t- family: moe\n", "mine.yaml:3: a tab; YAML is indented with spaces"),
    ("name: [1, 2\n", "mine.yaml:2: "),
    ("a: 1\n---\nb: 2\n", "mine.yaml:2: "),
    ("a: \x01\n", "mine.yaml: "),
    ("- 1\n", "mine.yaml: [1] is not of type"),
    ("just text", 'mine.yaml: "just text" is not of type'),
    ("a: &x [*x]\n", "mine.yaml: holds what JSON cannot"),
    ("1: 2\n", "mine.yaml: holds what JSON cannot"),
    ("a: 2026-11-20\n", "mine.yaml: holds what JSON cannot"),
    ("a: " + "[" * 3000, "mine.yaml: is nested too deeply"),
]


@pytest.mark.parametrize(("text", "said"), TEXTS, ids=[f"{text[:12]!r}" for text, _ in TEXTS])
def test_text_that_is_no_suite_is_reported_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    """Empty files, doubled keys, tabs, broken syntax: one error each, never a traceback."""
    assert problem(tmp_path, text).startswith(said)


def test_bytes_that_are_not_text_are_reported(tmp_path: Path) -> None:
    """A binary file given by mistake."""
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"mine\.yaml: is not UTF-8 text"):
        suite.load_suite(str(tmp_path / "mine.yaml"))


@given(st.recursive(st.none() | st.integers() | st.text(max_size=4), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from([*small(), "family", "ops", "sizes", "tokens", "from"]), x), max_leaves=8))  # fmt: skip
def test_no_document_at_all_makes_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Whatever YAML somebody writes, the answer is a suite or a UserError."""
    path = tmp_path_factory.getbasetemp() / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError):
        suite.load_suite(str(path))


def test_an_unknown_suite_names_the_known_ones() -> None:
    """`smok` is near `smoke`."""
    with pytest.raises(UserError) as error:
        suite.load_suite("smok")
    assert str(error.value).startswith("no suite named 'smok'; have: ")
    assert "did you mean 'smoke'?" in str(error.value)


def test_a_path_that_is_not_there_is_not_mistaken_for_a_name() -> None:
    """A file name gets a message about files."""
    with pytest.raises(UserError, match=r"no suite file mine/other\.yaml"):
        suite.load_suite("mine/other.yaml")


@pytest.mark.parametrize(
    ("text", "size"),
    [(1, 1), ("64B", 64), ("1KiB", 1024), ("4 MiB", 4 * 1024**2), ("1GiB", 1024**3), ("0B", 0)],
)
def test_sizes_are_powers_of_1024(text: int | str, size: int) -> None:
    """KiB, MiB and GiB as IEC 80000-13 has them."""
    assert suite.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "1kb", "1KB", "-1KiB", "1.5KiB", "1TiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """Ambiguous units (KB) are not guessed at."""
    with pytest.raises(ValueError, match="is not a size"):
        suite.parse_size(text)


@given(st.integers(min_value=0, max_value=2**45))
def test_a_size_reads_back_from_its_label(size: int) -> None:
    """`size_label` loses nothing."""
    assert suite.parse_size(suite.size_label(size)) == size


def test_the_schema_offers_what_the_types_know() -> None:
    """The lists in schema/suite.v1.json are those of runtime/types.py."""
    defs = schemas.schema("suite")["$defs"]
    for family in FAMILIES:
        keys = defs[family]["properties"]
        assert tuple(keys["modes"]["items"]["enum"]) == MODES[family]
        assert tuple(keys["dtypes"]["items"]["enum"]) == DTYPES[family]
        assert (*keys["regimes"]["items"]["enum"], *PROGRAM_REGIMES) == REGIMES
    assert tuple(defs["group"]["properties"]["family"]["enum"]) == FAMILIES
    assert tuple(defs["collective"]["properties"]["ops"]["items"]["enum"]) == (*COLLECTIVE_OPS, *PROGRAM_OPS)
    assert tuple(defs["routing"]["properties"]["kind"]["enum"]) == Routing.KINDS
    assert tuple(defs["routing"]["properties"]["spread"]["enum"]) == Routing.SPREADS
    assert set(defs["sampling"]["properties"]) == {f.name for f in fields(Sampling)}


@pytest.mark.parametrize("path", sorted(schemas.FOLDER.glob("*.json")), ids=lambda p: p.name)
def test_every_schema_is_a_schema(path: Path) -> None:
    """Valid draft 2020-12, identified by its file name."""
    import jsonschema_rs

    document = json.loads(path.read_text())
    jsonschema_rs.meta.validate(document)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["$id"] == f"collectivex.{path.name.removesuffix('.json')}"


@pytest.mark.parametrize("name", suite.names())
def test_every_suite_of_ours_loads(name: str) -> None:
    """The files that come with the project are valid, and every workload has a source."""
    assert suite.load_suite(name).name == name


def test_the_points_of_the_published_table_can_have_every_percentile() -> None:
    """Up to 384 fresh samples (p99 needs 368), 72 blocks (p95 needs 72); p90, which needs 36, everywhere."""
    for group in suite.load_suite("ep-core").groups:
        s = group.sampling
        samples = (s.trials * s.iterations, s.trials * s.chain_blocks)
        assert min(samples) >= 36
        if group.dtypes == ("bf16",) and set(group.tokens) & {1, 16, 128, 1024, 4096}:
            published = "low-latency" in group.modes or "cached" in group.modes
            plain = group.routing[0].label == "uniform" and len(group.routing) == 1
            assert not (published and plain) or samples == (384, 72)


def thorough(name: str) -> set[tuple[str, tuple[int, ...], str]]:
    """(mode, tokens, dtype) of a suite's groups with 300 checked calls."""
    return {
        (mode, group.tokens, dtype)
        for group in suite.load_suite(name).groups
        if group.sampling.checked_calls == 300
        for mode in group.modes
        for dtype in group.dtypes
    }


def test_the_largest_shapes_are_checked_300_times() -> None:
    """ep-ladder: T = 512 in low-latency and 8192 in the other modes, both dtypes; ep-core most of them."""
    largest = {"low-latency": 512, "normal": 8192, "cached": 8192}
    everything = {(mode, (tokens,), dtype) for mode, tokens in largest.items() for dtype in DTYPES["moe"]}
    assert thorough("ep-ladder") == everything
    assert thorough("ep-core") == {
        ("low-latency", (512,), "bf16"),
        ("low-latency", (512,), "fp8"),
        ("normal", (8192,), "bf16"),
    }


def test_ep_ladder_has_every_size_in_every_mode_and_dtype() -> None:
    """T = 1 to 8192: what is proven once is proven everywhere."""
    groups = suite.load_suite("ep-ladder").groups
    ladder = {(m, t, d) for g in groups for m in g.modes for t in g.tokens for d in g.dtypes}
    assert ladder == {(m, 2**n, d) for m in MODES["moe"] for n in range(14) for d in DTYPES["moe"]}
