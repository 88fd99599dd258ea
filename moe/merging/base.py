"""What the ways of merging LoRAs share.

Legend: T sources, r the largest rank, K d_in, N d_out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.config import ConfigError

Source = Mapping[str, Pair]  # one LoRA: {linear: its factors, the scale in B}


class Merger(ABC):
    """One way. A source that has no pair for a linear adds zero there.

    ``coefficient``: the default of what the result is multiplied by, and the result is proportional to it.
    Options, if any, are in ``Options``.
    """

    coefficient: ClassVar[float] = 1.0

    def __init__(self, options: Any = None) -> None:
        self.options = options

    @abstractmethod
    def merge(self, sources: Sequence[Source], coefficient: float) -> Iterator[tuple[str, Pair | Tensor]]:
        """Linear after linear, its name and what is added to ``W0 x``: a pair, or a whole delta [N, K]."""


def linears(sources: Sequence[Source]) -> list[str]:
    """The linears of all sources, as they come."""
    return list(dict.fromkeys(name for source in sources for name in source))


def delta(source: Source, name: str, like: Pair) -> Tensor:
    """[N, K]: the product of a source's pair, or zeros of the size of ``like``."""
    if name in source:
        return source[name].B_RN.T @ source[name].A_RK
    return like.A_RK.new_zeros(like.B_RN.shape[1], like.A_RK.shape[1])


def stacked(sources: Sequence[Source], name: str) -> tuple[Tensor, Tensor]:
    """(A [T, r, K], B [T, r, N]) of one linear; rows that a source lacks are zero.

    Row i of one source then stands beside row i of the others: what is computed of them depends on how each
    product happens to be split into factors.
    """
    found = [source.get(name) for source in sources]
    some = next(pair for pair in found if pair is not None)
    r = max(len(pair.A_RK) for pair in found if pair is not None)
    A_TrK, B_TrN = (factor.new_zeros(len(sources), r, factor.shape[1]) for factor in some)
    for t, pair in enumerate(found):
        if pair is not None:
            A_TrK[t, : len(pair.A_RK)], B_TrN[t, : len(pair.B_RN)] = pair
    return A_TrK, B_TrN


def largest(x: Tensor, share: float) -> Tensor:
    """The bound of the largest entries of ``x`` [..., n] by magnitude: ``round(share * n)`` are not below it.

    Of equal entries all are; infinite where there are none to keep. [..., 1]
    """
    n = x.shape[-1]
    kept = round(share * n)
    if not kept:
        return torch.full_like(x[..., :1], float("inf"))
    return x.abs().kthvalue(n - kept + 1, dim=-1, keepdim=True).values


def check_share(key: str, value: float, zero: bool = False) -> None:
    """Raises ConfigError unless ``value`` is in (0, 1], or with ``zero`` in [0, 1)."""
    if not (0 <= value < 1 if zero else 0 < value <= 1):
        raise ConfigError(f"{key}: {value} is not in {'[0, 1)' if zero else '(0, 1]'}")
