"""A linear router on the rows of a layer.

Legend: M rows, K d_in, E experts, G 1 or the tasks of the batch.
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
from taskmoe.moe.tasks import TaskTable


class TokenLinearRouter(Bank):
    """logits = W x for every token (Shazeer et al. 2017; LoRAMoE, MixLoRA, MoLA, HydraLoRA).

    weight_E1K: [E, 1, K] float32, uniform in +-1 / sqrt(K): a bank of E experts of rank 1 to the kernels, so
    that a gradient a task costs nothing.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.weight_E1K = nn.Parameter(torch.empty(config.num_experts, 1, d_in).uniform_(-bound, bound))

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> [M, E] float32 (float64 for float64 rows)."""
        (weight_GE1K,) = context.factors(self.weight_E1K)
        return shrink(x_MK, [weight_GE1K], [None], plan)[0]
