"""TIES: trim, elect a sign, average what agrees. Legend: T sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taskmoe.moe.merging.base import check_share, largest
from taskmoe.moe.merging.by_entry import ByEntry


class Ties(ByEntry):
    """coefficient * the mean over those sources whose entry has the sign of the sum (Yadav et al. 2023, arXiv
    2306.01708).

    Of each source the largest share ``density`` of its entries counts, over all linears together; the others
    are zero. An entry's sign is that of the sum of what is left, and sources that are zero there or have the
    other sign are no part of the mean.

    On deltas a source is held as a whole, of the size of all weights that have experts. On factors shares and
    means are taken of all A, and of all B.
    """

    adds: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options(ByEntry.Options):
        density: float = 0.2  # the share of a source's entries that counts

        def __post_init__(self) -> None:
            super().__post_init__()
            check_share("merge.options.density", self.density)

    def bound(self, parts: Iterator[Tensor] | Sequence[Tensor]) -> float:
        return float(largest(torch.cat([part.flatten() for part in parts]), self.options.density))

    def combine(self, x_T: Tensor, bounds_T: Sequence[float]) -> Tensor:
        bounds = torch.tensor(bounds_T, dtype=x_T.dtype).view(-1, *[1] * (x_T.dim() - 1))
        trimmed_T = torch.where(x_T.abs() >= bounds, x_T, 0.0)
        agrees_T = (trimmed_T != 0) & (trimmed_T.sign() == trimmed_T.sum(0).sign())
        return torch.where(agrees_T, trimmed_T, 0.0).sum(0) / agrees_T.sum(0).clamp_min(1)
