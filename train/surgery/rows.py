"""Which tasks share a row of J, and which methods that suits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from taskmoe.moe.config import ConfigError
from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.surgery.direct import DirectSurgery

BY_TASK = ("fixed", "gradvac")  # they keep something for each task id: rows cannot be groups of tasks


def fold(tasks: Sequence[int], max_tasks: int | None, seed: int, step: int) -> dict[int, int]:
    """{task: row}: a row each in the order of the ids, or, above ``max_tasks``, random groups of equal size.

    The groups are drawn from (seed, step): tasks that meet in one do not meet in all.
    """
    ids = sorted(set(tasks))
    if max_tasks is None or len(ids) <= max_tasks:
        return {task: row for row, task in enumerate(ids)}
    order = np.random.default_rng([seed, step, 5]).permutation(len(ids))
    return {ids[i]: place % max_tasks for place, i in enumerate(order)}


def check_tasks(method: Surgery | DirectSurgery, n_tasks: int, max_tasks: int) -> None:
    """Raises ConfigError where a method that goes by task does not fit the tasks of a run."""
    if method.name in BY_TASK and n_tasks > max_tasks:
        raise ConfigError(
            f"surgery.max_tasks: {max_tasks}, but there are {n_tasks} tasks, and {method.name!r} needs a row "
            f"for each; set it to {n_tasks}"
        )
    if method.name == "fixed" and len(method.options["weights"]) != n_tasks:
        found = len(method.options["weights"])
        raise ConfigError(
            f"surgery.options.weights: {found} weights for {n_tasks} tasks; give one for each task, "
            "in the order of the task table"
        )


def check_rows(method: Surgery | DirectSurgery, rows: Sequence[Sequence[int]]) -> None:
    """Raises ConfigError where tasks share a row and the method goes by task."""
    if method.name in BY_TASK and any(len(tasks) > 1 for tasks in rows):
        raise ConfigError(
            f"surgery.max_tasks: {len(rows)}, but {method.name!r} needs a row for each task; "
            f"set it to {sum(map(len, rows))}"
        )
