"""One MLP on the task's vector for all routing groups.

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


class SharedMLPRouter(nn.Module):
    """The task's vector through one two-layer MLP whose outputs are all groups' logits: W2 gelu(W1 t), W2
    with S * H * E rows (Ye, Zha, Ren 2022).

    w1_DF, b1_F, w2_FE, b2_E: float32 (E stands for S * H * E).
    """

    uses: ClassVar[tuple[str, ...]] = (
        "representation", "num_experts", "num_heads", "router_scope", "router_hidden_dim",
    )  # fmt: skip
    task_dims: ClassVar[dict[str, int]] = {}

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.shape = (len(groups), config.num_heads, config.num_experts)
        hidden, out = config.router_hidden_dim, math.prod(self.shape)
        low, high = 1 / math.sqrt(dim), 1 / math.sqrt(hidden)
        self.w1_DF = nn.Parameter(torch.empty(dim, hidden).uniform_(-low, low))
        self.b1_F = nn.Parameter(torch.zeros(hidden))
        self.w2_FE = nn.Parameter(torch.empty(hidden, out).uniform_(-high, high))
        self.b2_E = nn.Parameter(torch.zeros(out))

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """vectors_TD: [Tb, D] -> logits [S, Tb, H, E]."""
        assert vectors_TD is not None
        hidden = nn.functional.gelu(vectors_TD @ self.w1_DF + self.b1_F)
        return (hidden @ self.w2_FE + self.b2_E).unflatten(-1, self.shape).transpose(0, 1)
