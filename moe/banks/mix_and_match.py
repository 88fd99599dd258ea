"""Rank-1 halves that pair freely (T-REX). Legend: M rows, K d_in, N d_out, R rows of A, Q rows of B."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand, low_rank_core
from taskmoe.moe.banks.core import CoreBank
from taskmoe.moe.banks.rank_space import dense_gates
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Gate, TokenGate
from taskmoe.moe.tasks import TaskTable


class MixAndMatchBank(CoreBank):
    """y + s * sum_ij G[i, j] b_j (a_i x): a gate for each pair of a row of A and one of B (T-REX, arXiv
    2404.08985).

    ``r`` rows of A; ``num_experts`` pairs, so num_experts / r rows of B; pair (i, j) is expert i * Q + j.

    A_RK: [R, K]; B_QN: [Q, N], zero; float32.
    """

    uses: ClassVar[tuple[str, ...]] = ("r", "num_experts", "lora_alpha", "lora_dropout")
    levels: ClassVar[tuple[str, ...]] = ("task", "token")
    weighs_all: ClassVar[bool] = True  # another row of B renumbers the pairs

    def __init__(self, config: TaskMoEConfig, d_in: int, d_out: int, r: int, tasks: TaskTable) -> None:
        super().__init__(config, d_in, r)
        self.B_QN = nn.Parameter(torch.zeros(config.num_experts // r, d_out))

    @staticmethod
    def check(config: TaskMoEConfig, options: None) -> None:
        """Raises ConfigError where the pairs do not fill whole rows of B; see :class:`BankKind`."""
        for E in config.expert_counts():
            for r in config.ranks():
                if E % r:
                    raise ConfigError(
                        f"moe.num_experts: {E} pairs of {r} rows of A (moe.r) with rows of B; make it a "
                        f"multiple of {r}"
                    )

    def of_task(self, gates_HE: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """What one task uses, as (A [R, K], B [R, N]) of ``B^T A x``."""
        return self.A_RK, self.scale * gates_HE[0].unflatten(0, (len(self.A_RK), -1)) @ self.B_QN

    def forward(
        self,
        x_MK: Tensor,
        y_MN: Tensor,
        gate: Gate | TokenGate,
        plan: Plan,
        weight_NK: Tensor | None = None,
    ) -> Tensor:
        """x_MK: [M, K]; y_MN: [M, N], what the experts' part is added to -> [M, N]."""
        A_GRK, B_GQN = self.factors(gate, self.A_RK, self.B_QN)
        R, Q = A_GRK.shape[1], B_GQN.shape[1]
        if isinstance(gate, TokenGate):
            s_MR = self.shrunk(x_MK, y_MN, A_GRK, plan)
            pairs_MRQ = dense_gates(gate, R * Q, s_MR.dtype).unflatten(1, (R, Q))
            h_MQ = (s_MR.unsqueeze(2) * pairs_MRQ).sum(1)  # no product that autocast would round
            ones_TQ = h_MQ.new_ones(plan.num_tasks, Q)
            return expand(h_MQ, y_MN, B_GQN.unsqueeze(2), ones_TQ, None, self.scale, plan)
        pairs_TE = gate.values.squeeze(1)
        if gate.slots is not None:
            pairs_TE = pairs_TE.new_zeros(len(pairs_TE), R * Q).scatter(1, gate.slots.squeeze(1), pairs_TE)
        core_TQR = pairs_TE.unflatten(1, (R, Q)).mT
        return low_rank_core(self.dropout(x_MK), y_MN, A_GRK, B_GQN, core_TQR, self.scale, plan)
