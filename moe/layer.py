"""MoELinear: a frozen linear layer, its bank, and the only place where they meet the gates."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from taskmoe.moe.banks.low_rank import LowRankBank
from taskmoe.moe.context import current


class MoELinear(nn.Module):
    """``base(x)`` plus what the task's experts add.

    ``base`` is any frozen module that maps [..., K] to [..., N] (nn.Linear, GPT-2's Conv1D, a quantised
    linear).
    """

    def __init__(self, base: nn.Module, bank: LowRankBank, name: str, group: int) -> None:
        super().__init__()
        self.base, self.bank, self.name, self.group = base, bank, name, group

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., K] floating -> [..., N], in the dtype of ``base(x)``."""
        y = self.base(x, *args, **kwargs)
        context = current(self.name)
        if not context.enabled:
            return y
        plan = context.plan(x.shape[:-1], self.name)
        out = self.bank(x.reshape(plan.rows, -1), y.reshape(plan.rows, -1), context.gates[self.group], plan)
        return out.view(y.shape)

    # Models look at the weight of their linears (its dtype, its device).
    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)


class SavedModule(nn.Module):
    """A module trained whole (PEFT's ``modules_to_save``): a trainable copy beside the frozen original.

    The original serves when the adapter is disabled.
    """

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__()
        self.original, self.name = original, name
        self.saved = copy.deepcopy(original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.saved if current(self.name).enabled else self.original
        return module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("saved"), name)
