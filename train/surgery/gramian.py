"""Inner products of task gradients, and what they say about a step.

Shapes: T rows, one a task; P columns (parameters).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INACTIVE = 0.01  # below this change of the update a method does nothing worth its cost

_CHUNK = 1 << 16  # columns that are in fp64 at a time


def gramian(jacobian_TP: Tensor) -> Tensor:
    """J J' in fp64, whatever the precision of J and of the device's fp32 products; additive over columns.

    Args:
        jacobian_TP: [T, P], floating point.

    Returns:
        fp64 [T, T] on the CPU, symmetric to the bit.
    """
    T = jacobian_TP.shape[0]
    G_TT = torch.zeros(T, T, dtype=torch.float64, device=jacobian_TP.device)
    for part in jacobian_TP.detach().split(_CHUNK, dim=1):
        part_Tp = part.double()
        G_TT += part_Tp @ part_Tp.T
    return ((G_TT + G_TT.T) / 2).cpu()


def cosines(gramian_TT: Tensor) -> Tensor:
    """Cosine of each pair of tasks, fp64 [T, T] in [-1, 1]; nan where a task has no gradient."""
    norms_T = gramian_TT.double().diagonal().sqrt()
    norms_T = norms_T.masked_fill(norms_T == 0, math.nan)
    return (gramian_TT.double() / norms_T[:, None] / norms_T[None, :]).clamp(-1, 1)


def conflict_fraction(gramian_TT: Tensor) -> float:
    """Share of the pairs of tasks with a gradient whose inner product is negative; nan with fewer than two.

    With noisy gradients about half of all pairs of tasks that agree look like conflicts: read it beside
    :func:`same_task_cosines`.
    """
    live_T = (gramian_TT.diagonal() > 0).nonzero().squeeze(1)
    R = len(live_T)
    if R < 2:
        return math.nan
    upper = torch.triu(gramian_TT[live_T][:, live_T] < 0, diagonal=1)
    return int(upper.sum()) / (R * (R - 1) / 2)


def same_task_cosines(first_T: Tensor, second_T: Tensor, between_T: Tensor) -> Tensor:
    """The null for :func:`cosines`: how alike two halves of one task's own batch are.

    Args:
        first_T, second_T: [T], squared norms of the gradients of the halves.
        between_T: [T], inner product of the two.

    Returns:
        fp64 [T] in [-1, 1]; nan where a half has no gradient.
    """
    norms_T = first_T.double().sqrt() * second_T.double().sqrt()
    return (between_T.double() / norms_T.masked_fill(norms_T == 0, math.nan)).clamp(-1, 1)


def update_change(gramian_TT: Tensor, weights_T: Tensor) -> float:
    """|d - d_sum| / |d_sum|, with d = J' w and d_sum = J' 1; 0 if both are zero, inf if d_sum alone is."""
    G_TT, w_T = gramian_TT.double(), weights_T.to(gramian_TT.device, torch.float64)
    return _ratio(_square(G_TT, w_T - 1), _square(G_TT, torch.ones_like(w_T)))


def direction_change(gramian_TT: Tensor, weights_T: Tensor) -> float:
    """The part of :func:`update_change` that no learning rate gives: min of |a d - d_sum| / |d_sum|, a >= 0.

    It is the sine of the angle between the two, 1 for angles above 90 degrees and for d = 0.
    """
    G_TT, w_T = gramian_TT.double(), weights_T.to(gramian_TT.device, torch.float64)
    ones_T = torch.ones_like(w_T)
    length = _square(G_TT, w_T)
    stretch = max(float(w_T @ G_TT @ ones_T), 0.0) / length if length > 0 else 0.0
    return _ratio(_square(G_TT, stretch * w_T - ones_T), _square(G_TT, ones_T))


def inactive(change: float) -> bool:
    """Whether a method left the update as it was, to within :data:`INACTIVE`."""
    return change < INACTIVE


def _square(G_TT: Tensor, v_T: Tensor) -> float:
    return max(float(v_T @ G_TT @ v_T), 0.0)  # rounding can leave a small negative number


def _ratio(above: float, below: float) -> float:
    if below == 0:
        return math.inf if above > 0 else 0.0
    return math.sqrt(above / below)
