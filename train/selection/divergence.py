"""Tasks whose texts are distributed alike: a divergence between clouds of embeddings (Divergence-Based Domain
Transferability for Zero-Shot Classification, 2023).

Legend: T tasks, n rows of one task, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taskmoe.train.selection.base import Subject

MEDIAN_ROWS = 2000  # a median of four million distances is as good
FLOOR = 1e-3  # of a variance, as a share of the mean variance: words that a task lacks do not vary in it


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64: minus the divergence that ``--measure`` names, zero on the diagonal."""
    clouds = [subject.embeddings[name] for name in subject.names]
    return -MEASURES[subject.options.measure](clouds)


def mmd(clouds: Sequence[Tensor]) -> Tensor:
    """[T, T]: squared maximum mean discrepancy (Gretton et al. 2012), biased, so never negative.

    k(x, y) = exp(-|x - y|^2 / (2 m)), m the median squared distance of different rows of all tasks (of at
    most ``MEDIAN_ROWS`` of them, evenly spread): one kernel for all pairs.
    """
    counts, rows_ND = [len(cloud) for cloud in clouds], torch.cat(list(clouds))
    some_nD = rows_ND[:: -(-len(rows_ND) // MEDIAN_ROWS)]
    # Exact, so that equal rows are at zero.
    away_nn = torch.cdist(some_nD, some_nD, compute_mode="donot_use_mm_for_euclid_dist").square()
    apart = away_nn[away_nn > 0]
    width = 2 * float(apart.median()) if len(apart) else 1.0
    G_TT = rows_ND.new_empty(len(counts), len(counts))
    for t, cloud in enumerate(clouds):  # a task at a time: rows are many
        k_nN = torch.exp(-torch.cdist(cloud, rows_ND).square() / width)
        G_TT[t] = torch.stack([block.mean() for block in k_nN.split(counts, 1)])
    own_T = G_TT.diagonal()
    return (own_T[:, None] + own_T - G_TT - G_TT.T).clamp_min(0).fill_diagonal_(0)


def wasserstein(clouds: Sequence[Tensor]) -> Tensor:
    """[T, T]: squared 2-Wasserstein distance of Gaussians with the clouds' means and diagonal variances."""
    means_TD, deviations_TD = _moments(clouds)
    both = torch.cat([means_TD, deviations_TD], 1)
    return (both[:, None] - both).square().sum(-1)


def kl(clouds: Sequence[Tensor]) -> Tensor:
    """[T, T]: KL(p, q) + KL(q, p) of Gaussians with the clouds' means and diagonal variances."""
    means_TD, deviations_TD = _moments(clouds)
    v_TD = deviations_TD.square()
    v_TD = v_TD.clamp_min(FLOOR * float(v_TD.mean()) or torch.finfo(v_TD.dtype).tiny)
    found = [
        (v / v_TD + v_TD / v - 2 + (m - means_TD).square() * (1 / v + 1 / v_TD)).sum(-1) / 2
        for m, v in zip(means_TD, v_TD, strict=True)
    ]
    return torch.stack(found)


def _moments(clouds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    means_TD = torch.stack([cloud.mean(0) for cloud in clouds])
    return means_TD, torch.stack([cloud.std(0, correction=0) for cloud in clouds])


MEASURES: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "mmd": mmd,
    "wasserstein": wasserstein,
    "kl": kl,
}
