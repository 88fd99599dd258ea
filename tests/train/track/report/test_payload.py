"""What the page is given, against the tensors it was made of."""

from __future__ import annotations

import json
import math
from base64 import b64decode
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from taskmoe.moe import TaskTable
from taskmoe.moe.snapshot import Snapshot
from taskmoe.train.track.facts import Facts
from taskmoe.train.track.report import payload as module
from taskmoe.train.track.report.payload import dendrogram, labels, payload, short_names
from taskmoe.train.track.routing import cluster, group_metrics, shares, similarity

FIGURES = {
    "gates",
    "layers",
    "history",
    "similarity",
    "map",
    "conflict",
    "conflict_history",
    "curves",
    "expert",
}


def of(facts: Facts) -> dict[str, Any]:
    found = payload(facts, similarity(facts.snapshot))
    json.dumps(found, allow_nan=False)
    return found


def unpack(text: str, *shape: int) -> np.ndarray:
    steps = np.frombuffer(b64decode(text), dtype=np.uint8).astype(float).reshape(shape)
    return np.where(steps == 255, np.nan, steps / 254)


def test_gates_are_the_shares_of_every_layer_and_head(make_facts: Callable[..., Facts]) -> None:
    facts = make_facts(heads=2)
    found = of(facts)
    assert found["missing"] == {} and found["routing"]["note"] == ""
    assert [group["name"] for group in found["routing"]["groups"]] == list(facts.snapshot.gates)
    for group in found["routing"]["groups"]:
        gates_THE, first_THE = (
            s.gates[group["name"]] for s in (facts.snapshot, facts.first) if s is not None
        )
        np.testing.assert_allclose(unpack(group["now"], 12, 2, 8), shares(gates_THE), atol=0.002)
        np.testing.assert_allclose(unpack(group["start"], 12, 2, 8), 1 / 8, atol=0.002)
        assert (group["heads"], group["experts"], group["dead"]) == (2, 8, [7])
        assert group["numbers"] == pytest.approx(group_metrics(gates_THE, first_THE), rel=1e-5)
        for h, numbers in enumerate(group["of_heads"]):
            assert numbers == pytest.approx(
                group_metrics(gates_THE[:, h : h + 1], first_THE[:, h : h + 1]), rel=1e-5
            )
    most = max(float(g.max()) for g in facts.snapshot.gates.values())
    assert found["routing"]["largest"] == pytest.approx(most, rel=1e-5)


def test_equal_shares_are_not_drawn_as_if_they_were_a_choice(make_facts: Callable[..., Facts]) -> None:
    facts = make_facts()
    assert facts.first is not None
    assert of(make_facts(snapshot=facts.first))["routing"]["largest"] == pytest.approx(3 / 8)


def test_tasks_that_came_later_and_rows_not_seen_are_unknown(make_facts: Callable[..., Facts]) -> None:
    facts = make_facts()
    assert facts.first is not None
    gates = {n: g.clone() for n, g in facts.snapshot.gates.items()}
    for g in gates.values():
        g[3] = math.nan
    first = Snapshot("task", {n: g[:10] for n, g in facts.first.gates.items()})
    found = of(make_facts(snapshot=Snapshot("token", gates), first=first))
    group = found["routing"]["groups"][0]
    now, start = unpack(group["now"], 12, 8), unpack(group["start"], 12, 8)
    assert np.isnan(now).any(1).tolist() == [t == 3 for t in range(12)]
    assert np.isnan(start).all(1).tolist() == [t >= 10 for t in range(12)]
    assert found["map"][3] == [None, None] and found["order"][-1] == 3
    assert np.isnan(unpack(found["similarity"], 12, 12)[3]).all()


