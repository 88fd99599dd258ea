"""Little work on the CPU: the grouped low-rank product as plain torch under autograd.

An op of our own costs more to call than a few small products take. It keeps less memory for the backward
pass, can give one gradient a task, and knows the way through each segment; where none of that counts, these
two functions do the same sums.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks, k slots of a task, R = k*r, C =
E*r, S segments, L rows of the longest, P = S*L rows with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from taskmoe.kernels import ways
from taskmoe.kernels.plan import Plan

Plain = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, float, Plan], Tensor]

# In the unit of ways.py: what calling the ops costs, forward and backward, ...
OP = 2**23
# ... from where on that is nothing, and memory counts, ...
MUCH = 2**28
# ... what batched() costs more than dense(), what its padding costs, and a gathered element under autograd.
BATCH = 2**21
PAD = 2**22
GATHER = 48


def choose(
    x_MK: Tensor, A_GErK: Tensor, B_GErN: Tensor, slots_Tk: Tensor | None, plan: Plan
) -> Plain | None:
    """The function of this file that costs less than the ops, if there is one."""
    (G, E, r, K), N = A_GErK.shape, B_GErN.shape[3]
    if G > 1 or x_MK.device.type != "cpu" or x_MK.dtype not in (torch.float32, torch.float64):
        return None
    # A backward pass under autocast would cast the sums; a compiler plans calls and memory by itself.
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    k = None if slots_Tk is None else slots_Tk.shape[1]
    return _cheapest(len(plan.tasks), plan.rows, plan.longest, E, k, r, K + N)


@lru_cache(maxsize=1024)
def _cheapest(S: int, rows: int, longest: int, E: int, k: int | None, r: int, width: int) -> Plain | None:
    cost: dict[Plain | None, float] = {dense: rows * width * (E * r + ways.ROW)}
    if k is None:
        cost[None] = cost[dense] + OP
    else:
        cost[None] = min(ways.costs(S, rows, longest, E, k, r, width).values()) + OP
        padded = S * longest
        copies = PAD + 2 * padded * width * ways.ROW if padded > rows else 0
        cost[batched] = padded * width * (k * r + ways.ROW) + BATCH + copies + S * k * r * width * GATHER
    best = min(cost, key=lambda way: cost[way])
    return best if cost[best] < MUCH else None


def dense(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    plan: Plan,
) -> Tensor:
    """See :func:`taskmoe.kernels.low_rank.low_rank`; G = 1. Every row times every expert: the gates pick."""
    r, dtype = A_GErK.shape[2], x_MK.dtype
    g_TE = gates_Tk.to(dtype) * scale
    if slots_Tk is not None:
        g_TE = g_TE.new_zeros(len(g_TE), A_GErK.shape[1]).scatter_add(1, slots_Tk, g_TE)
    g_TC = g_TE if r == 1 else g_TE.repeat_interleave(r, dim=1)
    h_MC = torch.mm(x_MK, A_GErK.to(dtype).flatten(0, 2).t()) * ways.over_rows(g_TC, plan.op_tables())
    B_CN = B_GErN.to(dtype).flatten(0, 2)
    return torch.mm(h_MC, B_CN) if y_MN is None else torch.addmm(y_MN, h_MC, B_CN)


def batched(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    plan: Plan,
) -> Tensor:
    """See :func:`taskmoe.kernels.low_rank.low_rank`; G = 1, with slots. A batch of segments, each times the
    experts of its task; ragged segments are padded."""
    assert slots_Tk is not None
    (_, _, r, K), N, dtype = A_GErK.shape, B_GErN.shape[3], x_MK.dtype
    S, L = len(plan.tasks), plan.longest
    tasks_S = plan.op_tables()[2]
    experts = slots_Tk.index_select(0, tasks_S).flatten()
    R = r * slots_Tk.shape[1]
    A_SRK = A_GErK.to(dtype).squeeze(0).index_select(0, experts).view(S, R, K)
    B_SRN = B_GErN.to(dtype).squeeze(0).index_select(0, experts).view(S, R, N)
    g_TR = gates_Tk.to(dtype) * scale
    g_TR = g_TR if r == 1 else g_TR.repeat_interleave(r, dim=1)
    g_S1R = g_TR.index_select(0, tasks_S).unsqueeze(1)
    places = plan.padded() if plan.rows < S * L else None
    x_PK = x_MK if places is None else x_MK.new_zeros(S * L, K).index_copy(0, places, x_MK)
    h_SLR = torch.bmm(x_PK.view(S, L, K), A_SRK.transpose(1, 2)) * g_S1R
    if places is None and y_MN is not None:
        return torch.baddbmm(y_MN.view(S, L, N), h_SLR, B_SRN).flatten(0, 1)
    out_PN = torch.bmm(h_SLR, B_SRN).flatten(0, 1)
    out_MN = out_PN if places is None else out_PN.index_select(0, places)
    return out_MN if y_MN is None else y_MN + out_MN
