"""Routers: task ids -> logits over experts, for all routing groups at once.

Legend: S routing groups, T tasks, Tb tasks in this batch, H heads, E experts, D task embedding, F hidden.

A router is called once per forward pass, not once per sequence. Its parameters are stacked over the groups,
so that every rank touches every tensor in every step whatever its tasks are. ``task_dims`` names, for each
parameter with a
task axis, which one it is: that is where a table of tasks grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import TaskMoEConfig


class TaskTableRouter(nn.Module):
    """A free row of logits for each task, group and head (Ponti et al. 2022; heads: Caccia et al. 2023).

    logits_STHE: [S, T, H, E] float32, drawn from N(0, init_std): small, so that training starts near the
    average.
    """

    task_dims: ClassVar[dict[str, int]] = {"logits_STHE": 1}

    def __init__(self, config: TaskMoEConfig, num_groups: int, num_tasks: int) -> None:
        super().__init__()
        shape = (num_groups, num_tasks, config.num_heads, config.num_experts)
        self.logits_STHE = nn.Parameter(torch.randn(shape) * config.router_init_std)

    def forward(self, tasks: Tensor) -> Tensor:
        """tasks: [Tb] int64 -> logits [S, Tb, H, E]."""
        return self.logits_STHE.index_select(1, tasks)


class TaskMLPRouter(nn.Module):
    """A learned task embedding through one two-layer MLP a group: W2 gelu(W1 t) (Ye, Zha, Ren 2022).

    embedding_TD: [T, D], shared by all groups; w1_SDF, b1_SF, w2_SFE, b2_SE: one MLP a group (E stands for H
    * E).
    """

    task_dims: ClassVar[dict[str, int]] = {"embedding_TD": 0}

    def __init__(self, config: TaskMoEConfig, num_groups: int, num_tasks: int) -> None:
        super().__init__()
        d, f, out = config.task_embedding_dim, config.router_hidden_dim, config.num_heads * config.num_experts
        self.heads, self.experts = config.num_heads, config.num_experts
        self.embedding_TD = nn.Parameter(torch.randn(num_tasks, d))
        self.w1_SDF = nn.Parameter(
            torch.empty(num_groups, d, f).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d))
        )
        self.b1_SF = nn.Parameter(torch.zeros(num_groups, f))
        self.w2_SFE = nn.Parameter(
            torch.empty(num_groups, f, out).uniform_(-1 / math.sqrt(f), 1 / math.sqrt(f))
        )
        self.b2_SE = nn.Parameter(torch.zeros(num_groups, out))

    def forward(self, tasks: Tensor) -> Tensor:
        """tasks: [Tb] int64 -> logits [S, Tb, H, E]."""
        t = self.embedding_TD.index_select(0, tasks)
        hidden = nn.functional.gelu(torch.einsum("td,sdf->stf", t, self.w1_SDF) + self.b1_SF.unsqueeze(1))
        logits = torch.einsum("stf,sfe->ste", hidden, self.w2_SFE) + self.b2_SE.unsqueeze(1)
        return logits.unflatten(-1, (self.heads, self.experts))


class NoRouter(nn.Module):
    """No parameters: logits of zero for every expert (with gate: uniform)."""

    task_dims: ClassVar[dict[str, int]] = {}
    zero: Tensor

    def __init__(self, config: TaskMoEConfig, num_groups: int, num_tasks: int) -> None:
        super().__init__()
        self.shape = (num_groups, config.num_heads, config.num_experts)
        self.register_buffer(
            "zero", torch.zeros(()), persistent=False
        )  # follows the model's dtype and device

    def forward(self, tasks: Tensor) -> Tensor:
        """tasks: [Tb] int64 -> zeros [S, Tb, H, E]."""
        s, h, e = self.shape
        return self.zero.new_zeros(s, tasks.numel(), h, e)


ROUTERS: dict[str, Callable[[TaskMoEConfig, int, int], nn.Module]] = {
    "task_table": TaskTableRouter,
    "task_mlp": TaskMLPRouter,
    "none": NoRouter,
}