def test_too_many_gates_are_thinned_and_that_is_said(
    make_facts: Callable[..., Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = make_facts(layers=8)
    monkeypatch.setattr(module, "MAX_CELLS", 12 * 8 * 8)  # now fits, now and the start do not
    groups = of(facts)["routing"]
    assert groups["note"] == "the start is left out, so that the file stays small"
    assert all(g["now"] and g["start"] is None for g in groups["groups"])
    monkeypatch.setattr(module, "MAX_CELLS", 12 * 8 * 3)
    groups = of(facts)["routing"]
    assert [i for i, g in enumerate(groups["groups"]) if g["now"]] == [0, 4, 7]
    assert groups["note"].startswith("3 of 8 layers, evenly spaced")
    assert all("entropy" in g["numbers"] for g in groups["groups"])


def test_similarity_and_map_are_those_of_the_routing(make_facts: Callable[..., Facts]) -> None:
    facts = make_facts()
    found, known = of(facts), similarity(facts.snapshot)
    np.testing.assert_allclose(unpack(found["similarity"], 12, 12), known, atol=0.002)
    families = [task % 3 for task in found["order"]]
    assert sum(a != b for a, b in pairwise(families)) == 2, "families lie side by side"
    assert len(found["map"]) == 12


def test_the_tree_joins_every_task_once() -> None:
    known = torch.tensor(
        [[1.0, 0.1, 0.9, 0.1], [0.1, 1.0, 0.1, 0.5], [0.9, 0.1, 1.0, 0.1], [0.1, 0.5, 0.1, 1.0]]
    )
    tree = cluster(known)
    lines = dendrogram(tree)
    assert len(lines["place"]) == len(lines["height"]) == 3 * 5
    tops = lines["height"][1::5]
    assert tops == pytest.approx([0.1, 0.5, 0.9], abs=1e-4)
    leaves = [p for p, h in zip(lines["place"], lines["height"], strict=True) if h == 0]
    assert sorted(leaves) == [0, 1, 2, 3]  # type: ignore[type-var]
    assert [lines["place"][10], lines["place"][13]] == [0.5, 2.5]


def test_tasks_not_seen_have_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    known = torch.eye(4)
    known[3] = known[:, 3] = math.nan
    lines = dendrogram(cluster(known))
    assert len(lines["place"]) == 2 * 5
    monkeypatch.setattr(module, "MAX_STEMS", 3)
    assert 0.0 not in dendrogram(cluster(known))["height"]


def test_labels_are_short_and_different() -> None:
    tasks = TaskTable.from_names(["a\n b", "x" * 60, "x" * 61, "short"])
    found = labels(tasks)
    assert found[0] == "a b" and found[3] == "short" and all(len(label) <= 40 for label in found)
    assert len(set(found)) == 4


def test_what_all_names_begin_with_is_left_out() -> None:
    assert short_names(["m.layers.0.up", "m.layers.0.down"]) == {
        "m.layers.0.up": "up",
        "m.layers.0.down": "down",
    }
    assert short_names(["model.layers"]) == {"model.layers": "model.layers"}
    assert short_names(["a", "a.b"]) == {"a": "a", "a.b": "b"}


def test_rows_that_tasks_share_keep_their_place(make_facts: Callable[..., Facts]) -> None:
    conflict = ([["caesar-then-0", "rotate-then-2"], ["gone"]], [[1.0, -0.5], [-0.5, math.nan]])
    found = of(make_facts(conflict=conflict))["conflict"]
    assert found["labels"] == ["caesar then 0 + rotate then 2", "gone"] and found["tasks"] is None
    np.testing.assert_allclose(2 * unpack(found["cosines"], 2, 2) - 1, conflict[1], atol=0.004)


NOTHING = {"snapshot": Snapshot("none", {}), "first": None, "log": [], "results": None, "conflict": None}
UNSEEN = Snapshot("token", {"a": torch.full((12, 1, 4), math.nan)})


@pytest.mark.parametrize(
    "change, missing",
    [
        ({**NOTHING, "kind": "adapter"}, dict.fromkeys(["gates", "layers", "expert", "history"], "take gates")
         | dict.fromkeys(["curves", "conflict", "conflict_history"], "does not lie beside this adapter")
         | dict.fromkeys(["similarity", "map"], "take gates")),
        ({"snapshot": UNSEEN, "first": None},
         dict.fromkeys(["gates", "layers", "expert", "similarity", "map"], "has been seen")),
        ({"conflict": None}, {"conflict": "surgery.matrix_steps"}),
        ({"conflict": ([["a"]], [[1.0]])}, {"conflict": "one task alone"}),
        ({"conflict": None, "log": [{"step": 1, "kind": "train", "train/loss/rotate-then-2": 1.0}]},
         {"conflict": "surgery.method", "conflict_history": "surgery.method", "history": "no routing yet"}),
        ({"num_tasks": 1}, {"similarity": "two tasks", "map": "two tasks", "conflict": "one task alone"}),
        ({"num_tasks": 2}, {"map": "no map"}),
    ],
)  # fmt: skip
def test_what_is_missing_says_why(
    make_facts: Callable[..., Facts], change: dict[str, Any], missing: dict[str, str]
) -> None:
    found = of(make_facts(**change))["missing"]
    assert set(found) == set(missing) <= FIGURES
    for figure, words in missing.items():
        assert words in found[figure], figure


def test_thousands_of_tasks_are_not_compared_pair_by_pair(
    make_facts: Callable[..., Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_COMPARED", 11)
    found = of(make_facts())
    assert set(found["missing"]) == {"similarity", "map"} and "12 tasks" in found["missing"]["map"]
    assert found["order"] == list(range(12)) and found["routing"] is not None
