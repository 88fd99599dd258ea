"""What a run's log and its last evaluation say of learning: curves, and a row for each task.

Legend: T tasks, P points of a curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from taskmoe.moe.tasks import TaskTable
from taskmoe.train.track.facts import Facts, latest
from taskmoe.train.track.report.pack import pack_floats

MAX_NUMBERS = 100_000  # of one family of curves; with more tasks than points fit, curves have fewer points
POINTS = (100, 600)  # of a curve, at least and at most
# What eval_results.json compares, in words.
ARMS = {"experts": "as trained", "uniform": "all gates equal", "disabled": "experts off"}


class Family(NamedTuple):
    """Curves of one kind.

    key: of a task in a line of the log; ``{metric}`` is the task's own. whole: of all tasks together.
    """

    title: str
    unit: str
    key: str
    whole: str | None


FAMILIES = {
    "loss": Family("training loss", "nats a target token", "train/loss/{slug}", "train/loss"),
    "metric": Family("evaluation: own metric", "0 to 1", "eval/{slug}/{metric}", "eval/score"),
    "eval_loss": Family(
        "evaluation: loss", "nats a target token", "eval/{slug}/loss", "eval/macro/loss"
    ),
    "weight": Family("effective weight", "rate × loss weight × surgery's", "weight/{slug}", None),
    "epochs": Family("epochs seen", "times its rows were seen", "train/epochs/{slug}", None),
}  # fmt: skip


def curves(facts: Facts) -> dict[str, dict[str, Any]]:
    """{family: title, unit, ``steps`` [P], ``values`` packed floats [P, T], ``whole`` [P] or None}.

    A family that the log lacks is left out; of long logs evenly spaced lines are kept, the last among them.
    """
    metrics = own_metrics(facts)
    found = {}
    for name, family in FAMILIES.items():
        keys = [
            family.key.format(slug=task.slug, metric=metric)
            for task, metric in zip(facts.tasks, metrics, strict=True)
        ]
        lines = [line for line in facts.log if any(key in line for key in keys)]
        if not lines:
            continue
        least, most = POINTS
        lines = spaced(lines, min(most, max(least, MAX_NUMBERS // len(keys))))
        found[name] = {
            "title": family.title,
            "unit": family.unit,
            "steps": [line["step"] for line in lines],
            "values": pack_floats([[_number(line.get(key)) for key in keys] for line in lines]),
            "whole": None if family.whole is None else [finite(line.get(family.whole)) for line in lines],
        }
    return found


def history(log: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any] | None:
    """{"steps": [P], key: [P]} of those keys that the log has; None where it has none of them."""
    lines = [line for line in log if any(key in line for key in keys)]
    if not lines:
        return None
    lines = spaced(lines, POINTS[1])
    series = {key: [finite(line.get(key)) for line in lines] for key in keys}
    kept = {key: values for key, values in series.items() if any(v is not None for v in values)}
    return {"steps": [line["step"] for line in lines], **kept}


def task_rows(facts: Facts) -> dict[str, list[Any]]:
    """{column: [T]} of the table of tasks; values that are not known are None, columns of these left out."""
    last, tasks = latest(facts.log), facts.tasks
    metrics = own_metrics(facts)
    columns: dict[str, list[Any]] = {
        "group": [task.group for task in tasks],
        "target tokens": _column(last, tasks, "train/tokens/{slug}"),
        "epochs": _column(last, tasks, "train/epochs/{slug}"),
        "training loss": _column(last, tasks, "train/loss/{slug}"),
        "effective weight": _column(last, tasks, "weight/{slug}"),
        "metric": list(metrics),
    }
    for arm, title in ARMS.items():
        scored = (facts.results or {}).get(arm, {}).get("tasks", {})
        columns[title] = [finite(scored.get(t.name, {}).get(m)) for t, m in zip(tasks, metrics, strict=True)]
    if not any(v is not None for v in columns[ARMS["experts"]]):
        pairs = zip(tasks, metrics, strict=True)
        columns[ARMS["experts"]] = [finite(last.get(f"eval/{t.slug}/{m}")) for t, m in pairs]
    return {title: values for title, values in columns.items() if any(v is not None for v in values)}


def scores(facts: Facts) -> dict[str, float]:
    """{arm in words: score} of the last evaluation."""
    found = {title: finite((facts.results or {}).get(arm, {}).get("score")) for arm, title in ARMS.items()}
    return {title: value for title, value in found.items() if value is not None}


def own_metrics(facts: Facts) -> list[str | None]:
    """The name of each task's own metric, None where it was never evaluated."""
    scored = (facts.results or {}).get("experts", {}).get("tasks", {})
    last = latest([line for line in facts.log if line["kind"] == "eval"])
    return [scored.get(t.name, {}).get("metric") or last.get(f"eval/{t.slug}/metric") for t in facts.tasks]


def spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.unique(np.rint(np.linspace(0, len(items) - 1, most)).astype(int))]


def finite(value: Any) -> float | None:
    """A number that JSON holds, to six digits; None for anything else."""
    number = _number(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _column(last: Mapping[str, Any], tasks: TaskTable, key: str) -> list[float | None]:
    return [finite(last.get(key.format(slug=task.slug))) for task in tasks]
