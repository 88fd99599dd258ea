"""CoBa: weights from the slopes of the validation losses.

Shapes: T tasks; n points in the window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskmoe.train.balancing.base import Balancing, BalancingError, padded
from taskmoe.train.choices import number, whole


class CoBa(Balancing):
    """Convergence balancer (Gong et al. 2024, arXiv 2410.06741).

    With v_t the validation loss relative to its first value and a_t its least-squares slope over a window:

    - relative score RCS = softmax over tasks of T a_t / sum_k |a_k|: slow tasks up;
    - absolute score ACS = softmax over tasks of -n a_t / sum over the window of |a_t|: tasks whose loss has
      begun to rise down;
    - divergence factor DF = n softmax over the window of -tau n a_max / sum |a_max|, at its newest point,
      with a_max the largest slope of any task;
    - w = T softmax(T (DF RCS + (1 - DF) ACS)), none below a tenth of the average.

    DF is clamped to [0, 1]. Without that, a slope that has just become twice as steep gives a DF of tens and
    (1 - DF) a large negative weight, and ACS then rewards the tasks it should slow.

    The unit of time is a validation, not a step: call ``on_validation`` at even intervals. It looks at
    validation rows, so the numbers that are reported must come from others. A task that has missed a
    validation of the window (new, or without validation rows) keeps the weight 1.

    Args:
        warmup: validations with all weights 1, >= 2.
        history: points of the window, >= 2.
        tau: sharpness of DF.
    """

    needs_validation = True

    def __init__(
        self, n_tasks: int, seed: int, warmup: int = 100, history: int = 200, tau: float = 5.0
    ) -> None:
        super().__init__(n_tasks, seed)
        self.warmup = whole("balancing.options.warmup", warmup, 2)
        self.history = whole("balancing.options.history", history, 2)
        self.tau = number("balancing.options.tau", tau, 0.0)
        self._seen = 0
        self._first_T = torch.full((n_tasks,), math.nan, dtype=torch.float64)
        self._ratios_nT = torch.zeros(0, n_tasks, dtype=torch.float64)
        self._slopes_nT = torch.zeros(0, n_tasks, dtype=torch.float64)

    def on_validation(self, losses_T: Tensor) -> None:
        fresh_T = self._first_T.isnan()
        bad_T = torch.isinf(losses_T) | (fresh_T & (losses_T <= 0))  # each is divided by its first
        if bad_T.any():
            tasks = ", ".join(map(str, bad_T.nonzero().squeeze(1).tolist()))
            raise BalancingError(f"coba: the validation loss of task {tasks} is infinite, or starts at 0")
        self._first_T = torch.where(fresh_T, losses_T, self._first_T)
        self._ratios_nT = torch.cat([self._ratios_nT, (losses_T / self._first_T)[None]])[-self.history :]
        self._seen += 1
        if len(self._ratios_nT) > 1:
            self._slopes_nT = torch.cat([self._slopes_nT, slopes(self._ratios_nT)[None]])[-self.history :]

    def weights(self, step: int, losses_T: Tensor | None) -> Tensor:
        w_T = torch.ones(self.n_tasks, dtype=torch.float64)
        if self._seen < self.warmup:
            return w_T
        live_T = torch.isfinite(self._slopes_nT).all(0)
        if live_T.any():
            w_T[live_T] = scores(self._slopes_nT[:, live_T], self.tau)
        return w_T

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self._seen,
            "first_T": self._first_T.clone(),
            "ratios_nT": self._ratios_nT.clone(),
            "slopes_nT": self._slopes_nT.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = int(state["seen"])
        self._first_T = padded(state["first_T"], self._first_T)
        for name in ("ratios_nT", "slopes_nT"):
            saved_nT = state[name]
            start_nT = torch.full((len(saved_nT), self.n_tasks), math.nan, dtype=torch.float64)
            setattr(self, f"_{name}", padded(saved_nT, start_nT)[-self.history :])


def slopes(ratios_nT: Tensor) -> Tensor:
    """Least-squares slope of each column over 0..n-1 (n >= 2); nan for a column that holds one."""
    x_n = torch.arange(len(ratios_nT), dtype=torch.float64)
    x_n -= x_n.mean()
    return (x_n @ (ratios_nT - ratios_nT.mean(0))) / x_n.square().sum()


def divergence_factor(worst_n: Tensor, tau: float) -> float:
    """DF in [0, 1] from the largest slope at each point of the window, oldest first."""
    n = len(worst_n)
    share_n = (-tau * n * _over(worst_n, worst_n.abs().sum())).softmax(0)
    return min(1.0, n * float(share_n[-1]))


def scores(slopes_nT: Tensor, tau: float) -> Tensor:
    """The weights [T] of CoBa from the slopes of a window; they sum to T."""
    n, T = slopes_nT.shape
    newest_T = slopes_nT[-1]
    relative_T = (T * _over(newest_T, newest_T.abs().sum())).softmax(0)
    absolute_T = (-n * _over(newest_T, slopes_nT.abs().sum(0))).softmax(0)
    df = divergence_factor(slopes_nT.max(1).values, tau)
    w_T = (T * (df * relative_T + (1 - df) * absolute_T)).softmax(0).clamp(min=1 / (10 * T))
    return T * w_T / w_T.sum()


def _over(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where nothing has moved."""
    return torch.where(below > 0, above / below, 0.0)
