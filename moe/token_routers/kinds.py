"""Token-level routers by name: the rows of a layer -> logits over its experts.

A router is built from ``(config, d_in, tasks, dim)`` for each layer and called with ``(x_MK, context,
plan)``: the rows that the layer reads. ``dim`` is the size of the tasks' vectors, ``context.task_vectors()``
(0 unless ``uses`` names ``representation``). It returns logits [M, E]; or gates, and then says so in
``gates``. It is a :class:`~taskmoe.moe.banks.base.Bank` of kind ``router``; parameters that tasks share go
through ``context.split`` where there is one. ``total``: the sum of its gates, where it gives gates.
``name``: of the layer, which :class:`~taskmoe.moe.token_routing.TokenRouting` fills in. ``check``, ``idle``
and ``packs``: see ``moe/choices.py``.
"""

from __future__ import annotations

from typing import Any

from taskmoe.moe.token_routers.arrow import ArrowRouter
from taskmoe.moe.token_routers.clusters import TokenClusterRouter
from taskmoe.moe.token_routers.linear import TokenLinearRouter
from taskmoe.moe.token_routers.random_instances import RandomInstanceRouter
from taskmoe.moe.token_routers.ranks import RanksRouter
from taskmoe.moe.token_routers.with_task import (
    GatePerTaskRouter,
    TokenTaskConcatRouter,
    TokenTaskSumRouter,
)

TOKEN_ROUTERS: dict[str, Any] = {
    "token_linear": TokenLinearRouter,
    "token_task_sum": TokenTaskSumRouter,
    "token_task_concat": TokenTaskConcatRouter,
    "gate_per_task": GatePerTaskRouter,
    "token_cluster": TokenClusterRouter,
    "ranks": RanksRouter,
    "arrow": ArrowRouter,
    "random_instances": RandomInstanceRouter,
}
