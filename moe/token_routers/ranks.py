"""A router that chooses single ranks of one LoRA, balanced by a bias that is not learned (SMoRA).

Legend: M rows, K d_in, E experts of rank 1, k of them a row, G 1 or the tasks of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import shrink
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context
from taskmoe.moe.options import options_of
from taskmoe.moe.tasks import TaskTable


class RanksRouter(Bank):
    """g_e = k * p_e / (sum of the chosen p), p = sigmoid(W x), for the k largest p + bias (SMoRA).

    With experts of rank 1 each expert is one rank of a LoRA of rank E, and ``lora_alpha`` is the paper's
    alpha / k. The bias chooses and does not gate. After each optimiser step, from the choices of all its
    rows but padding, while the router trains: bias += bias_step * sign(mean count - count).

    weight_E1K: [E, 1, K] float32, uniform in +-1 / sqrt(K). bias_E: [E], a buffer saved with the adapter.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True
    gates: ClassVar[tuple[str, ...]] = ("raw",)  # what it gives are gates
    moving: ClassVar[tuple[str, ...]] = ("bias_E",)
    name: str = ""  # the layer's
    bias_E: Tensor
    count_E: Tensor

    @dataclass(frozen=True)
    class Options:
        top_k: int = 8  # ranks of a token
        bias_step: float = 1e-5  # how far a rank's bias moves in a step; 0: no bias

        def __post_init__(self) -> None:
            if not self.bias_step >= 0:
                raise ConfigError(f"moe.router_options.bias_step: {self.bias_step} must be 0 or more")

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError for more ranks a token than a layer has."""
        least = min(config.expert_counts())
        if not 1 <= options.top_k <= least:
            raise ConfigError(
                f"moe.router_options.top_k: {options.top_k} must be between 1 and num_experts = {least}"
            )

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.options = options_of("router", config, type(self))
        E, bound = config.num_experts, 1 / math.sqrt(d_in)
        self.weight_E1K = nn.Parameter(torch.empty(E, 1, d_in).uniform_(-bound, bound))
        self.register_buffer("bias_E", torch.zeros(E))
        self.register_buffer("count_E", torch.zeros(E), persistent=False)  # of this step's choices
        self.total = float(self.options.top_k)

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> gates [M, E] float32 (float64 for float64 rows), zero but for k."""
        (weight_GE1K,) = context.factors(self.weight_E1K)
        p_ME = torch.sigmoid(shrink(x_MK, [weight_GE1K], [None], plan)[0])
        slots_Mk = torch.topk(p_ME.detach() + self.bias_E, self.options.top_k, dim=1).indices
        chosen_ME = torch.zeros_like(p_ME).scatter_(1, slots_Mk, 1.0)
        # Under checkpointing some choices are seen twice, but then all are: the sign does not change.
        if self.training and torch.is_grad_enabled() and self.weight_E1K.requires_grad:
            text_M = context.text_rows(plan, self.name, chosen_ME)
            self.count_E += (text_M[:, None] * chosen_ME).sum(0)  # a product of matrices may round
        kept_ME = p_ME * chosen_ME
        return kept_ME * (self.total / kept_ME.sum(1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def after_step(self, add_up: Callable[[Tensor], Tensor]) -> None:
        """See :meth:`taskmoe.moe.banks.base.Bank.after_step`: one collective."""
        counts_E = add_up(self.count_E)
        self.bias_E += self.options.bias_step * torch.sign(counts_E.mean() - counts_E)
        self.count_E.zero_()

    def extra_repr(self) -> str:
        return f"num_experts={len(self.bias_E)}, d_in={self.weight_E1K.shape[2]}, top_k={self.options.top_k}"
