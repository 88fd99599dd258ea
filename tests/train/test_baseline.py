"""One evaluation beside another: gains, means and wins by hand, and what makes scores be of other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from taskmoe.train.baseline import against
from taskmoe.train.track.facts import FactsError

Evaluation = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """``evaluation(name, scores, settings)``: what scoring a run of these settings returns."""

    def make(name: str, scores: Mapping[str, float], settings: str = "", root: str | None = None) -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").write_text("model: {type: llama}\n" + settings)
        about = {"run": str(tmp_path / name), "checkpoint": "checkpoint-4", "step": 4, "split": "test"}
        tasks = {n: {"f1": s, "loss": 1.0, "rows": 10, "metric": "f1"} for n, s in scores.items()}
        return {**about, "data_root": root, "tasks": tasks}

    return make


def test_gain_means_medians_and_wins_by_hand(evaluation: Evaluation) -> None:
    base = evaluation(
        "average", {"a": 0.4, "b": 0.009, "c": 0.5, "d": 0.2}, "moe: {gate: uniform}\nseed: 1\n"
    )
    mine = evaluation("poly", {"d": 0.1, "a": 0.6, "b": 0.5, "c": 0.5}, "moe: {gate: softmax}\nseed: 1\n")
    found = against(mine, base)
    first, second = found["arms"]
    assert found["baseline"] == first["name"] == "average" and second["name"] == "poly"
    assert second["differs"] == {"moe.gate": ["uniform", "softmax"]}
    assert second["difference"]["value"] == pytest.approx((0.2 + 0.491 + 0.0 - 0.1) / 4)
    gain = second["relative_gain"]
    assert gain["value"] == pytest.approx((0.5 + 0.0 - 0.5) / 3) and gain["left_out"] == ["b"]
    assert second["mean"]["value"] == pytest.approx(0.425) and second["median"] == pytest.approx(0.5)
    assert second["wins"] == {"better": 2, "same": 1, "worse": 1}
    assert any(
        "b not in the average relative gain: the baseline is under 0.01" in r for r in found["remarks"]
    )


def test_checkpoints_of_one_run_have_their_own_names(evaluation: Evaluation) -> None:
    late = evaluation("run", {"a": 0.5})
    early = {**late, "checkpoint": "checkpoint-2"}
    names = [Path(arm["name"]).name for arm in against(late, early)["arms"]]
    assert names == ["checkpoint-2", "checkpoint-4"]


def test_other_rows_are_said(evaluation: Evaluation) -> None:
    mine = evaluation("mine", {"a": 0.5, "b": 0.5}, "data: {root: x}\neval_split: validation\n", root="there")
    base = evaluation(
        "base", {"a": 0.5, "b": 0.5}, "data: {root: y}\nevaluation: {max_rows: 3}\n", root="there"
    )
    assert not [r for r in against(mine, base)["remarks"] if "rows" in r], "both read what the options say"
    base["tasks"]["b"]["rows"] = 7
    remarks = against(mine, {**base, "data_root": "elsewhere"})["remarks"]
    assert "data.root differs between the arms: their scores may be of other rows" in remarks
    assert "b: base was scored on 7 rows, mine on 10" in remarks


def test_runs_without_a_common_task(evaluation: Evaluation) -> None:
    with pytest.raises(FactsError, match="no task is in all of base, mine"):
        against(evaluation("mine", {"a": 0.5}), evaluation("base", {"b": 0.5}))
