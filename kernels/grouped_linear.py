"""Linear layers of module experts: rows by the weight of their task's expert.

The matrices are large, so this is cuBLAS's and CUTLASS's work, not ours: one grouped product where torch has
it and its rules allow it, one product a segment elsewhere.

Legend: M rows, K d_in, N d_out, E experts, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from taskmoe.kernels.plan import Plan

ALIGNMENT = 16  # bytes: what grouped_mm asks of every row


def grouped_linear(
    x_MK: Tensor, weight_ENK: Tensor, bias_EN: Tensor | None, experts_T: Sequence[int], plan: Plan
) -> Tensor:
    """``weight[e] x + bias[e]`` for each row of task ``t``, ``e = experts[t]``.

    Args:
        x_MK: rows in the order of ``plan``, in the dtype of the weight.
        weight_ENK, bias_EN: the experts' linear layers, as nn.Linear keeps them.
        experts_T: the expert of each task, on the host.
        plan: the row space of ``x``.

    Returns:
        ``[M, N]``. Experts without rows get gradients of zero.

    Raises:
        ValueError: shapes that do not fit, or an expert that does not exist.
    """
    E, N, K = weight_ENK.shape
    if x_MK.shape != (plan.rows, K):
        raise ValueError(f"x is {tuple(x_MK.shape)}; the plan and the weight ask for {(plan.rows, K)}")
    if bias_EN is not None and bias_EN.shape != (E, N):
        raise ValueError(f"bias is {tuple(bias_EN.shape)}; the weight asks for {(E, N)}")
    if len(experts_T) != plan.num_tasks or not all(0 <= e < E for e in experts_T):
        raise ValueError(
            f"experts are {list(experts_T)}; give one of 0..{E - 1} for each of {plan.num_tasks} tasks"
        )
    experts_S = [experts_T[t] for t in plan.tasks]
    rising = all(a <= b for a, b in pairwise(experts_S))
    if not (rising and plan.rows and x_MK.is_cuda and grouped_mm_takes(x_MK, weight_ENK)):
        parts = [
            functional.linear(x_MK[start:end], weight_ENK[e], None if bias_EN is None else bias_EN[e])
            for e, (_, start, end) in zip(experts_S, plan.segments(), strict=True)
        ]
        return torch.cat(parts) if parts else x_MK.new_zeros(0, N)
    ends = [0] * E
    for e, end in zip(experts_S, plan.offsets[1:], strict=True):
        ends[e] = end
    for e in range(1, E):
        ends[e] = max(ends[e], ends[e - 1])
    unused = sorted(set(range(E)) - set(experts_S))
    out_MN = GroupedMM.apply(x_MK, weight_ENK, _on_device(ends, torch.int32, x_MK), unused)
    if bias_EN is not None:
        expert_of_task = _on_device(list(experts_T), torch.int64, x_MK)
        # Indexing, not index_select: its backward sorts, where the other's adds by atomics.
        out_MN = out_MN + bias_EN[expert_of_task.index_select(0, plan.row_tasks(x_MK.device))]
    return out_MN


def grouped_mm_takes(x_MK: Tensor, weight_ENK: Tensor) -> bool:
    """Whether torch's grouped_mm is there and takes these: 16-bit, rows of a multiple of 16 bytes."""
    _, N, K = weight_ENK.shape
    aligned = all(n * x_MK.element_size() % ALIGNMENT == 0 for n in (N, K))
    return (
        hasattr(functional, "grouped_mm")
        and x_MK.dtype == weight_ENK.dtype == torch.bfloat16
        and aligned
        and x_MK.is_contiguous()
        and weight_ENK.is_contiguous()
    )


class GroupedMM(torch.autograd.Function):
    """x [M, K] by weight [E, N, K] over runs of rows that end at ``ends`` int32 [E]; three grouped
    products."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_ENK: Tensor, ends: Tensor, unused: list[int]) -> Tensor:
        ctx.save_for_backward(x_MK, weight_ENK, ends)
        ctx.unused = unused
        return functional.grouped_mm(x_MK, weight_ENK.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_ENK, ends = ctx.saved_tensors
        dy_MN = dy_MN.contiguous()  # grouped_mm refuses the stride-0 gradient of a sum
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = functional.grouped_mm(dy_MN, weight_ENK, offs=ends)
        if ctx.needs_input_grad[1]:
            dweight = functional.grouped_mm(dy_MN.t(), x_MK, offs=ends)
            for e in ctx.unused:  # the product of no rows is left unwritten on some GPUs
                dweight[e].zero_()
        return dx, dweight, None, None


def _on_device(values: list[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Values of the host, copied without waiting for the device."""
    return torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
