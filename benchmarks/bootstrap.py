"""Paired bootstrap over examples: how far do scores, and differences of scores, move with the examples drawn?

One resample draws, within every task, as many examples as it has, with replacement; every task's own metric
is computed anew on them, then the mean of each group of tasks, then the mean of the groups. All arms and
seeds see the same draws, so the difference of two arms is paired; an arm's value in a resample is the mean
over its seeds.
The intervals are the middle 95 % of the resamples: they cover the choice of examples, not that of seeds.

Legend: S resamples, N examples of a task, K labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskmoe.train.metrics import normalise, resolve

# Metrics that are the mean over examples of a number each.
MEANS = ("accuracy", "exact_match", "token_f1", "rouge_l")


@dataclass(frozen=True)
class Scored:
    """The examples of a task, and what they are scored by."""

    rows: Sequence[Mapping[str, Any]]  # raw rows: target, and accepted where several answers are right
    metric: str  # as taskmoe.train.metrics.resolve takes it
    labels: Sequence[str] | None
    group: str  # tasks of a group count as one in the score

    def value(self, predictions: Sequence[str]) -> float:
        """The metric on all examples."""
        return resolve(self.metric, self.labels)(predictions, self.rows)


def draws(sizes: Mapping[str, int], resamples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Indices of every resample of every task, {task: [S, N] int32}."""
    random = np.random.default_rng(seed)
    return {task: random.integers(0, n, (resamples, n), dtype=np.int32) for task, n in sizes.items()}


def resampled(task: Scored, predictions: Sequence[str], picks_SN: np.ndarray) -> np.ndarray:
    """The metric on every resample, [S] float64.

    Raises:
        RuntimeError: the fast form of the metric is not the metric.
    """
    whole_1N = np.arange(len(task.rows), dtype=np.int32)[None]
    if task.metric in MEANS:
        metric = resolve(task.metric, task.labels)
        each_N = np.array([metric([p], [row]) for p, row in zip(predictions, task.rows, strict=True)])
        fast = [each_N[picks].mean(1) for picks in (picks_SN, whole_1N)]
    else:
        codes_N = _codes(task, predictions)
        fast = [_of_counts(task, codes_N[picks]) for picks in (picks_SN, whole_1N)]
    if abs(float(fast[1][0]) - task.value(predictions)) > 1e-9:
        raise RuntimeError(
            f"{task.metric}: {float(fast[1][0])} here, {task.value(predictions)} by the metric itself"
        )
    return fast[0]


def _codes(task: Scored, predictions: Sequence[str]) -> np.ndarray:
    """Predicted x right label of every example as one number, [N]; what is no label counts as label K."""
    ids = {normalise(label): i for i, label in enumerate(task.labels or ())}
    found = np.array([ids.get(normalise(p), len(ids)) for p in predictions])
    wanted = np.array([ids.get(normalise(row["target"]), len(ids)) for row in task.rows])
    return found * (len(ids) + 1) + wanted


def _of_counts(task: Scored, codes_SN: np.ndarray) -> np.ndarray:
    """Metrics of classes, from how often each label was predicted for each: [S]."""
    labels = list(task.labels or ())
    k = len(labels) + 1
    counts = np.stack([np.bincount(codes, minlength=k * k).reshape(k, k) for codes in codes_SN])
    hits, found, wanted = (
        c[:, : k - 1] for c in (np.diagonal(counts, axis1=1, axis2=2), counts.sum(2), counts.sum(1))
    )
    if task.metric == "macro_recall":
        return (hits / np.maximum(1, wanted)).mean(1)
    f1 = 2 * hits / np.maximum(1, found + wanted)
    if task.metric == "macro_f1":
        return f1.mean(1)
    _, _, argument = task.metric.partition(":")
    of = [argument] if argument in labels else [part.strip() for part in argument.split(",")]
    return f1[:, [labels.index(label) for label in of]].mean(1)


def score(tasks: Mapping[str, Scored], values: Mapping[str, Any]) -> Any:
    """Mean over groups of the mean over a group's tasks; of numbers or of arrays."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for name, task in tasks.items():
        groups[task.group].append(values[name])
    means = [sum(members) / len(members) for members in groups.values()]
    return sum(means) / len(means)


def interval(values_S: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return [float(q) for q in np.quantile(values_S, [0.025, 0.975])]


def compare(
    tasks: Mapping[str, Scored],
    arms: Mapping[str, Sequence[Mapping[str, Sequence[str]]]],
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of all arms and the differences of all pairs, with intervals.

    Args:
        arms: {arm: one {task: predictions} a seed}.

    Returns:
        ``{"arms": {arm: {"tasks": {task: {"mean", "sd", "interval"}}, "score", "score_sd", "seed_scores",
        "interval"}}, "differences": {"a - b": {"score", "interval", "tasks": {task: {"mean",
        "interval"}}}}, "resamples"}``.
        The sd is over seeds (0 for one).
    """
    picks = draws({name: len(task.rows) for name, task in tasks.items()}, resamples, seed)
    found: dict[str, Any] = {}
    samples: dict[str, dict[str, np.ndarray]] = {}
    for arm, seeds in arms.items():
        values = {t: [task.value(run[t]) for run in seeds] for t, task in tasks.items()}
        samples[arm] = {
            t: np.mean([resampled(task, run[t], picks[t]) for run in seeds], 0) for t, task in tasks.items()
        }
        scores = [float(score(tasks, {t: v[i] for t, v in values.items()})) for i in range(len(seeds))]
        found[arm] = {
            "tasks": {
                t: {"mean": float(np.mean(v)), "sd": _sd(v), "interval": interval(samples[arm][t])}
                for t, v in values.items()
            },
            "score": float(np.mean(scores)),
            "score_sd": _sd(scores),
            "seed_scores": scores,
            "interval": interval(score(tasks, samples[arm])),
        }
    differences = {}
    names = list(arms)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            gaps = {t: samples[a][t] - samples[b][t] for t in tasks}
            differences[f"{a} - {b}"] = {
                "score": found[a]["score"] - found[b]["score"],
                "interval": interval(score(tasks, gaps)),
                "tasks": {
                    t: {
                        "mean": found[a]["tasks"][t]["mean"] - found[b]["tasks"][t]["mean"],
                        "interval": interval(gap),
                    }
                    for t, gap in gaps.items()
                },
            }
    return {"arms": found, "differences": differences, "resamples": resamples}


def _sd(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
