"""Rank-1 experts whose first factors are their own keys (MoRAM).

Legend: M rows, K d_in, N d_out, R experts, k of them a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand
from taskmoe.moe.banks.core import CoreBank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context
from taskmoe.moe.options import options_of
from taskmoe.moe.tasks import TaskTable


class OwnKeysBank(CoreBank):
    """y + s * B (w * A x), w = softmax of the k largest of n / temperature, n = A x / ||A x|| (MoRAM).

    There is no router: ``r`` rank-1 experts, and how strongly a token excites each row of A is its gate.

    A_RK: [r, K]; B_RN: [r, N], zero; float32.
    """

    uses: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "lora_dropout")
    levels: ClassVar[tuple[str, ...]] = ()

    @dataclass(frozen=True)
    class Options:
        top_k: int = 8  # experts of a token; at most r
        temperature: float = 0.03  # of the softmax over them

        def __post_init__(self) -> None:
            if not self.temperature > 0:
                raise ConfigError(f"moe.bank_options.temperature: {self.temperature} must be above 0")

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError for more experts a token than a layer has."""
        least = min(config.ranks())
        if not 1 <= options.top_k <= least:
            raise ConfigError(f"moe.bank_options.top_k: {options.top_k} must be between 1 and r = {least}")

    def __init__(self, config: TaskMoEConfig, d_in: int, d_out: int, r: int, tasks: TaskTable) -> None:
        super().__init__(config, d_in, r)
        self.options = options_of("bank", config, type(self))
        self.B_RN = nn.Parameter(torch.zeros(r, d_out))
        self.num_gates = r

    def forward(
        self, x_MK: Tensor, y_MN: Tensor, gate: Context, plan: Plan, weight_NK: Tensor | None = None
    ) -> Tensor:
        """x_MK: [M, K]; y_MN: [M, N], what the experts' part is added to -> [M, N]."""
        A_GRK, B_GRN = self.factors(gate, self.A_RK, self.B_RN)
        s_MR = self.shrunk(x_MK, y_MN, A_GRK, plan)
        if gate.uniform:
            gates_MR = torch.full_like(s_MR, 1 / s_MR.shape[1])
        else:
            n_MR = nn.functional.normalize(s_MR, dim=1)
            largest_Mk, slots_Mk = n_MR.topk(self.options.top_k, dim=1)
            chosen_Mk = torch.softmax(largest_Mk / self.options.temperature, dim=1)
            gate.record(self, chosen_Mk, slots_Mk, plan)
            gates_MR = torch.zeros_like(s_MR).scatter(1, slots_Mk, chosen_Mk)
        ones_TR = s_MR.new_ones(plan.num_tasks, s_MR.shape[1])
        return expand(gates_MR * s_MR, y_MN, B_GRN.unsqueeze(2), ones_TR, None, self.scale, plan)
