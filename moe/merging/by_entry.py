"""Merging entry by entry, of the products or of the factors.

Legend: T sources, r the largest rank, K d_in, N d_out; x is any of the tensors that are merged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.config import ConfigError
from taskmoe.moe.merging.base import Merger, Source, delta, linears, stacked

SPACES = ("delta", "factors")


class ByEntry(Merger):
    """Merges deltas B^T A, as the papers do with whole weights, or with ``space: factors`` all A and all B.

    A merged delta has any rank, and a singular value decomposition makes factors of it: of large models that
    takes long. The factors of one product are not unique, so that merging them is another method; it keeps
    the rank and never makes a matrix of the size of a weight. Where all sources have the same A, and nothing
    is left out of it, both are the same: B is added up as the deltas are, A is a mean.
    """

    adds: ClassVar[bool] = True  # the entries of the sources are added, not averaged

    @dataclass(frozen=True)
    class Options:
        space: str = "delta"  # delta: the products of the factors; factors: A and B, each by itself

        def __post_init__(self) -> None:
            if self.space not in SPACES:
                raise ConfigError(f"merge.options.space: {self.space!r} is not one of {', '.join(SPACES)}")

    def merge(self, sources: Sequence[Source], coefficient: float) -> Iterator[tuple[str, Pair | Tensor]]:
        names = linears(sources)
        if self.options.space == "factors":
            stacks = {name: stacked(sources, name) for name in names}
            bounds_A_T, bounds_B_T = (
                [self.bound([stack[i][t] for stack in stacks.values()]) for t in range(len(sources))]
                for i in (0, 1)
            )
            for name, (A_TrK, B_TrN) in stacks.items():
                A_rK, B_rN = self.combine(A_TrK, bounds_A_T), self.combine(B_TrN, bounds_B_T)
                yield name, Pair(A_rK / len(sources) if self.adds else A_rK, coefficient * B_rN)
            return
        like = {name: next(source[name] for source in sources if name in source) for name in names}
        bounds_T = [self.bound(delta(source, n, like[n]) for n in names) for source in sources]
        for name in names:
            deltas_TNK = torch.stack([delta(source, name, like[name]) for source in sources])
            yield name, coefficient * self.combine(deltas_TNK, bounds_T)

    def bound(self, parts: Iterator[Tensor] | Sequence[Tensor]) -> float:
        """What counts of one source: entries from this magnitude on; parts: its tensors, one by one."""
        return 0.0

    @abstractmethod
    def combine(self, x_T: Tensor, bounds_T: Sequence[float]) -> Tensor:
        """The tensors of one linear [T, ...] as one [...]."""
