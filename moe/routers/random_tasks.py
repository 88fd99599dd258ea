"""Routes drawn once for each task: a control for learned routes.

Legend: S routing groups, T tasks, Tb tasks in this batch, H heads, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import options_of
from taskmoe.moe.tasks import TaskTable


class RandomTaskRouter(nn.Module):
    """Each task uses ``experts`` of the E, drawn for each group and head, all alike (a control of Ye, Zha,
    Ren 2022).

    route_STHE: [S, T, H, E], 1 / experts or 0. It follows from the seed and the task's name, so that tasks
    may be added; it is not saved. The gate is ``raw``.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts", "num_heads", "router_scope")
    task_dims: ClassVar[dict[str, int]] = {}
    gates: ClassVar[tuple[str, ...]] = ("raw",)
    trains: ClassVar[bool] = False
    route_STHE: Tensor

    @dataclass(frozen=True)
    class Options:
        """The draw."""

        experts: int = 1  # how many of them a task uses
        seed: int = 0  # another seed, other routes

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError for more experts than there are."""
        if not 1 <= options.experts <= config.num_experts:
            raise ConfigError(
                f"moe.router_options.experts: {options.experts} must be between 1 and num_experts = "
                f"{config.num_experts}"
            )

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        options = options_of("router", config, RandomTaskRouter)
        shape = (len(groups), config.num_heads, config.num_experts)
        routes = []
        for task in tasks:
            digest = hashlib.sha256(f"{options.seed} {task.name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
            chosen = torch.rand(shape, generator=generator, device="cpu").topk(options.experts).indices
            routes.append(torch.zeros(shape, device="cpu").scatter_(-1, chosen, 1 / options.experts))
        self.register_buffer("route_STHE", torch.stack(routes, dim=1), persistent=False)

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """tasks: [Tb] int64 -> gates [S, Tb, H, E]."""
        return self.route_STHE.index_select(1, tasks)
