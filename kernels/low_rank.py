"""The grouped low-rank product with gates a task: shape checks and an autograd Function over the ops of
ops.py.

Legend: M rows, K d_in, N d_out, D either, E experts, r rank of one expert, T tasks, k slots of a task,
R = k*r, G 1 or T, H heads.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from taskmoe.kernels import little, ops, reference
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
    weight_NK: Tensor | None = None,
) -> Tensor:
    """``y + scale * sum_j gates[t, j] * B[slots[t, j]]^T (A[slots[t, j]] x)`` for each row of task ``t``.

    Gates and scale act in rank space, never on ``y``. The sums run in fp32 or better (fp64 for fp64).

    Args:
        x_MK: rows in the order of ``plan``; any floating dtype. Cast to the dtype of ``y`` where they differ.
        y_MN: what to add to, or None.
        A_GErK: bank with G = 1, or one parameter expanded over the T tasks (stride 0): the forward pass reads
            entry 0, the backward pass gives ``[T, E, r, K]``, one gradient a task.
        B_GErN: the same for the other factor.
        gates_Tk: one gate a task and slot, any floating dtype.
        slots_Tk: int64 expert ids; an expert may fill two slots of a task. None: slot ``j`` is expert ``j``
            (k = E). Ids outside ``0..E - 1`` are an error of the CPU path (not checked on a GPU).
        scale: a number, ``lora_alpha / r``.
        plan: the row space of ``x``.
        weight_NK: a frozen linear layer's weight, in the dtype of ``x``. Its product is added by a matmul
            that accumulates onto what the experts have written, and so is its gradient in ``x``: on a GPU
            two passes over [M, N] fewer, and two over [M, K], than adding the experts to the finished
            product.

    Returns:
        ``[M, N]`` in the dtype of ``y`` (of ``x`` without ``y``). Gradients come back in the dtype of their
        tensor; experts and tasks without rows get zeros.

    Raises:
        ValueError: shapes that do not fit, or an unknown value of ``TASKMOE_KERNELS``.
    """
    _check(x_MK, y_MN, A_GErK, B_GErN, gates_Tk, slots_Tk, plan)
    if y_MN is not None and x_MK.dtype != y_MN.dtype:
        x_MK = x_MK.to(y_MN.dtype)
    if weight_NK is not None:
        _check_weight(weight_NK, x_MK, B_GErN.shape[3])
    mode = ops.mode()
    if mode == "auto" and weight_NK is None:
        plain = little.choose(x_MK, A_GErK, B_GErN, slots_Tk, plan)
        if plain is not None:
            return plain(x_MK, y_MN, A_GErK, B_GErN, gates_Tk, slots_Tk, scale, plan)
    with without_autocast(x_MK):
        if mode == "reference":
            out = reference.low_rank(x_MK, y_MN, A_GErK, B_GErN, gates_Tk, slots_Tk, scale, plan)
            return out if weight_NK is None else out + x_MK @ weight_NK.t()
        tables = tables_of(plan, x_MK)
        return _LowRank.apply(
            x_MK, y_MN, A_GErK, B_GErN, gates_Tk, slots_Tk, float(scale), tables, weight_NK
        )


def low_rank_averaged(
    x_MK: Tensor, y_MN: Tensor | None, A_TrK: Tensor, B_TrN: Tensor, scale: float, plan: Plan
) -> Tensor:
    """``y + scale * B_t^T (A_t x)`` for each row of task ``t``: one expert a task, see :func:`average`.

    Raises:
        ValueError: the banks do not hold one expert for each of ``plan.num_tasks`` tasks.
    """
    T = plan.num_tasks
    if A_TrK.shape[0] != T or B_TrN.shape[0] != T:
        raise ValueError(f"A has {A_TrK.shape[0]} and B {B_TrN.shape[0]} tasks; the plan has {T}")
    gates, slots = one_expert_a_task(T, x_MK.device)
    return low_rank(x_MK, y_MN, A_TrK[None], B_TrN[None], gates, slots, scale, plan)


def one_expert_a_task(T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Gates (ones ``[T, 1]``) and slots under which task ``t`` has expert ``t`` to itself."""
    return torch.ones(T, 1, device=device), torch.arange(T, device=device)[:, None]


