"""Curves and the table of tasks, from lines of a log that are written here."""

from __future__ import annotations

import math
from base64 import b64decode
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from taskmoe.moe import TaskTable
from taskmoe.train.track.facts import Facts
from taskmoe.train.track.report import learning

LOG = [
    {"step": 10, "kind": "train", "train/loss": 2.0, "train/loss/a": 3.0, "train/loss/b": math.nan,
     "train/tokens/a": 5, "train/epochs/a": 0.25, "weight/a": 1.0},
    {"step": 10, "kind": "eval", "eval/a/f1": 0.25, "eval/a/loss": 1.5, "eval/a/metric": "f1",
     "eval/score": 0.25},
    {"step": 20, "kind": "train", "train/loss": 1.0, "train/loss/b": 0.5, "train/tokens/a": 9},
]  # fmt: skip
SCORED = {"experts": {"tasks": {"a": {"metric": "f1", "f1": 0.75}}, "score": 0.75}, "uniform": {"score": 0.5}}


@pytest.fixture
def facts(make_facts: Callable[..., Facts]) -> Facts:
    return make_facts(2, tasks=TaskTable.from_names(["a", "b"]), log=LOG, results=None)


def values(family: dict[str, Any]) -> list[list[float]]:
    found = np.frombuffer(b64decode(family["values"]), dtype="<f4")
    return found.reshape(len(family["steps"]), -1).tolist()


def test_curves_have_a_point_for_each_line_that_knows_them(facts: Facts) -> None:
    found = learning.curves(facts)
    assert found["loss"]["steps"] == [10, 20] and found["loss"]["whole"] == [2.0, 1.0]
    np.testing.assert_array_equal(values(found["loss"]), [[3.0, math.nan], [math.nan, 0.5]])
    np.testing.assert_array_equal(values(found["metric"]), [[0.25, math.nan]])
    np.testing.assert_array_equal(values(found["eval_loss"]), [[1.5, math.nan]])
    assert found["eval_loss"]["whole"] == [None] and found["weight"]["whole"] is None
    assert set(found) == {"loss", "metric", "eval_loss", "weight", "epochs"}


def test_long_curves_keep_their_ends(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "POINTS", (3, 5))
    lines = [{"step": i, "kind": "train", "train/loss/a": float(i)} for i in range(1, 101)]
    found = learning.curves(Facts(**{**vars(facts), "log": lines}))["loss"]
    assert len(found["steps"]) == 5 and found["steps"][0] == 1 and found["steps"][-1] == 100
    assert [row[0] for row in values(found)] == found["steps"]
    monkeypatch.setattr(learning, "MAX_NUMBERS", 8)  # two tasks: four points each
    assert len(learning.curves(Facts(**{**vars(facts), "log": lines}))["loss"]["steps"]) == 4


def test_histories_leave_out_what_was_never_logged() -> None:
    lines = [{"step": 1, "x": 0.5}, {"step": 2, "y": 3.0}, {"step": 3, "x": math.nan, "z": "text"}]
    assert learning.history(lines, ["x", "z"]) == {"steps": [1, 3], "x": [0.5, None]}
    assert learning.history(lines, ["w"]) is None


def test_rows_of_tasks_hold_the_last_values(facts: Facts) -> None:
    rows = learning.task_rows(facts)
    assert rows["target tokens"] == [9.0, None] and rows["epochs"] == [0.25, None]
    assert rows["training loss"] == [3.0, 0.5] and rows["effective weight"] == [1.0, None]
    assert rows["metric"] == ["f1", None] and rows["as trained"] == [0.25, None]
    assert "group" not in rows and "experts off" not in rows


def test_the_final_evaluation_comes_before_the_log(facts: Facts) -> None:
    ended = Facts(**{**vars(facts), "results": SCORED})
    assert learning.task_rows(ended)["as trained"] == [0.75, None]
    assert learning.scores(ended) == {"as trained": 0.75, "all gates equal": 0.5}
    assert learning.scores(facts) == {}
