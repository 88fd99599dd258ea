"""A task that is added starts from one that was there: which rows are its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from taskmoe.moe.model import TaskMoEModel, task_dims

OF_TASKS = ("experts", "router", "task_embedding")


@torch.no_grad()
def start_from(model: TaskMoEModel, seen: Mapping[str, str]) -> list[str]:
    """Give each task in ``seen`` the rows of another: {task: the one that it starts from}.

    All that a task owns in experts, routers and vectors, but not its head, whose labels are its own. Vectors
    that are given (``representation: frozen``) stay as they are. (Gupta et al. 2022, arXiv 2204.07689.)

    Returns:
        The names of the parameters that were written.

    Raises:
        TaskError: a task that is not in the table.
    """
    axes, groups = task_dims(model), model.parameter_groups()
    owned = {n: p for g in OF_TASKS for n, p in groups[g] if n in axes}
    pairs = [(model.tasks.id(new), model.tasks.id(old)) for new, old in seen.items()]
    for name, parameter in owned.items():
        rows = parameter.movedim(axes[name], 0)
        for new, old in pairs:
            rows[new] = rows[old]
    return list(owned)
