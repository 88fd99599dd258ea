"""Where the rows of a task that is added start: at a rule's, or at those of one that was there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.model import TaskMoEModel, task_dims
from taskmoe.moe.routers.fixed import FixedRouter, experts_of_tasks
from taskmoe.moe.tasks import TaskTable

OF_TASKS = ("experts", "router", "task_embedding")
TABLE, VECTORS = "routing.router.logits_STHE", "routing.representation.embedding_TD"
CLOSED = -1e4  # a logit of TABLE whose gate is zero, whatever the temperature


def rule_of(model: TaskMoEModel, name: str, tensor: Tensor) -> str:
    """What a new task's rows of an adapter's tensor follow: ``moe_config.new_task_rows``, or ``random``: they
    stay as the model was built, where they are given (buffers, vectors that begin at those of a file)."""
    begun = (model.moe_config.representation_options or {}).get("path") is not None
    given = not isinstance(tensor, torch.nn.Parameter) or (begun and name == VECTORS)
    return "random" if given else model.moe_config.new_task_rows


def is_open(logits: Tensor) -> Tensor:
    """Where a task may route to an expert at all; bool, the shape of ``logits``."""
    return logits > CLOSED / 2


def row_of_new_tasks(name: str, old: Tensor, axis: int, rule: str) -> Tensor:
    """What tensor ``name`` holds for a new task, by its rows of known tasks: size 1 along ``axis``.

    ``mean`` and ``nearest``: their mean (a run looks for the nearest once the adapter is whole). Of a table
    of logits the mean of those that are open, 0 where all are closed: a closed one says that an expert came
    after the task, not how well it serves. ``zero``: zeros.
    """
    if rule == "zero":
        return torch.zeros_like(old.narrow(axis, 0, 1))
    open_ = is_open(old)
    if name != TABLE or open_.all():
        return old.mean(axis, keepdim=True)
    return torch.where(open_, old, 0.0).sum(axis, keepdim=True) / open_.sum(axis, keepdim=True).clamp_min(1)


@torch.no_grad()
def start_from(model: TaskMoEModel, seen: Mapping[str, str]) -> list[str]:
    """Give each task in ``seen`` the rows of another: {task: the one that it starts from}.

    All that a task owns in experts, routers and vectors, but not its head, whose labels are its own. Vectors
    that are given (``representation: frozen``) stay as they are; a map that is given (``router: fixed``)
    sends the task to the other's expert, in ``moe_config`` too. (Gupta et al. 2022, arXiv 2204.07689.)

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
    if isinstance(model.routing.router, FixedRouter):
        route_TE = model.routing.router.route_TE
        for new, old in pairs:
            route_TE[new] = route_TE[old]
        experts = route_TE.argmax(1).tolist()
        options = {"experts": dict(zip(model.tasks.names, experts, strict=True))}
        model.moe_config = replace(model.moe_config, router_options=options)
    return list(owned)


def has_rows(model: TaskMoEModel) -> bool:
    """Whether anything but a head belongs to one task alone, so that tasks can start from one another."""
    axes, groups = task_dims(model), model.parameter_groups()
    owned = any(n in axes for g in OF_TASKS for n, _ in groups[g])
    return owned or isinstance(model.routing.router, FixedRouter)


def with_new_tasks(config: TaskMoEConfig, known: TaskTable, names: Sequence[str]) -> TaskMoEConfig:
    """Settings under which a table with ``names`` appended can be attached: a map that is given
    (``router: fixed``) gets an expert for each, that of the first task until :func:`start_from` says more."""
    if config.router != "fixed":
        return config
    experts = experts_of_tasks(config, known)
    first = experts[known.names[0]]
    return replace(config, router_options={"experts": {**experts, **dict.fromkeys(names, first)}})
