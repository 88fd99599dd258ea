"""Terms of the logits and gates of each task by itself, as means over groups, tasks of the step and heads.

Legend: S routing groups, Tb tasks of the step, H heads, E experts.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.regularisers.base import OfRouting, Routed
from taskmoe.moe.tasks import TaskTable


class ZLoss(OfRouting):
    """logsumexp_e(z)^2: keeps the logits small (ST-MoE, Zoph et al. 2022, arXiv 2202.08906)."""

    def value(self, routed: Routed) -> Tensor:
        return torch.logsumexp(routed.logits_STHE, dim=-1).square().mean()


class Entropy(OfRouting):
    """-sum_e p_e log p_e of a task's shares, in nats: a weight above 0 sharpens routes, below 0 levels them.
    """

    signed: ClassVar[bool] = True

    def value(self, routed: Routed) -> Tensor:
        p = routed.shares_STHE
        return torch.special.entr(p.clamp_min(torch.finfo(p.dtype).tiny)).sum(-1).mean()


class Sparsity(OfRouting):
    """sum_e sigmoid(z_e / temperature): the L1 norm of gates before they are normalised.

    Gates that sum to one have a constant L1 norm, so it needs a gate made of sigmoids.
    """

    gates: ClassVar[tuple[str, ...]] = ("sigmoid", "bernoulli")

    def __init__(self, options: Any, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        if config.gate not in self.gates:
            raise ConfigError(
                f"moe.regularisers.sparsity: gate {config.gate!r} has no L1 norm to lower; use a gate out of "
                f"{', '.join(self.gates)}, or the regulariser entropy"
            )
        if (config.gate_options or {}).get("normalise") == "l2":
            raise ConfigError(
                "moe.regularisers.sparsity: gate_options.normalise: l2 takes no sigmoid, so there is no L1 "
                "norm to lower; use normalise: sum or sqrt"
            )

    def value(self, routed: Routed) -> Tensor:
        return torch.sigmoid(routed.logits_STHE / routed.temperature).sum(-1).mean()
