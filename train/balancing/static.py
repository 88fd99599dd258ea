"""Weights that follow no gradient: given, random, or by how fast each loss falls.

Shapes: T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.balancing.base import Balancing, padded
from taskmoe.train.choices import generator, number, whole

_STREAM = 1  # of the random numbers under one seed; 0 is surgery's


class Fixed(Balancing):
    """The weights given, one a task; 1 without any.

    Raises:
        ConfigError: not one finite number >= 0 for each task.
    """

    def __init__(self, n_tasks: int, seed: int, weights: Sequence[float] | None = None) -> None:
        super().__init__(n_tasks, seed)
        if weights is not None and not isinstance(weights, list | tuple):
            raise ConfigError(f"balancing.options.weights: {weights!r} is no list; give a number a task")
        given = [1.0] * n_tasks if weights is None else list(weights)
        if len(given) != n_tasks:
            raise ConfigError(f"balancing.options.weights: {len(given)} weights for {n_tasks} tasks")
        values = [number("balancing.options.weights", w, 0.0) for w in given]
        self._weights_T = torch.tensor(values, dtype=torch.float64)

    def weights(self, step: int, losses_T: Tensor | None) -> Tensor:
        return self._weights_T.clone()


class Random(Balancing):
    """T softmax(z), z standard normal, anew each step: a control (RLW, Lin et al. 2022, arXiv 2111.10603)."""

    def weights(self, step: int, losses_T: Tensor | None) -> Tensor:
        gen = generator(self.seed, step, _STREAM)
        return self.n_tasks * torch.randn(self.n_tasks, generator=gen, dtype=torch.float64).softmax(0)


class DWA(Balancing):
    """T softmax(rate / temperature), rate = mean loss of the last window over that of the one before it.

    Dynamic weight average (Liu et al. 2019, arXiv 1803.10704), with windows of steps in place of epochs. A
    window's mean is over its steps that hold the task; a window without the task is skipped. Tasks without
    two windows have the rate 1.

    Args:
        window: optimiser steps.
        temperature: > 0; higher is more uniform.
    """

    def __init__(self, n_tasks: int, seed: int, window: int = 25, temperature: float = 2.0) -> None:
        super().__init__(n_tasks, seed)
        self.window = whole("balancing.options.window", window, 1)
        self.temperature = number("balancing.options.temperature", temperature, 0.0, open_low=True)
        self._seen = 0
        self._sums_T, self._counts_T = (torch.zeros(n_tasks, dtype=torch.float64) for _ in range(2))
        self._older_T, self._newer_T = (
            torch.full((n_tasks,), math.nan, dtype=torch.float64) for _ in range(2)
        )

    def weights(self, step: int, losses_T: Tensor | None) -> Tensor:
        rate_T = self._newer_T / self._older_T
        rate_T = torch.where(torch.isfinite(rate_T), rate_T, 1.0)
        return self.n_tasks * (rate_T / self.temperature).softmax(0)

    def update(self, losses_T: Tensor) -> None:
        here_T = ~losses_T.isnan()
        self._sums_T[here_T] += losses_T[here_T]
        self._counts_T += here_T
        self._seen += 1
        if self._seen < self.window:
            return
        full_T = self._counts_T > 0
        mean_T = self._sums_T / self._counts_T
        self._older_T = torch.where(full_T, self._newer_T, self._older_T)
        self._newer_T = torch.where(full_T, mean_T, self._newer_T)
        self._seen = 0
        self._sums_T.zero_()
        self._counts_T.zero_()

    def state_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, f"_{name}").clone() for name in _DWA_STATE}
        return {"seen": self._seen, **values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = int(state["seen"])
        for name in _DWA_STATE:
            setattr(self, f"_{name}", padded(state[name], getattr(self, f"_{name}")))


_DWA_STATE = ("sums_T", "counts_T", "older_T", "newer_T")
