"""A learned vector for each task. Legend: T tasks, Tb those of this batch, D task vector."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.tasks import TaskTable


class LearnedVectors(nn.Module):
    """A free vector for each task, drawn from N(0, 1) (Task2Vec of Ye, Zha, Ren 2022, without a start).

    embedding_TD: [T, D] float32.
    """

    uses: ClassVar[tuple[str, ...]] = ("task_embedding_dim",)
    task_dims: ClassVar[dict[str, int]] = {"embedding_TD": 0}

    def __init__(self, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__()
        self.dim = config.task_embedding_dim
        self.embedding_TD = nn.Parameter(torch.randn(len(tasks), self.dim))

    def forward(self, tasks: Tensor) -> Tensor:
        """tasks: [Tb] int64 -> [Tb, D]."""
        return self.embedding_TD.index_select(0, tasks)
