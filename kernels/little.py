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
from torch.nn.functional import linear

from taskmoe.kernels import ways
from taskmoe.kernels.plan import Plan

Plain = Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, float, Plan], Tensor]

# In the unit of ways.py: what calling the ops costs, forward and backward, ...
OP = 2**22
# ... from where on that is nothing, and memory counts, ...
MUCH = 2**28
# ... what batched() costs more than dense(), what its padding costs, and a gathered element under autograd.
BATCH = 2**19
PAD = 2**19
GATHER = 32


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
    cost: dict[Plain | None, float] = {dense: rows * width * (E * r + ways.WHOLE)}
    if k is None:
        cost[None] = cost[dense] + OP
    else:
        cost[None] = min(ways.costs(S, rows, longest, E, k, r, width).values()) + OP
        padded = S * longest
        copies = PAD + padded * width * ways.ROW if padded > rows else 0
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
    E, r, K = A_GErK.shape[1:]
    tables = plan.op_tables()
    g_TC = _like(gates_Tk, x_MK) * scale
    if slots_Tk is not None:
        g_TC = g_TC.new_zeros(plan.num_tasks, E).scatter_add(1, slots_Tk, g_TC)
    if r > 1:
        g_TC = g_TC.repeat_interleave(r, dim=1)
    g_MC = g_TC.index_select(0, tables[2] if len(plan.tasks) == 1 else tables[0])
    h_MC = linear(x_MK, _like(A_GErK, x_MK).reshape(E * r, K)) * g_MC
    B_CN = _like(B_GErN, x_MK).reshape(E * r, B_GErN.shape[3])
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
    (r, K), N = A_GErK.shape[2:], B_GErN.shape[3]
    S, L, R = len(plan.tasks), plan.longest, r * slots_Tk.shape[1]
    tasks_S = plan.op_tables()[2]
    experts = slots_Tk.index_select(0, tasks_S).flatten()
    A_SRK = _like(A_GErK, x_MK).index_select(1, experts).view(S, R, K)
    B_SRN = _like(B_GErN, x_MK).index_select(1, experts).view(S, R, N)
    g_TR = _like(gates_Tk, x_MK) * scale
    if r > 1:
        g_TR = g_TR.repeat_interleave(r, dim=1)
    g_S1R = g_TR.index_select(0, tasks_S).unsqueeze(1)
    places = plan.padded() if plan.rows < S * L else None
    x_PK = x_MK if places is None else x_MK.new_zeros(S * L, K).index_copy(0, places, x_MK)
    h_SLR = torch.bmm(x_PK.view(S, L, K), A_SRK.transpose(1, 2)) * g_S1R
    if places is None and y_MN is not None:
        return torch.baddbmm(y_MN.view(S, L, N), h_SLR, B_SRN).view(S * L, N)
    out_PN = torch.bmm(h_SLR, B_SRN).view(S * L, N)
    out_MN = out_PN if places is None else out_PN.index_select(0, places)
    return out_MN if y_MN is None else y_MN + out_MN


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t if t.dtype == x.dtype else t.to(x.dtype)
