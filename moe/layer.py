"""MoELinear: a frozen linear layer, its bank, and the only place where they meet the gates."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from taskmoe.kernels.low_rank import add_linear_
from taskmoe.moe.context import current
from taskmoe.moe.siblings import Siblings

HALVES = (torch.bfloat16, torch.float16)


class MoELinear(nn.Module):
    """``base(x)`` plus what the task's experts add.

    ``base`` is any frozen module that maps [..., K] to [..., N] (nn.Linear, GPT-2's Conv1D, a quantised
    linear).
    """

    # Whether the experts write first and the frozen product is accumulated onto them; None: on a GPU, where
    # that saves passes over memory. It differs from the sum in the last bit, so that the CPU does not.
    experts_first: bool | None = None

    def __init__(
        self,
        base: nn.Module,
        bank: Any,
        name: str,
        group: int,
        token_routing: nn.Module | None = None,
    ) -> None:
        """bank: called with ``(x_MK, y_MN, gate, plan, weight_NK)``; token_routing: gives the gates of each
        row, where the tasks' gates of routing group ``group`` do not hold. With neither (group -1) the bank
        is given the context as its gate."""
        super().__init__()
        self.base, self.bank, self.name, self.group = base, bank, name, group
        self.token_routing = token_routing
        self.siblings: Siblings | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., K] floating -> [..., N], in the dtype of ``base(x)``."""
        context = current(self.name)
        if not context.enabled:
            return self.base(x, *args, **kwargs)
        plan = context.plan(x.shape[:-1], self.name)
        x_MK = x.reshape(plan.rows, -1)
        mine = None
        if self.siblings is not None:
            mine = self.siblings.rank_rows(self.name, x, x_MK, context, plan)
        gate: Any
        if self.token_routing is not None:
            gate = self.token_routing(x_MK, context, plan)
        else:
            gate = context if self.group < 0 else context.gates[self.group]
        if self._experts_first(x) and not args and not kwargs:
            weight_NK, bias = self.weight, self.bias
            y_MN = None if bias is None else bias.expand(plan.rows, -1)
            if mine is None:
                out = self.bank(x_MK, y_MN, gate, plan, weight_NK)
            else:
                out = add_linear_(self.bank.expand(mine[0], y_MN, mine[1], plan, x.dtype), x_MK, weight_NK)
            return out.view(*x.shape[:-1], -1)
        y = self.base(x, *args, **kwargs)
        y_MN = y.reshape(plan.rows, -1)
        if mine is None:
            out = self.bank(x_MK, y_MN, gate, plan)
        else:
            out = self.bank.expand(mine[0], y_MN, mine[1], plan, y.dtype)
        return out.view(y.shape)

    def _experts_first(self, x: Tensor) -> bool:
        """Only beside a plain frozen linear of the same dtype whose weight lies here whole."""
        base, wanted = self.base, self.experts_first
        if self.token_routing is not None or not self.bank.first:
            return False
        if not (x.is_cuda if wanted is None else wanted):
            return False
        hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
        return (
            type(base) is nn.Linear
            and "forward" not in vars(base)  # accelerate's offloading puts its own there
            and not any(hooks)
            and all(_plain_and_frozen(p, x) for p in base.parameters())
            and not self.bank.drops()
            and not torch.is_autocast_enabled(x.device.type)
        )

    # Models look at the weight of their linears (its dtype, its device).
    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)


def _plain_and_frozen(p: nn.Parameter, x: Tensor) -> bool:
    """Whether ``p`` is an ordinary tensor (not quantised, not sharded) beside ``x`` that does not train."""
    ordinary = type(p) is nn.Parameter and type(p.data) is Tensor and not hasattr(p, "ds_id")
    return ordinary and not p.requires_grad and p.dtype == x.dtype and p.device == x.device


class SavedModule(nn.Module):
    """A module trained whole (PEFT's ``modules_to_save``): a trainable copy beside the frozen original.

    The original serves when the adapter is disabled. Beside an original in bf16 or fp16 the copy is kept in
    fp32, computes in the original's dtype, and gets its gradients in fp32.
    """

    copies: ClassVar[str] = "saved"  # the group in which copies of ``original`` train

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__()
        self.original, self.name = original, name
        self.saved = copy.deepcopy(original)
        if _floating(original) in HALVES:
            self.saved.float()

    @torch.no_grad()
    def refresh(self) -> None:
        """Start the copy again from the original, which a phase without adapters may have trained."""
        for copied, original in zip(self.saved.parameters(), self.original.parameters(), strict=True):
            copied.copy_(original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not current(self.name).enabled:
            return self.original(*args, **kwargs)
        dtype = _floating(self.original)
        if dtype is None or dtype == _floating(self.saved):
            return self.saved(*args, **kwargs)
        # Not functional_call with cast parameters: ZeRO-3 gathers them in the module's own hooks, later.
        with torch.autocast(next(self.saved.parameters()).device.type, dtype):
            out = self.saved(*args, **kwargs)
        # What autocast leaves alone (an embedding, a norm) comes out in fp32.
        return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, out)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("saved"), name)


def _floating(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
