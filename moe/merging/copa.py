"""CoPA, later named RobustMerge. Legend: T sources, r the largest rank, K d_in, N d_out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.merging.base import Merger, Source, check_share, largest, linears, stacked


class Copa(Merger):
    """Prune both factors, scale up the directions that lost most (Zeng et al. 2025, arXiv 2502.17159).

    On factors. Of each A_t and of each B_t the largest share ``density`` of the entries stays. Row i of A_t
    has kept 1 / s_ti of its absolute sum; of the r values of a source those below their quantile ``floor``
    are raised to it. Then A = sum_t A_t, and row i of B = coefficient * sum_t s_ti B_t / sum_t s_ti.

    The default coefficient, 4, is the authors' factor 2 on each of A and B. A row of which nothing is left
    adds nothing, and has no part in quantiles and sums.
    """

    coefficient = 4.0

    @dataclass(frozen=True)
    class Options:
        density: float = 0.2  # the share of a factor's entries that stays
        floor: float = 0.8  # the quantile that no scale of a source is below

        def __post_init__(self) -> None:
            check_share("merge.options.density", self.density)
            check_share("merge.options.floor", self.floor, zero=True)

    def merge(self, sources: Sequence[Source], coefficient: float) -> Iterator[tuple[str, Pair | Tensor]]:
        for name in linears(sources):
            A_TrK, B_TrN = stacked(sources, name)
            s_Tr1, pruned_TrK = self._scales(A_TrK).unsqueeze(-1), self._pruned(A_TrK)
            total_r1 = s_Tr1.sum(0)
            B_rN = (s_Tr1 * self._pruned(B_TrN)).sum(0) / torch.where(total_r1 > 0, total_r1, 1.0)
            yield name, Pair(pruned_TrK.sum(0), coefficient * B_rN)

    def _pruned(self, x_Trd: Tensor) -> Tensor:
        """Shares are of the entries of rows that a source has: those of zeros are no part of it."""
        found = []
        for x_rd in x_Trd:
            rows = x_rd.abs().sum(-1) > 0
            bound = largest(x_rd[rows].flatten(), self.options.density) if rows.any() else x_rd.new_zeros(1)
            found.append(torch.where(x_rd.abs() >= bound, x_rd, 0.0))
        return torch.stack(found)

    def _scales(self, A_TrK: Tensor) -> Tensor:
        """s [T, r], zero for rows of which nothing is left."""
        left_Tr = self._pruned(A_TrK).abs().sum(-1)
        s_Tr = torch.where(left_Tr > 0, A_TrK.abs().sum(-1) / left_Tr, 0.0)
        for s_r in s_Tr:
            alive = s_r > 0
            if alive.any():
                ordered = s_r[alive].sort().values
                s_r[alive] = s_r[alive].clamp_min(ordered[int(self.options.floor * len(ordered))])
        return s_Tr
