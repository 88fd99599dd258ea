"""Model Breadcrumbs: neither the largest entries nor the many small ones. Legend: T sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.moe.merging.base import check_share, largest
from taskmoe.moe.merging.by_entry import ByEntry

SCOPES = ("linear", "row")


class Breadcrumbs(ByEntry):
    """coefficient * sum_t of each source's entries of middling size (Davari and Belilovsky 2023, arXiv
    2312.06795).

    By magnitude, in each linear (the paper) or in each of its rows (the authors' program): the largest share
    ``drop`` becomes zero, the share ``keep`` that comes next stays, the rest becomes zero.
    """

    coefficient = 0.4

    @dataclass(frozen=True)
    class Options(ByEntry.Options):
        drop: float = 0.1  # the share of the largest entries that is left out
        keep: float = 0.2  # the share of those next in size that stays
        scope: str = "linear"  # linear | row: of what these are shares

        def __post_init__(self) -> None:
            super().__post_init__()
            check_share("merge.options.drop", self.drop, zero=True)
            check_share("merge.options.keep", self.keep)
            if self.drop + self.keep > 1:
                raise ConfigError(
                    f"merge.options.keep: {self.keep} and drop: {self.drop} are more than 1 together"
                )
            if self.scope not in SCOPES:
                raise ConfigError(f"merge.options.scope: {self.scope!r} is not one of {', '.join(SCOPES)}")

    def combine(self, x_T: Tensor, bounds_T: Sequence[float]) -> Tensor:
        options, parts = self.options, x_T.flatten(1) if self.options.scope == "linear" else x_T
        size = parts.abs()
        kept = (size < largest(parts, options.drop)) & (size >= largest(parts, options.drop + options.keep))
        return torch.where(kept, parts, 0.0).sum(0).view(x_T.shape[1:])
