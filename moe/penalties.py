"""Terms that join the loss inside a layer: an identity whose backward pass adds their gradient.

A term of activations cannot be collected by a hook or on the side: activation checkpointing would run it
twice, or back-propagate through a graph that is gone. Here it is part of the graph of a tensor that the loss
depends on. Where that part is recomputed, so is the term; where the gradient passes, once a forward pass, its
own is added.

Legend: M rows, B sequences, L positions, E experts, k slots a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from taskmoe.moe.regularisers.base import Rows

if TYPE_CHECKING:
    from taskmoe.kernels.plan import Plan
    from taskmoe.moe.context import Context


def penalise(x: Tensor, value: Tensor, weight: float, seen: Callable[[Tensor], None]) -> Tensor:
    """``x`` unchanged; its backward pass adds the gradient of ``weight * value``.

    Args:
        x: any shape; the loss must depend on what is returned.
        value: a scalar.
        seen: is called with ``value``, once, in the backward pass.
    """
    return _Penalty.apply(x, value, weight, seen)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, weight: float, seen: Callable[[Tensor], None]) -> Tensor:
        ctx.weight, ctx.seen = weight, seen
        ctx.save_for_backward(value)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (value,) = ctx.saved_tensors
        ctx.seen(value.detach())
        return gradient, torch.full_like(value, ctx.weight), None, None


def rows_of(context: Context, plan: Plan, name: str, like: Tensor) -> Rows:
    """The rows of module ``name``, with weights in the dtype and on the device of ``like``: see
    :meth:`taskmoe.moe.context.Context.text_rows`."""
    device = like.device
    if context.packed:
        lengths = torch.tensor([b - a for a, b in zip(plan.offsets, plan.offsets[1:], strict=False)])
        sequences, each = len(lengths), torch.repeat_interleave(lengths).to(device)
    else:
        sequences = context.num_sequences
        each = torch.arange(plan.rows, device=device) // max(1, plan.rows // sequences)
    weights_M = context.text_rows(plan, name, like)
    return Rows(context.tasks, plan.row_tasks(device), sequences, each, weights_M)
