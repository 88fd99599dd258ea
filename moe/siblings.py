"""Linears that read the same rows (q, k, v; gate, up) share one pass over them.

The first sibling that is called takes the rows into the rank space of all of them; the others find their part
waiting. Forward, x is read once instead of once a linear; backward, the gradient of x is written once, and
one pass over x serves all banks.

Legend: M rows, K d_in, R columns of a linear's experts in rank space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import shrink
from taskmoe.moe.banks.low_rank import LowRankBank, Operands
from taskmoe.moe.context import Context

if TYPE_CHECKING:
    from taskmoe.moe.layer import MoELinear


# Entries of x below which a CPU is faster without: there the arithmetic counts, not the pass, and two halves
# are twice the calls. Measured with benchmarks/step.py: a step takes 1.12 to 1.19 x as long with sharing at
# 2**15 entries, 0.96 to 0.99 x at 2**19.
SMALL = 2**18


@dataclass
class Shared:
    """What a forward pass keeps between the first sibling and the last (or its own end): the rows, and who
    still waits for what."""

    x: Tensor
    waiting: dict[str, tuple[Tensor, Operands]]  # {linear: its rows in rank space [M, R], its operands}


class Siblings:
    """Linears that were seen to read the same rows, in the order in which they did."""

    def __init__(self, linears: Sequence[MoELinear]) -> None:
        self.linears = list(linears)

    def rank_rows(
        self, name: str, x: Tensor, x_MK: Tensor, context: Context, plan: Plan
    ) -> tuple[Tensor, Operands] | None:
        """The rows of ``x`` in the rank space of linear ``name``, and the operands of its bank; None: it
        works alone.

        ``x`` is the very tensor that the linear was given: another one, be it equal, starts anew.
        """
        found = context.shared.get(id(self))
        if found is None or found.x is not x:
            if not all(_can_share(linear.bank) for linear in self.linears) or not self._worth(x_MK):
                return None
            if torch.is_autocast_enabled(x.device.type):
                return None  # a linear that works alone takes the rows in the dtype of its product
            operands = [linear.bank.operands(context.gates[linear.group]) for linear in self.linears]
            rows = shrink(x_MK, [o.A_GErK for o in operands], [o.slots_Tk for o in operands], plan)
            names = [linear.name for linear in self.linears]
            found = Shared(x, dict(zip(names, zip(rows, operands, strict=True), strict=True)))
            context.shared[id(self)] = found
        mine = found.waiting.pop(name, None)
        if not found.waiting:
            context.shared.pop(id(self), None)
        return mine

    def _worth(self, x_MK: Tensor) -> bool:
        """Whether the passes saved outweigh the copy that puts the banks side by side."""
        if not x_MK.is_cuda and x_MK.numel() < SMALL:
            return False
        bank_ErK, S = self.linears[0].bank.A_ErK, len(self.linears)
        return 2 * S * bank_ErK.shape[0] * bank_ErK.shape[1] < (S - 1) * len(x_MK)


def _can_share(bank: LowRankBank) -> bool:
    """Not with dropout, which gives each linear rows of its own, nor under ZeRO-3, which gathers a bank's
    parameters for the call of that bank alone."""
    return not bank.drops() and not hasattr(bank.A_ErK, "ds_id")


def family(linears: Sequence[MoELinear]) -> Siblings | None:
    """Siblings, if the banks of ``linears`` fit together: one number of experts, rank and composition, gates
    of tasks."""
    if any(linear.token_routing is not None or not linear.bank.shares for linear in linears):
        return None
    shapes = {(tuple(linear.bank.A_ErK.shape), linear.bank.compose) for linear in linears}
    return Siblings(linears) if len(linears) > 1 and len(shapes) == 1 else None
