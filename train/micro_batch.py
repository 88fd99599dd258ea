"""Forward and backward of one micro-batch, in one pass or in one for each task.

Legend: B sequences, T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taskmoe.train.config import Config
from taskmoe.train.engine import Engine
from taskmoe.train.objectives import IGNORE, Counts, model_inputs, step_loss, task_losses


def learn(
    engine: Engine,
    batch: Mapping[str, Any],
    counts: Counts,
    weights_T: Tensor,
    config: Config,
    device: torch.device,
    index: int = 0,
) -> Tensor:
    """Back-propagate a micro-batch's share of the step's loss.

    Args:
        counts: of the whole step, over all ranks and micro-batches.
        weights_T: [T], loss weights.
        index: of the micro-batch in the step.

    Returns:
        The loss sum of each task, fp64 [T], detached.
    """
    how: dict[str, Any] = {
        "task_type": config.task_type,
        "reduction": config.loss_reduction,
        "label_smoothing": config.label_smoothing_factor,
    }
    surgery = engine.surgery
    if surgery is not None:
        surgery.enter(index)
        weights_T = surgery.loss_weights(weights_T)
    if surgery is None or surgery.one_pass:
        loss, sums_T = step_loss(_logits(engine, batch, config, device), batch, counts, weights_T, **how)
        engine.backward(loss)
        return sums_T
    turns = surgery.turns[index]
    if surgery.way == "separate":
        losses_T, sums_T = task_losses(
            _logits(engine, batch, config, device), batch, counts, weights_T, **how
        )
        for task in turns:
            engine.backward(losses_T[task], retain_graph=task != turns[-1])
            surgery.gradients.harvest(task)
        return sums_T
    total_T = torch.zeros_like(weights_T)
    for task in turns:
        part = task_slice(batch, task)
        loss, sums_T = step_loss(_logits(engine, part, config, device), part, counts, weights_T, **how)
        engine.backward(loss)
        surgery.gradients.harvest(task)
        total_T += sums_T.cpu()
    return total_T


def task_slice(batch: Mapping[str, Any], task: int) -> dict[str, Any]:
    """The sequences of one task; of a batch that has none of it, its first sequence without a target.

    Packed rows ([B, L] task ids) stay whole, and lose the targets of other tasks.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    mask = batch["task_ids"] == task
    if mask.dim() == 2:
        return {**tensors, "labels": batch["labels"].masked_fill(~mask.to(batch["labels"].device), IGNORE)}
    if not bool(mask.any()):
        first = {name: value[:1] for name, value in tensors.items()}
        return {**first, "labels": torch.full_like(first["labels"], IGNORE)}
    return {name: value[mask] for name, value in tensors.items()}


def _logits(engine: Engine, batch: Mapping[str, Any], config: Config, device: torch.device) -> Tensor:
    return engine.engine(**model_inputs(batch, config.task_type, engine.model.config, device)).logits
