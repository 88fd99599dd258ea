"""What of a model belongs to some tasks alone, so that adapting to them leaves all others as they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError
from taskmoe.moe.model import TaskMoEModel, task_dims


class OwnRows:
    """What belongs to some tasks: their rows of the parameters of some groups, or the parameters whole.

    Training moves nothing else for good: :meth:`put` writes back every other row as it was at the start.

    Args:
        tasks: ids. groups: kinds of parameters, as in ``parameter_groups``.
        axes: {parameter: axis whose index is the task's id}; None: the axes of tasks. A parameter of
            ``groups`` without an axis belongs to no task.
        whole: all of each parameter belongs to the one task there is.

    Raises:
        ConfigError: ``whole`` with several tasks.
    """

    def __init__(
        self,
        model: TaskMoEModel,
        tasks: Sequence[int],
        groups: Sequence[str],
        axes: Mapping[str, int] | None = None,
        whole: bool = False,
    ) -> None:
        if whole and len(tasks) != 1:
            raise ConfigError(f"{len(tasks)} tasks cannot each own all experts; adapt them one by one")
        axes = task_dims(model) if axes is None else axes
        self.tasks = list(tasks)
        model.set_trainable(groups)  # what is frozen for good stays so
        kept = model.trainable_groups()
        self.groups = {g: [(n, p) for n, p in kept[g] if whole or n in axes] for g in groups}
        self.parameters = {n: p for ps in self.groups.values() for n, p in ps}
        self.axes = {n: None if whole else axes[n] for n in self.parameters}
        self.before = {n: p.detach().clone() for n, p in self.parameters.items()}
        model.set_trainable(())

    def train(self) -> None:
        """These parameters and no others take gradients."""
        for p in self.parameters.values():
            p.requires_grad_(True)

    def count(self) -> int:
        """How many numbers belong to one task."""
        return sum(part.numel() for part in self._parts(self.parameters, self.tasks[0]).values())

    def take(self, task: int) -> dict[str, Tensor]:
        """{parameter: a copy of what belongs to the task}."""
        return {n: part.detach().clone() for n, part in self._parts(self.parameters, task).items()}

    @torch.no_grad()
    def put(self, values: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Write ``{task: what :meth:`take` gave}``; everything else is as it was at the start."""
        for name, p in self.parameters.items():
            p.copy_(self.before[name])
        for task, of_task in values.items():
            for name, part in self._parts(self.parameters, task).items():
                part.copy_(of_task[name])

    def _parts(self, parameters: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
        own = {n: (p.detach(), self.axes[n]) for n, p in parameters.items()}
        return {n: p if axis is None else p.select(axis, task) for n, (p, axis) in own.items()}
