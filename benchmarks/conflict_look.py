"""What surgery would change at a point of a run of ``conflict.py``, by the size of the batch.

Legend: T tasks, b rows of a task, H = 2 T halves of tasks' batches.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from conflict_bed import METHODS, Bed, losses, task_ids
from torch import Tensor

from taskmoe.moe import TaskMoEModel
from taskmoe.train.surgery.combine import Surgery
from taskmoe.train.surgery.gramian import (
    conflict_fraction,
    cosines,
    direction_change,
    same_task_cosines,
    update_change,
)
from taskmoe.train.task_gradients import TaskGradients


def gradients(
    model: TaskMoEModel, bed: Bed, seed: int = 0, rows: Sequence[int] = (2, 8, 32), draws: int = 2
) -> list[dict[str, Any]]:
    """What surgery would do at this point, for batches of ``rows`` rows a task; means over ``draws`` batches.

    Each half of a task's rows counts as a task of its own in one backward pass. So one Gramian holds the
    halves of one task (the null), the halves of different tasks, and, added up, the tasks themselves.
    """
    T, draw = len(bed.tasks), torch.Generator().manual_seed(seed)
    upper_TT = torch.triu(torch.ones(T, T), 1) > 0
    rivals_TT = upper_TT & torch.tensor([[a.skills == b.skills for b in bed.tasks] for a in bed.tasks])
    methods = {name: Surgery(name) for name in METHODS}
    grads, found = TaskGradients(model, list(range(2 * T))), []
    for b in rows:
        seen: dict[str, list[float]] = {}

        def note(name: str, value: Tensor | float, seen: dict[str, list[float]] = seen) -> None:
            seen.setdefault(name, []).append(float(value))

        for i in range(draws):
            # Without replacement: a row in both halves would make the null look like agreement.
            halves = [part[torch.randperm(len(part), generator=draw)[:b]] for part in bed.rows["train"]]
            halves = [part[: b // 2] for part in halves] + [part[b // 2 :] for part in halves]
            model.zero_grad()
            with grads:
                losses(model, halves, task_ids=task_ids(2 * T, b // 2))[0].mean().backward()
            (G_HH,) = grads.combine("sum", i).gramians.values()
            G_TT = G_HH.view(2, T, 2, T).sum((0, 2))
            C_TT, between = cosines(G_TT), cosines(G_HH)[:T, T:]
            note("conflict_fraction", conflict_fraction(G_TT))
            note("cosine", C_TT[upper_TT].mean())
            if rivals_TT.any():
                note("rivals_cosine", C_TT[rivals_TT].mean())
            squares = G_HH.diagonal()
            note("null_cosine", same_task_cosines(squares[:T], squares[T:], G_HH[:T, T:].diagonal()).mean())
            note("halves_cosine", between[upper_TT | upper_TT.T].mean())
            note("null_conflict_fraction", float((G_HH[:T, T:].diagonal() < 0).double().mean()))
            for name, method in methods.items():
                w_T = method.weights(G_TT, i)
                note(f"{name}_change", update_change(G_TT, w_T))
                note(f"{name}_turn", direction_change(G_TT, w_T))
        model.zero_grad()
        found.append({"rows": b, **{k: round(statistics.fmean(v), 4) for k, v in seen.items()}})
    return found
