"""Scale-up domains: what a pool states, what GPUs say, and that a contradiction is not measured."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from collectivex.runtime import domains, nvml, worker
from collectivex.runtime.document import Place
from collectivex.runtime.errors import InfraError
from collectivex.runtime.ranks import Ranks, run_threads

A, B = "a1b2.0", "a1b2.1"  # one NVLink cluster, two cliques


@pytest.mark.parametrize(
    ("ranks", "nodes", "nodes_per_domain", "expected"),
    [
        (4, 1, None, [0, 0, 0, 0]),
        (4, 2, None, [0, 0, 1, 1]),  # nobody said anything: a domain ends at the node
        (4, 2, 1, [0, 0, 1, 1]),
        (8, 2, 18, [0] * 8),  # two trays of a rack of 18
        (6, 3, 2, [0, 0, 0, 0, 1, 1]),
        (2, 2, 18, [0, 0]),  # one rank a tray
    ],
)
def test_a_pool_states_how_many_nodes_share_a_domain(
    ranks: int, nodes: int, nodes_per_domain: int | None, expected: list[int]
) -> None:
    """Ranks fill one node after the other, nodes one domain after the other."""
    assert domains.stated(ranks, nodes, nodes_per_domain) == expected


@pytest.mark.parametrize(
    ("fabrics", "expected"),
    [
        ([A, A, A, A], [0, 0, 0, 0]),
        ([A, A, B, B], [0, 0, 1, 1]),  # another clique is not reached, though of the same cluster
        ([B, B, A, A], [0, 0, 1, 1]),  # numbered as they come
        ([None] * 4, None),  # HGX boards: a fabric without identity ends at the node
        ([A, A, None, None], None),
        ([A, B, A, B], None),  # GPUs of a node that disagree
    ],
)
def test_gpus_of_one_cluster_and_clique_share_a_domain(
    fabrics: list[str | None], expected: list[int] | None
) -> None:
    """Two nodes of two ranks. NCCL decides the same way (ncclMnnvlCheck)."""
    assert domains.realised(fabrics, 2) == expected


def test_what_the_gpus_say_goes_before_what_the_pool_says() -> None:
    """They confirm the file, or speak where it says nothing; without them the file stands."""
    assert domains.placed(4, 2, 18, [A] * 4) == ([0, 0, 0, 0], "nvml")
    assert domains.placed(4, 2, None, [A] * 4) == ([0, 0, 0, 0], "nvml")
    assert domains.placed(4, 2, 18, [None] * 4) == ([0, 0, 0, 0], "sku")
    assert domains.placed(4, 2, None, [None] * 4) == ([0, 0, 1, 1], "nodes")


def test_a_node_is_one_domain_whatever_its_gpus_say() -> None:
    """Numbers of one node do not depend on how its fabric is named."""
    assert domains.placed(4, 1, 1, [A, A, B, B]) == ([0, 0, 0, 0], "sku")
    assert domains.placed(4, 1, None, [A, A, A, A]) == ([0, 0, 0, 0], "nodes")


@pytest.mark.parametrize(
    ("nodes_per_domain", "fabrics", "said"),
    [
        (18, [A, A, B, B], "2 scale-up domains of 2, 2 ranks, the plan has them in one scale-up domain of 4"),
        (1, [A] * 4, "one scale-up domain of 4 ranks, the plan has them in 2 scale-up domains of 2, 2 ranks"),
    ],
)
def test_nodes_of_other_domains_than_stated_are_not_measured(
    nodes_per_domain: int, fabrics: list[str | None], said: str
) -> None:
    """Trays of two racks would be filed as one NVLink domain; the fabric's identity is not in the message."""
    with pytest.raises(InfraError, match=said) as caught:
        domains.placed(4, 2, nodes_per_domain, fabrics)
    assert "a1b2" not in caught.value.message


def test_a_result_without_placement_has_a_domain_per_node() -> None:
    """Documents from before the field existed."""
    case = {"ranks": 4, "nodes": 2}
    assert domains.of_result({"case": case}) == [0, 0, 1, 1]
    assert domains.of_result({"case": case, "placement": {"domains": [0, 0, 0, 0]}}) == [0, 0, 0, 0]


def located(
    monkeypatch: pytest.MonkeyPatch, nodes_per_domain: int | None, fabrics: list[str | None]
) -> Place:
    """What the ranks of two nodes of two make of their place; the UUID of rank k's GPU is "k"."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda rank: SimpleNamespace(uuid=rank))
    monkeypatch.setattr(nvml, "fabric", lambda uuid: fabrics[int(uuid.removeprefix("GPU-"))])
    told = asdict(Place("e", "a", "s", "pool", "t", "cuda", nodes_per_domain=nodes_per_domain))

    def work(ranks: Ranks) -> Place:
        ranks.ranks_per_node = 2
        return worker.locate(told, ranks, SimpleNamespace(kind="cuda", torch_device=ranks.rank))

    places = run_threads(4, work)
    assert len(set(places)) == 1
    return places[0]


def test_every_rank_asks_its_gpu_and_all_agree_on_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place that records are written with has what was realised, and no identity of a fabric."""
    place = located(monkeypatch, 18, [A, A, A, A])
    assert (place.domains, place.domains_source) == ((0, 0, 0, 0), "nvml")
    assert "a1b2" not in repr(place)
    assert located(monkeypatch, None, [A, A, B, B]).domains == (0, 0, 1, 1)
    assert located(monkeypatch, 18, [None] * 4).domains_source == "sku"


def test_ranks_in_other_domains_than_planned_end_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every rank raises; the worker ends with the exit code of infrastructure."""
    with pytest.raises(InfraError, match="2 scale-up domains"):
        located(monkeypatch, 18, [A, A, B, B])
