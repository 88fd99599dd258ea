"""A matrix for each task between one first factor and several second ones (MTL-LoRA).

Legend: M rows, K d_in, N d_out, E experts, r rank, T tasks of the table, Tb tasks in the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import shrink
from taskmoe.moe.banks.core import CoreBank
from taskmoe.moe.banks.rank_space import expand_gated
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Gate, TokenGate, current
from taskmoe.moe.tasks import TaskTable


class MtlLoraBank(CoreBank):
    """y + s * sum_e g_e B_e Lambda_t A x (MTL-LoRA, Yang et al. 2024, arXiv 2410.09437).

    The paper's w_t is the gate: ``router: task_table``, ``gate: softmax``, ``router_temperature``.

    A_RK: [r, K]; lambda_Trr: [T, r, r], the identity, each task's own; B_ErN: [E, r, N], zero; float32.
    """

    uses: ClassVar[tuple[str, ...]] = (
        "r", "num_experts", "lora_alpha", "lora_dropout", "new_task_rows",
    )  # fmt: skip
    levels: ClassVar[tuple[str, ...]] = ("task", "token")
    by_expert: ClassVar[tuple[str, ...]] = ("B_ErN",)
    task_dims: ClassVar[dict[str, int]] = {"lambda_Trr": 0}

    def __init__(self, config: TaskMoEConfig, d_in: int, d_out: int, r: int, tasks: TaskTable) -> None:
        super().__init__(config, d_in, r)
        self.lambda_Trr = nn.Parameter(torch.eye(r).repeat(len(tasks), 1, 1))
        self.B_ErN = nn.Parameter(torch.zeros(config.num_experts, r, d_out))

    def of_task(self, gates_HE: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """What one task uses, as (A [R, K], B [R, N]) of ``B^T A x``."""
        B_rN = self.scale * torch.einsum("e,ern->rn", gates_HE[0], self.B_ErN)
        return self.lambda_Trr[task] @ self.A_RK, B_rN

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
        # To the kernel each task's matrix is an expert of rank r, and the only one of its rows.
        tasks = current("mtl_lora").task_ids(x_MK.device)
        lambda_Trr = self.lambda_Trr.index_select(0, tasks).to(s_Mr.dtype)
        own_T1 = torch.arange(len(tasks), device=x_MK.device)[:, None]
        h_Mr = shrink(s_Mr, [lambda_Trr.unsqueeze(0)], [own_T1], plan)[0]
        return expand_gated(h_Mr, y_MN, B_GErN, gate, self.scale, plan)
