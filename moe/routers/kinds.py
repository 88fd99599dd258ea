"""Task-level routers by name: task -> logits over experts, for all routing groups at once.

A router is built from ``(config, groups, tasks, dim)``: the names of the S groups in the order of the model,
and the task table. It is called once per forward pass, not once per sequence, with ``(tasks [Tb] int64,
vectors_TD [Tb, D])``: the ids of the batch's tasks and their vectors (``dim`` = D; None and 0 unless ``uses``
names ``representation``). It returns logits [S, Tb, H, E] and is a function of its parameters and the task
alone. Its parameters are stacked over the S groups, so that every rank touches every tensor in every step
whatever its tasks are. ``task_dims`` names the axis of the tasks of each parameter that has one: there a
table of tasks grows.

``gates`` names the gates that it goes with (default: any), ``trains`` says that it has parameters (default),
``shares`` that tasks share them (default), ``blind`` that it says nothing and goes with a gate that asks
nothing, ``over_groups`` that it needs several groups. ``check`` and ``idle``: see ``moe/choices.py``.
"""

from __future__ import annotations

from typing import Any

from taskmoe.moe.routers.fixed import FixedRouter
from taskmoe.moe.routers.linear import TaskLinearRouter
from taskmoe.moe.routers.mlp import TaskMLPRouter
from taskmoe.moe.routers.none import NoRouter
from taskmoe.moe.routers.random_tasks import RandomTaskRouter
from taskmoe.moe.routers.recurrent import RecurrentRouter
from taskmoe.moe.routers.shared_mlp import SharedMLPRouter
from taskmoe.moe.routers.table import TaskTableRouter
from taskmoe.moe.routers.transformer import TransformerRouter

ROUTERS: dict[str, Any] = {
    "task_table": TaskTableRouter,
    "task_mlp": TaskMLPRouter,
    "task_linear": TaskLinearRouter,
    "shared_mlp": SharedMLPRouter,
    "recurrent": RecurrentRouter,
    "transformer": TransformerRouter,
    "fixed": FixedRouter,
    "random_tasks": RandomTaskRouter,
    "none": NoRouter,
}
