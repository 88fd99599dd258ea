"""Numbers of the routing against values by hand, loops, and other implementations.

Legend: T tasks, H heads, E experts.
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import cophenet, is_valid_linkage, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score, mutual_info_score
from torch import Tensor

from taskmoe.moe.snapshot import Snapshot
from taskmoe.train.track import routing
from taskmoe.train.track.routing import (
    UNSEEN_HEIGHT,
    against_groups,
    cluster,
    dead_share,
    group_keys,
    group_metrics,
    map_2d,
    metrics,
    shares,
    similarity,
)

NAN = math.nan


def gates(*rows: list[float]) -> Tensor:
    """[T, 1, E]."""
    return torch.tensor(rows).unsqueeze(1)


def task_level(**groups: Tensor) -> Snapshot:
    return Snapshot("task", groups)


def families(sizes: list[int], noise: float, seed: int = 0) -> tuple[Snapshot, list[str]]:
    """Tasks of families that each have an expert of their own, and the families, in mixed order."""
    draw = torch.Generator().manual_seed(seed)
    own = torch.tensor([f for f, size in enumerate(sizes) for _ in range(size)])
    own = own[torch.randperm(len(own), generator=draw)]
    groups = {}
    for name in ("a", "b"):
        logits_TE = 3 * torch.nn.functional.one_hot(own, len(sizes)).float()
        logits_TE += noise * torch.randn(logits_TE.shape, generator=draw)
        groups[name] = logits_TE.softmax(-1).unsqueeze(1)
    return task_level(**groups), [f"family {f}" for f in own.tolist()]


def test_shares_are_of_sizes_and_need_some():
    p = shares(gates([1.0, -3.0], [0.0, 0.0], [NAN, NAN]))
    torch.testing.assert_close(p[0, 0], torch.tensor([0.25, 0.75]))
    assert p.dtype == torch.float32 and p[1:].isnan().all()


def test_numbers_of_equal_shares():
    numbers = group_metrics(torch.full((3, 2, 4), 0.5))
    assert numbers["entropy"] == pytest.approx(math.log(4))
    assert numbers["effective_experts"] == pytest.approx(4)
    assert numbers["utilisation_max"] == pytest.approx(0.25)
    assert numbers["dead_experts"] == numbers["over_uniform"] == 0
    assert numbers["between_tasks"] == pytest.approx(0, abs=1e-12)
    assert "drift" not in numbers


def test_numbers_of_one_expert_a_task():
    numbers = group_metrics(gates([1, 0, 0, 0], [0, 0, 1, 0]))
    assert numbers["entropy"] == 0 and numbers["effective_experts"] == 1
    assert numbers["utilisation_max"] == 0.5 and numbers["dead_experts"] == 2
    assert numbers["over_uniform"] == 0.75
    assert numbers["between_tasks"] == pytest.approx(1)  # the expert tells the task


def test_what_all_tasks_share_says_nothing_about_them():
    numbers = group_metrics(gates([0.9, 0.1], [0.9, 0.1], [0.9, 0.1]))
    assert numbers["over_uniform"] == pytest.approx(0.4)
    assert numbers["between_tasks"] == pytest.approx(0, abs=1e-7)


def test_between_tasks_is_the_mutual_information():
    counts = np.array([[6, 2, 2], [1, 8, 1]])  # ten tokens a task, by expert
    tasks = [t for t, row in enumerate(counts) for _ in range(row.sum())]
    experts = [e for row in counts for e, n in enumerate(row) for _ in range(n)]
    wanted = mutual_info_score(tasks, experts) / math.log(2)
    found = group_metrics(torch.tensor(counts).unsqueeze(1))["between_tasks"]
    assert 0.1 < found == pytest.approx(wanted)


def test_heads_are_averaged_and_an_expert_lives_in_any_of_them():
    one = gates([1, 0, 0], [0, 1, 0])
    equal = gates([0.5, 0.5, 0], [0.5, 0.5, 0])
    numbers = group_metrics(torch.cat([one, equal], 1))
    assert numbers["between_tasks"] == pytest.approx(0.5)
    assert numbers["entropy"] == pytest.approx(math.log(2) / 2)
    assert numbers["dead_experts"] == 1
    assert group_metrics(torch.cat([gates([1, 0, 0]), gates([0, 0, 1])], 1))["dead_experts"] == 1


@pytest.mark.parametrize(("E", "limit"), [(4, 0.01), (50, 0.01), (128, 0.5 / 128)])
def test_equal_shares_of_many_experts_are_alive(E: int, limit: float):
    assert dead_share(E) == limit
    assert group_metrics(torch.ones(2, 1, E))["dead_experts"] == 0
    weak_E = torch.ones(E)
    weak_E[0] = 0.9 * limit * (E - 1)  # of the sum of the others: a share under the limit
    assert group_metrics(weak_E.expand(2, 1, E))["dead_experts"] == 1


def test_one_task_or_one_expert_has_nothing_between_tasks():
    assert group_metrics(gates([1, 0]))["between_tasks"] == 0
    assert group_metrics(gates([1], [1]))["between_tasks"] == 0


def test_unseen_tasks_count_nowhere():
    seen = gates([0.7, 0.3], [0.2, 0.8])
    with_unseen = torch.cat([gates([NAN, NAN]), seen])
    assert group_metrics(with_unseen) == group_metrics(seen)
    assert group_metrics(gates([NAN, NAN])) == {}


def test_drift_is_over_tasks_known_at_both_times():
    first = gates([1, 0], [NAN, NAN])
    now = gates([0.25, 0.75], [1, 0], [1, 0])  # the second was not seen, the third not there
    assert group_metrics(now, first)["drift"] == 0.75
    assert group_metrics(now, now)["drift"] == 0
    assert "drift" not in group_metrics(now[1:2], first[1:])
    assert "drift" not in group_metrics(now, gates([1, 0, 0]))  # other experts


def test_metrics_are_means_over_groups_and_all_keys_are_there():
    a, b = gates([1, 0], [0, 1]), gates([1, 1, 0, 0], [1, 1, 0, 0])
    unseen = gates([NAN, NAN], [NAN, NAN])
    found = metrics(task_level(a=a, b=b, c=unseen), task_level(a=a, b=b[:, :, [2, 3, 0, 1]]))
    assert found == {
        "routing/entropy": pytest.approx(math.log(2) / 2),
        "routing/effective_experts": pytest.approx(1.5),
        "routing/over_uniform": pytest.approx(0.5),
        "routing/between_tasks": pytest.approx(0.5),
        "routing/drift": pytest.approx(0.5),
        "routing/dead_expert_frac": pytest.approx(2 / 6),
    }
    assert "routing/drift" not in metrics(task_level(a=a))
    assert metrics(Snapshot("none", {})) == metrics(Snapshot("token", {"c": unseen})) == {}


def test_keys_of_groups_and_heads():
    one = gates([1, 0], [0, 1])
    two = torch.cat([one, torch.full((2, 1, 2), 0.5)], 1)
    found = group_keys(task_level(plain=one, heads=two), task_level(heads=two.flip(1)))
    names = set(group_metrics(one))
    assert set(found) == {f"routing/plain/{n}" for n in names} | {
        f"routing/heads/head-{h}/{n}" for h in (0, 1) for n in (*names, "drift")
    }
    assert found["routing/heads/head-0/entropy"] == 0
    assert found["routing/heads/head-1/entropy"] == pytest.approx(math.log(2))
    assert found["routing/heads/head-1/drift"] == 0.5


def test_similarity_is_the_cosine_of_all_shares():
    snapshot = task_level(a=torch.rand(4, 2, 3), b=torch.rand(4, 1, 5))
    snapshot.gates["a"][3] = snapshot.gates["b"][3] = NAN
    rows = torch.cat([shares(g).flatten(1) for g in snapshot.gates.values()], 1)[:3].double()
    C_TT = similarity(snapshot)
    for i in range(3):
        for j in range(3):
            wanted = torch.cosine_similarity(rows[i], rows[j], dim=0)
            torch.testing.assert_close(C_TT[i, j], wanted)
    assert C_TT[3].isnan().all() and C_TT[:, 3].isnan().all()
    assert similarity(Snapshot("none", {})).shape == (0, 0)


def test_a_group_without_gates_for_a_task_is_zeros():
    C_TT = similarity(task_level(a=gates([1, 0], [1, 0]), b=gates([1, 0], [0, 0])))
    assert float(C_TT[0, 1]) == pytest.approx(1 / math.sqrt(2))


def test_clusters_put_families_side_by_side():
    snapshot, own = families([4, 3, 5], noise=0.3)
    found = cluster(similarity(snapshot))
    assert sorted(found.order) == list(range(12)) and is_valid_linkage(found.linkage)
    changes = sum(own[a] != own[b] for a, b in zip(found.order, found.order[1:], strict=False))
    assert changes == 2
    assert adjusted_rand_score(own, found.labels(3)) == 1
    labels = found.labels(3)
    assert list(dict.fromkeys(labels[t] for t in found.order)) == [0, 1, 2]  # numbered as they lie


def test_leaves_of_very_many_tasks_lie_as_the_tree_has_them(monkeypatch: pytest.MonkeyPatch):
    snapshot, own = families([4, 3, 5], noise=0.3)
    C_TT = similarity(snapshot)
    ordered = cluster(C_TT)
    monkeypatch.setattr(routing, "_ORDERED", 11)
    found = cluster(C_TT)
    plain = linkage(squareform((1 - C_TT).fill_diagonal_(0).numpy(), checks=False), "average")
    assert np.allclose(found.linkage, plain) and found.order != ordered.order
    assert sum(own[a] != own[b] for a, b in zip(found.order, found.order[1:], strict=False)) == 2


def test_unseen_tasks_join_last():
    snapshot, _ = families([3, 3], noise=0.3)
    C_TT = similarity(snapshot)
    alone = cluster(C_TT)
    C_TT[[0, 4]] = NAN
    C_TT[:, [0, 4]] = NAN
    found = cluster(C_TT)
    assert found.order[-2:] == found.unseen == [0, 4] and is_valid_linkage(found.linkage)
    assert found.linkage[-2:, 2].tolist() == [UNSEEN_HEIGHT] * 2 and found.linkage[-1, 3] == 6
    seen = [1, 2, 3, 5]
    sub = cluster(C_TT[seen][:, seen])
    heights, wanted = squareform(cophenet(found.linkage)), squareform(cophenet(sub.linkage))
    assert np.array_equal(heights[np.ix_(seen, seen)], wanted)
    labels = found.labels(2)
    assert labels[0] == labels[4] == -1
    assert [labels[t] for t in seen] == sub.labels(2) and set(sub.labels(2)) == {0, 1}
    assert alone.unseen == []


@pytest.mark.parametrize("diagonal", [[], [1.0], [NAN], [1.0, NAN], [NAN, NAN]])
def test_few_tasks(diagonal: list[float]):
    C_TT = torch.diag(torch.tensor(diagonal))
    found = cluster(C_TT)
    assert sorted(found.order) == list(range(len(diagonal)))
    assert found.linkage.shape == (max(len(diagonal) - 1, 0), 4)
    assert found.labels(2) == [-1 if math.isnan(d) else 0 for d in diagonal]
    place = map_2d(C_TT)
    assert place.isnan().all(1).tolist() == [math.isnan(d) for d in diagonal]


def test_tasks_that_cannot_be_told_apart_are_one_cluster():
    draw = torch.Generator().manual_seed(0)
    sizes = torch.rand(9, 1, 1, generator=draw) + 0.5  # of the same shares, but for rounding
    alike = torch.rand(1, 1, 7, generator=draw) * sizes
    assert cluster(similarity(task_level(a=alike))).labels(3) == [0] * 9


def test_a_map_in_two_dimensions_keeps_the_distances():
    angles = torch.tensor([0.0, 0.4, 1.1, 1.5]).double()  # unit vectors in a plane
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    C_TT = rows @ rows.T
    C_TT = torch.nn.functional.pad(C_TT, (0, 1, 0, 1), value=NAN)
    place = map_2d(C_TT)
    assert place.shape == (5, 2) and place[4].isnan().all()
    torch.testing.assert_close(torch.pdist(place[:4]), torch.pdist(rows))
    assert float(place[:4, 0].var()) >= float(place[:4, 1].var())


def test_families_that_were_learned_are_recovered():
    snapshot, own = families([4, 3, 5], noise=0.3)
    found = against_groups(similarity(snapshot), own)
    assert found == {
        "adjusted_rand_index": 1.0,
        "adjusted_mutual_information": pytest.approx(1),
        "p_value": 0.001,  # none of 999 shuffles
        "num_groups": 3,
        "num_tasks": 12,
    }


def test_tasks_without_a_group_or_unseen_do_not_count():
    snapshot, own = families([4, 3, 5], noise=0.3)
    C_TT = similarity(snapshot)
    C_TT[0] = C_TT[:, 0] = NAN
    found = against_groups(C_TT, [None if t == 1 else g for t, g in enumerate(own)])
    assert found is not None and found["num_tasks"] == 10 and found["adjusted_rand_index"] == 1


def test_p_values_of_groups_that_mean_nothing_are_spread():
    p = []
    for seed in range(40):
        snapshot, _ = families([6, 6, 6], noise=3.0, seed=seed)
        own = np.random.default_rng(seed).integers(0, 3, 18)
        found = against_groups(similarity(snapshot), [str(g) for g in own])
        assert found is not None
        p.append(found["p_value"])
    assert 0.3 < sum(p) / len(p) < 0.8 and sum(x <= 0.05 for x in p) <= 6


@pytest.mark.parametrize(
    "noise", [0.3, 2.0]
)  # with the first, a few shuffles are as good, and none is better
def test_the_p_value_counts_shuffles_with_a_rand_index_at_least_as_large(noise: float):
    snapshot, own = families([3, 3, 3], noise, seed=3)
    C_TT = similarity(snapshot)
    found = against_groups(C_TT, own)
    assert found is not None
    labels, draw = cluster(C_TT).labels(3), np.random.default_rng(0)
    given = np.unique(own, return_inverse=True)[1]
    together = np.equal.outer(labels, labels)

    def rand(groups: np.ndarray) -> float:  # the adjusted index grows with it, as long as sizes stay
        return float((np.equal.outer(groups, groups) == together).mean())

    as_large = sum(rand(draw.permutation(given)) >= rand(given) for _ in range(999))
    assert 0.001 < found["p_value"] == (1 + as_large) / 1000
    assert found == against_groups(C_TT, own)


@pytest.mark.parametrize("groups", [[None] * 4, ["a"] * 4, ["a", None, None, "b"], ["a", "b", "c", "d"]])
def test_too_few_groups_to_compare(groups: list[str | None]):
    snapshot, _ = families([2, 2], noise=0.3)
    assert against_groups(similarity(snapshot), groups) is None


def test_a_large_model_takes_seconds():
    draw = torch.Generator().manual_seed(0)
    gates_of = {f"layer.{i}": torch.randn(1000, 1, 64, generator=draw).softmax(-1) for i in range(48)}
    began = time.process_time()
    snapshot = task_level(**gates_of)
    found, C_TT = metrics(snapshot, snapshot), similarity(snapshot)
    tree = cluster(C_TT)
    assert time.process_time() - began < 3
    assert found["routing/drift"] == 0 and len(tree.order) == 1000
