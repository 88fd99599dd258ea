"""What is said of a run's routing: true of the numbers, and nothing that is not known."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from taskmoe.moe import TaskTable
from taskmoe.moe.snapshot import Snapshot
from taskmoe.train.track.routing import metrics
from taskmoe.train.track.verdicts import verdicts

T, E = 9, 4
UNKNOWN = "Which tasks fight is not known: "


def tasks(groups: int = 3) -> TaskTable:
    table = TaskTable()
    for i in range(T):
        table.add(f"Task {i}", group=f"family {i % groups}" if groups else None)
    return table


def learned(strength: float = 3.0, noise: float = 0.2) -> Snapshot:
    """Tasks of a family have an expert of their own; expert 3 is nobody's."""
    draw = torch.Generator().manual_seed(0)
    logits = strength * torch.nn.functional.one_hot(torch.arange(T) % 3, E).float()
    logits[:, 3] -= 2 * strength
    return Snapshot(
        "task", {g: gates(logits + noise * torch.randn(T, E, generator=draw)) for g in ("a", "b")}
    )


def gates(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1).unsqueeze(1)


def uniform() -> Snapshot:
    return learned(strength=0.0, noise=0.01)


def line(lines: list[str], pattern: str) -> str:
    """The one line that says this."""
    found = [text for text in lines if re.search(pattern, text)]
    assert len(found) == 1, lines
    return found[0]


def test_routing_that_was_learned():
    now, first = learned(), uniform()
    lines = verdicts(now, tasks(), first)
    assert len(lines) == 6
    m, f = metrics(now, first), metrics(first)
    assert f" {100 * m['routing/over_uniform']:.1f} % " in line(lines, "^Routing is not uniform")
    assert f"uses {m['routing/effective_experts']:.1f} of 4 experts" in line(lines, "^Routing is not uniform")
    assert f" {100 * m['routing/between_tasks']:.1f} % " in line(lines, "^Tasks are routed differently")
    assert "2 of 8 experts are dead" in line(lines, "dead") and "a (1), b (1)." in line(lines, "dead")
    assert "recovers the 3 given groups of 9 tasks: adjusted Rand index 1.00" in line(lines, "Rand")
    changed = line(lines, "^Since the start")
    assert f" {100 * m['routing/drift']:.1f} % " in changed and "most in " in changed
    assert f"from {f['routing/effective_experts']:.1f} to {m['routing/effective_experts']:.1f}" in changed
    assert lines[-1].startswith(UNKNOWN)


def test_routing_that_was_not_learned():
    lines = verdicts(uniform(), tasks(), uniform())
    line(lines, "^Routing is uniform")
    line(lines, "^Tasks are routed alike")
    line(lines, "^No expert is dead")
    line(lines, r"does not recover the 3 given groups .* p = (0\.[1-9]|1\.)")
    assert "there then" not in line(lines, "^Routing has not changed since the start")


def test_differences_that_were_there_at_the_start_are_not_called_learned():
    given = learned()
    lines = verdicts(given, tasks(), given)
    line(lines, "^Tasks are routed differently")
    line(lines, "has not changed since the start; what differs between tasks was there then")


@pytest.mark.parametrize(
    ("wrong", "state", "rand"),
    [(0, "recovers", "1.00"), (1, "recovers in part", "0.64"), (2, "does not recover", "0.36")],
)
def test_groups_of_which_some_tasks_are_said_to_be_of_another(wrong: int, state: str, rand: str):
    table = TaskTable()
    for i in range(T):
        table.add(f"Task {i}", group=f"family {(i + (i < wrong)) % 3}")
    said = line(verdicts(learned(), table), "Rand")
    assert f" {state} the 3 given groups" in said and f"index {rand} " in said


def test_nothing_is_said_of_what_is_not_known():
    lines = verdicts(learned(), tasks(groups=0))
    assert not any("Rand" in text for text in lines)
    line(lines, "^What was learned is not known")
    line(
        verdicts(learned(), tasks(), Snapshot("task", {"c": torch.ones(T, 1, E)})), "^What was learned is not"
    )
    one = Snapshot("task", {"a": torch.tensor([[[1.0, 0.0]]])})
    assert not any("Tasks are routed" in text for text in verdicts(one, TaskTable.from_names(["one"])))


def test_no_routing():
    assert verdicts(Snapshot("none", {}), tasks())[0] == "No experts take gates: there is no routing to see."
    unseen = Snapshot("token", {"a": torch.full((T, 1, E), math.nan)})
    assert verdicts(unseen, tasks())[0] == "No task has been seen yet: its routing is not known."
    assert len(verdicts(unseen, tasks())) == 2


def test_tokens_of_some_tasks():
    now = Snapshot("token", dict(learned().gates))
    for g in now.gates.values():
        g[:2] = math.nan
    lines = verdicts(now, tasks())
    assert lines[0] == "2 of 9 tasks have not been seen: their routing is not known."
    line(lines, "^Token routing, averaged over each task's tokens, is not uniform")


def test_the_threshold_of_many_experts_is_told():
    many = Snapshot("task", {"a": torch.ones(T, 1, 100)})
    line(verdicts(many, tasks()), r"^No expert is dead: each of the 100 has 0\.5 % ")


def test_groups_with_dead_experts_are_counted_past_three():
    dead = gates(torch.tensor([[9.0, 0.0, 0.0, 0.0]]).expand(T, E))
    half = gates(torch.tensor([[9.0, 9.0, 0.0, 0.0]]).expand(T, E))
    now = Snapshot("task", {"a": half, "b": dead, "c": half, "d": half, "e": half})
    said = line(verdicts(now, tasks()), "^11 of 20 experts are dead, under 1.0 %")
    assert said.endswith(": b (3), a (2), c (2) and 2 more.")


def test_tasks_that_fight():
    rows = [["task-0"], ["task-1", "task-2"], ["task-3"], ["task-4"]]
    cosines = [
        [1, -0.3, "nan", 0.2],
        [-0.3, 1, "nan", -0.06],
        ["nan", "nan", None, None],
        [0.2, -0.06, "nan", 1],
    ]
    said = verdicts(uniform(), tasks(), conflict=(rows, cosines))[-1]
    assert said.startswith("2 of 3 pairs of tasks fight")
    assert said.endswith("Task 0 and Task 1 + Task 2 (-0.30), Task 1 + Task 2 and Task 4 (-0.06).")


def test_the_worst_pairs_are_named():
    size = 5
    cosines = [[1.0 if i == j else -0.1 * (i + j) for j in range(size)] for i in range(size)]
    said = verdicts(uniform(), tasks(), conflict=([[f"task-{i}"] for i in range(size)], cosines))[-1]
    assert said.startswith("10 of 10 pairs") and said.count("(") == 3
    assert "most of all Task 3 and Task 4 (-0.70), Task 2 and Task 4 (-0.60)" in said


@pytest.mark.parametrize(("cosine", "start"), [(-0.04, "No tasks fight"), (None, UNKNOWN + "no two")])
def test_tasks_that_do_not_fight(cosine: float | None, start: str):
    said = verdicts(uniform(), tasks(), conflict=([["task-0"], ["task-1"]], [[1, cosine], [cosine, 1]]))[-1]
    assert said.startswith(start) and (cosine is None or "is -0.04" in said)
