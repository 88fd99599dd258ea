"""Tasks that are close to the target and together cover it (Xu et al. 2024, arXiv 2402.15017), greedily.

Legend: T tasks, n rows of one task, D embedding, R directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from taskmoe.train.selection.base import Subject

DIRECTIONS = 8  # of a source: the principal ones of its rows
_SMALL = 1e-6  # of a unit direction: rounding


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64: T less the place at which :func:`order` takes a source, from T - 1 down to 1; NaN in
    rows of tasks that are no targets."""
    clouds = [subject.embeddings[name] for name in subject.names]
    T = len(clouds)
    found_TT = torch.full((T, T), torch.nan, dtype=torch.float64)
    for target in subject.targets:
        sources = [s for s in range(T) if s != target]
        taken = order(clouds[target], [clouds[s] for s in sources])
        for place, s in enumerate(taken):
            found_TT[target, sources[s]] = T - 1 - place
    return found_TT


def order(target_nD: Tensor, sources: Sequence[Tensor]) -> list[int]:
    """In which order sources are taken: each time the one with the largest sum of two numbers.

    Consistency: the cosine of its mean row with the target's. Diversity: by how much the share of the
    target's rows (of their squared length) grows that lies in the span of what is taken, of each source its
    first ``DIRECTIONS`` right singular vectors. The paper has thresholds for both in place of a sum.
    """
    mean_D = target_nD.mean(0)
    axes = [_directions(source) for source in sources]
    consistency = [float(cosine_similarity(source.mean(0), mean_D, dim=0)) for source in sources]
    span_RD, taken = target_nD.new_zeros(0, target_nD.shape[1]), list[int]()
    while len(taken) < len(sources):
        gains = {}
        for s in range(len(sources)):
            if s not in taken:
                new_RD = _beyond(axes[s], span_RD)
                gains[s] = consistency[s] + coverage(target_nD, new_RD)
        best = max(gains, key=lambda s: gains[s])
        taken.append(best)
        span_RD = torch.cat([span_RD, _beyond(axes[best], span_RD)])
    return taken


def coverage(rows_nD: Tensor, axes_RD: Tensor) -> float:
    """The share of the rows' squared length along R orthonormal directions, in [0, 1]."""
    whole = float(rows_nD.square().sum())
    return float((rows_nD @ axes_RD.T).square().sum()) / whole if whole else 0.0


def _directions(rows_nD: Tensor) -> Tensor:
    _, sizes_R, axes_RD = torch.linalg.svd(rows_nD, full_matrices=False)
    return axes_RD[:DIRECTIONS][sizes_R[:DIRECTIONS] > _SMALL]


def _beyond(axes_RD: Tensor, span_RD: Tensor) -> Tensor:
    """Orthonormal directions of what ``axes`` add to ``span``."""
    for _ in range(2):  # once more, for what rounding left of it
        axes_RD = axes_RD - (axes_RD @ span_RD.T) @ span_RD
    _, sizes_R, new_RD = torch.linalg.svd(axes_RD, full_matrices=False)
    return new_RD[sizes_R > _SMALL]
