"""The gradient of each task, kept apart in the one backward pass of a batch that mixes tasks.

A bank enters its op with a task axis of stride 0. The op's backward gives one gradient a task, a hook on that
view keeps them, and the view's own backward adds them up: ``p.grad`` is what plain training gives.

Legend: E experts, r rank of one expert, D the wide dimension of a bank, G 1 or Tb, Tb tasks in this batch, H
heads, S routing groups, k slots a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taskmoe.kernels.low_rank import average
from taskmoe.kernels.plan import Plan

# Parameters of one bank -> [G, *shape] each, as the op takes them.
Split = Callable[..., tuple[Tensor, ...]]


class Parts(Protocol):
    """Who keeps them. ``halves``: not None in passes where each task is cut in two (see ``Context``)."""

    halves: int | None

    def wants(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient of this parameter is to be kept apart."""
        ...

    def keep(
        self, parameter: nn.Parameter, tasks: Sequence[int], halves: Sequence[int], parts: Tensor
    ) -> Tensor | None:
        """Called in the backward pass, once a use of the parameter: parts [Tb, *shape], one a task id and
        half.

        What is returned (None: the parts themselves) is summed into ``p.grad``.
        """
        ...

    def keep_gates(self, tasks: Sequence[int], gradient_STHk: Tensor) -> None:
        """Called once a backward pass: the gradient of the gates, [S, Tb, H, k]; row t is task t's alone."""
        ...


def splitter(parts: Parts, tasks: Sequence[int], halves: Sequence[int]) -> Split:
    """How the banks of one forward pass on these task ids get their task axis."""

    def split(*parameters: nn.Parameter) -> tuple[Tensor, ...]:
        if not any(parts.wants(p) for p in parameters):
            return tuple(p.unsqueeze(0) for p in parameters)
        return tuple(_expanded(p, parts, tasks, halves) for p in parameters)

    return split


def _expanded(
    parameter: nn.Parameter, parts: Parts, tasks: Sequence[int], halves: Sequence[int]
) -> Tensor:
    view = parameter.expand(len(tasks), *parameter.shape)
    # Not in the first forward of reentrant checkpointing, which builds no graph.
    if view.requires_grad and parts.wants(parameter):
        view.register_hook(lambda gradient: parts.keep(parameter, tasks, halves, gradient))
    return view


def by_row(values_GD: Tensor, plan: Plan) -> Tensor:
    """[G, *shape], one for each task of ``plan`` (or [1, *shape] for all) -> [M, *shape] (or [1, *shape])."""
    # Indexing, not index_select: its backward sorts, where the other's adds by atomics.
    return values_GD if len(values_GD) == 1 else values_GD[plan.row_tasks(values_GD.device)]


def average_by_task(bank_GErD: Tensor, weights_THE: Tensor) -> Tensor:
    """:func:`taskmoe.kernels.low_rank.average` of a bank with a task axis: [T, r, D].

    With G = T (one parameter expanded with stride 0) the forward pass reads entry 0, and the backward pass
    gives [T, E, r, D], one gradient a task.

    Raises:
        ValueError: as ``average``.
    """
    if bank_GErD.shape[0] == 1:
        return average(bank_GErD[0], weights_THE)
    return _AverageByTask.apply(bank_GErD, weights_THE)


class _AverageByTask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bank_GErD: Tensor, weights_THE: Tensor) -> Tensor:
        ctx.save_for_backward(bank_GErD, weights_THE)  # a view of stride 0: nothing is copied
        return average(bank_GErD[0], weights_THE)

    @staticmethod
    def backward(ctx: Any, dmean_TrD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        bank_GErD, weights_THE = ctx.saved_tensors
        (T, H, E), (r, D) = weights_THE.shape, bank_GErD.shape[2:]
        blocks_TrHd = dmean_TrD.reshape(T, r, H, D // H)
        dbank = dweights = None
        if ctx.needs_input_grad[0]:
            weights = weights_THE.to(dmean_TrD.dtype)
            dbank = torch.einsum("the,trhd->terhd", weights, blocks_TrHd).reshape(T, E, r, D)
        if ctx.needs_input_grad[1]:
            bank_ErHd = bank_GErD[0].reshape(E, r, H, D // H)
            dweights = torch.einsum("trhd,erhd->the", blocks_TrHd, bank_ErHd).to(weights_THE.dtype)
        return dbank, dweights
