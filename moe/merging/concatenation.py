"""Factors side by side, exactly the weighted sum of the deltas. Legend: R rank, K d_in, N d_out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskmoe.moe.collapse import Pair
from taskmoe.moe.config import ConfigError
from taskmoe.moe.merging.base import Merger, Source, linears


class Concatenation(Merger):
    """coefficient * sum_t w_t Delta_t, as A = [A_1; A_2; ...] and B = [w_1 B_1; w_2 B_2; ...].

    On deltas, exact; the rank is the sum of the ranks. By default the mean, which is what experts with equal
    gates compute. (peft's ``cat``.)
    """

    @dataclass(frozen=True)
    class Options:
        weights: tuple[float, ...] = ()  # one a source; (): 1 / T each

    def merge(self, sources: Sequence[Source], coefficient: float) -> Iterator[tuple[str, Pair | Tensor]]:
        weights = self.options.weights or [1 / len(sources)] * len(sources)
        if len(weights) != len(sources):
            raise ConfigError(
                f"merge.options.weights: {len(weights)} of them for {len(sources)} LoRAs; give one each"
            )
        return iter(concatenate(sources, [coefficient * w for w in weights]).items())


def concatenate(sources: Sequence[Source], weights: Sequence[float]) -> dict[str, Pair]:
    """{linear: a pair whose product is sum_t w_t Delta_t}."""
    found = {}
    for name in linears(sources):
        own = [(source[name], w) for source, w in zip(sources, weights, strict=True) if name in source]
        A_RK, B_RN = torch.cat([pair.A_RK for pair, _ in own]), torch.cat([w * p.B_RN for p, w in own])
        found[name] = Pair(A_RK, B_RN)
    return found
