"""The mean of the deltas, at the rank of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.config import ConfigError
from taskmoe.moe.merging.base import Merger, Source
from taskmoe.moe.merging.concatenation import concatenate
from taskmoe.moe.truncate import truncate


class SvdMean(Merger):
    """The nearest product of rank ``rank`` to coefficient * mean_t Delta_t.

    On deltas; nearest in the Frobenius norm (Eckart and Young 1936). It is found from the factors alone.
    """

    @dataclass(frozen=True)
    class Options:
        rank: int | None = None  # of the result; None: that of the largest source

        def __post_init__(self) -> None:
            if self.rank is not None and self.rank < 1:
                raise ConfigError(f"merge.options.rank: {self.rank} must be at least 1")

    def merge(self, sources: Sequence[Source], coefficient: float) -> Iterator[tuple[str, Pair | Tensor]]:
        rank = self.options.rank or max(len(pair.A_RK) for source in sources for pair in source.values())
        mean = concatenate(sources, [coefficient / len(sources)] * len(sources))
        for name, pair in mean.items():
            yield name, truncate({name: pair}, rank)[0][name]
