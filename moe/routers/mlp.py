"""An MLP a routing group on the task's vector.

Legend: S routing groups, Tb tasks in this batch, H heads, E experts, D task vector, F hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.tasks import TaskTable


class TaskMLPRouter(nn.Module):
    """The task's vector through one two-layer MLP a group: W2 gelu(W1 t) (Ye, Zha, Ren 2022).

    w1_SDF, b1_SF, w2_SFE, b2_SE: one MLP a group (E stands for H * E), float32.
    """

    uses: ClassVar[tuple[str, ...]] = (
        "representation", "num_experts", "num_heads", "router_scope", "router_hidden_dim",
    )  # fmt: skip
    task_dims: ClassVar[dict[str, int]] = {}

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        d, f, out = dim, config.router_hidden_dim, config.num_heads * config.num_experts
        self.heads, self.experts = config.num_heads, config.num_experts
        S, low, high = len(groups), 1 / math.sqrt(d), 1 / math.sqrt(f)
        self.w1_SDF = nn.Parameter(torch.empty(S, d, f).uniform_(-low, low))
        self.b1_SF = nn.Parameter(torch.zeros(S, f))
        self.w2_SFE = nn.Parameter(torch.empty(S, f, out).uniform_(-high, high))
        self.b2_SE = nn.Parameter(torch.zeros(S, out))

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """vectors_TD: [Tb, D] -> logits [S, Tb, H, E]."""
        assert vectors_TD is not None
        hidden = torch.einsum("td,sdf->stf", vectors_TD, self.w1_SDF) + self.b1_SF.unsqueeze(1)
        hidden = nn.functional.gelu(hidden)
        logits = torch.einsum("stf,sfe->ste", hidden, self.w2_SFE) + self.b2_SE.unsqueeze(1)
        return logits.unflatten(-1, (self.heads, self.experts))
