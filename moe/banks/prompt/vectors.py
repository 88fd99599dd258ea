"""Task prompt vectors: what tuning has changed, added up to start a new task (Belanec et al. 2024, arXiv
2408.01119).

Prompts are tensors of one shape, [l, W] or any other: a row of ``PerTaskPrompts.prompts_TlW``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def task_vector(tuned: Tensor, start: Tensor) -> Tensor:
    """tau_t = P_t - P_0: ``tuned`` less the values that it started from.

    Raises:
        ValueError: two shapes.
    """
    if tuned.shape != start.shape:
        raise ValueError(f"a prompt of shape {tuple(tuned.shape)} did not start as {tuple(start.shape)}")
    return tuned - start


def add_vectors(start: Tensor, vectors: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """P_0 + scale * sum_t tau_t: a start for a task that is like all of them.

    Raises:
        ValueError: no vectors, or one of another shape.
    """
    return start + scale * _stacked(start, vectors).sum(0)


def average_vectors(start: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """P_0 + mean_t tau_t. With ``new_task_rows: mean`` new tasks' prompts start so, from all known tasks.

    Raises:
        ValueError: as :func:`add_vectors`.
    """
    return start + _stacked(start, vectors).mean(0)


def _stacked(start: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    if not vectors:
        raise ValueError("no task vectors: give at least one")
    for vector in vectors:
        if vector.shape != start.shape:
            raise ValueError(
                f"a task vector of shape {tuple(vector.shape)} does not fit a prompt of {tuple(start.shape)}"
            )
    return torch.stack(list(vectors))
