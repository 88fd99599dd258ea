"""Routers that read the token and the task (Gupta et al. 2022, arXiv 2204.07689), in three forms.

The paper names gates that depend on the task and shows no formula; these three are ours. The task's vector
e_t is that of ``representation``: one for the whole model.

Legend: M rows, K d_in, E experts, D task vector, F hidden, T tasks of the table, Tb tasks in the batch, G 1
or Tb.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import shrink
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Context
from taskmoe.moe.parts import by_row
from taskmoe.moe.tasks import TaskTable


def _linear(x_MK: Tensor, weight_GE1K: Tensor, plan: Plan) -> Tensor:
    """[M, E]; E experts of rank 1 to the kernels, so that a gradient a task costs nothing."""
    return shrink(x_MK, [weight_GE1K], [None], plan)[0]


def _of_tasks(vectors_TD: Tensor, weight_GDE: Tensor) -> Tensor:
    """[Tb, E], row t by the weight of task t."""
    if len(weight_GDE) == 1:
        return vectors_TD @ weight_GDE[0]
    return torch.einsum("td,tde->te", vectors_TD, weight_GDE)


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class TokenTaskSumRouter(Bank):
    """logits = W x + U e_t: the task moves the token's logits.

    A linear map of [x; e_t] is the same function. weight_E1K: [E, 1, K], up_DE: [D, E], float32, uniform in
    +-1 / sqrt(fan in).
    """

    uses: ClassVar[tuple[str, ...]] = ("representation", "num_experts")
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.weight_E1K = _uniform(config.num_experts, 1, d_in, fan_in=d_in)
        self.up_DE = _uniform(dim, config.num_experts, fan_in=dim)

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> [M, E] float32 (float64 for float64 rows)."""
        weight_GE1K, up_GDE = context.factors(self.weight_E1K, self.up_DE)
        return _linear(x_MK, weight_GE1K, plan) + by_row(_of_tasks(context.task_vectors(), up_GDE), plan)


class TokenTaskConcatRouter(Bank):
    """logits = W2 gelu(W1 [x; e_t] + b1) + b2: token and task meet in a hidden layer.

    Without the hidden layer this would be ``token_task_sum``. Only here does what a token says depend on the
    task. token_F1K: [F, 1, K], task_DF: [D, F], b1_F, weight_E1F: [E, 1, F], b2_E: float32, uniform in +-1 /
    sqrt(fan in), biases zero.
    """

    uses: ClassVar[tuple[str, ...]] = ("representation", "num_experts", "router_hidden_dim")
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int) -> None:
        super().__init__()
        hidden = config.router_hidden_dim
        self.token_F1K = _uniform(hidden, 1, d_in, fan_in=d_in + dim)
        self.task_DF = _uniform(dim, hidden, fan_in=d_in + dim)
        self.b1_F = nn.Parameter(torch.zeros(hidden))
        self.weight_E1F = _uniform(config.num_experts, 1, hidden, fan_in=hidden)
        self.b2_E = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> [M, E] float32 (float64 for float64 rows)."""
        token_GF1K, task_GDF, b1_GF, weight_GE1F, b2_GE = context.factors(
            self.token_F1K, self.task_DF, self.b1_F, self.weight_E1F, self.b2_E
        )
        of_tasks_TF = _of_tasks(context.task_vectors(), task_GDF) + b1_GF
        hidden_MF = nn.functional.gelu(_linear(x_MK, token_GF1K, plan) + by_row(of_tasks_TF, plan))
        return _linear(hidden_MF, weight_GE1F, plan) + by_row(b2_GE, plan)


class GatePerTaskRouter(Bank):
    """logits = W_t x: each task has a gate of its own.

    weight_TEK: [T, E, K] float32, uniform in +-1 / sqrt(K): no task shares it with another.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts", "new_task_rows")
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True  # nothing is shared: a task's gate gets that task's gradient alone
    task_dims: ClassVar[dict[str, int]] = {"weight_TEK": 0}
    shares: ClassVar[bool] = False

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.weight_TEK = _uniform(len(tasks), config.num_experts, d_in, fan_in=d_in)

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> [M, E] float32 (float64 for float64 rows)."""
        # To the kernel each task of the batch is an expert of rank E, and the only one of its rows.
        weight_TEK = self.weight_TEK.index_select(0, context.task_ids(x_MK.device))
        own_T1 = torch.arange(len(weight_TEK), device=x_MK.device)[:, None]
        return shrink(x_MK, [weight_TEK.unsqueeze(0)], [own_T1], plan)[0]
