"""Where added tasks start: at the task whose routes serve their first rows best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taskmoe.moe import TaskMoEModel
from taskmoe.moe.new_tasks import start_from
from taskmoe.train.config import Config
from taskmoe.train.data.bundle import TaskSplit
from taskmoe.train.data.collator import Collator
from taskmoe.train.distributed import gather_objects
from taskmoe.train.objectives import model_inputs, token_losses


@torch.no_grad()
def loss_as(model: TaskMoEModel, batch: dict[str, Any], task: int, config: Config) -> float:
    """The mean loss of a batch run as if all its rows were of ``task``."""
    tasks = torch.full_like(batch["task_ids"], task)
    device = next(model.parameters()).device
    inputs = model_inputs({**batch, "task_ids": tasks}, config.task_type, model.config, device)
    return float(token_losses(model(**inputs).logits, batch, config.task_type)[0].mean())


def start_from_nearest(
    model: TaskMoEModel,
    splits: Sequence[TaskSplit],
    added: Sequence[str],
    tokenizer: Any,
    config: Config,
) -> dict[str, tuple[str, float]]:
    """Give each added task the rows of the known task under which its first training rows have least loss.

    One forward pass of ``per_device_train_batch_size`` rows for each pair of an added and a known task, on
    every rank; the first rank's choice holds: a collective.

    Args:
        added: names of tasks at the end of the table.

    Returns:
        {added task: (the one that it starts from, the loss)}.
    """
    names, table = model.tasks.names, model.tasks
    known = names[: len(names) - len(added)]
    collate = Collator(tokenizer, config.task_type, len(names))
    chosen, was_training = {}, model.training
    model.eval()
    for name in added:
        split = splits[table.id(name)]
        rows = range(min(len(split.tokens), config.per_device_train_batch_size))
        batch = collate([{**split.tokens[i], "task": table.id(name)} for i in rows])
        losses = {seen: loss_as(model, batch, table.id(seen), config) for seen in known}
        nearest = min(losses, key=lambda seen: losses[seen])
        chosen[name] = (nearest, losses[nearest])
    model.train(was_training)
    chosen = gather_objects(chosen)[0]
    start_from(model, {new: seen for new, (seen, _) in chosen.items()})
    return chosen
