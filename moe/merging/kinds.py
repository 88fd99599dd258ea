"""The ways of merging, by name.

A way is a :class:`~taskmoe.moe.merging.base.Merger`; its docstring says whether it works on deltas, the
products B^T A, or on factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch

from taskmoe.moe.collapse import Pair
from taskmoe.moe.config import ConfigError
from taskmoe.moe.merging.base import Merger, Source, linears
from taskmoe.moe.merging.breadcrumbs import Breadcrumbs
from taskmoe.moe.merging.concatenation import Concatenation
from taskmoe.moe.merging.copa import Copa
from taskmoe.moe.merging.svd_mean import SvdMean
from taskmoe.moe.merging.task_arithmetic import TaskArithmetic
from taskmoe.moe.merging.ties import Ties
from taskmoe.moe.options import read_options
from taskmoe.moe.truncate import shortest

MERGERS: dict[str, type[Merger]] = {
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "breadcrumbs": Breadcrumbs,
    "copa": Copa,
    "concatenation": Concatenation,
    "svd_mean": SvdMean,
}
Watch = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Merged:
    """pairs: {linear: its pair}, none where nothing is added. errors: {linear: |dW - its pair| / |dW|}, 0.0
    where nothing was cut."""

    pairs: dict[str, Pair]
    errors: dict[str, float]

    @property
    def rank(self) -> int:
        """The largest of the linears'."""
        return max(len(pair.A_RK) for pair in self.pairs.values())


def merger(method: str, options: Mapping[str, Any] | None = None) -> Merger:
    """The way of this name.

    Raises:
        ConfigError: an unknown name or option (the nearest is named), or a value that cannot be used.
    """
    if method not in MERGERS:
        near = get_close_matches(method, MERGERS, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"merge.method: {method!r} is not one of {', '.join(MERGERS)}; the nearest is {near!r}"
        )
    cls = MERGERS[method]
    return cls(read_options("merge.options", f"method {method!r}", cls, options or {}))


@torch.no_grad()
def merge_loras(
    sources: Sequence[Source],
    method: str,
    coefficient: float | None = None,
    options: Mapping[str, Any] | None = None,
    max_rank: int | None = None,
    watch: Watch = lambda found, total: found,
) -> Merged:
    """Several LoRAs of one base model as one, each of its linears at the lowest rank that holds it.

    Args:
        sources: {linear: its factors} each.
        coefficient: what the result is multiplied by; None: the method's own default.
        max_rank: above it, the nearest of that rank.
        watch: wraps the loop over linears, given it and their number, say to show progress.

    Raises:
        ConfigError: as :func:`merger`; no LoRAs, LoRAs of different models, or nothing left of them.
    """
    way = merger(method, options)
    if not sources:
        raise ConfigError("merge: there are no LoRAs to merge")
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"max_rank: {max_rank} must be at least 1")
    _require_one_model(sources)
    c = way.coefficient if coefficient is None else coefficient
    pairs, errors = {}, {}
    for name, whole in watch(way.merge(sources, c), len(linears(sources))):
        pairs[name], errors[name] = shortest(whole, max_rank)
    kept = {name: pair for name, pair in pairs.items() if len(pair.A_RK)}
    if not kept:
        raise ConfigError(
            f"merge.method: {method!r} leaves nothing of these LoRAs: is the coefficient {c} or a share too "
            "small, or are they untrained?"
        )
    return Merged(kept, {name: errors[name] for name in kept})


def _require_one_model(sources: Sequence[Source]) -> None:
    first: dict[str, tuple[int, int]] = {}
    for i, source in enumerate(sources):
        for name, pair in source.items():
            size = pair.A_RK.shape[1], pair.B_RN.shape[1]
            if first.setdefault(name, size) != size:
                raise ConfigError(
                    f"merge: LoRA {i + 1} of {len(sources)} has {name} from {size[0]} to {size[1]} features, "
                    f"one before it from {first[name][0]} to {first[name][1]}; they belong to other models"
                )
