"""A map from tasks to experts that is given, not learned.

Legend: S routing groups, T tasks, Tb tasks in this batch, H heads, E experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.options import options_of
from taskmoe.moe.tasks import TaskTable


class FixedRouter(nn.Module):
    """Each task has one expert, in every group (SciMult, Zhang et al. 2023: an expert for each kind of task).

    route_TE: [T, E], ones where the expert is the task's; it follows from the settings and is not saved. The
    gate is ``raw``.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    task_dims: ClassVar[dict[str, int]] = {}
    gates: ClassVar[tuple[str, ...]] = ("raw",)
    trains: ClassVar[bool] = False
    mutes: ClassVar[tuple[str, ...]] = ("num_heads",)  # every head has the same gates
    route_TE: Tensor

    @dataclass(frozen=True)
    class Options:
        """The map: a task's own name counts before patterns, of these the first; groups as they come."""

        experts: dict | None = None  # {task or pattern with *: expert, from 0}; None: one a group of tasks

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError for an empty map, or experts that there are not."""
        if options.experts is not None and not options.experts:
            raise ConfigError(
                "moe.router_options.experts: {} is empty; give {task or pattern: expert}, or leave it out"
            )
        for task, expert in (options.experts or {}).items():
            if type(expert) is not int or not 0 <= expert < config.num_experts:
                raise ConfigError(
                    f"moe.router_options.experts: {str(task)!r} needs expert {expert!r}, and they are "
                    f"numbered 0 to {config.num_experts - 1}"
                )

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable, dim: int) -> None:
        super().__init__()
        chosen = list(experts_of_tasks(config, tasks).values())
        if max(chosen) >= config.num_experts:
            raise ConfigError(
                f"moe.num_experts: {config.num_experts}, but the tasks are in {1 + max(chosen)} groups, and "
                "each needs an expert; set it to that"
            )
        route_TE = torch.zeros(len(tasks), config.num_experts, device="cpu")
        route_TE[range(len(tasks)), chosen] = 1.0
        self.register_buffer("route_TE", route_TE, persistent=False)
        self.shape = (len(groups), config.num_heads)

    def forward(self, tasks: Tensor, vectors_TD: Tensor | None) -> Tensor:
        """tasks: [Tb] int64 -> gates [S, Tb, H, E]."""
        route_TE = self.route_TE.index_select(0, tasks)
        return route_TE[None, :, None].expand(self.shape[0], -1, self.shape[1], -1)


def experts_of_tasks(config: TaskMoEConfig, tasks: TaskTable) -> dict[str, int]:
    """{task: its expert} of the settings of router ``fixed``.

    Raises:
        ConfigError: a task without an expert, or a pattern without a task.
    """
    given = options_of("router", config, FixedRouter).experts
    chosen = _by_group(tasks) if given is None else _by_pattern(tasks, given)
    return dict(zip(tasks.names, chosen, strict=True))


def _by_group(tasks: TaskTable) -> list[int]:
    order: dict[str, int] = {}
    for task in tasks:
        if task.group is None:
            raise ConfigError(
                f"moe.router_options.experts: none given, and task {task.name!r} is in no group; "
                "give its data set a group, or give {task pattern: expert}"
            )
        order.setdefault(task.group, len(order))
    return [order[str(task.group)] for task in tasks]


def _by_pattern(tasks: TaskTable, given: dict) -> list[int]:
    experts = {str(pattern): expert for pattern, expert in given.items()}
    for pattern in experts:
        if not any(pattern == name or fnmatchcase(name, pattern) for name in tasks.names):
            near = difflib.get_close_matches(pattern, tasks.names, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"moe.router_options.experts: {pattern!r} matches no task; the nearest of {len(tasks)} is "
                f"{near!r}"
            )
    return [_of_task(name, experts) for name in tasks.names]


def _of_task(name: str, experts: dict[str, int]) -> int:
    if name in experts:  # a name may look like a pattern: sum[1]
        return experts[name]
    for pattern, expert in experts.items():
        if fnmatchcase(name, pattern):
            return expert
    raise ConfigError(
        f"moe.router_options.experts: {', '.join(experts)}: none matches task {name!r}; give it an expert"
    )
