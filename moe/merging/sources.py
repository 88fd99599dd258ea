"""LoRAs to merge, out of a model: of each task, or of each expert.

Legend: H heads, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from taskmoe.moe.collapse import CollapseError, Pair, collapse, expert_linears
from taskmoe.moe.merging.base import Source
from taskmoe.moe.model import TaskMoEModel


def of_tasks(model: TaskMoEModel, tasks: Sequence[str] | None = None) -> dict[str, Source]:
    """{task: the LoRA that it uses}, of these tasks or of all.

    Raises:
        CollapseError: see :func:`taskmoe.moe.collapse.collapse`. TaskError: an unknown task.
    """
    chosen = model.tasks.names if tasks is None else tasks
    return {task: collapse(model, task) for task in chosen}


@torch.no_grad()
def of_experts(model: TaskMoEModel) -> dict[str, Source]:
    """{``expert e``: what it adds with a gate of one and all others zero}, whoever routes to it.

    Raises:
        CollapseError: the experts are not LoRAs beside linears, each of its own.
    """
    layers, others = expert_linears(model)
    # A bank that keeps something of each task, or names no parameter by expert, has no expert of its own.
    whole = all("B_ErN" in layer.bank.by_expert and not layer.bank.task_dims for layer in layers.values())
    if not layers or others or not whole:
        raise CollapseError(
            f"moe.bank: {model.moe_config.bank!r} has no experts that are LoRAs by themselves; merge what "
            "tasks use"
        )
    found: dict[str, dict[str, Pair]] = {}
    for name, layer in layers.items():
        E = len(layer.bank.B_ErN)
        for e, gates_E in enumerate(torch.eye(E, device=model.device)):
            A_RK, B_RN = layer.bank.of_task(gates_E.expand(model.moe_config.num_heads, E), 0)
            pair = Pair(A_RK.float().contiguous(), B_RN.float().contiguous())
            found.setdefault(f"expert {e}", {})[name] = pair
    return dict(found)
