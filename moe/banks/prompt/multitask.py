"""MPT: one prompt that all tasks share, times a rank-1 part of each (Wang et al. 2023, arXiv 2303.02861).

Legend: T tasks, Tb tasks in this batch, l positions of a prompt, W numbers a position, G 1 or Tb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.banks.prompt.per_task import PromptOptions, Starts, task_ids
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Context


@dataclass(frozen=True)
class MultitaskOptions(PromptOptions):
    factor_std: float = 0.0  # spread around one, at the start, of the tasks' factors


class MultitaskPrompts(Bank):
    """P_t = P* o (u_t v_t'), with P* shared and u_t, v_t a task's own.

    u_t and v_t start at one, so that every task starts from P* itself. (Around zero, as in peft, the product
    starts at about nothing.)

    shared_lW: [l, W], rows_Tl: [T, l] (the u_t), columns_TW: [T, W] (the v_t), float32.
    """

    Options = MultitaskOptions
    uses: ClassVar[tuple[str, ...]] = ("new_task_rows",)
    levels: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[bool] = True
    task_dims: ClassVar[dict[str, int]] = {"rows_Tl": 0, "columns_TW": 0}

    def __init__(
        self, config: TaskMoEConfig, options: MultitaskOptions, num_tasks: int, starts: Starts
    ) -> None:
        super().__init__()
        self.shared_lW = nn.Parameter(starts(1)[0].clone())
        length, width = self.shared_lW.shape
        self.rows_Tl = nn.Parameter(1 + options.factor_std * torch.randn(num_tasks, length))
        self.columns_TW = nn.Parameter(1 + options.factor_std * torch.randn(num_tasks, width))

    def forward(self, context: Context) -> Tensor:
        """The prompts of ``context.tasks``: [Tb, l, W]."""
        ids = task_ids(context, self.shared_lW)
        (shared_GlW,) = context.factors(self.shared_lW)
        u_Tl1 = self.rows_Tl.index_select(0, ids).unsqueeze(2)
        v_T1W = self.columns_TW.index_select(0, ids).unsqueeze(1)
        return shared_GlW * u_Tl1 * v_T1W
