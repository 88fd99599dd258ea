"""Evaluation: metrics and loss of every task, their means, and one score, whatever the number of ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

import torch

from taskmoe.moe.choices import choices_in_use
from taskmoe.moe.config import ConfigError
from taskmoe.moe.tasks import TaskTable
from taskmoe.train.checkpoint import rng_state, set_rng_state
from taskmoe.train.config import Config
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.distributed import Ranks
from taskmoe.train.metrics import resolve
from taskmoe.train.predict import Predictor

LABELLED = ("accuracy", "macro_f1")  # reported besides the task's own metric
FREE = ("exact_match", "token_f1", "rouge_l")


def primary_metrics(config: Config, tasks: TaskTable) -> list[str]:
    """The metric of each task: its data set's, else that of the first matching pattern of
    ``evaluation.metrics``, else accuracy for tasks with labels and exact_match for the others.

    Raises:
        ConfigError: an unknown metric or label, or a pattern of ``evaluation`` that matches no task.
    """
    own = {d.name: d.metric for d in config.datasets if d.name is not None and d.metric is not None}
    patterns = config.evaluation.metrics or {}
    groups = (config.evaluation.groups or {}).values()
    for setting, pattern in [*(("metrics", p) for p in patterns), *(("groups", p) for p in groups)]:
        if not any(fnmatchcase(name, pattern) for name in tasks.names):
            shown = ", ".join(tasks.names[:12])
            raise ConfigError(f"evaluation.{setting}: {pattern!r} matches none of the tasks {shown}")
    specs = []
    for task in tasks:
        matching = (spec for pattern, spec in patterns.items() if fnmatchcase(task.name, pattern))
        default = "accuracy" if task.labels else "exact_match"
        specs.append(own.get(task.name) or next(matching, default))
        try:
            resolve(specs[-1], task.labels)
        except ConfigError as error:
            raise ConfigError(f"task {task.name!r}: {error}") from error
    return specs


def group_of(config: Config, name: str) -> str:
    """The group whose mean stands for this task in the score; a task in none is its own."""
    for group, pattern in (config.evaluation.groups or {}).items():
        if fnmatchcase(name, pattern):
            return group
    return name


def evaluate(
    model: Any,
    splits: Sequence[TaskSplit],
    tokenizer: Any,
    config: Config,
    collator: Collator,
    ranks: Ranks,
    tasks: Sequence[int] | None = None,
    return_predictions: bool = False,
) -> dict[str, Any]:
    """Score a split. Every rank must call it and gets the same result; training does not notice it.

    Args:
        model: a TaskMoEModel, or anything with its ``forward``, ``generate``, ``tasks`` and ``config``.
        splits: one a task; tasks without rows are left out.
        collator: of the run; its packing is not used.
        tasks: ids of the tasks to score; None: all.
        return_predictions: add the predicted texts, in the order of the rows.

    Returns:
        ``{"tasks": {name: {metric: value, "loss", "rows", "metric": name of its own metric}}, "macro":
        {metric: mean over tasks}, "groups": {name: mean of its tasks' own metrics}, "score": mean of the
        groups}``, and with ``return_predictions`` ``"predictions": {name: [text]}``. ``evaluation.max_rows``
        takes that many rows a task, spread evenly. ``loss`` is the mean over target tokens, without label
        smoothing.

    Raises:
        ConfigError: an unknown metric, or no rows at all.
    """
    table: TaskTable = model.tasks
    specs = primary_metrics(config, table)
    wanted = range(len(table)) if tasks is None else tasks
    by_task = {s.task: s for s in splits if s.task in wanted and len(s.tokens) > 0}
    if not by_task:
        raise ConfigError("evaluation: none of the tasks has rows in this split")
    with _undisturbed(model):
        predictor = Predictor(model, by_task, tokenizer, config, collator, ranks)
        predictions, losses = predictor.run()
    results: dict[str, dict[str, Any]] = {}
    for task, split in by_task.items():
        rows = [split.raw[row] for row in predictor.rows[task]]
        labels = table[task].labels
        names = dict.fromkeys([specs[task], *(LABELLED if labels else FREE)])
        scores: dict[str, Any] = {n: resolve(n, labels)(predictions[task], rows) for n in names}
        total, tokens = losses[task]
        if task in predictor.reciprocal:
            scores["mrr"] = predictor.reciprocal[task]
        scores["loss"] = total / tokens if tokens else float("nan")
        results[table[task].name] = scores | {"rows": len(rows), "metric": specs[task]}
    found: dict[str, Any] = {"tasks": results, **_summary(config, results)}
    if return_predictions:
        found["predictions"] = {table[task].name: predictions[task] for task in by_task}
    return found


def evaluate_controls(model: Any, *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """:func:`evaluate` with the experts disabled, and with every gate (if any) 1 / E: {arm: results}."""
    modes = {"disabled": model.disable_adapter, "uniform": model.uniform_gates}
    if "router" not in choices_in_use(model.moe_config):
        del modes["uniform"]
    arms = {}
    for name, mode in modes.items():
        with mode():
            arms[name] = evaluate(model, *args, **kwargs)
    return arms


def _summary(config: Config, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means: of each metric over its tasks, of each group over its tasks, and the score over the groups."""
    macro: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[float]] = defaultdict(list)
    for name, scores in results.items():
        groups[group_of(config, name)].append(scores[scores["metric"]])
        for metric, value in scores.items():
            # f1:LABEL means something in one task only.
            if metric not in ("rows", "metric") and ":" not in metric:
                macro[metric].append(value)
    means = {group: fmean(values) for group, values in groups.items()}
    return {
        "macro": {metric: fmean(values) for metric, values in macro.items()},
        "groups": means,
        "score": fmean(means.values()),
    }


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's mode and every random generator as before outside."""
    modes = {module: module.training for module in model.modules()}
    rng = rng_state()
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        set_rng_state(rng)
