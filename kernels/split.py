"""The grouped low-rank product in its two halves, and what can be built from them.

:func:`shrink` takes the rows into rank space, :func:`expand` takes them back, each with its own gradient.
Linears that read the same rows (q, k, v; gate, up) share one shrink: x is read once, and its gradient is
written once. And a method whose core matrix is not block-diagonal puts a small product in between:
:func:`low_rank_core`.

Legend: M rows, K d_in, N d_out, E experts, r rank of one expert, T tasks, k slots of a task, R = k*r, G 1 or
T, S siblings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taskmoe.kernels import ops, reference
from taskmoe.kernels.low_rank import tables_of, without_autocast
from taskmoe.kernels.plan import Plan


def shrink(
    x_MK: Tensor, banks_GErK: Sequence[Tensor], slots_Tk: Sequence[Tensor | None], plan: Plan
) -> list[Tensor]:
    """``s[m, j*r + i] = A[slots[t, j], i] x[m]`` for each of S banks, with one pass over ``x``.

    The banks of all siblings stand side by side as one bank of S*E experts, a copy that is small beside
    ``x``.

    Args:
        x_MK: rows in the order of ``plan``, any floating dtype.
        banks_GErK: S banks of one shape, with the task axis of :func:`taskmoe.kernels.low_rank.low_rank`.
        slots_Tk: S tensors of int64 expert ids of one shape; or S times None: slot ``j`` is expert ``j``.
        plan: the row space of ``x``.

    Returns:
        S times ``s [M, R]``, float32 (float64 for float64 rows), for :func:`expand`.

    Raises:
        ValueError: shapes that do not fit, or an unknown value of ``TASKMOE_KERNELS``.
    """
    _check_shrink(x_MK, banks_GErK, slots_Tk, plan)
    with without_autocast(x_MK):
        if ops.mode() == "reference":
            pairs = zip(banks_GErK, slots_Tk, strict=True)
            return [reference.shrink(x_MK, bank, slots, plan) for bank, slots in pairs]
        E, slots = banks_GErK[0].shape[1], None
        if slots_Tk[0] is not None:
            slots = torch.cat([s + i * E for i, s in enumerate(slots_Tk) if s is not None], dim=1)
        s_MSR = _Shrink.apply(x_MK, slots, tables_of(plan, x_MK), *banks_GErK)
        return list(s_MSR.chunk(len(banks_GErK), dim=1))


def expand(
    s_MR: Tensor,
    y_MN: Tensor | None,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    scale: float,
    plan: Plan,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y + scale * sum_j gates[t, j] * B[slots[t, j]]^T s_j`` for each row of task ``t``.

    Args:
        s_MR: of :func:`shrink`, or any rank-space rows in float32 or better.
        y_MN: what to add to, or None.
        B_GErN, gates_Tk, slots_Tk, scale, plan: as in :func:`taskmoe.kernels.low_rank.low_rank`.
        dtype: of the result; default that of ``y``, or of ``s``.

    Raises:
        ValueError: shapes that do not fit, or an unknown value of ``TASKMOE_KERNELS``.
    """
    _check_expand(s_MR, y_MN, B_GErN, gates_Tk, slots_Tk, plan)
    dtype = dtype or (s_MR.dtype if y_MN is None else y_MN.dtype)
    with without_autocast(s_MR):
        if ops.mode() == "reference":
            return reference.expand(s_MR, y_MN, B_GErN, gates_Tk, slots_Tk, scale, plan, dtype)
        if s_MR.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"s is {s_MR.dtype}; rank-space rows are float32 or float64")
        tables = tables_of(plan, s_MR)
        return _Expand.apply(s_MR, y_MN, B_GErN, gates_Tk, slots_Tk, float(scale), tables, dtype)


def low_rank_core(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GRK: Tensor,
    B_GQN: Tensor,
    core_TQR: Tensor,
    scale: float,
    plan: Plan,
) -> Tensor:
    """``y + scale * B^T M_t A x`` for each row of task ``t``, with any core matrix ``M_t``.

    Rank-1 experts mixed and matched (T-REX; a full gate matrix), one A for many B (HydraLoRA, arXiv
    2404.19245: ``M_t`` stacks ``g_te I_r``), MTL-LoRA (arXiv 2410.09437: ``M_t`` stacks ``w_tj Lambda_t``).
    The small product in the middle is a shrink of rank-space rows, with the core matrices as the bank of T
    experts.

    Args:
        x_MK, y_MN, scale, plan: as in :func:`taskmoe.kernels.low_rank.low_rank`.
        A_GRK, B_GQN: the stacked factors, R and Q rows, with the task axis.
        core_TQR: one matrix a task.

    Returns:
        ``[M, N]`` in the dtype of ``y`` (of ``x`` without ``y``).

    Raises:
        ValueError: shapes that do not fit.
    """
    T, Q, R = core_TQR.shape
    if A_GRK.shape[1] != R or B_GQN.shape[1] != Q or plan.num_tasks != T:
        raise ValueError(
            f"core is {tuple(core_TQR.shape)}; the rows of B and A and the tasks of the plan ask for "
            f"{(plan.num_tasks, B_GQN.shape[1], A_GRK.shape[1])}"
        )
    dtype = x_MK.dtype if y_MN is None else y_MN.dtype
    own = torch.arange(T, device=x_MK.device)[:, None]
    s_MR = shrink(x_MK.to(dtype), [A_GRK.unsqueeze(2)], [None], plan)[0]
    h_MQ = shrink(s_MR, [core_TQR[None].to(s_MR.dtype)], [own], plan)[0]
    ones = h_MQ.new_ones(T, Q)
    return expand(h_MQ, y_MN, B_GQN.unsqueeze(2), ones, None, scale, plan, dtype)


