"""What is told about surgery: means, and lines that are not said twice."""

from __future__ import annotations

import torch

from taskmoe.moe import TaskTable
from taskmoe.train.combination import Combination
from taskmoe.train.surgery_log import Seen


def seen() -> Seen:
    tasks = TaskTable()
    for name in ("sort", "sum"):
        tasks.add(name)
    return Seen(tasks)


def combination(weights: list[float]) -> Combination:
    return Combination([[0], [1]], {"all": torch.eye(2).double()}, {"all": torch.tensor(weights).double()})


def test_weights_are_means_over_the_steps_that_gave_them():
    log = seen()
    log.add(combination([1.0, 3.0]))
    log.add_weights({"all": {0: 2.0, 1: 9.0}}, [0])
    metrics, _ = log.read(False)
    assert metrics["train/weight/sort"] == 1.5 and metrics["train/weight/sum"] == 3
    assert log.read(False)[0] == {}


def test_shared_rows_are_told_once_a_phase():
    log = seen()
    log.folded = True
    assert len(log.read(False)[1]) == 1
    assert log.read(False)[1] == []
    resumed = seen()
    resumed.load_state_dict(log.state_dict())
    assert resumed.read(False)[1] == []


def test_inactive_is_told_when_it_changes():
    log, said = seen(), []
    for weights in ([1.0, 1.0], [1.0, 1.001], [1.0, 3.0], [1.0, 2.0], [1.0, 1.0]):
        log.add(combination(weights))
        said.append([line.split(":")[0] for line in log.read(False)[1]])
    assert said == [["surgery is inactive"], [], ["surgery is active again"], [], ["surgery is inactive"]]
