"""One task of a mixture as a plain Hugging Face model: what the experts add is added to the weights.

Legend: R rank, K d_in, N d_out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.module.experts import ModuleExperts
from taskmoe.moe.collapse import CollapseError, Pair, collapse
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.peft_write import is_conv1d
from taskmoe.moe.plain_copy import plain_copy
from taskmoe.moe.squeeze import squeeze


@torch.no_grad()
def merge(model: TaskMoEModel, task: int | str, pairs: Mapping[str, Pair] | None = None) -> nn.Module:
    """A copy of the base model that computes what ``model`` does for ``task``, free of experts and routers.

    Module experts (``bank: module``) merge where the task uses one copy of each module alone; everything else
    as :func:`taskmoe.moe.collapse.collapse` says.

    Args:
        pairs: added in place of those of :func:`collapse`, say truncated.

    Returns:
        In evaluation mode, in the dtype of the base, all of it free to train. ``model`` stays as it is.

    Raises:
        CollapseError: no plain model equals the task, or a quantised weight, to which nothing can be added.
        TaskError: an unknown task.
    """
    number = model.tasks.id(task) if isinstance(task, str) else task
    if any(isinstance(m, ModuleExperts) for m in model.modules()):
        _require_one_expert(model, number)
        return squeeze(model, model.tasks.names[number]).eval()
    found = collapse(model, number) if pairs is None else pairs
    instead = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, MoELinear):
            base = module.base
            if type(base.weight) is not nn.Parameter or not base.weight.is_floating_point():
                raise CollapseError(
                    f"{name}: its weight is quantised, so that nothing can be added to it; use peft"
                )
            weight = nn.Parameter(_merged(base, found[name]))
            instead[id(module)] = copy.deepcopy(base, {id(base.weight): weight})
    return plain_copy(model, number, instead).eval()


def _merged(base: nn.Module, pair: Pair) -> Tensor:
    """The weight of a linear and its experts together, as the linear has it: [N, K], in Conv1D [K, N]."""
    weight: Tensor = base.weight  # type: ignore[assignment]
    delta_NK = (pair.B_RN.T @ pair.A_RK).to(weight.device)
    wide = torch.promote_types(weight.dtype, delta_NK.dtype)
    return (weight.to(wide) + (delta_NK.T if is_conv1d(base) else delta_NK)).to(weight.dtype)


def _require_one_expert(model: TaskMoEModel, task: int) -> None:
    for name, gates_THE in model.gates().items():
        gates_HE = gates_THE[task]
        if not bool(((gates_HE == 0) | (gates_HE == 1)).all()) or not bool((gates_HE.sum(-1) == 1).all()):
            shares = ", ".join(f"{g:.3g}" for g in gates_HE[0].tolist())
            raise CollapseError(
                f"{name}: task {model.tasks.names[task]!r} mixes copies of a module ({shares}), and no one "
                "module equals their sum; keep the mixture (save_pretrained), or train with gate: one_hot"
            )
