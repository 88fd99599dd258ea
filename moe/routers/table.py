"""A free row of logits a task.

Legend: S routing groups, T tasks, Tb tasks in this batch, H heads, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.tasks import TaskTable


class TaskTableRouter(nn.Module):
    """A free row of logits for each task, group and head (Ponti et al. 2022; heads: Caccia et al. 2023).

    logits_STHE: [S, T, H, E] float32, drawn from N(0, init_std): small, so that training starts near the
    average.
    """

    uses: ClassVar[tuple[str, ...]] = (
        "num_experts", "num_heads", "router_scope", "router_init_std", "new_task_rows",
    )  # fmt: skip
    task_dims: ClassVar[dict[str, int]] = {"logits_STHE": 1}
    shares: ClassVar[bool] = False  # a row belongs to one task

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        shape = (len(groups), len(tasks), config.num_heads, config.num_experts)
        self.logits_STHE = nn.Parameter(torch.randn(shape) * config.router_init_std)

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """tasks: [Tb] int64 -> logits [S, Tb, H, E]."""
        return self.logits_STHE.index_select(1, tasks)
