"""What the ways of weighing losses share: the signature, and the mean loss of each task of a step.

Shapes: T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class BalancingError(RuntimeError):
    """Losses that no weights can be made of; the message names the tasks."""


def task_losses(sums_T: Tensor, counts_T: Tensor) -> Tensor:
    """The mean loss of each task, fp64 [T] on the CPU; nan for a task without a target.

    Args:
        sums_T: [T], loss sums over all ranks and micro-batches.
        counts_T: [T], the targets they are sums over.

    Raises:
        BalancingError: a task with targets has a loss that is not finite.
    """
    sums_T, counts_T = sums_T.to("cpu", torch.float64), counts_T.to("cpu", torch.float64)
    bad_T = (counts_T > 0) & ~torch.isfinite(sums_T)
    if bad_T.any():
        tasks = ", ".join(map(str, bad_T.nonzero().squeeze(1).tolist()))
        raise BalancingError(f"the loss of task {tasks} is not finite; look at its rows and learning rate")
    return torch.where(counts_T > 0, sums_T / counts_T.clamp(min=1), math.nan)


def padded(saved_T: Tensor, start_T: Tensor) -> Tensor:
    """``start_T`` with its first entries replaced: tasks appended since a checkpoint begin at their start."""
    merged_T = start_T.clone()
    merged_T[..., : saved_T.shape[-1]] = saved_T
    return merged_T


class Balancing:
    """A method: weights from losses. It sees reduced values only, so all ranks hold the same state.

    Args:
        n_tasks: T.
        seed: integer >= 0.
    """

    needs_validation = False  # wants `on_validation`
    needs_second_forward = False  # wants `after_step`

    def __init__(self, n_tasks: int, seed: int) -> None:
        self.n_tasks, self.seed = n_tasks, seed

    def weights(self, step: int, losses_T: Tensor | None) -> Tensor:
        """fp64 [T], 1 on average where nothing is known."""
        raise NotImplementedError

    def update(self, losses_T: Tensor) -> None:
        """The mean losses of a step (nan: absent), once a step."""

    def after_step(self, losses_T: Tensor) -> None:
        """The mean losses of the same rows with the weights that the step led to."""

    def on_validation(self, losses_T: Tensor) -> None:
        """Mean losses on validation rows (nan: none)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
