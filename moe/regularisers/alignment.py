"""Alignment of the tasks in rank space: Align-LoRA.

Legend: M rows, K d_in, E experts, r rank of one expert, R = E r, Tb tasks in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.kinds import BANKS
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.penalties import rows_of
from taskmoe.moe.regularisers.base import Regulariser

if TYPE_CHECKING:
    from taskmoe.moe.model import TaskMoEModel

KEY = "moe.regularisers.alignment"
# Of the published kernel: exp(-|x - y|^2 / (2 s)), summed over these s.
BANDWIDTHS = (
    1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 1e2, 1e3, 1e4, 1e5, 1e6,
)  # fmt: skip


def kl_distances(z_MR: Tensor, weights_TM: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Symmetric KL divergences of diagonal Gaussians fitted to each task's rows.

    D(i, j) = (KL(i|j) + KL(j|i)) / 2 = 1/4 sum_d [v_i/v_j + v_j/v_i - 2 + (m_i - m_j)^2 (1/v_i + 1/v_j)], m
    and v mean and (biased) variance plus eps; the logarithms of the two directions cancel.

    Args:
        z_MR: [M, R]. weights_TM: [T, M], 1 where a row belongs to a task and counts.

    Returns:
        [T, T] distances, and [T] bool, the tasks that have two rows or more: one has no variance, and eps in
        its place would drown all other pairs.
    """
    counts_T = weights_TM.sum(1)
    shares_TM = weights_TM / counts_T.clamp_min(1).unsqueeze(1)
    mean_TR = shares_TM @ z_MR
    centred_TMR = (z_MR - mean_TR.unsqueeze(1)).square()
    var_TR = torch.einsum("tm,tmr->tr", shares_TM, centred_TMR) + eps
    inverse_TR = var_TR.reciprocal()
    gaps_TTR = (mean_TR.unsqueeze(1) - mean_TR.unsqueeze(0)).square()
    ratio_TTR = var_TR.unsqueeze(1) * inverse_TR.unsqueeze(0)
    both_TTR = inverse_TR.unsqueeze(1) + inverse_TR.unsqueeze(0)
    terms_TTR = ratio_TTR + ratio_TTR.transpose(0, 1) - 2 + gaps_TTR * both_TTR
    return terms_TTR.sum(-1) / 4, counts_T > 1


def mmd_distances(z_MR: Tensor, weights_TM: Tensor, bandwidths: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Squared maximum mean discrepancies (biased) under a sum of Gaussian kernels; as :func:`kl_distances`,
    but a task is there from one row on.
    """
    counts_T = weights_TM.sum(1)
    shares_TM = weights_TM / counts_T.clamp_min(1).unsqueeze(1)
    squares_MM = (z_MR.unsqueeze(1) - z_MR.unsqueeze(0)).square().sum(-1)
    kernel_MM = torch.zeros_like(squares_MM)
    for s in bandwidths:
        kernel_MM = kernel_MM + torch.exp(squares_MM * (-0.5 / s))
    means_TT = shares_TM @ kernel_MM @ shares_TM.T
    own_T = means_TT.diagonal()
    return own_T.unsqueeze(1) + own_T.unsqueeze(0) - 2 * means_TT, counts_T > 0


class Alignment(Regulariser):
    """Mean over pairs of tasks of D(z_i, z_j), z = A x of the tasks' tokens (Align-LoRA, arXiv 2508.05078).

    Computed where the bank computes, in each micro-batch; the term is the mean over layers and micro-batches.
    z is taken before dropout and pooled over all tokens of a task that are no padding (the paper's code
    compares position by position, padding included, and needs several sequences a task for that). A
    micro-batch of one task adds nothing: mix tasks inside micro-batches. It depends on how a step is cut into
    micro-batches.
    """

    sort: ClassVar[str] = "activations"
    absent: ClassVar[str] = "no low-rank experts lie beside linears here"
    couples: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        distance: str = "kl"  # kl: of diagonal Gaussians | mmd: sum of Gaussian kernels
        max_rows: int = 256  # mmd: how many rows of a micro-batch, evenly spaced
        bandwidths: tuple[float, ...] = BANDWIDTHS  # mmd: s of exp(-d^2 / 2s), summed
        eps: float = 1e-6  # kl: added to the variances

        def __post_init__(self) -> None:
            if self.distance not in ("kl", "mmd"):
                raise ConfigError(f"{KEY}.distance: {self.distance!r} is unknown; known are kl, mmd")
            if self.max_rows < 2:
                raise ConfigError(f"{KEY}.max_rows: {self.max_rows} must be at least 2")
            if not self.bandwidths or min(self.bandwidths) <= 0:
                raise ConfigError(f"{KEY}.bandwidths: {self.bandwidths} must be numbers above 0")
            if not self.eps > 0:
                raise ConfigError(f"{KEY}.eps: {self.eps} must be above 0")

    @staticmethod
    def idle(options: Options) -> dict[str, str]:
        """Options of the other distance; see ``moe/choices.py``."""
        of = {"max_rows": "mmd", "bandwidths": "mmd", "eps": "kl"}
        return {name: f"distance is {options.distance!r}" for name, d in of.items() if d != options.distance}

    @classmethod
    def fits(cls, options: Options, config: TaskMoEConfig) -> bool:
        """See :class:`Regulariser`."""
        return "A_ErK" in getattr(BANKS[config.bank], "by_expert", ())

    def enter(self, model: TaskMoEModel, name: str) -> int:
        """Hook the banks: inside their call, where ZeRO-3 has their parameters whole."""
        layers: list[Any] = [m for m in model.modules() if _has_rank_space(m)]
        for layer in layers:
            layer.siblings = None  # a bank of which a sibling does the work is not called
            layer.bank.register_forward_hook(_Hook(self, name, layer.name))
        return len(layers)

    def value(self, z_MR: Tensor, weights_TM: Tensor) -> Tensor:
        """z_MR: [M, R] float32 or float64; weights_TM: [Tb, M] -> a scalar."""
        options = self.options
        if options.distance == "kl":
            distances_TT, present_T = kl_distances(z_MR, weights_TM, options.eps)
        else:
            every = -(-len(z_MR) // options.max_rows)
            distances_TT, present_T = mmd_distances(z_MR[::every], weights_TM[:, ::every], options.bandwidths)
        pairs_TT = (present_T.unsqueeze(1) & present_T.unsqueeze(0)).triu(1)
        return (distances_TT * pairs_TT).sum() / pairs_TT.sum().clamp_min(1)


class _Hook:
    """Called behind a bank: the term joins the bank's output."""

    def __init__(self, term: Alignment, name: str, layer: str) -> None:
        self.term, self.name, self.layer = term, name, layer

    def __call__(self, bank: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        from taskmoe.moe.context import current

        context = current(self.layer)
        if context.penalties is None or not torch.is_grad_enabled():
            return out
        x_MK, plan = args[0], args[3]
        with torch.autocast(x_MK.device.type, enabled=False):
            A_RK = bank.A_ErK.flatten(0, 1)
            z_MR = x_MK.to(A_RK.dtype) @ A_RK.T
            rows = rows_of(context, plan, self.layer, z_MR)
            tasks_T1 = torch.arange(len(context.tasks), device=z_MR.device).unsqueeze(1)
            weights_TM = (rows.tasks_M == tasks_T1) * rows.weights_M
            return context.penalise(out, self.name, self.term.value(z_MR, weights_TM))


def _has_rank_space(module: nn.Module) -> bool:
    bank = getattr(module, "bank", None)
    return hasattr(module, "siblings") and isinstance(getattr(bank, "A_ErK", None), nn.Parameter)
