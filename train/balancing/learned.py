"""Weights that are themselves trained: uncertainty weighting and FAMO, with an optimiser of their own.

Shapes: T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.base import Balancing, BalancingError, padded
from taskmoe.train.choices import number

_SMALLEST = 1e-8  # FAMO takes logarithms: a loss of zero counts as this


class _Adam:
    """Adam (Kingma and Ba 2015) on one vector, entry by entry: absent tasks neither move nor age."""

    def __init__(self, n: int, lr: float) -> None:
        self.lr, self.betas, self.eps = lr, (0.9, 0.999), 1e-8
        self.value_T, self.first_T, self.second_T, self.count_T = (
            torch.zeros(n, dtype=torch.float64) for _ in range(4)
        )

    def step(self, grad_T: Tensor, here_T: Tensor) -> None:
        """Move the entries of ``here_T`` (bool) against ``grad_T``."""
        (b1, b2), g = self.betas, grad_T[here_T]
        count = self.count_T[here_T] + 1
        first = b1 * self.first_T[here_T] + (1 - b1) * g
        second = b2 * self.second_T[here_T] + (1 - b2) * g.square()
        move = (first / (1 - b1**count)) / ((second / (1 - b2**count)).sqrt() + self.eps)
        self.count_T[here_T], self.first_T[here_T], self.second_T[here_T] = count, first, second
        self.value_T[here_T] -= self.lr * move

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in _ADAM_STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _ADAM_STATE:
            setattr(self, name, padded(state[name], getattr(self, name)))


_ADAM_STATE = ("value_T", "first_T", "second_T", "count_T")


class Uncertainty(Balancing):
    """w = exp(-s), s the log-variance of each task, learned (Kendall et al. 2018, arXiv 1705.07115).

    The loss of the paper is sum_t 1/2 (exp(-s_t) l_t + s_t); twice that is used, so that s = 0, the start,
    is plain training. s descends its gradient 1 - exp(-s_t) l_t by Adam, with the same losses that the
    step's weights were applied to. Where l_t stands still, w_t goes to 1 / l_t.

    Args:
        lr: Adam's, on s.
    """

    def __init__(self, n_tasks: int, seed: int, lr: float = 0.01) -> None:
        super().__init__(n_tasks, seed)
        self._adam = _Adam(n_tasks, number("balancing.options.lr", lr, 0.0))

    def weights(self, step: int, losses_T: Tensor | None) -> Tensor:
        return torch.exp(-self._adam.value_T)

    def update(self, losses_T: Tensor) -> None:
        self._adam.step(1 - torch.exp(-self._adam.value_T) * losses_T, ~losses_T.isnan())

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])


class FAMO(Balancing):
    """Equal relative progress of all losses, without task gradients (FAMO, Liu et al., arXiv 2306.03792).

    z = softmax(xi); the step descends sum_t z_t log l_t, that is w_t = (z_t / l_t) / sum_k (z_k / l_k), here
    times the number of tasks. xi then learns, by Adam, from the relative change of each loss over the step:
    what fell least is weighed more. Losses must be >= 0. Absent tasks keep their xi; the others share.

    w depends on the losses of the very step: they are given to ``weights`` where task gradients are combined
    after the backward pass; otherwise the newest known losses of each task stand in (1 before the first).

    Args:
        lr, gamma: Adam's learning rate and weight decay on xi.
        same_batch: measure the change on the rows of the step, by another forward pass after it
            (``after_step``), as in the paper; false: between consecutive steps' own losses, which costs
            nothing and is as noisy as the batches.
    """

    def __init__(
        self, n_tasks: int, seed: int, lr: float = 0.025, gamma: float = 0.01, same_batch: bool = True
    ) -> None:
        super().__init__(n_tasks, seed)
        if not isinstance(same_batch, bool):
            raise ConfigError(f"balancing.options.same_batch: {same_batch!r} is neither true nor false")
        self._adam = _Adam(n_tasks, number("balancing.options.lr", lr, 0.0))
        self.gamma = number("balancing.options.gamma", gamma, 0.0)
        self.needs_second_forward = same_batch
        self._known_T = torch.ones(n_tasks, dtype=torch.float64)
        self._before_T: Tensor | None = None  # this step's losses, until `after_step`
        self._ever_T = torch.zeros(n_tasks, dtype=torch.bool)

    def weights(self, step: int, losses_T: Tensor | None) -> Tensor:
        now_T = self._known_T if losses_T is None else losses_T
        here_T = ~now_T.isnan()
        ratio_T = torch.zeros(self.n_tasks, dtype=torch.float64)
        ratio_T[here_T] = self._adam.value_T[here_T].softmax(0) / now_T[here_T].clamp(min=_SMALLEST)
        return here_T.sum() * ratio_T / ratio_T.sum() if here_T.any() else torch.ones_like(ratio_T)

    def update(self, losses_T: Tensor) -> None:
        here_T = ~losses_T.isnan()
        if (losses_T[here_T] < 0).any():
            tasks = ", ".join(map(str, (losses_T < 0).nonzero().squeeze(1).tolist()))
            raise BalancingError(f"famo: the loss of task {tasks} is negative; famo takes logarithms")
        if self.needs_second_forward:
            self._before_T = losses_T.clone()
        else:
            self._learn(self._known_T, losses_T, here_T & self._ever_T)
        self._known_T = torch.where(here_T, losses_T, self._known_T)
        self._ever_T |= here_T

    def after_step(self, losses_T: Tensor) -> None:
        if self._before_T is None:
            raise BalancingError("famo: after_step without the losses from before the step (update)")
        self._learn(self._before_T, losses_T, ~(self._before_T.isnan() | losses_T.isnan()))
        self._before_T = None

    def _learn(self, before_T: Tensor, after_T: Tensor, here_T: Tensor) -> None:
        if not here_T.any():
            return
        fall = before_T[here_T].clamp(min=_SMALLEST).log() - after_T[here_T].clamp(min=_SMALLEST).log()
        xi = self._adam.value_T[here_T]
        z = xi.softmax(0)
        grad_T = torch.zeros(self.n_tasks, dtype=torch.float64)
        grad_T[here_T] = z * (fall - z @ fall) + self.gamma * xi
        self._adam.step(grad_T, here_T)

    def state_dict(self) -> dict[str, Any]:
        known = {"known_T": self._known_T.clone(), "ever_T": self._ever_T.clone()}
        return {"adam": self._adam.state_dict(), **known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        self._known_T = padded(state["known_T"], self._known_T)
        self._ever_T = padded(state["ever_T"], self._ever_T)
        self._before_T = None