class _Shrink(torch.autograd.Function):
    """One op forward, one op backward, for the banks of all siblings side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor | None, tables: list[Tensor], *banks: Tensor) -> Tensor:
        bank = banks[0] if len(banks) == 1 else torch.cat([b[:1] for b in banks], dim=1)
        ctx.save_for_backward(x, slots, *banks)
        ctx.tables = tables
        return torch.ops.taskmoe.shrink_fwd.default(x, bank, slots, tables)

    @staticmethod
    def backward(ctx: Any, ds: Tensor) -> Any:
        x, slots, *banks = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])]
        grads: list[Tensor | None] = [None] * len(banks)
        dx = None
        if any(needs):
            bank = banks[0]
            if len(banks) > 1:
                bank = torch.cat([b[:1] for b in banks], dim=1).expand(banks[0].shape[0], -1, -1, -1)
            with without_autocast(ds):
                dx, d_bank = torch.ops.taskmoe.shrink_bwd.default(ds, x, bank, slots, ctx.tables, needs)
            if needs[1]:
                parts = [d_bank] if len(banks) == 1 else d_bank.chunk(len(banks), dim=1)
                grads = [g if n else None for g, n in zip(parts, ctx.needs_input_grad[3:], strict=True)]
        return dx if needs[0] else None, None, None, *grads


class _Expand(torch.autograd.Function):
    """One op forward, one op backward."""

    @staticmethod
    def forward(
        ctx: Any,
        s: Tensor,
        y: Tensor | None,
        B: Tensor,
        gates: Tensor,
        slots: Tensor | None,
        scale: float,
        tables: list[Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(s, B, gates, slots)
        ctx.scale, ctx.tables = scale, tables
        return torch.ops.taskmoe.expand_fwd.default(s, y, B, gates, slots, scale, tables, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        s, B, gates, slots = ctx.saved_tensors
        need_s, need_y, need_B, need_gates = ctx.needs_input_grad[:4]
        needs = [need_s, need_B, need_gates]
        grads: list[Tensor | None] = [None] * 3
        if any(needs):
            with without_autocast(dy):
                results = torch.ops.taskmoe.expand_bwd.default(
                    dy, s, B, gates, slots, ctx.scale, ctx.tables, needs
                )
            grads = [grad if need else None for grad, need in zip(results, needs, strict=True)]
        ds, dB, dgates = grads
        return ds, dy if need_y else None, dB, dgates, None, None, None, None


def _check_shrink(x_MK: Tensor, banks: Sequence[Tensor], slots: Sequence[Tensor | None], plan: Plan) -> None:
    if not banks or len(slots) != len(banks):
        raise ValueError(f"{len(banks)} banks and {len(slots)} slots; give banks, and slots for each")
    shape = banks[0].shape
    if len(shape) != 4 or any(b.shape != shape for b in banks):
        raise ValueError(f"banks are {[tuple(b.shape) for b in banks]}; they must be [G, E, r, K], all alike")
    if shape[0] not in (1, plan.num_tasks):
        raise ValueError(f"banks have a task axis of {shape[0]}; it must be 1 or {plan.num_tasks} tasks")
    if x_MK.shape != (plan.rows, shape[3]):
        raise ValueError(f"x is {tuple(x_MK.shape)}; the plan and the banks ask for {(plan.rows, shape[3])}")
    found = [None if s is None else (tuple(s.shape), s.dtype) for s in slots]
    first = slots[0]
    good = None if first is None else ((plan.num_tasks, first.shape[-1] if first.dim() else 0), torch.int64)
    if any(f != good for f in found):
        raise ValueError(f"slots are {found}; give int64 ids [{plan.num_tasks}, k] for each bank, or none")


def _check_expand(
    s_MR: Tensor, y_MN: Tensor | None, B: Tensor, gates: Tensor, slots: Tensor | None, plan: Plan
) -> None:
    T = plan.num_tasks
    if B.dim() != 4 or B.shape[0] not in (1, T):
        raise ValueError(f"B is {tuple(B.shape)}; it must be [G, E, r, N] with G 1 or the plan's {T} tasks")
    _, E, r, N = B.shape
    k = gates.shape[-1]
    if gates.shape != (T, k) or (slots is None and k != E):
        raise ValueError(f"gates are {tuple(gates.shape)}; they must be [{T}, k], without slots k = {E}")
    if slots is not None and (slots.shape != gates.shape or slots.dtype != torch.int64):
        raise ValueError(
            f"slots are {tuple(slots.shape)} {slots.dtype}; they must be int64 of shape {tuple(gates.shape)}"
        )
    if s_MR.shape != (plan.rows, k * r):
        raise ValueError(f"s is {tuple(s_MR.shape)}; the plan, gates and B ask for {(plan.rows, k * r)}")
    if y_MN is not None and y_MN.shape != (plan.rows, N):
        raise ValueError(f"y is {tuple(y_MN.shape)}; the plan and B ask for {(plan.rows, N)}")
