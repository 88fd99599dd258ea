"""Per-task sums of a run: exact counts and loss sums, never means of means.

Legend: T tasks. All sums are fp64; losses are added up per rank and reduced only when they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.tasks import TaskTable
from taskmoe.train.distributed import all_sum
from taskmoe.train.objectives import Counts


class Meter:
    """Sums since the last :meth:`read`, and counts since the start of the run."""

    def __init__(self, tasks: TaskTable, sizes: Sequence[int]) -> None:
        """sizes: training rows of each task."""
        self.tasks, self.sizes = tasks, list(sizes)
        zeros = torch.zeros(len(tasks), dtype=torch.float64)
        self.loss_T, self.tokens_T = (
            zeros.clone(),
            zeros.clone(),
        )  # since the last read; loss: this rank's
        self.all_tokens_T, self.all_samples_T = zeros.clone(), zeros.clone()  # since the start, all ranks

    def add(self, loss_T: Tensor) -> None:
        """Add a micro-batch's loss sums (fp64 [T], this rank's)."""
        self.loss_T += loss_T.cpu()

    def count(self, counts: Counts) -> None:
        """Add a step's counts, already summed over ranks."""
        self.tokens_T += counts.tokens_T.cpu()
        self.all_tokens_T += counts.tokens_T.cpu()
        self.all_samples_T += counts.samples_T.cpu()

    @property
    def tokens(self) -> int:
        """Target tokens since the last read."""
        return int(self.tokens_T.sum())

    def epochs(self) -> list[float]:
        """Times each task's training rows have been seen."""
        return [float(n) / max(1, size) for n, size in zip(self.all_samples_T, self.sizes, strict=True)]

    def read(self) -> dict[str, Any]:
        """Metrics of the steps since the last read, reduced over ranks (a collective); new sums begin."""
        loss_T = all_sum(self.loss_T)
        metrics: dict[str, Any] = {"train/loss": float(loss_T.sum() / self.tokens_T.sum().clamp(min=1))}
        epochs = self.epochs()
        for i, task in enumerate(self.tasks):
            if self.tokens_T[i] > 0:
                metrics[f"train/loss/{task.slug}"] = float(loss_T[i] / self.tokens_T[i])
            metrics[f"train/tokens/{task.slug}"] = int(self.all_tokens_T[i])
            metrics[f"train/epochs/{task.slug}"] = epochs[i]
        self.loss_T.zero_()
        self.tokens_T.zero_()
        return metrics

    def state_dict(self) -> dict[str, list[float]]:
        """JSON-able; a collective: the loss is summed over ranks, which may be numbered otherwise later."""
        return {
            "loss": all_sum(self.loss_T).tolist(),
            "tokens": self.tokens_T.tolist(),
            "all_tokens": self.all_tokens_T.tolist(),
            "all_samples": self.all_samples_T.tolist(),
        }

    def load_state_dict(self, state: dict[str, list[float]], is_main: bool) -> None:
        """Go on from :meth:`state_dict`; rank 0 takes the loss. Tasks added since start at zero."""
        loss = state["loss"] if is_main else [0.0] * len(state["loss"])
        for own, values in (
            (self.loss_T, loss),
            (self.tokens_T, state["tokens"]),
            (self.all_tokens_T, state["all_tokens"]),
            (self.all_samples_T, state["all_samples"]),
        ):
            own[: len(values)] = torch.tensor(values, dtype=torch.float64)
