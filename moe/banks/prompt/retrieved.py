"""A bank of prompts, mixed by a task's gates (after SPT: Bari et al. 2022, arXiv 2212.10929).

Legend: Tb tasks in this batch, E prompts in the bank, k slots a task, l positions of a prompt, W numbers a
position, G 1 or Tb.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.banks.prompt.per_task import PromptOptions, Starts
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Context


class RetrievedPrompts(Bank):
    """P_t = sum_e g_t,e P_e, with the gates of the one routing group.

    With ``gate: top_k`` these are the k prompts retrieved for the task; a router that compares a frozen
    vector of the task with keys retrieves by similarity.

    prompts_ElW: [E, l, W] float32, each with a start of its own.
    """

    Options = PromptOptions
    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    levels: ClassVar[tuple[str, ...]] = ("task",)
    splits: ClassVar[bool] = True

    def __init__(self, config: TaskMoEConfig, options: PromptOptions, num_tasks: int, starts: Starts) -> None:
        super().__init__()
        self.prompts_ElW = nn.Parameter(starts(config.num_experts))

    def forward(self, context: Context) -> Tensor:
        """The prompts of ``context.tasks``: [Tb, l, W]."""
        (gate,) = context.gates
        (bank_GElW,) = context.factors(self.prompts_ElW)
        # Prompts do not come from the embeddings, so that nothing else makes the bridge wait for them.
        values = gate.values if context.bridge is None else context.bridge.before(gate.values)
        g_TE = values.squeeze(1)
        if gate.slots is not None:
            g_TE = g_TE.new_zeros(len(g_TE), bank_GElW.shape[1]).scatter(1, gate.slots.squeeze(1), g_TE)
        g_TE = g_TE.to(bank_GElW.dtype)
        if len(bank_GElW) == 1:
            return torch.einsum("te,elw->tlw", g_TE, bank_GElW[0])
        return torch.einsum("te,telw->tlw", g_TE, bank_GElW)
