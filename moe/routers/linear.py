"""A linear map a routing group on the task's vector.

Legend: S routing groups, Tb tasks in this batch, H heads, E experts, D task vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.tasks import TaskTable


class TaskLinearRouter(nn.Module):
    """The task's vector through one linear map a group: W t + b (task-prompt routing, JiuZhang 2.0, Zhao et
    al. 2023, when the vector describes the task's prompt; MOELoRA, Liu et al. 2023, when it is learned).

    w_SDE, b_SE: float32, uniform in +-1 / sqrt(D), and zero (E stands for H * E).
    """

    uses: ClassVar[tuple[str, ...]] = ("representation", "num_experts", "num_heads", "router_scope")
    task_dims: ClassVar[dict[str, int]] = {}

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.heads, self.experts = config.num_heads, config.num_experts
        bound, out = 1 / math.sqrt(dim), self.heads * self.experts
        self.w_SDE = nn.Parameter(torch.empty(len(groups), dim, out).uniform_(-bound, bound))
        self.b_SE = nn.Parameter(torch.zeros(len(groups), out))

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """vectors_TD: [Tb, D] -> logits [S, Tb, H, E]."""
        assert vectors_TD is not None
        logits = torch.einsum("td,sde->ste", vectors_TD, self.w_SDE) + self.b_SE.unsqueeze(1)
        return logits.unflatten(-1, (self.heads, self.experts))
