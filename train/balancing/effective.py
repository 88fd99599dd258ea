"""What a task weighs in the end, and whether a configuration corrects one imbalance twice.

Shapes: T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.train.objectives import REDUCTIONS

# Settings that lift small or hard tasks. `explicit` rates are left out: whoever writes numbers has seen them.
_MIXTURES = {
    "equal": "draws every task equally often",
    "temperature": "draws small tasks more often than their rows",
    "capped": "draws large tasks less often than their rows",
    "unimax": "draws every task equally often, as far as its rows last",
}
_BALANCERS = {
    "uncertainty": "divides each loss by about its own size",
    "dwa": "lifts the tasks whose losses fall slowly",
    "coba": "lifts the tasks whose validation losses fall slowly",
    "famo": "lifts the tasks whose losses fall slowly",
}
_SURGERY = {
    "nash_mtl": "gives each task the same say, whatever the size of its loss",
    "imtl_g": "gives each task the same projection, whatever the size of its loss",
    "aligned_mtl": "evens out the sizes of the gradients",
}


def effective_weights(
    rates_T: Tensor,
    weights_T: Tensor,
    combination_T: Tensor | None = None,
    *,
    reduction: str = "token",
    tokens_T: Tensor | None = None,
) -> Tensor:
    """Rate x weight x combination: what each task weighs in the update, fp64 [T].

    The first factor is the share of the task in an average step's loss, before any weight: its rate with
    ``sample``; its share of the tokens with ``token``; the same for every task that is drawn with ``task``
    (exactly so where each step holds every task).

    Args:
        rates_T: [T], shares of the tasks in the sequences drawn.
        weights_T: [T], weights of the losses.
        combination_T: [T], weights of the gradients (surgery); default 1.
        reduction: ``loss_reduction``.
        tokens_T: [T], mean targets of a sequence, for ``token``; default: alike.

    Raises:
        ConfigError: an unknown reduction.
    """
    rates_T = rates_T.double()
    if reduction == "token":
        share_T = rates_T if tokens_T is None else rates_T * tokens_T.to(rates_T.device, torch.float64)
    elif reduction == "sample":
        share_T = rates_T
    elif reduction == "task":
        share_T = (rates_T > 0).double()
    else:
        raise ConfigError(f"loss_reduction: {reduction!r} is none of {', '.join(REDUCTIONS)}")
    product_T = share_T / share_T.sum() * weights_T.to(rates_T.device, torch.float64)
    return product_T if combination_T is None else product_T * combination_T.to(rates_T.device, torch.float64)


def corrected_twice(
    *,
    mixing: str,
    reduction: str,
    task_weights: Mapping[str, float] | None = None,
    balancing: str | None = None,
    surgery: str | None = None,
) -> str | None:
    """A sentence about settings that correct the same imbalance, or None if at most one does.

    Rates, loss weights and combinations multiply: two corrections of one imbalance overshoot.

    Args:
        mixing: ``mixing.strategy``.
        reduction: ``loss_reduction``.
        task_weights: loss weights by task.
        balancing, surgery: the methods' names.
    """
    found = []
    if mixing in _MIXTURES:
        found.append(f"mixing.strategy: {mixing} {_MIXTURES[mixing]}")
    if reduction == "task":
        found.append("loss_reduction: task weighs every task alike, whatever was drawn")
    if task_weights and len(set(task_weights.values()) | {1.0}) > 1:
        found.append("task_weights sets weights by hand")
    if balancing in _BALANCERS:
        found.append(f"balancing.method: {balancing} {_BALANCERS[balancing]}")
    if surgery in _SURGERY:
        found.append(f"surgery.method: {surgery} {_SURGERY[surgery]}")
    if len(found) < 2:
        return None
    return (
        f"{len(found)} settings correct an imbalance between tasks, and their effects multiply: "
        f"{'; '.join(found)}. Keep one, or watch the effective weights"
    )