def add_linear_(out_MN: Tensor, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """``out += x @ weight^T`` in place, by a matmul that accumulates.

    Raises:
        ValueError: a weight that does not fit, or that trains: it would get no gradient.
    """
    _check_weight(weight_NK, x_MK, out_MN.shape[1])
    return _AddLinear.apply(out_MN, x_MK, weight_NK)


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_MN: Tensor, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(weight_NK)
        ctx.mark_dirty(out_MN)
        return out_MN.addmm_(x_MK, weight_NK.t())

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
        (weight_NK,) = ctx.saved_tensors
        return dy_MN, dy_MN @ weight_NK if ctx.needs_input_grad[1] else None, None


def average(bank_ErD: Tensor, weights_THE: Tensor) -> Tensor:
    """``[T, r, D]``: block ``h`` of the wide dimension is ``sum_e weights[t, h, e] * bank[e, :, block h]``.

    The parameters of Poly (H = 1; Ponti et al., arXiv 2202.13914) and MHR (H > 1; Caccia et al., arXiv
    2211.03831), which mix experts before the product. The result has the bank's dtype.

    Raises:
        ValueError: the numbers of experts differ, or D is not a multiple of H.
    """
    E, r, D = bank_ErD.shape
    T, H, experts = weights_THE.shape
    if experts != E:
        raise ValueError(f"weights are over {experts} experts; the bank has {E}")
    if D % H:
        raise ValueError(f"num_heads is {H}; the width {D} is not a multiple of it")
    weights = weights_THE.to(bank_ErD.dtype)
    if H == 1:
        return (weights[:, 0] @ bank_ErD.reshape(E, r * D)).view(T, r, D)
    return torch.einsum("the,erhd->trhd", weights, bank_ErD.view(E, r, H, D // H)).reshape(T, r, D)


class _LowRank(torch.autograd.Function):
    """One op forward, one op backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: Tensor,
        y_MN: Tensor | None,
        A_GErK: Tensor,
        B_GErN: Tensor,
        gates_Tk: Tensor,
        slots_Tk: Tensor | None,
        scale: float,
        tables: list[Tensor],
        weight_NK: Tensor | None,
    ) -> Tensor:
        out_MN, s_MR = torch.ops.taskmoe.low_rank_fwd.default(
            x_MK, y_MN, A_GErK, B_GErN, gates_Tk, slots_Tk, scale, tables
        )
        if weight_NK is not None:
            out_MN.addmm_(x_MK, weight_NK.t())
        ctx.save_for_backward(x_MK, s_MR, A_GErK, B_GErN, gates_Tk, slots_Tk, weight_NK)
        ctx.scale, ctx.tables = scale, tables
        return out_MN

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> Any:
        # Read once: non-reentrant checkpointing recomputes at the first read and forbids a second.
        x_MK, s_MR, A_GErK, B_GErN, gates_Tk, slots_Tk, weight_NK = ctx.saved_tensors
        need_x, need_y, need_A, need_B, need_gates = ctx.needs_input_grad[:5]
        needs = [need_x, need_A, need_B, need_gates]
        grads: list[Tensor | None] = [None] * 4
        if any(needs):
            with without_autocast(dy_MN):
                results = torch.ops.taskmoe.low_rank_bwd.default(
                    dy_MN, x_MK, s_MR, A_GErK, B_GErN, gates_Tk, slots_Tk, ctx.scale, ctx.tables, needs
                )
            grads = [grad if need else None for grad, need in zip(results, needs, strict=True)]
        dx, dA, dB, dgates = grads
        if dx is not None and weight_NK is not None:
            dx.addmm_(dy_MN, weight_NK)
        return dx, dy_MN if need_y else None, dA, dB, dgates, None, None, None, None


def tables_of(plan: Plan, x: Tensor) -> list[Tensor]:
    """What the ops of ``x`` take as ``tables``."""
    return plan.op_tables(x.device, tiles=x.is_cuda or ops.use_triton(x))


def without_autocast(x: Tensor) -> Any:
    """The op decides its own dtypes: autocast must not cast its fp32 sums."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _check_weight(weight_NK: Tensor, x_MK: Tensor, N: int) -> None:
    if weight_NK.shape != (N, x_MK.shape[1]) or weight_NK.dtype != x_MK.dtype:
        raise ValueError(
            f"weight is {tuple(weight_NK.shape)} {weight_NK.dtype}; x and the result ask for "
            f"{(N, x_MK.shape[1])} {x_MK.dtype}"
        )
    if weight_NK.requires_grad:
        raise ValueError("weight trains, and would get no gradient here; add its product yourself")


def _check(
    x_MK: Tensor,
    y_MN: Tensor | None,
    A_GErK: Tensor,
    B_GErN: Tensor,
    gates_Tk: Tensor,
    slots_Tk: Tensor | None,
    plan: Plan,
) -> None:
    if A_GErK.dim() != 4 or B_GErN.dim() != 4 or A_GErK.shape[:3] != B_GErN.shape[:3]:
        raise ValueError(
            f"A is {tuple(A_GErK.shape)} and B {tuple(B_GErN.shape)}; "
            "they must be [G, E, r, K] and [G, E, r, N]"
        )
    (G, E, _, K), N, T = A_GErK.shape, B_GErN.shape[3], plan.num_tasks
    if G not in (1, T):
        raise ValueError(f"A has a task axis of {G}; it must be 1 or the plan's {T} tasks")
    if x_MK.shape != (plan.rows, K):
        raise ValueError(f"x is {tuple(x_MK.shape)}; the plan and A ask for {(plan.rows, K)}")
    if y_MN is not None and y_MN.shape != (plan.rows, N):
        raise ValueError(f"y is {tuple(y_MN.shape)}; the plan and B ask for {(plan.rows, N)}")
    if gates_Tk.dim() != 2 or gates_Tk.shape[0] != T:
        raise ValueError(f"gates are {tuple(gates_Tk.shape)}; they must be [T, k] with the plan's {T} tasks")
    if slots_Tk is None:
        if gates_Tk.shape[1] != E:
            raise ValueError(
                f"gates have {gates_Tk.shape[1]} slots for {E} experts; give slots or one gate each"
            )
    elif slots_Tk.shape != gates_Tk.shape or slots_Tk.dtype != torch.int64:
        raise ValueError(
            f"slots are {tuple(slots_Tk.shape)} {slots_Tk.dtype}; "
            f"they must be int64 expert ids of shape {tuple(gates_Tk.shape)}, one a gate"
        )
