"""Regret@k and NDCG by hand, and the file of measured transfer."""

from __future__ import annotations

import json
import math

import pytest

from taskmoe.moe import TaskError, TaskTable
from taskmoe.train.selection.base import SelectError
from taskmoe.train.selection.scores import ndcg, read_transfer, regret, score

MEASURED = {"a": 0.8, "b": 0.4, "c": 0.6}


def test_regret_is_the_share_of_the_best_that_is_lost():
    assert regret(MEASURED, ["b", "c", "a"], 1) == pytest.approx(0.5)
    assert regret(MEASURED, ["b", "c", "a"], 2) == pytest.approx(0.25)
    assert regret(MEASURED, ["b", "c", "a"], 3) == regret(MEASURED, ["a", "c", "b"], 1) == 0
    with pytest.raises(SelectError, match="the best score is -1; Regret@k is a share"):
        regret({"a": -1.0, "b": -2.0}, ["a", "b"], 1)


def test_ndcg_by_hand():
    # relevance: a 1, c 0.5, b 0
    gains = {"a": 1.0, "c": 2**0.5 - 1, "b": 0.0}
    ideal = gains["a"] + gains["c"] / math.log2(3)
    found = gains["b"] + gains["c"] / math.log2(3) + gains["a"] / 2
    assert ndcg(MEASURED, ["b", "c", "a"]) == pytest.approx(found / ideal)
    assert ndcg(MEASURED, ["a", "c", "b"]) == 1
    percent = {source: 100 * value for source, value in MEASURED.items()}
    assert ndcg(percent, ["c", "b", "a"]) == pytest.approx(ndcg(MEASURED, ["c", "b", "a"]))
    assert ndcg({"a": 1.0, "b": 1.0}, ["b", "a"]) == 1


def test_scores_are_means_over_measured_targets_and_sources():
    transfer = {"x": MEASURED, "y": {"a": 1.0, "b": 0.5}}
    rankings = {"x": ["a", "other", "c", "b"], "y": ["other", "b", "a"], "z": ["a"]}
    found = score(transfer, rankings)
    assert found["targets"] == 2 and found["regret@1"] == pytest.approx(0.25) and found["regret@3"] == 0
    assert found["ndcg"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    with pytest.raises(SelectError, match="none of its targets is ranked: x, y"):
        score(transfer, {"z": ["a"]})


@pytest.mark.parametrize(
    ("rows", "error", "says"),
    [
        ("[", SelectError, "is no readable JSON"),
        ([1], SelectError, 'is not {"target"'),
        ({}, SelectError, 'is not {"target"'),
        ({"a": {"b": 1, "c": "x"}}, SelectError, "'a' from 'c' has 'x', no number"),
        ({"a": {"b": True, "c": 1}}, SelectError, "'a' from 'b' has True, no number"),
        ({"a": {"a": 1, "b": 1}}, SelectError, "'a' has fewer than two sources"),
        ({"a": {"b": -1, "c": 0}}, SelectError, "'a': the best score is 0; Regret@k is a share"),
        ({"aa": {"b": 1, "c": 1}}, TaskError, "unknown task 'aa'; the nearest of 3 are a"),
        ({"a": {"b": 1, "d": 1}}, TaskError, "unknown task 'd'"),
    ],
)
def test_files_that_cannot_be_used(rows, error, says, tmp_path):
    path = tmp_path / "transfer.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(error, match=says):
        read_transfer(path, TaskTable.from_names(["a", "b", "c"]))


def test_a_file_is_read_without_its_diagonal(tmp_path):
    path = tmp_path / "transfer.json"
    path.write_text(json.dumps({"a": {"a": 5, "b": 1, "c": 0.5}}))
    assert read_transfer(path, TaskTable.from_names(["a", "b", "c"])) == {"a": {"b": 1.0, "c": 0.5}}
