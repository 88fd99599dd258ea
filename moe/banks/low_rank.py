"""The bank of low-rank experts: E pairs (A_e, B_e) of rank r on one linear layer.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks in the batch, G 1 or T, H heads, k
slots.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from taskmoe.kernels.low_rank import low_rank, one_expert_a_task
from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand
from taskmoe.kernels.token_level import gated_low_rank, grouped_low_rank
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.context import Gate, TokenGate
from taskmoe.moe.parts import average_by_task
from taskmoe.moe.tasks import TaskTable


class Operands(NamedTuple):
    """What the op takes of a bank and a gate: one gate and one expert a task and slot.

    A_GErK: [G, E, r, K], B_GErN: [G, E, r, N]; gates_Tk: [T, k]; slots_Tk: [T, k] int64, or None: k = E.
        Averaged
    parameters are one expert a task: G = 1, E = T, k = 1.
    """

    A_GErK: Tensor
    B_GErN: Tensor
    gates_Tk: Tensor
    slots_Tk: Tensor | None


class LowRankBank(Bank):
    """Low-rank experts, gated after the product or averaged before it.

    after:  y + s * sum_j g[t, j] B_e(j) A_e(j) x     (LoRA experts; rank-1 experts are r = 1)
    before: y + s * B_t A_t x, A_t = sum_e g[t, e] A_e, B_t likewise   (Poly; with H > 1 heads MHR: block h of
    the
            features of A and of B is averaged with its own gates g[t, h])

    A_ErK: [E, r, K] and B_ErN: [E, r, N], float32. B starts at zero, so that the first step equals the base
    model; A starts as LoRA's (uniform, +-1 / sqrt(K)).
    """

    uses: ClassVar[tuple[str, ...]] = (
        "r", "num_experts", "lora_alpha", "lora_dropout", "compose", "num_heads",
    )  # fmt: skip
    levels: ClassVar[tuple[str, ...]] = ("task", "token")
    splits: ClassVar[bool] = True
    by_expert: ClassVar[tuple[str, ...]] = ("A_ErK", "B_ErN")
    shares: ClassVar[bool] = True  # a shrink with its siblings
    first: ClassVar[bool] = True  # may write before the frozen product is added

    def __init__(self, config: TaskMoEConfig, d_in: int, d_out: int, r: int, tasks: TaskTable) -> None:
        super().__init__()
        bound, E = 1 / math.sqrt(d_in), config.num_experts
        self.A_ErK = nn.Parameter(torch.empty(E, r, d_in).uniform_(-bound, bound))
        self.B_ErN = nn.Parameter(torch.zeros(E, r, d_out))
        self.scale = (config.lora_alpha if config.lora_alpha is not None else r) / r
        self.compose = config.compose
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()

    def forward(
        self,
        x_MK: Tensor,
        y_MN: Tensor | None,
        gate: Gate | TokenGate,
        plan: Plan,
        weight_NK: Tensor | None = None,
    ) -> Tensor:
        """x_MK: [M, K]; y_MN: [M, N], what the experts' part is added to -> [M, N].

        weight_NK: the frozen layer's weight, where its product is not in ``y`` yet (with gates a task).
        """
        if isinstance(gate, TokenGate):
            A_GErK, B_GErN = self.factors(gate)
            rows = self.dropout(x_MK)
            if gate.slots is None:
                return gated_low_rank(rows, y_MN, A_GErK, B_GErN, gate.values, self.scale, plan)
            return grouped_low_rank(rows, y_MN, A_GErK, B_GErN, gate.values, gate.slots, self.scale, plan)
        return low_rank(self.dropout(x_MK), y_MN, *self.operands(gate), self.scale, plan, weight_NK)

    def expand(
        self, s_MR: Tensor, y_MN: Tensor | None, operands: Operands, plan: Plan, dtype: torch.dtype
    ) -> Tensor:
        """:meth:`forward` from rank space on: s_MR is what A has made of the rows; [M, N] in ``dtype``."""
        _, B_GErN, gates_Tk, slots_Tk = operands
        return expand(s_MR, y_MN, B_GErN, gates_Tk, slots_Tk, self.scale, plan, dtype)

    def operands(self, gate: Gate) -> Operands:
        """The bank under a gate, as the op takes it."""
        A_GErK, B_GErN = self.factors(gate)
        if self.compose == "before":
            weights_THE = gate.values
            if gate.slots is not None:
                shape = (*gate.values.shape[:-1], self.A_ErK.shape[0])
                weights_THE = gate.values.new_zeros(shape).scatter(-1, gate.slots, gate.values)
            A_TrK, B_TrN = average_by_task(A_GErK, weights_THE), average_by_task(B_GErN, weights_THE)
            return Operands(A_TrK[None], B_TrN[None], *one_expert_a_task(len(A_TrK), A_TrK.device))
        slots = None if gate.slots is None else gate.slots.squeeze(1)
        return Operands(A_GErK, B_GErN, gate.values.squeeze(1), slots)

    def of_task(self, gates_HE: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """What one task uses, as (A [R, K], B [R, N]) of ``B^T A x``; gates_HE: [H, E], zeros left out."""
        if self.compose == "before":
            banks = self.A_ErK.unsqueeze(0), self.B_ErN.unsqueeze(0)
            A_TrK, B_TrN = (average_by_task(bank, gates_HE.unsqueeze(0)) for bank in banks)
            return A_TrK[0], self.scale * B_TrN[0]
        gates_E = gates_HE[0]
        chosen = gates_E.nonzero().squeeze(1)
        B_ErN = self.scale * gates_E[chosen, None, None] * self.B_ErN[chosen]
        return self.A_ErK[chosen].flatten(0, 1), B_ErN.flatten(0, 1)

    def drops(self) -> bool:
        """Whether dropout changes the rows now."""
        return self.training and isinstance(self.dropout, nn.Dropout)

    def factors(self, gate: Gate | TokenGate) -> tuple[Tensor, ...]:
        """A and B as the op takes them, [G, E, r, D]: G = 1 gives one gradient, summed over tasks; G = T one
        a task, which ``gate.split`` keeps."""
        if gate.split is None:
            return self.A_ErK.unsqueeze(0), self.B_ErN.unsqueeze(0)
        return gate.split(self.A_ErK, self.B_ErN)

    def extra_repr(self) -> str:
        e, r, k = self.A_ErK.shape
        return f"num_experts={e}, r={r}, d_in={k}, d_out={self.B_ErN.shape[-1]}, compose={self.compose}"
