"""Combinations of task gradients that need nothing but torch: sum, mean, PCGrad, Nash-MTL, and two controls.

Each function takes options and returns a :data:`~taskmoe.train.surgery.base.Method`.

Shapes: T tasks. ``G_TT`` is the Gramian J J' of their gradients, scaled to a mean diagonal of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.choices import number, whole
from taskmoe.train.surgery.base import Method, SurgeryError


def total() -> Method:
    """w = 1: plain training."""
    return lambda G_TT, gen, rows: torch.ones(len(rows), dtype=torch.float64)


def mean() -> Method:
    """w = 1 / T, over the tasks that have a gradient in the step. The direction is that of ``sum``."""
    return lambda G_TT, gen, rows: torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)


def pcgrad(reduction: str = "sum") -> Method:
    """Projecting conflicting gradients (Yu et al. 2020, arXiv 2001.06782, algorithm 1).

    From each g_i, in a random order of the others drawn for each i, the part along an (unprojected) g_j is
    removed whenever their inner product is negative. Everything happens in the coefficients of the g_j, so
    the Gramian suffices. For two tasks the result conflicts with neither; **for three or more it may**, as
    a later projection can bring back a conflict that an earlier one had removed (``upgrad`` never does).

    Args:
        reduction: ``sum`` (the paper; equals ``sum`` where nothing conflicts) or ``mean`` of the projections.
    """
    if reduction not in ("sum", "mean"):
        raise ConfigError(f"surgery.options.reduction: {reduction!r} is neither 'sum' nor 'mean'")

    def weights(G_TT: Tensor, gen: torch.Generator, rows: Sequence[int]) -> Tensor:
        G, T = G_TT.numpy(), len(rows)
        w_TT = np.eye(T)
        for i, w_T in enumerate(w_TT):
            for j in torch.randperm(T, generator=gen).tolist():
                if j == i:
                    continue
                inner = G[j] @ w_T
                if inner < 0:
                    w_T[j] -= inner / G[j, j]
        return torch.from_numpy(w_TT.sum(0) if reduction == "sum" else w_TT.mean(0))

    return weights


def random_weights() -> Method:
    """w = T softmax(z), z standard normal: a control (RLW, Lin et al. 2022, arXiv 2111.10603).

    The weights sum to T, so that their mean is that of ``sum``.
    """

    def weights(G_TT: Tensor, gen: torch.Generator, rows: Sequence[int]) -> Tensor:
        z_T = torch.randn(len(rows), generator=gen, dtype=torch.float64)
        return len(rows) * z_T.softmax(0)

    return weights


def fixed(weights: Sequence[float]) -> Method:
    """The weights given, one for each task id: a control (tuned static weights).

    Raises:
        ConfigError: a weight that is not a finite number >= 0.
    """
    given = [number("surgery.options.weights", w, 0.0) for w in weights]

    def chosen(G_TT: Tensor, gen: torch.Generator, rows: Sequence[int]) -> Tensor:
        missing = [row for row in rows if row >= len(given)]
        if missing:
            raise ConfigError(
                f"surgery.options.weights: {len(given)} weights, but the step holds task {missing[0]}; "
                "give one for each task"
            )
        return torch.tensor([given[row] for row in rows], dtype=torch.float64)

    return chosen


def nash_mtl(ridge: float = 1e-6, max_iterations: int = 1000) -> Method:
    """The bargaining solution G w = 1 / w, w > 0 (Nash-MTL, Navon et al. 2022, arXiv 2202.01017, claim 3.1).

    It is the minimum of the strictly convex 1/2 w' G w - sum log w, which Newton's method with the step of
    self-concordant functions reaches to rounding. So there is no solver, no warm start and no state, unlike
    the authors' sequence of approximations. Multiplying one task's loss by a constant leaves that task's
    contribution w_t g_t as it was, up to a common factor. The norm of the combined gradient is that of the
    Jacobian, sqrt(sum_t |g_t|^2), even close to a Pareto-stationary point; the authors' clipping of that norm
    is left to the engine, which clips after combination.

    Args:
        ridge: shrinks the cosines by 1 / (1 + ridge); it bounds the weights where gradients cancel (there
            the equation has no solution).
        max_iterations: of Newton's method.
    """
    ridge = number("surgery.options.ridge", ridge, 0.0, open_low=True)
    whole("surgery.options.max_iterations", max_iterations, 1)

    def weights(G_TT: Tensor, gen: torch.Generator, rows: Sequence[int]) -> Tensor:
        G = G_TT.numpy()
        norms_T = np.sqrt(np.diagonal(G))
        C_TT = (G / np.outer(norms_T, norms_T) + ridge * np.eye(len(rows))) / (1 + ridge)
        b_T = np.ones(len(rows))  # w times the norms: the equation in cosines, well scaled
        for _ in range(max_iterations):
            slope_T = C_TT @ b_T - 1 / b_T
            newton_T = np.linalg.solve(C_TT + np.diag(b_T**-2), slope_T)
            decrement = math.sqrt(max(float(slope_T @ newton_T), 0.0))
            b_T = b_T - newton_T / (1 + decrement if decrement > 0.25 else 1)
            if decrement < 1e-8:  # quadratic by now: the step just taken left far less
                return torch.from_numpy(b_T / norms_T)
        raise SurgeryError(
            f"nash_mtl: no solution in {max_iterations} iterations; raise surgery.options.ridge ({ridge:g})"
        )

    return weights
