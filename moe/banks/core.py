"""What banks with a small matrix between two stacked factors share: scale, dropout, the way into the ops.

Legend: M rows, K d_in, N d_out, R rows of A, G 1 or the tasks of the batch.
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
from taskmoe.moe.context import Context, Gate, TokenGate


class CoreBank(Bank):
    """y + s * B' M A x: A [R, K] reads the rows, a subclass says what M and B are.

    A_RK: [R, K] float32, uniform in +-1 / sqrt(K), as LoRA's.
    """

    splits: ClassVar[bool] = True
    shares: ClassVar[bool] = False
    first: ClassVar[bool] = False

    def __init__(self, config: TaskMoEConfig, d_in: int, rows: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.A_RK = nn.Parameter(torch.empty(rows, d_in).uniform_(-bound, bound))
        self.scale = (config.lora_alpha if config.lora_alpha is not None else rows) / rows
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()

    def shrunk(self, x_MK: Tensor, y_MN: Tensor, A_GRK: Tensor, plan: Plan) -> Tensor:
        """A x: [M, R], float32 (float64 for float64 rows)."""
        return shrink(self.dropout(x_MK).to(y_MN.dtype), [A_GRK.unsqueeze(1)], [None], plan)[0]

    def factors(self, gate: Gate | TokenGate | Context, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
        """Parameters as the ops take them, [G, *shape]."""
        if gate.split is None:
            return tuple(p.unsqueeze(0) for p in parameters)
        return gate.split(*parameters)

    def drops(self) -> bool:
        """Whether dropout changes the rows now."""
        return self.training and isinstance(self.dropout, nn.Dropout)
