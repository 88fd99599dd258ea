"""The low-rank product with gates of its own for every token: densely, or with rows sorted by expert.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, k experts of a token, T tasks, G 1 or T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskmoe.kernels import ops, reference
from taskmoe.kernels.grouping import group_rows
from taskmoe.kernels.low_rank import tables_of, without_autocast
from taskmoe.kernels.plan import Plan


def gated_low_rank(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_ME: Tensor,
    scale: float,
    plan: Plan,
) -> Tensor:
    """``y + scale * sum_e gates[m, e] * B_e^T (A_e x)`` for each row ``m``: every expert meets every row.

    Nothing is sorted, and x and y are passed over once (x once for 128 columns). For E * r up to about 256
    that is as cheap as meeting the chosen experts alone (LoRAMoE, SMoRA, rank-1 experts; sparse gates are
    gates of zero); beyond, :func:`grouped_low_rank`.

    Args:
        x_MK, y_MN, A_GErK, B_GErN, scale, plan: as in :func:`taskmoe.kernels.low_rank.low_rank`; the plan
            serves the task axis alone.
        gates_ME: one gate a row and expert, any floating dtype.

    Returns:
        ``[M, N]`` in the dtype of ``y`` (of ``x`` without ``y``).

    Raises:
        ValueError: shapes that do not fit, or an unknown value of ``TASKMOE_KERNELS``.
    """
    E = _check(x_MK, y_MN, A_GErK, B_GErN, gates_ME, plan)
    if gates_ME.shape[1] != E:
        raise ValueError(f"gates are {tuple(gates_ME.shape)}; {E} experts ask for {(plan.rows, E)}")
    if y_MN is not None:
        x_MK = x_MK.to(y_MN.dtype)
    with without_autocast(x_MK):
        if ops.mode() == "reference":
            return reference.gated_low_rank(x_MK, y_MN, A_GErK, B_GErN, gates_ME, scale, plan)
        tables = tables_of(plan, x_MK)
        return _TokenLevel.apply(x_MK, y_MN, A_GErK, B_GErN, gates_ME, None, float(scale), tables)


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
    """``y + scale * sum_j gates[m, j] * B[slots[m, j]]^T (A[slots[m, j]] x)`` for each row ``m``.

    Rows are sorted by expert, once for each of the k slots; the cost follows k * r, not E * r. Rows that
    choose their experts together (one choice a sequence, say) are cheaper as tasks of
    :func:`taskmoe.kernels.low_rank.low_rank`, where each row is met once for all k.

    Args:
        x_MK, y_MN, A_GErK, B_GErN, scale, plan: as in :func:`taskmoe.kernels.low_rank.low_rank`; the plan
            serves the task axis alone.
        gates_Mk: one gate a row and slot, any floating dtype.
        slots_Mk: int64 expert ids; an expert may fill two slots of a row. Ids outside ``0..E - 1`` are not
            checked.

    Returns:
        ``[M, N]`` in the dtype of ``y`` (of ``x`` without ``y``).

    Raises:
        ValueError: shapes that do not fit, or an unknown value of ``TASKMOE_KERNELS``.
    """
    E = _check(x_MK, y_MN, A_GErK, B_GErN, gates_Mk, plan)
    if slots_Mk.shape != gates_Mk.shape or slots_Mk.dtype != torch.int64:
        raise ValueError(
            f"slots are {tuple(slots_Mk.shape)} {slots_Mk.dtype}; "
            f"they must be int64 expert ids of shape {tuple(gates_Mk.shape)}, one a gate"
        )
    if y_MN is not None:
        x_MK = x_MK.to(y_MN.dtype)
    with without_autocast(x_MK):
        if ops.mode() == "reference":
            return reference.grouped_low_rank(x_MK, y_MN, A_GErK, B_GErN, gates_Mk, slots_Mk, scale, plan)
        G, tiles = A_GErK.shape[0], ops.use_triton(x_MK)
        tasks = plan.row_tasks(x_MK.device) if G > 1 else None
        groups = group_rows(slots_Mk, tasks, G, E, tiles=tiles)
        return _TokenLevel.apply(x_MK, y_MN, A_GErK, B_GErN, gates_Mk, slots_Mk, float(scale), groups)


class _TokenLevel(torch.autograd.Function):
    """One op forward, one op backward: ``gated``, or with slots ``grouped``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        A: Tensor,
        B: Tensor,
        gates: Tensor,
        slots: Tensor | None,
        scale: float,
        tables: list[Tensor],
    ) -> Tensor:
        if slots is None:
            out, s = torch.ops.taskmoe.gated_fwd.default(x, y, A, B, gates, scale, tables)
        else:
            out, s = torch.ops.taskmoe.grouped_fwd.default(x, y, A, B, gates, slots, scale, tables)
        ctx.save_for_backward(x, s, A, B, gates, slots)
        ctx.scale, ctx.tables = scale, tables
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, s, A, B, gates, slots = ctx.saved_tensors
        need_x, need_y, *others = ctx.needs_input_grad[:5]
        needs = [need_x, *others]
        grads: list[Tensor | None] = [None] * 4
        if any(needs):
            with without_autocast(dy):
                if slots is None:
                    results = torch.ops.taskmoe.gated_bwd.default(
                        dy, x, s, A, B, gates, ctx.scale, ctx.tables, needs
                    )
                else:
                    results = torch.ops.taskmoe.grouped_bwd.default(
                        dy, x, s, A, B, gates, slots, ctx.scale, ctx.tables, needs
                    )
            grads = [grad if need else None for grad, need in zip(results, needs, strict=True)]
        dx, dA, dB, dgates = grads
        return dx, dy if need_y else None, dA, dB, dgates, None, None, None


def _check(x_MK: Tensor, y_MN: Tensor | None, A: Tensor, B: Tensor, gates: Tensor, plan: Plan) -> int:
    """The number of experts."""
    if A.dim() != 4 or B.dim() != 4 or A.shape[:3] != B.shape[:3]:
        raise ValueError(
            f"A is {tuple(A.shape)} and B {tuple(B.shape)}; they must be [G, E, r, K] and [G, E, r, N]"
        )
    (G, E, _, K), N = A.shape, B.shape[3]
    if G not in (1, plan.num_tasks):
        raise ValueError(f"A has a task axis of {G}; it must be 1 or the plan's {plan.num_tasks} tasks")
    if x_MK.shape != (plan.rows, K):
        raise ValueError(f"x is {tuple(x_MK.shape)}; the plan and A ask for {(plan.rows, K)}")
    if y_MN is not None and y_MN.shape != (plan.rows, N):
        raise ValueError(f"y is {tuple(y_MN.shape)}; the plan and B ask for {(plan.rows, N)}")
    if gates.dim() != 2 or gates.shape[0] != plan.rows:
        raise ValueError(f"gates are {tuple(gates.shape)}; they must be one row for each of {plan.rows} rows")
    return E
