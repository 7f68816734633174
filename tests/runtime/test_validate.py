"""`cx validate`: honest folders pass; whatever is truncated, tampered with or foreign is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
import pytest
from honest import Change, cell, execution, result, rewrite, said

from collectivex.runtime import cli, recheck
from collectivex.runtime.redact import Private, Redactor
from collectivex.runtime.types import comparison_key


@pytest.fixture(scope="module")
def unspoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once."""
    return execution(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def folder(unspoilt: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(unspoilt, tmp_path / "execution"))


def test_an_honest_folder_has_no_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 0, nothing on stdout, the count for people."""
    assert cli.main(["validate", str(folder)]) == 0
    assert capsys.readouterr() == ("", "3 results in 1 executions: all valid\n")


def test_folders_are_found_below_the_one_given(folder: Path) -> None:
    """`cx validate results` is what CI runs."""
    assert cli.main(["validate", "--published", str(folder.parent)]) == 0


def test_problems_are_printed_as_path_and_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 1; stdout holds one line for each."""
    path = cell(folder, "all_reduce")
    path.write_text(path.read_text()[:100])
    assert cli.main(["validate", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{path}: is not JSON, or truncated")
    assert err == "3 results in 1 executions: 1 problems\n"


def test_a_folder_without_results_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2: a gate that looks at nothing must not be green."""
    assert cli.main(["validate", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no results under ")


def test_results_without_a_manifest_are_a_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which cells were asked for is then unknown; each of them is named."""
    (folder / "manifest.json").unlink()
    assert cli.main(["validate", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "with --resume, makes it anew from the plan and the records" in out
    assert out.count("is an orphan") == 3


def test_results_beside_a_broken_manifest_are_named(folder: Path) -> None:
    """With the way to count them again, and nothing is said of them that is not wrong."""
    (folder / "manifest.json").write_text("{")
    first, *orphans = said(folder)
    assert first.startswith("manifest.json: is not JSON, or truncated")
    assert "with --resume, makes it anew" in first
    assert ["is an orphan" in line for line in orphans] == [True] * 3


def a_measurement(data: dict[str, Any]) -> dict[str, Any]:
    return data["measurements"][0]


def fastened(data: dict[str, Any]) -> None:
    """Make the median of the maximum look better, consistently."""
    stats = a_measurement(data)["max"]
    stats["p50"] = stats["min"]


def new_case(data: dict[str, Any]) -> None:
    data["case"]["ranks"] = 8


def other_key(data: dict[str, Any]) -> None:
    a_measurement(data)["comparison_key"] = "0" * 16


def fewer_samples(data: dict[str, Any]) -> None:
    a_measurement(data)["max"]["n"] = 63


def other_interval(data: dict[str, Any]) -> None:
    a_measurement(data)["max"]["intervals"]["p50"]["low"] += 1


def failed_check(data: dict[str, Any]) -> None:
    data["correctness"]["checks"][0]["passed"] = False


def ignored_knob(data: dict[str, Any]) -> None:
    data["knobs"] = {"sms": {"requested": 24, "realised": 20}}


def no_check(data: dict[str, Any]) -> None:
    data["correctness"]["checks"] = []


def disorder(data: dict[str, Any]) -> None:
    a_measurement(data)["median"]["p99"] = 0.5


def twice(data: dict[str, Any]) -> None:
    data["measurements"].append(a_measurement(data))


def graph(data: dict[str, Any]) -> None:
    a_measurement(data)["regime"] = "graph"


def unknown_key(data: dict[str, Any]) -> None:
    data["note"] = "hello"


def late_run(data: dict[str, Any]) -> None:
    data["design"]["runs"] = 1
    data["identity"]["run"] = 3


def other_execution(data: dict[str, Any]) -> None:
    data["identity"]["execution"] = "another"


def other_contract(data: dict[str, Any]) -> None:
    data["contract"] = "2020.01-1"


def newer_contract(data: dict[str, Any]) -> None:
    data["contract"] = "2099.01-1"


def other_sku(data: dict[str, Any]) -> None:
    data["identity"]["sku"] = "b300"


def a_home(data: dict[str, Any]) -> None:
    data["provenance"]["libraries"][0]["path"] = "/home/somebody/lib/libnccl.so.2"


def an_address(data: dict[str, Any]) -> None:
    data["warnings"] = ["connect to 10.1.2.3 failed"]


def a_token(data: dict[str, Any]) -> None:
    data["provenance"]["environment"]["NCCL_DEBUG"] = "ghp_0123456789abcdefghijABCDEFGHIJ"


TAMPERED: list[tuple[Change, str]] = [
    (fastened, "measurements[0].max.p50: "),
    (new_case, "identity.case_id: its case gives "),
    (other_key, "measurements[0].comparison_key: its case gives "),
    (fewer_samples, "measurements[0].max.n: 63 published, the samples give 64"),
    (other_interval, "measurements[0].max.intervals.p50.low: "),
    (failed_check, "correctness.passed: says True, its checks say False"),
    (no_check, "correctness.passed: says True, its checks say False"),
    (ignored_knob, "knobs.sms: 24 asked, 20 applied, and still ok"),
    (disorder, "measurements[0].median: percentiles are not in order"),
    (twice, "measurements[2]: fresh call is there twice"),
    (graph, "measurements[0].regime: graph was not asked for"),
    (unknown_key, "does not follow the schema: note: unknown key"),
    (late_run, "identity.run: run 3 of 1"),
    (other_execution, "its record is of execution another"),
    (other_contract, "its record is of contract 2020.01-1"),
    (newer_contract, "was written by a newer CollectiveX"),
    (other_sku, "its record is of sku b300"),
    (a_home, "provenance.libraries[0].path: holds something private: '~/lib/libnccl.so.2'"),
    (an_address, "warnings[0]: holds something private: 'connect to <address> failed'"),
    (a_token, "provenance.environment.NCCL_DEBUG: holds something private: '<secret>'"),
]


@pytest.mark.parametrize(("change", "problem"), TAMPERED, ids=[change.__name__ for change, _ in TAMPERED])
def test_a_changed_result_is_found_out(folder: Path, change: Change, problem: str) -> None:
    """Every number and name that can be worked out again is."""
    rewrite(cell(folder, "all_reduce"), change)
    found = said(folder)
    assert any(problem in line for line in found), found


def test_rows_that_leave_and_do_not_arrive_are_found(folder: Path) -> None:
    """Bytes are derived from these counts; they are conserved over every tier."""

    def lose(data: dict[str, Any]) -> None:
        data["bytes"]["ranks"][0]["rows_received"]["scale_up"] -= 1

    rewrite(cell(folder, "deepseek-v3-t128-bf16-uniform-normal-n1r4-torch_dist-full"), lose)
    assert any("rows sent and" in line and "over scale_up" in line for line in said(folder))


MOE = "deepseek-v3-t128-bf16-uniform-normal-n1r4-torch_dist-full"


@pytest.mark.parametrize(
    ("domains", "problem"),
    [
        ([0, 0, 0], "placement.domains: 3 entries for 4 ranks"),
        ([0, 0, 1, 1], "placement.domains: a node of 4 ranks lies in several"),
    ],
)
def test_a_placement_that_does_not_fit_the_case_is_found(
    folder: Path, domains: list[int], problem: str
) -> None:
    """One domain for each rank, and one for all ranks of a node."""
    rewrite(cell(folder, MOE), lambda data: data.update(placement={"domains": domains, "source": "nvml"}))
    assert any(problem in line for line in said(folder))


def test_rows_between_domains_where_there_is_one_are_found(folder: Path) -> None:
    """The tiers follow from the domains."""

    def move(data: dict[str, Any]) -> None:
        for rank in data["bytes"]["ranks"]:
            for rows in (rank["rows_sent"], rank["rows_received"]):
                rows["scale_up"], rows["scale_out"] = 0, rows["scale_up"]

    rewrite(cell(folder, MOE), move)
    assert any("rows to other scale-up domains, where there is one" in line for line in said(folder))


def sidecar(folder: Path) -> Path:
    data = json.loads(cell(folder, "all_reduce").read_text())
    return folder / data["samples"]["file"]


def test_a_sidecar_that_is_gone_is_found(folder: Path) -> None:
    """No raw samples, no published number."""
    sidecar(folder).unlink()
    assert any("cannot be read: No such file" in line for line in said(folder))


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b + b"x", lambda b: b"\0" * len(b)])
def test_a_sidecar_that_was_changed_is_found(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Its name is the sha256 of its content."""
    path = sidecar(folder)
    path.write_bytes(change(path.read_bytes()))
    assert any("its content has another sha256" in line for line in said(folder))


def reseal(folder: Path, data: bytes) -> None:
    """Put other bytes in the place of a sidecar, with the right name and reference."""
    sidecar(folder).unlink()
    sha = hashlib.sha256(data).hexdigest()
    name = f"samples/{sha}.json.gz"
    (folder / name).write_bytes(data)
    rewrite(cell(folder, "all_reduce"), lambda d: d.update(samples={"file": name, "sha256": sha}))


def repacked(folder: Path, change: Change) -> None:
    data = json.loads(gzip.decompress(sidecar(folder).read_bytes()))
    change(data)
    reseal(folder, gzip.compress(json.dumps(data).encode(), mtime=0))


RESEALED: list[tuple[Change, str]] = [
    (lambda d: d.update(cell_id="another"), "holds the samples of another"),
    (lambda d: d["series"].pop(), "the sidecar has no chained call"),
    (lambda d: d["series"][0].update(component="x"), "fresh x is in no measurement"),
    (lambda d: d["series"][0].update(trials=2), "measurements[0].trials: 8, the sidecar says 2"),
    (lambda d: d["series"][0]["per_rank_us"].pop(), "the sidecar has 3 ranks of 4"),
    (lambda d: d["series"][0]["per_rank_us"][0].pop(), "ranks have series of different lengths"),
    (lambda d: d["series"][0]["per_rank_us"][0].__setitem__(0, 1e6), "measurements[0].max.max: "),
    (lambda d: d["series"][0]["per_rank_us"][0].__setitem__(0, "1"), 'series[0].per_rank_us[0][0]: "1" is'),
    (lambda d: d.update(extra=1), "extra: unknown key"),
]


@pytest.mark.parametrize(("change", "problem"), RESEALED, ids=[problem for _, problem in RESEALED])
def test_a_resealed_sidecar_must_give_the_published_statistics(
    folder: Path, change: Change, problem: str
) -> None:
    """A right hash over wrong samples is not enough."""
    repacked(folder, change)
    found = said(folder)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"plain text", "is not gzip, or truncated"),
        (gzip.compress(b"{}" * 99)[:-5], "is not gzip, or truncated"),
        (gzip.compress(b"not json"), "is not JSON"),
        (gzip.compress(b"[" * 100_000), "is not JSON"),
        (gzip.compress(b"[]"), "[] is not of type"),
    ],
)
def test_a_foreign_sidecar_is_named_and_survived(folder: Path, data: bytes, problem: str) -> None:
    """Not gzip, cut off, not JSON, nested to exhaustion, JSON of something else."""
    reseal(folder, data)
    assert any(problem in line for line in said(folder))


def test_a_sidecar_that_unpacks_to_gigabytes_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading stops at the limit, whatever the file claims to be."""
    monkeypatch.setattr(recheck, "LARGEST_SIDECAR", 1000)
    reseal(folder, gzip.compress(b" " * 1_000_000))
    assert any("is larger than" in line for line in said(folder))


FOREIGN = [
    "notes.txt",
    "cells/notes.txt",
    "samples/x.json.gz",
    "figures/run.sh",
    "cells/.x.json.1.tmp",
    "id_rsa",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_no_part_of_a_result_is_named(folder: Path, name: str) -> None:
    """Whatever lies there is published with the rest."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("hello")
    assert any("is no part of an execution folder" in line for line in said(folder))


def test_a_foreign_json_file_among_the_cells_is_named(folder: Path) -> None:
    """Not a result, and not listed."""
    (folder / "cells" / "package.json").write_text('{"name": "x"}')
    found = said(folder)
    assert any(line.startswith("package.json: is not a CollectiveX result") for line in found)
    assert any("does not list cells/package.json" in line for line in found)


def test_links_are_not_followed(folder: Path) -> None:
    """They lead out of what is published."""
    (folder / "figures").symlink_to("/")
    assert said(folder) == ["figures: is a link"]


def test_figures_and_logs_belong_to_an_execution_but_logs_are_not_published(folder: Path) -> None:
    """Logs may name hosts and people."""
    for name in ("figures/a/latency.svg", "logs/torch_dist.r0/rank0.log", "report.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    assert said(folder) == []
    assert said(folder, published=True) == [
        "rank0.log: logs are not published: they may name hosts and people"
    ]


def test_a_folder_of_the_machine_is_not_published(folder: Path) -> None:
    """A library's path in a record tells where its owner keeps things."""
    path = sorted((folder / "cells").iterdir())[0]
    rewrite(path, lambda d: d["warnings"].append("/data/someone/deepep/_C.so is old"))
    assert said(folder) == []
    assert said(folder, published=True) == [f"{path.name}: names a folder of the machine: /data/someone/"]


def test_a_file_beside_published_results_is_named(folder: Path) -> None:
    """CI validates every file there is under results/."""
    (folder.parent / "README.md").write_text("about")
    assert cli.main(["validate", "--published", str(folder.parent)]) == 0
    (folder.parent / "stray.json").write_text("{}")
    assert cli.main(["validate", "--published", str(folder.parent)]) == 1


def test_every_requested_cell_has_exactly_one_record(folder: Path) -> None:
    """A missing file, a pending cell, a doubled entry, a record nobody asked for, another status."""
    path = folder / "manifest.json"
    entries = json.loads(path.read_text())["cells"]

    def spoil(data: dict[str, Any]) -> None:
        first, second, third = data["cells"]
        first["status"] = "failed"
        data["cells"] = [first, first, second, {"cell_id": "x", "status": "pending", "file": None}]
        data["complete"] = True

    rewrite(path, spoil)
    (folder / entries[1]["file"]).unlink()
    found = "\n".join(said(folder))
    assert f"lists {entries[0]['cell_id']} twice" in found
    assert f"{entries[0]['cell_id']}: says failed, its record says ok" in found
    assert f"{entries[1]['cell_id']} is ok, but {entries[1]['file']} is missing" in found
    assert "x is pending: it has no record" in found
    assert "complete: says True with 1 cells pending" in found
    assert f"does not list {entries[2]['file']}" in found


def test_a_record_under_another_name_is_found(folder: Path) -> None:
    """The file name is the cell id."""
    path = cell(folder, "all_reduce")
    path.rename(path.with_name("renamed.json"))
    assert any("not the name of the file" in line for line in said(folder))


def test_samples_that_belong_to_no_result_are_found(folder: Path) -> None:
    """Left over from something that was deleted, or smuggled in."""
    (folder / "samples" / f"{'0' * 64}.json.gz").write_bytes(b"x")
    assert said(folder) == [f"{'0' * 64}.json.gz: belongs to no result"]


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "{", "\x00", "[" * 100_000])
@pytest.mark.parametrize("name", ["manifest.json", "cell"])
def test_no_content_at_all_makes_a_traceback(folder: Path, name: str, text: str) -> None:
    """Empty, truncated, foreign, hostile: a problem, and the other files are still looked at."""
    path = folder / name if name == "manifest.json" else cell(folder, "all_reduce")
    path.write_text(text)
    found = said(folder)
    assert len([line for line in found if line.startswith(f"{path.name}: ")]) == 1


def test_the_comparison_key_of_an_older_contract_is_made_with_that_contract(tmp_path: Path) -> None:
    """Published results stay valid when the contract moves on."""
    old = "2020.01-1"
    made = result(factory.collective_case(), tmp_path)
    case, topology = factory.collective_case(), made["identity"]["topology_class"]
    made["contract"] = old
    for m in made["measurements"]:
        m["comparison_key"] = comparison_key(case, m["regime"], topology, old)
    assert said(factory.execution(tmp_path, [made], contract=old)) == []


def test_versions_of_four_parts_are_not_taken_for_addresses() -> None:
    """cuDNN 9.1.0.70 is a version where it stands under a version's key, an address elsewhere."""
    redactor = Redactor(Private())
    here = {"libraries": [{"version": "9.1.0.70"}], "versions": {"cudnn": "9.1.0.70"}, "driver": "1.2.3.4"}
    assert list(recheck.private_strings(here, redactor)) == []
    (problem,) = recheck.private_strings({"warnings": ["9.1.0.70"]}, redactor)
    assert problem.startswith("warnings[0]: ")
