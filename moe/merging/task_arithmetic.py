"""Task arithmetic: the sum. Legend: T sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.merging.base import Source
from taskmoe.moe.merging.by_entry import ByEntry
from taskmoe.moe.merging.concatenation import concatenate


class TaskArithmetic(ByEntry):
    """coefficient * sum_t Delta_t (Ilharco et al. 2023, arXiv 2212.04089).

    On deltas exact: factors are put side by side. On factors: B = coefficient * sum_t B_t, A = mean_t A_t.
    """

    coefficient = 0.4

    def merge(self, sources: Sequence[Source], coefficient: float) -> Iterator[tuple[str, Pair | Tensor]]:
        if self.options.space == "factors":
            return super().merge(sources, coefficient)
        return iter(concatenate(sources, [coefficient] * len(sources)).items())

    def combine(self, x_T: Tensor, bounds_T: Sequence[float]) -> Tensor:
        return x_T.sum(0)
