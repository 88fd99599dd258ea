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


def shrink(x_MK: Tensor, A_GErK: Tensor, slots_Tk: Tensor | None, plan: Plan) -> Tensor:
    """``s[m, j*r + i] = A[slots[t, j], i] x[m]`` in fp32 or better; see
    :func:`taskmoe.kernels.split.shrink`."""
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    E, r = A_GErK.shape[1:3]
    k = E if slots_Tk is None else slots_Tk.shape[1]
    parts = []
    for t, start, end in plan.segments():
        bank_ErK = A_GErK[t if A_GErK.shape[0] > 1 else 0].to(wide)
        experts = range(E) if slots_Tk is None else slots_Tk[t].tolist()
        parts.append(torch.cat([x_MK[start:end].to(wide) @ bank_ErK[e].T for e in experts], dim=1))
    return torch.cat(parts) if parts else x_MK.new_zeros(0, k * r, dtype=wide)


def expand(
    s_MR: Tensor,
    y_MN: Tensor | None,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    plan: Plan,
    dtype: torch.dtype,
) -> Tensor:
    """``y + scale * sum_j gates[t, j] * B[slots[t, j]]^T s_j``; see :func:`taskmoe.kernels.split.expand`."""
    wide, r = s_MR.dtype, B_GErN.shape[2]
    parts = []
    for t, start, end in plan.segments():
        bank_ErN = B_GErN[t if B_GErN.shape[0] > 1 else 0].to(wide)
        total = s_MR.new_zeros(end - start, B_GErN.shape[3])
        for j in range(gates_Tk.shape[1]):
            e = j if slots_Tk is None else slots_Tk[t, j]
            total = total + gates_Tk[t, j].to(wide) * (s_MR[start:end, j * r : (j + 1) * r] @ bank_ErN[e])
        parts.append((scale * total if y_MN is None else y_MN[start:end].to(wide) + scale * total).to(dtype))
    return torch.cat(parts) if parts else s_MR.new_zeros(0, B_GErN.shape[3], dtype=dtype)


def gated_low_rank(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_ME: Tensor,
    scale: float,
    plan: Plan,
) -> Tensor:
    """``y + scale * sum_e gates[m, e] * B_e^T (A_e x)``, row by row."""
    slots_ME = torch.arange(gates_ME.shape[1], device=x_MK.device).expand(plan.rows, -1)
    return grouped_low_rank(x_MK, y_MN, A_GErK, B_GErN, gates_ME, slots_ME, scale, plan)


def grouped_low_rank(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Mk: Tensor,
    slots_Mk: Tensor,
    scale: float,
    plan: Plan,
) -> Tensor:
    """``y + scale * sum_j gates[m, j] * B[slots[m, j]]^T (A[slots[m, j]] x)``, row by row."""
    dtype = x_MK.dtype if y_MN is None else y_MN.dtype
    wide = torch.promote_types(dtype, torch.float32)
    rows = []
    for m, t in enumerate(plan.row_tasks().tolist()):
        g = t if A_GErK.shape[0] > 1 else 0
        total = x_MK.new_zeros(B_GErN.shape[3], dtype=wide)
        for gate, e in zip(gates_Mk[m], slots_Mk[m].tolist(), strict=True):
            product = (A_GErK[g, e].to(wide) @ x_MK[m].to(wide)) @ B_GErN[g, e].to(wide)
            total = total + gate.to(wide) * product
        rows.append((scale * total if y_MN is None else y_MN[m].to(wide) + scale * total).to(dtype))
    return torch.stack(rows) if rows else x_MK.new_zeros(0, B_GErN.shape[3], dtype=dtype)


def low_rank_core(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GRK: Tensor,
    B_GQN: Tensor,
    core_TQR: Tensor,
    scale: float,
    plan: Plan,
) -> Tensor:
    """``y + scale * B^T M_t A x`` for each row of task ``t``."""
    dtype = x_MK.dtype if y_MN is None else y_MN.dtype
    wide = torch.promote_types(dtype, torch.float32)
    parts = []
    for t, start, end in plan.segments():
        A, B = (bank[t if bank.shape[0] > 1 else 0].to(wide) for bank in (A_GRK, B_GQN))
        out = scale * (x_MK[start:end].to(wide) @ A.T @ core_TQR[t].to(wide).T @ B)
        parts.append((out if y_MN is None else y_MN[start:end].to(wide) + out).to(dtype))
    return torch.cat(parts) if parts else x_MK.new_zeros(0, B_GQN.shape[2], dtype=dtype)


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
