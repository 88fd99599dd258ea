"""The identity penalty of AdapterFusion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from taskmoe.moe.banks.fusion import (
    Fusion,
    FusionAttention,
    TaskFusionAttention,
    identity_penalty,
)
from taskmoe.moe.banks.kinds import BANKS
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.regularisers.base import OfParameters, on_one_device


class FusionIdentity(OfParameters):
    """sum over layers of |I - Wv|_F^2 (Pfeiffer et al. 2021, arXiv 2005.00247, with weight 0.01).

    With value matrices of each task's own: their mean, for each layer.
    """

    @classmethod
    def fits(cls, options: None, config: TaskMoEConfig) -> bool:
        """See :class:`Regulariser`."""
        return BANKS[config.bank] is Fusion

    def reads(self, module: nn.Module) -> list[nn.Parameter]:
        if isinstance(module, FusionAttention):
            return [module.value_NN]
        return [module.value_TNN] if isinstance(module, TaskFusionAttention) else []

    def value(self, modules: Sequence[nn.Module]) -> Tensor:
        values = [self.reads(m)[0] for m in modules]
        return on_one_device([identity_penalty(v if v.dim() == 3 else v[None]) for v in values]).sum()
