"""Terms that keep low-rank experts of one layer apart, as means over pairs of experts and over layers.

Legend: E experts, r rank of one expert, K d_in, N d_out, D either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.kinds import BANKS
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.regularisers.base import OfParameters, on_one_device, pair_mean
from taskmoe.moe.tasks import TaskTable

FACTORS = ("A_ErK", "B_ErN")


def _has(config: TaskMoEConfig, *factors: str) -> bool:
    """Whether some layer has several experts with these factors."""
    known = getattr(BANKS[config.bank], "by_expert", ())
    return max(config.expert_counts()) > 1 and all(name in known for name in factors)


class Orthogonality(OfParameters):
    """|A^_e A^_f'|_F^2 / r for pairs of experts, A^ with rows of length one: 0 if the subspaces are
    orthogonal.

    O-LoRA (Wang et al. 2023, arXiv 2310.14152) sums the entries of A_e A_f' between tasks learned one after
    the other; rows of length one keep the term from being met by shrinking A.
    """

    @dataclass(frozen=True)
    class Options:
        factor: str = "A"  # A | B: which factor of the experts

    def __init__(self, options: Options, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        names = {name[0]: name for name in FACTORS}
        if options.factor not in names:
            key = "moe.regularisers.orthogonality.factor"
            raise ConfigError(f"{key}: {options.factor!r} is unknown; known are {', '.join(names)}")
        self.name = names[options.factor]

    @classmethod
    def fits(cls, options: Options, config: TaskMoEConfig) -> bool:
        """See :class:`Regulariser`."""
        return _has(config, *(name for name in FACTORS if name[0] == options.factor))

    def reads(self, module: nn.Module) -> list[nn.Parameter]:
        factor = getattr(module, self.name, None)
        return [factor] if isinstance(factor, nn.Parameter) and _experts(factor) > 1 else []

    def value(self, modules: Sequence[nn.Module]) -> Tensor:
        return on_one_device([_overlap(getattr(m, self.name)) for m in modules]).mean()


class ExpertDistance(OfParameters):
    """cos(dW_e, dW_f) of the updates dW_e = B_e' A_e, for pairs of experts: 1 if equal, below 0 if opposed.

    <dW_e, dW_f> = sum((A_e A_f') * (B_e B_f')), so no dW is built. Experts at zero (the start) have cosine 0
    and no gradient.
    """

    @classmethod
    def fits(cls, options: None, config: TaskMoEConfig) -> bool:
        """See :class:`Regulariser`."""
        return _has(config, *FACTORS)

    def reads(self, module: nn.Module) -> list[nn.Parameter]:
        found = [getattr(module, name, None) for name in FACTORS]
        whole = all(isinstance(p, nn.Parameter) and _experts(p) > 1 for p in found)
        return [p for p in found if isinstance(p, nn.Parameter)] if whole else []

    def value(self, modules: Sequence[nn.Module]) -> Tensor:
        found = [_cosine(m.A_ErK, m.B_ErN) for m in modules]  # type: ignore[arg-type]
        return on_one_device(found).mean()


def _experts(parameter: Any) -> int:
    return int(getattr(parameter, "ds_shape", parameter.shape)[0])


def _overlap(factor_ErD: Tensor) -> Tensor:
    E, r = factor_ErD.shape[:2]
    rows = nn.functional.normalize(factor_ErD, dim=-1).flatten(0, 1)
    squares_EE = (rows @ rows.T).square().view(E, r, E, r).sum((1, 3))
    return pair_mean(squares_EE) / r


def _cosine(A_ErK: Tensor, B_ErN: Tensor) -> Tensor:
    E, r = A_ErK.shape[:2]
    a, b = A_ErK.flatten(0, 1), B_ErN.flatten(0, 1)
    inner_EE = ((a @ a.T) * (b @ b.T)).view(E, r, E, r).sum((1, 3))
    norms_E = inner_EE.diagonal().clamp_min(torch.finfo(inner_EE.dtype).tiny).sqrt()
    return pair_mean(inner_EE / (norms_E[:, None] * norms_E[None, :]).clamp_min(1e-12))
