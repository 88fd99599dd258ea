"""A learned vector for each task. Legend: T tasks, Tb those of this batch, D task vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import options_of
from taskmoe.moe.representations.frozen import vectors_of
from taskmoe.moe.tasks import TaskTable


class LearnedVectors(nn.Module):
    """A free vector for each task, drawn from N(0, 1), or begun at given ones (Ye, Zha, Ren 2022).

    embedding_TD: [T, D] float32.
    """

    uses: ClassVar[tuple[str, ...]] = ("task_embedding_dim", "new_task_rows")
    task_dims: ClassVar[dict[str, int]] = {"embedding_TD": 0}

    @dataclass(frozen=True)
    class Options:
        """Where they start."""

        path: str | None = None  # a .safetensors or .json file, {task name: vector}; None: drawn

    @staticmethod
    def idle(options: Options) -> dict[str, str]:
        """A task that is added takes its vector from the file; see ``moe/representations/kinds.py``."""
        return {} if options.path is None else {"new_task_rows": "path has a vector for each task"}

    def __init__(self, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__()
        self.dim = config.task_embedding_dim
        path = options_of("representation", config, LearnedVectors).path
        if path is None:
            self.embedding_TD = nn.Parameter(torch.randn(len(tasks), self.dim))
            return
        start_TD = vectors_of(path, tasks)
        if start_TD.shape[1] != self.dim:
            raise ConfigError(
                f"moe.task_embedding_dim: {self.dim}, but the vectors of {path} have {start_TD.shape[1]} "
                "numbers; set it to that"
            )
        self.embedding_TD = nn.Parameter(start_TD)

    def forward(self, tasks: Tensor) -> Tensor:
        """tasks: [Tb] int64 -> [Tb, D]."""
        return self.embedding_TD.index_select(0, tasks)
