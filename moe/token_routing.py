"""Router and gate of one layer that routes its tokens itself.

Legend: M rows, K d_in, E experts, k slots a row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Context, TokenGate
from taskmoe.moe.gates import GATES
from taskmoe.moe.options import options_of
from taskmoe.moe.representations.kinds import vector_size
from taskmoe.moe.tasks import TaskTable
from taskmoe.moe.token_routers.kinds import TOKEN_ROUTERS


class TokenRouting(nn.Module):
    """Rows [M, K] -> a :class:`~taskmoe.moe.context.TokenGate`."""

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, name: str) -> None:
        super().__init__()
        method = TOKEN_ROUTERS[config.router]
        dim = vector_size(config, tasks) if "representation" in method.uses else 0
        self.router = method(config, d_in, tasks, dim)
        self.router.name = name
        self.gate, self.top_k, self.name = GATES[config.gate], config.top_k, name
        self.gate_options = options_of("gate", config, self.gate)
        self.num_experts = self.num_gates = config.num_experts

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> TokenGate:
        """x_MK: [M, K] floating."""
        if context.uniform:
            # As much in all as the router gives: one, or what a router of gates says.
            each = getattr(self.router, "total", 1.0) / self.num_experts
            gates = x_MK.new_full((len(x_MK), self.num_experts), each)
            return TokenGate(gates, None, context.split)
        logits_ME = self.router(x_MK, context, plan)
        noise = None
        if self.gate.noisy and self.training:
            tiny = torch.finfo(torch.float32).eps / 2
            noise = torch.rand_like(logits_ME).clamp(tiny, 1 - tiny)
        values, slots = self.gate(logits_ME, context.temperature, self.top_k, noise, self.gate_options)
        context.record(self, values, slots, plan)
        if context.penalties is not None:
            values = context.penalties.on_tokens(values, slots, logits_ME, context, plan, self.name)
        return TokenGate(values, slots, context.split)
