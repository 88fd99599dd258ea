"""Arrow: experts chosen by what they answer to, without training.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from taskmoe.kernels.plan import Plan
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.banks.low_rank import LowRankBank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.tasks import TaskTable

if TYPE_CHECKING:
    from taskmoe.moe.model import TaskMoEModel


def prototypes(A_ErK: Tensor, B_ErN: Tensor) -> Tensor:
    """[E, K] in fp32 or better: the direction of unit length that B_e A_e answers to most, up to its sign.

    The top right-singular vector of each product, which is never built: A_e' = Q R, and B_e' R' has its
    singular values.
    """
    wide = torch.promote_types(A_ErK.dtype, torch.float32)
    Q_EKr, R_Err = torch.linalg.qr(A_ErK.to(wide).mT)
    small_ENr = B_ErN.to(wide).mT @ R_Err.mT
    Vh_Err = torch.linalg.svd(small_ENr, full_matrices=False).Vh
    return (Q_EKr @ Vh_Err[:, 0].unsqueeze(2)).squeeze(2)


class ArrowRouter(Bank):
    """logits = |p_e x|, p_e the prototype of expert e (Arrow, Ostapenko et al. 2024, arXiv 2405.11157).

    No parameters. prototypes_EK: [E, K], a buffer saved with the adapter. They are taken from experts that
    have something to say when they are attached or loaded (``bank: imported``); of experts that are trained
    here they stay zero until :func:`set_prototypes`.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True
    trains: ClassVar[bool] = False
    prototypes_EK: Tensor

    @staticmethod
    def check(config: TaskMoEConfig, options: None) -> None:
        """Raises ConfigError for experts that are no pairs of low rank; see ``moe/choices.py``."""
        if config.bank not in ("low_rank", "imported"):
            raise ConfigError(f"moe.bank: {config.bank!r} has no prototypes; use low_rank")

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int) -> None:
        super().__init__()
        self.register_buffer("prototypes_EK", torch.zeros(config.num_experts, d_in))

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> [M, E] float32 (float64 for float64 rows)."""
        return (x_MK.to(torch.promote_types(x_MK.dtype, torch.float32)) @ self.prototypes_EK.T).abs()

    @torch.no_grad()
    def begin(self, experts: Bank) -> None:
        """Take the prototypes, unless there are some or the experts have nothing to say yet."""
        if isinstance(experts, LowRankBank) and not self.prototypes_EK.any() and experts.B_ErN.any():
            self.take(experts)

    @torch.no_grad()
    def take(self, bank: LowRankBank) -> None:
        """The prototypes of the experts as they are now; zero for one that adds nothing here."""
        found_EK = prototypes(bank.A_ErK, bank.B_ErN)
        found_EK *= bank.B_ErN.flatten(1).any(1, keepdim=True) & bank.A_ErK.flatten(1).any(1, keepdim=True)
        self.prototypes_EK.copy_(found_EK)


@torch.no_grad()
def set_prototypes(model: TaskMoEModel) -> None:
    """Take the prototypes of every layer from its experts as they are now.

    Raises:
        ConfigError: the model has no such router.
    """
    found = False
    for layer in model.modules():
        router = getattr(layer.token_routing, "router", None) if isinstance(layer, MoELinear) else None
        if isinstance(router, ArrowRouter):
            assert isinstance(layer.bank, LowRankBank)
            router.take(layer.bank)
            found = True
    if not found:
        raise ConfigError(f"moe.router: {model.moe_config.router!r} takes no prototypes; use arrow")
