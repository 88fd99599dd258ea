"""Balance of the experts over a window of tasks.

Legend: S routing groups, Tb tasks of the step, H heads, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.regularisers.base import OfRouting, Routed
from taskmoe.moe.tasks import TaskTable


class WindowBalance(OfRouting):
    """E sum_e f_e P_e, the mean over groups and heads (Switch Transformers, Fedus et al. 2022, arXiv
    2101.03961).

    P_e: mean share of expert e over the tasks of the step. f_e (no gradient): mean over all tasks seen so far
    of the running mean of each task's gates, normalised to sum to one. Least, 1, where f is level.

    f is not taken over the batch, as it is for tokens: a batch may hold one task, or a few, and a task may
    well need one expert alone. Balanced batches would mean that every task uses every expert. Over the window
    each task counts once, and as long as the experts are used alike by the tasks together the gradient is
    zero, however few tasks a batch holds.
    """

    @dataclass(frozen=True)
    class Options:
        decay: float = 0.9  # of a task's running mean of gates, once a step that holds the task

    def __init__(self, options: Options, config: TaskMoEConfig, tasks: TaskTable) -> None:
        super().__init__(options, config, tasks)
        if not 0 <= options.decay < 1:
            key = "moe.regularisers.window_balance.decay"
            raise ConfigError(f"{key}: {options.decay} must be at least 0 and below 1")
        self._seen: dict[int, Tensor] = {}  # task id: [S, H, E]

    def value(self, routed: Routed) -> Tensor:
        """See :class:`Regulariser`; remembers the gates of the step's tasks."""
        for i, task in enumerate(routed.tasks):
            now = routed.gates_STHE[:, i].detach()
            before = self._seen.get(task)
            if before is not None:
                before = before.to(now)
                now = self.options.decay * before + (1 - self.options.decay) * now
            self._seen[task] = now.clone()
        load_SHE = torch.stack([g.to(routed.logits_STHE) for g in self._seen.values()]).mean(0)
        load_SHE = load_SHE / load_SHE.sum(-1, keepdim=True)
        return load_SHE.shape[-1] * (load_SHE * routed.shares_STHE.mean(1)).sum(-1).mean()

    def state(self) -> dict[int, Tensor]:
        return {task: gates.cpu() for task, gates in self._seen.items()}

    def load_state(self, state: Mapping[int, Any]) -> None:
        self._seen = {int(task): gates for task, gates in state.items()}
