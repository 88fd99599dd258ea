"""Tasks that are learned alike: data maps over the checkpoints of one run (STG-MTL, Sherif et al. 2023).

Legend: T tasks, C checkpoints, n rows of one task, Q quantiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taskmoe.moe import TaskMoEModel, load_adapter
from taskmoe.train import checkpoint
from taskmoe.train.data.collator import Collator
from taskmoe.train.objectives import model_inputs, token_losses
from taskmoe.train.selection.base import SelectError, Subject
from taskmoe.train.weights import load_base

QUANTILES = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)


def affinity(subject: Subject) -> Tensor:
    """[T, T] float64: minus the squared distance of the tasks' data maps (:func:`data_map`).

    Raises:
        SelectError: no run, one with a single checkpoint, or rows without a loss of their own.
    """
    run = subject.require_run("datamap")
    subject.require_rows_with_losses("datamap")
    folders = [
        path for path in run.home.glob("checkpoint-*") if checkpoint.verify(path, hashes=False) is None
    ]
    folders.sort(key=lambda path: checkpoint.read_state(path)["step"])
    if len(folders) < 2:
        raise SelectError(
            f"--method datamap: {run.home} has {len(folders)} checkpoint, and data maps need what changed "
            "between several; train with save_steps and a larger save_total_limit"
        )
    model = run.load().model
    seen: dict[str, list[Tensor]] = {name: [] for name in subject.names}
    for folder in folders:
        load_base(model, folder)
        load_adapter(model, folder)
        for name in subject.names:
            seen[name].append(confidences(subject, model, name))
            subject.advance()
    maps = torch.stack([data_map(torch.stack(of_task)) for of_task in seen.values()])
    return -torch.cdist(maps, maps).square().fill_diagonal_(0)


def data_map(confidence_Cn: Tensor) -> Tensor:
    """[(C - 1) 2 Q] float64: at each checkpoint but the first, the quantiles over a task's rows of the mean
    and of the standard deviation of their confidence so far.

    The paper takes the rows themselves, which all its tasks share; these are other rows for each task.

    Args:
        confidence_Cn: in [0, 1], checkpoints in the order of training.
    """
    parts = []
    for count in range(2, len(confidence_Cn) + 1):
        so_far_Cn = confidence_Cn[:count].double()
        for numbers_n in (so_far_Cn.mean(0), so_far_Cn.std(0, correction=0)):
            parts.append(torch.quantile(numbers_n, QUANTILES))
    return torch.cat(parts)


@torch.no_grad()
def confidences(subject: Subject, model: TaskMoEModel, name: str) -> Tensor:
    """[n] float64: the probability of the right class; of a text the geometric mean over its tokens."""
    config, bundle = subject.config, subject.data.bundle
    task = bundle.tasks.id(name)
    collate = Collator(subject.data.tokenizer, config.task_type, len(bundle.tasks))
    tokens = bundle.splits["train"][task].tokens
    rows = [{**tokens[i], "task": task} for i in range(min(len(tokens), subject.options.rows))]
    size, found = config.per_device_eval_batch_size, []
    for at in range(0, len(rows), size):
        batch = collate(rows[at : at + size])
        inputs = model_inputs(batch, config.task_type, model.config, "cpu")
        losses_n, _, sequences_n = token_losses(model(**inputs).logits, batch, config.task_type)
        sums = torch.zeros(len(rows[at : at + size]), dtype=torch.float64)
        counts = torch.bincount(sequences_n, minlength=len(sums))
        found.append(torch.exp(-sums.index_add(0, sequences_n, losses_n.double()) / counts))
    return torch.cat(found)
