"""The truth in plain torch: slow, loops over segments and slots, differentiated by autograd.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks, k slots of a task, G 1 or T,
H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taskmoe.kernels.plan import Plan


def low_rank(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    plan: Plan,
) -> Tensor:
    """``y + scale * sum_j gates[t, j] * B[slots[t, j]]^T (A[slots[t, j]] x)`` for each row of task ``t``.

    Same arguments and result as :func:`taskmoe.kernels.low_rank.low_rank`. With G = T each task reads its own
    copy of the bank, so that autograd leaves one gradient a task.
    """
    dtype = x_MK.dtype if y_MN is None else y_MN.dtype
    wide = torch.promote_types(dtype, torch.float32)
    per_task = A_GErK.shape[0] > 1
    slots = slots_Tk
    if slots is None:
        slots = torch.arange(A_GErK.shape[1], device=x_MK.device).expand(plan.num_tasks, -1)
    parts = []
    for t, start, end in plan.segments():
        g = t if per_task else 0
        x, total = x_MK[start:end].to(wide), None
        for j in range(gates_Tk.shape[1]):
            e = slots[t, j]
            expert = (x @ A_GErK[g, e].to(wide).T) @ B_GErN[g, e].to(wide)
            gated = gates_Tk[t, j].to(wide) * expert
            total = gated if total is None else total + gated
        assert total is not None
        out = scale * total if y_MN is None else y_MN[start:end].to(wide) + scale * total
        parts.append(out.to(dtype))
    return torch.cat(parts) if parts else x_MK.new_zeros(0, B_GErN.shape[-1], dtype=dtype)


def average(bank_ErD: Tensor, weights_THE: Tensor) -> Tensor:
    """``[T, r, D]``: block ``h`` of the wide dimension is ``sum_e weights[t, h, e] * bank[e, :, block h]``.

    The parameters of Poly (H = 1) and MHR (H > 1), which mix experts before the product (arXiv 2202.13914,
    2211.03831).
    """
    T, H, E = weights_THE.shape
    size = bank_ErD.shape[-1] // H
    tasks = []
    for t in range(T):
        blocks = []
        for h in range(H):
            columns = slice(h * size, (h + 1) * size)
            block = weights_THE[t, h, 0] * bank_ErD[0, :, columns]
            for e in range(1, E):
                block = block + weights_THE[t, h, e] * bank_ErD[e, :, columns]
            blocks.append(block)
        tasks.append(torch.cat(blocks, dim=-1))
    return torch.stack(tasks)
