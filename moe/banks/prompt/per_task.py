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
from taskmoe.moe.banks.prompt.saved import read_prompts
from taskmoe.moe.banks.prompt.vectors import add_vectors, task_vector
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


VECTORS = "vectors_"  # options of this name say where prompts start, and are of no use afterwards


@dataclass(frozen=True)
class PerTaskOptions(PromptOptions):
    """And where a task's prompt starts, if other tasks have been learned."""

    vectors_from: str | None = None  # folder of such an adapter: start at its P_0 plus its tasks' vectors
    vectors_of: tuple[str, ...] | None = None  # vectors_from: the tasks whose vectors are added; None: all
    vectors_scale: float = 1.0  # vectors_from: what their sum is multiplied by; 1 / their number: the mean

    def __post_init__(self) -> None:
        super().__post_init__()
        key = "moe.bank_options."
        if self.vectors_from is not None and self.start_std is not None:
            raise ConfigError(f"{key}start_std: {self.start_std} beside vectors_from, which gives the start")
        for name in ("vectors_of", "vectors_scale"):
            value = getattr(self, name)
            if self.vectors_from is None and value != getattr(PerTaskOptions, name):
                raise ConfigError(f"{key}{name}: {value} has no effect without vectors_from; give the folder")
        if self.vectors_of == ():
            raise ConfigError(f"{key}vectors_of: is empty; name tasks, or leave it out for all")


class PerTaskPrompts(Bank):
    """P_t, free for every task. All tasks start from the same values P_0, which are saved with them, so that
    what they have learned can be compared and added (:mod:`taskmoe.moe.banks.prompt.vectors`).

    prompts_TlW: [T, l, W] float32. start_lW: [l, W] float32, P_0.
    """

    Options = PerTaskOptions
    uses: ClassVar[tuple[str, ...]] = ("new_task_rows",)
    shares: ClassVar[bool] = False  # a prompt belongs to one task
    levels: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[bool] = True
    task_dims: ClassVar[dict[str, int]] = {"prompts_TlW": 0}

    start_lW: Tensor

    def __init__(
        self, config: TaskMoEConfig, options: PerTaskOptions, num_tasks: int, starts: Starts
    ) -> None:
        super().__init__()
        start_lW = starts(1)[0]
        if options.vectors_from is not None:
            start_lW = _from_vectors(options, start_lW)
        self.register_buffer("start_lW", start_lW)
        self.prompts_TlW = nn.Parameter(start_lW.repeat(num_tasks, 1, 1))

    def forward(self, context: Context) -> Tensor:
        """The prompts of ``context.tasks``: [Tb, l, W]."""
        return self.prompts_TlW.index_select(0, task_ids(context, self.prompts_TlW))


def _from_vectors(options: PerTaskOptions, like_lW: Tensor) -> Tensor:
    """The start that the task vectors of a saved adapter give, [l, W]; like_lW: a prompt of this model.

    Raises:
        ConfigError: no such adapter, or prompts of another shape.
    """
    key = "moe.bank_options.vectors_from"
    assert options.vectors_from is not None
    prompts_TlW, start_lW = read_prompts(options.vectors_from, options.vectors_of, key)
    if start_lW.shape != like_lW.shape:
        found, own = tuple(start_lW.shape), tuple(like_lW.shape)
        raise ConfigError(f"{key}: its prompts are {found}, this model's {own}; use one length and place")
    vectors = [task_vector(prompt_lW, start_lW) for prompt_lW in prompts_TlW]
    return add_vectors(start_lW, vectors, options.vectors_scale).to(like_lW)


def task_ids(context: Context, like: Tensor) -> Tensor:
    """``context.tasks``, int64 [Tb], beside ``like``."""
    return torch.tensor(context.tasks).to(like.device, non_blocking=True)
