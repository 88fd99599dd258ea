"""Representation, router and gate of all routing groups: the ids of a batch's tasks -> gates.

Legend: S routing groups, Tb tasks in this batch, H heads, E experts, k slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taskmoe.moe.choices import choices_in_use
from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.gates import GATES
from taskmoe.moe.options import options_of
from taskmoe.moe.routers.kinds import ROUTERS
from taskmoe.moe.tasks import TaskTable


class Routing(nn.Module):
    """Task ids [Tb] -> gates [S, Tb, H, k] and slots (or None).

    ``temperature``, ``seed`` and ``step`` are set as training goes. ``router`` is None where the layers route
    tokens themselves, and where no experts take gates. ``representation`` serves what reads the tasks'
    vectors: routers, or a bank without gates.
    """

    def __init__(self, config: TaskMoEConfig, groups: Sequence[str], tasks: TaskTable) -> None:
        super().__init__()
        chosen = choices_in_use(config)
        self.groups, self.gate, self.top_k = list(groups), GATES[config.gate], config.top_k
        self.gate_options = options_of("gate", config, self.gate)
        self.temperature, self.seed, self.step = config.router_temperature, 0, 0
        self.shape = (len(groups), config.num_heads, config.num_experts)
        self.representation: nn.Module | None = None
        self.router: nn.Module | None = None
        if "representation" in chosen and (groups or "router" not in chosen):
            self.representation = chosen["representation"](config, tasks)
        if groups and config.router in ROUTERS:
            dim = 0 if self.representation is None else int(self.representation.dim)  # type: ignore[arg-type]
            self.router = chosen["router"](config, self.groups, tasks, dim)

    def forward(self, tasks: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tasks: [Tb] int64; noise: of :meth:`noise`, for the same tasks."""
        return self.gate(self.logits(tasks), self.temperature, self.top_k, noise, self.gate_options)

    def logits(self, tasks: Tensor) -> Tensor:
        """tasks: [Tb] int64 -> [S, Tb, H, E]."""
        assert self.router is not None
        vectors = None if self.representation is None else self.representation(tasks)
        return self.router(tasks, vectors)

    def noise(self, tasks: Sequence[int]) -> Tensor | None:
        """Draws from (0, 1) of each task, [S, Tb, H, E] float32 on the CPU; None where the gate takes none.

        They depend on (seed, step, task) alone: in a step a task has one route, in every micro-batch, on
        every rank, and when surgery runs the routers once more.
        """
        if not (self.gate.noisy and self.training) or self.router is None:
            return None
        draws = []
        for task in tasks:
            generator = torch.Generator().manual_seed(_mixed(self.seed, self.step, task))
            draws.append(torch.rand(self.shape, generator=generator))
        tiny = torch.finfo(torch.float32).eps / 2
        return torch.stack(draws, dim=1).clamp(tiny, 1 - tiny)


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, the same everywhere."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % 2**63
    return mixed
