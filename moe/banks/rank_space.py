"""From rank space to the output under any gate, for banks whose second factors share their first.

Legend: M rows, N d_out, E experts, r rank of one expert, k slots, G 1 or the tasks of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand
from taskmoe.moe.context import Gate, TokenGate


def dense_gates(gate: TokenGate, num_experts: int, dtype: torch.dtype) -> Tensor:
    """[M, E], zero where no slot of a row names the expert."""
    values_Mk = gate.values.to(dtype)
    if gate.slots is None:
        return values_Mk
    return values_Mk.new_zeros(len(values_Mk), num_experts).scatter_add(1, gate.slots, values_Mk)


def expand_gated(
    h_Mr: Tensor, y_MN: Tensor, B_GErN: Tensor, gate: Gate | TokenGate, scale: float, plan: Plan
) -> Tensor:
    """``y + scale * sum_e g_e B_e^T h``: E experts that read the same rows, gated by task or token.

    Args:
        h_Mr: float32, or float64.
        y_MN: what to add to; gives the dtype of the result.
        B_GErN: as in :func:`taskmoe.kernels.split.expand`.
    """
    if isinstance(gate, TokenGate):
        gates_ME = dense_gates(gate, B_GErN.shape[1], h_Mr.dtype)
        h_MR = (gates_ME.unsqueeze(2) * h_Mr.unsqueeze(1)).flatten(1)
        ones_TE = h_Mr.new_ones(plan.num_tasks, B_GErN.shape[1])
        return expand(h_MR, y_MN, B_GErN, ones_TE, None, scale, plan)
    slots = None if gate.slots is None else gate.slots.squeeze(1)
    values_Tk = gate.values.squeeze(1)
    h_MR = h_Mr.repeat(1, values_Tk.shape[1])
    return expand(h_MR, y_MN, B_GErN, values_Tk, slots, scale, plan)
