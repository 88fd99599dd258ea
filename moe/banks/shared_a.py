"""One first factor for all experts (HydraLoRA). Legend: M rows, K d_in, N d_out, E experts, r rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.moe.banks.core import CoreBank
from taskmoe.moe.banks.rank_space import expand_gated
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Gate, TokenGate
from taskmoe.moe.tasks import TaskTable


class SharedABank(CoreBank):
    """y + s * sum_e g_e B_e A x: A is common, B_e the expert's (HydraLoRA, Tian et al. 2024, 2404.19245).

    A_RK: [r, K]; B_ErN: [E, r, N], zero; float32. Experts differ by their gates alone: under gates that are
    equal for ever they get one gradient and stay equal.
    """

    uses: ClassVar[tuple[str, ...]] = ("r", "num_experts", "lora_alpha", "lora_dropout")
    levels: ClassVar[tuple[str, ...]] = ("task", "token")
    by_expert: ClassVar[tuple[str, ...]] = ("B_ErN",)

    def __init__(self, config: TaskMoEConfig, d_in: int, d_out: int, r: int, tasks: TaskTable) -> None:
        super().__init__(config, d_in, r)
        self.B_ErN = nn.Parameter(torch.zeros(config.num_experts, r, d_out))

    def of_task(self, gates_HE: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """What one task uses, as (A [R, K], B [R, N]) of ``B^T A x``."""
        return self.A_RK, self.scale * torch.einsum("e,ern->rn", gates_HE[0], self.B_ErN)

    def forward(
        self,
        x_MK: Tensor,
        y_MN: Tensor,
        gate: Gate | TokenGate,
        plan: Plan,
        weight_NK: Tensor | None = None,
    ) -> Tensor:
        """x_MK: [M, K]; y_MN: [M, N], what the experts' part is added to -> [M, N]."""
        A_GRK, B_GErN = self.factors(gate, self.A_RK, self.B_ErN)
        s_Mr = self.shrunk(x_MK, y_MN, A_GRK, plan)
        return expand_gated(s_Mr, y_MN, B_GErN, gate, self.scale, plan)
