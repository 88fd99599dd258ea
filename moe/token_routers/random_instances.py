"""Routes drawn anew for each sequence: a control for learned routes.

Legend: B sequences, M rows (B times as many each), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taskmoe.kernels.plan import Plan
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context, RowSpaceError
from taskmoe.moe.options import options_of
from taskmoe.moe.tasks import TaskTable


class RandomInstanceRouter(Bank):
    """Each sequence uses ``experts`` of the E in a layer, drawn in every forward pass, all alike: in
    evaluation too, where a sequence is generated token by token with other experts each time (a control of
    Ye, Zha, Ren 2022). No parameters. The gate is ``raw``.
    """

    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True
    gates: ClassVar[tuple[str, ...]] = ("raw",)
    trains: ClassVar[bool] = False
    packs: ClassVar[bool] = False

    @dataclass(frozen=True)
    class Options:
        """The draw."""

        experts: int = 1  # how many of them a sequence uses

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError for more experts than a layer has."""
        least = min(config.expert_counts())
        if not 1 <= options.experts <= least:
            raise ConfigError(
                f"moe.router_options.experts: {options.experts} must be between 1 and num_experts = {least}"
            )

    def __init__(self, config: TaskMoEConfig, d_in: int, tasks: TaskTable, dim: int = 0) -> None:
        super().__init__()
        self.chosen = options_of("router", config, RandomInstanceRouter).experts
        self.experts = config.num_experts

    def forward(self, x_MK: Tensor, context: Context, plan: Plan) -> Tensor:
        """x_MK: [M, K] floating -> gates [M, E], equal over the rows of a sequence.

        Raises:
            RowSpaceError: packed rows, where a row of the batch is several sequences.
        """
        if context.packed:
            raise RowSpaceError("router random_instances draws for each sequence; set data.packing to false")
        # From torch's own generator: activation checkpointing puts it back before it runs a layer again.
        draws_BE = torch.rand(context.num_sequences, self.experts, device=x_MK.device)
        chosen = draws_BE.topk(self.chosen).indices
        gates_BE = x_MK.new_zeros(draws_BE.shape).scatter_(-1, chosen, 1 / self.chosen)
        return gates_BE.repeat_interleave(plan.rows // context.num_sequences, dim=0)
