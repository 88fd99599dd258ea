"""``taskmoe eval RUN --baseline RUN2``: the scores of one run beside those of another, on the same split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taskmoe.train.comparison import ASIDE, Arm, compare_arms
from taskmoe.train.track.facts import read_settings


def against(found: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The object of ``taskmoe compare`` (docs/TRACKING.md) for two evaluations.

    Args:
        found, baseline: what :func:`taskmoe.train.run_eval.score_run` returns, of the same split.

    Raises:
        FactsError: no task that both have with the same metric.
    """
    both = [_arm(baseline), _arm(found)]
    if both[0].name == both[1].name:
        for arm, of in zip(both, (baseline, found), strict=True):
            arm.name = f"{of['run']}/{of['checkpoint']}"
    compared = compare_arms(both)
    for task in compared["tasks"]:
        rows = [of["tasks"][task["name"]]["rows"] for of in (baseline, found)]
        if rows[0] != rows[1]:
            compared["remarks"].append(
                f"{task['name']}: {both[0].name} was scored on {rows[0]} rows, {both[1].name} on {rows[1]}"
            )
    return compared


def _arm(found: Mapping[str, Any]) -> Arm:
    """One evaluation as an arm of one seed; of the settings, what the evaluation replaced is as it was."""
    home = Path(found["run"])
    settings = read_settings(home)
    seed = settings.get("seed")
    settings = {key: value for key, value in settings.items() if key not in ASIDE}
    settings["eval_split"] = found["split"]
    settings["data"] = {**(settings.get("data") or {}), "root": found["data_root"]}
    # Rows are counted instead: one option of the command line holds for both runs.
    settings["evaluation"] = {**(settings.get("evaluation") or {}), "max_rows": None}
    tasks = found["tasks"]
    return Arm(
        settings,
        home.resolve().name,
        [found["run"]],
        {seed: {name: float(scores[scores["metric"]]) for name, scores in tasks.items()}},
        {name: scores["metric"] for name, scores in tasks.items()},
    )
