"""No router. Legend: S routing groups, Tb tasks in this batch, H heads, E experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.tasks import TaskTable


class NoRouter(nn.Module):
    """No parameters: logits of zero for every expert (with gate: uniform)."""

    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    task_dims: ClassVar[dict[str, int]] = {}
    trains: ClassVar[bool] = False
    mutes: ClassVar[tuple[str, ...]] = ("num_heads",)  # every head has the same gates
    blind: ClassVar[bool] = True
    zero: Tensor

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.shape = (len(groups), config.num_heads, config.num_experts)
        # follows the model's dtype and device
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """tasks: [Tb] int64 -> zeros [S, Tb, H, E]."""
        s, h, e = self.shape
        return self.zero.new_zeros(s, tasks.numel(), h, e)
