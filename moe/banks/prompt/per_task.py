"""Prompt tuning: one soft prompt a task (Lester et al. 2021, arXiv 2104.08691).

Legend: T tasks, Tb tasks in this batch, l positions of a prompt, W numbers a position (the width of the
model's embeddings, or of the keys and values of all its layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context

# A number of prompts -> their values at the start, [number, l, W] float32.
Starts = Callable[[int], Tensor]
PLACES = ("input", "layers")


@dataclass(frozen=True)
class PromptOptions:
    """What every kind of prompt can be told."""

    length: int = 20  # positions of a prompt, the same for every task
    where: str = "input"  # input: before the embeddings | layers: keys and values before every layer's own
    start_std: float | None = None  # start at N(0, start_std); None: random tokens' embeddings, layers: 0.02

    def __post_init__(self) -> None:
        if self.where not in PLACES:
            raise ConfigError(
                f"moe.bank_options.where: {self.where!r} is unknown; known are {', '.join(PLACES)}"
            )
        if self.length < 1:
            raise ConfigError(f"moe.bank_options.length: {self.length} must be at least 1")
        for name in ("start_std", "factor_std"):
            value = getattr(self, name, None)
            if value is not None and value < 0:
                raise ConfigError(f"moe.bank_options.{name}: {value} must be 0 or more")


class PerTaskPrompts(Bank):
    """P_t, free for every task. All tasks start from the same values, so that what they have learned can be
    compared and added (:mod:`taskmoe.moe.banks.prompt.vectors`).

    prompts_TlW: [T, l, W] float32.
    """

    Options = PromptOptions
    uses: ClassVar[tuple[str, ...]] = ()
    levels: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[bool] = True
    task_dims: ClassVar[dict[str, int]] = {"prompts_TlW": 0}

    def __init__(self, config: TaskMoEConfig, options: PromptOptions, num_tasks: int, starts: Starts) -> None:
        super().__init__()
        self.prompts_TlW = nn.Parameter(starts(1).repeat(num_tasks, 1, 1))

    def forward(self, context: Context) -> Tensor:
        """The prompts of ``context.tasks``: [Tb, l, W]."""
        return self.prompts_TlW.index_select(0, task_ids(context, self.prompts_TlW))


def task_ids(context: Context, like: Tensor) -> Tensor:
    """``context.tasks``, int64 [Tb], beside ``like``."""
    return torch.tensor(context.tasks).to(like.device, non_blocking=True)
