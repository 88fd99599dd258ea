"""The bank of low-rank experts: E pairs (A_e, B_e) of rank r on one linear layer.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks in the batch, G 1 or T, H heads, k
slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from taskmoe.kernels.low_rank import low_rank, low_rank_averaged
from taskmoe.kernels.plan import Plan
from taskmoe.moe.context import Gate
from taskmoe.moe.parts import average_by_task


class LowRankBank(nn.Module):
    """Low-rank experts, gated after the product or averaged before it.

    after:  y + s * sum_j g[t, j] B_e(j) A_e(j) x     (LoRA experts; rank-1 experts are r = 1)
    before: y + s * B_t A_t x, A_t = sum_e g[t, e] A_e, B_t likewise   (Poly; with H > 1 heads MHR: block h of
    the
            features of A and of B is averaged with its own gates g[t, h])

    A_ErK: [E, r, K] and B_ErN: [E, r, N], float32. B starts at zero, so that the first step equals the base
    model; A starts as LoRA's (uniform, +-1 / sqrt(K)).
    """

    def __init__(
        self, d_in: int, d_out: int, num_experts: int, r: int, scale: float, compose: str, dropout: float
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d_in)
        self.A_ErK = nn.Parameter(torch.empty(num_experts, r, d_in).uniform_(-bound, bound))
        self.B_ErN = nn.Parameter(torch.zeros(num_experts, r, d_out))
        self.scale, self.compose = scale, compose
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    def forward(self, x_MK: Tensor, y_MN: Tensor, gate: Gate, plan: Plan) -> Tensor:
        """x_MK: [M, K]; y_MN: [M, N], the frozen layer's output -> [M, N], y plus the experts' part."""
        x_MK = self.dropout(x_MK)
        A_GErK, B_GErN = self.factors(gate)
        if self.compose == "before":
            weights_THE = gate.values
            if gate.slots is not None:
                shape = (*gate.values.shape[:-1], self.A_ErK.shape[0])
                weights_THE = gate.values.new_zeros(shape).scatter(-1, gate.slots, gate.values)
            A_TrK, B_TrN = average_by_task(A_GErK, weights_THE), average_by_task(B_GErN, weights_THE)
            return low_rank_averaged(x_MK, y_MN, A_TrK, B_TrN, self.scale, plan)
        slots = None if gate.slots is None else gate.slots.squeeze(1)
        return low_rank(x_MK, y_MN, A_GErK, B_GErN, gate.values.squeeze(1), slots, self.scale, plan)

    def factors(self, gate: Gate) -> tuple[Tensor, ...]:
        """A and B as the op takes them, [G, E, r, D]: G = 1 gives one gradient, summed over tasks; G = T one
        a task, which ``gate.split`` keeps."""
        if gate.split is None:
            return self.A_ErK.unsqueeze(0), self.B_ErN.unsqueeze(0)
        return gate.split(self.A_ErK, self.B_ErN)

    def extra_repr(self) -> str:
        e, r, k = self.A_ErK.shape
        return f"num_experts={e}, r={r}, d_in={k}, d_out={self.B_ErN.shape[-1]}, compose={self.compose}"
