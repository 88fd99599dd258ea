"""AdapterFusion: adapters that were trained one a task, then attention of each token over what they give.

Legend: M rows, N width of the block's output, E experts, r bottleneck of one expert, s = r + 1, T tasks of
the table, Tb tasks in the batch, G 1 or Tb.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.grouped_linear import grouped_linear
from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand, shrink
from taskmoe.moe.banks.adapter import (
    WHERE,
    AdapterBank,
    BehindBlocks,
    BlockOptions,
    Blocks,
    adapter_banks,
)
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context
from taskmoe.moe.sub_blocks import BlockOutput
from taskmoe.moe.tasks import TaskTable

INIT_STD = 0.02  # of query and key
OFF_DIAGONAL = 1e-6  # of value, beside ones


def identity_penalty(value_GNN: Tensor) -> Tensor:
    """||I - Wv||^2 (squared Frobenius norm), the mean over G matrices: a scalar.

    Pfeiffer et al. 2021 (arXiv 2005.00247) add 0.01 of it for each layer, so that what an adapter gives
    passes nearly unchanged.
    """
    identity = torch.eye(value_GNN.shape[-1], dtype=value_GNN.dtype, device=value_GNN.device)
    return (value_GNN - identity).square().sum((-1, -2)).mean()


class FusionAttention(Bank):
    """Attention over the outputs of E adapters (AdapterFusion, Pfeiffer et al. 2021, arXiv 2005.00247).

    y + sum_e p_e Wv z_e, p = softmax_e((Wq y)' (Wk z_e) / temperature), z_e the output of adapter e without
    its own residual, y the block's output.

    As (Wq y)' Wk z_e = (Wk' Wq y)' z_e, and z_e is linear in the hidden units h_e of the adapter, everything
    is done on rows [M, N] and in rank space: no z_e is ever built, and three products of N x N serve any
    number of adapters.

    query_NN, key_NN: [N, N], N(0, 0.02); value_NN: [N, N], the identity plus 1e-6 elsewhere. All float32.
    """

    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True
    weighs_all: ClassVar[bool] = True

    def __init__(self, width: int, dropout: float, num_experts: int) -> None:
        super().__init__()
        self.num_gates = num_experts
        self.query_NN = nn.Parameter(torch.randn(width, width) * INIT_STD)
        self.key_NN = nn.Parameter(torch.randn(width, width) * INIT_STD)
        self.value_NN = nn.Parameter(_nearly_identity(width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, y_MN: Tensor, h_MR: Tensor, up_GEsN: Tensor, context: Context, plan: Plan) -> Tensor:
        """y_MN: [M, N]; h_MR: [M, E * s], hidden units with a one after each adapter's -> [M, N] like y.

        up_GEsN: the adapters' second halves, the last row of each its bias.
        """
        E, s = up_GEsN.shape[1:3]
        query_GNN, key_GNN, value_GNN = self.weights(context)
        ones_TE = h_MR.new_ones(plan.num_tasks, E)
        if context.uniform:
            p_ME = h_MR.new_full((len(h_MR), E), 1 / E)
        else:
            q_MN = _linear(y_MN, query_GNN, plan)
            u_MN = _linear(q_MN, key_GNN.transpose(1, 2), plan)
            keys_MR = shrink(u_MN, [up_GEsN], [None], plan)[0]
            scores_ME = (keys_MR * h_MR).unflatten(1, (E, s)).sum(2)
            p_ME = torch.softmax(scores_ME / context.temperature, dim=1)
            context.record(self, p_ME, None, plan)
            p_ME = self.dropout(p_ME)
        mixed_MR = (h_MR.unflatten(1, (E, s)) * p_ME.unsqueeze(2)).flatten(1)
        z_MN = expand(mixed_MR, None, up_GEsN, ones_TE, None, 1.0, plan, y_MN.dtype)
        return y_MN + _linear(z_MN, value_GNN, plan).to(y_MN.dtype)

    def weights(self, context: Context) -> tuple[Tensor, ...]:
        """Query, key and value as [G, N, N]."""
        return context.factors(self.query_NN, self.key_NN, self.value_NN)


class TaskFusionAttention(Bank):
    """:class:`FusionAttention` with matrices of its own for each task, as in the paper's second stage.

    query_TNN, key_TNN, value_TNN: [T, N, N] float32.
    """

    kind: ClassVar[str] = "router"
    splits: ClassVar[bool] = True  # nothing is shared: a task's matrices get that task's gradient alone
    weighs_all: ClassVar[bool] = True
    task_dims: ClassVar[dict[str, int]] = {"query_TNN": 0, "key_TNN": 0, "value_TNN": 0}

    def __init__(self, width: int, dropout: float, num_experts: int, num_tasks: int) -> None:
        super().__init__()
        self.num_gates = num_experts
        self.query_TNN = nn.Parameter(torch.randn(num_tasks, width, width) * INIT_STD)
        self.key_TNN = nn.Parameter(torch.randn(num_tasks, width, width) * INIT_STD)
        self.value_TNN = nn.Parameter(_nearly_identity(width).repeat(num_tasks, 1, 1))
        self.dropout = nn.Dropout(dropout)

    forward = FusionAttention.forward

    def weights(self, context: Context) -> tuple[Tensor, ...]:
        """Query, key and value of the tasks in the batch, [Tb, N, N]."""
        tasks = context.task_ids(self.query_TNN.device)
        return tuple(p.index_select(0, tasks) for p in (self.query_TNN, self.key_TNN, self.value_TNN))


class FusedAdapters(nn.Module):
    """Adapters behind one block and the attention that fuses them.

    While adapters train and the attention does not (the first phase), the adapters work alone under their
    task's gates; in every other state the attention fuses all of them, whatever the gates.
    """

    def __init__(self, adapters: AdapterBank, attention: FusionAttention | TaskFusionAttention) -> None:
        super().__init__()
        self.adapters, self.attention = adapters, attention

    def forward(self, y_MN: Tensor, context: Context, plan: Plan) -> Tensor:
        """y_MN: [M, N] floating -> [M, N] in its dtype."""
        return self.adapters(y_MN, context, plan, None if self.alone() else self.attention)

    def alone(self) -> bool:
        """Whether the adapters work without attention."""
        trains = [any(p.requires_grad for p in m.parameters()) for m in (self.adapters, self.attention)]
        return trains == [True, False]


class Fusion(BehindBlocks):
    """The kind ``fusion``: phase 1 trains ``experts`` (one adapter a task: ``router: fixed_map``), phase 2
    ``router`` (the attention). ``router_temperature`` divides the attention's scores."""

    uses: ClassVar[tuple[str, ...]] = (
        "r", "num_experts", "router_temperature", "router_scope", "new_task_rows", *WHERE,
    )  # fmt: skip
    levels: ClassVar[tuple[str, ...]] = ("task",)
    routes: ClassVar[bool] = True  # the attention is of the group router

    @dataclass(frozen=True)
    class Options(BlockOptions):
        """What a bank of this kind can be told."""

        behind: str = "ffn"  # which blocks: both | attention | ffn
        per_task: bool = False  # an attention for each task instead of one for all
        dropout: float = 0.0  # of the attention's weights

        def __post_init__(self) -> None:
            super().__post_init__()
            if not 0 <= self.dropout < 1:
                raise ConfigError(f"moe.bank_options.dropout: {self.dropout} must be in [0, 1)")

    @staticmethod
    def idle(options: Options) -> dict[str, str]:
        """See ``moe/choices.py``."""
        return {} if options.per_task else {"new_task_rows": "per_task is false: one attention for all"}

    @classmethod
    def build(
        cls, model: nn.Module, config: TaskMoEConfig, table: TaskTable, options: Any, blocks: Blocks
    ) -> tuple[dict[str, nn.Module], list[str]]:
        """See :class:`taskmoe.moe.banks.adapter.BehindBlocks`."""
        banks, groups = adapter_banks(config, options, blocks)
        replaced: dict[str, nn.Module] = {}
        for name, bank in banks.items():
            attention: FusionAttention | TaskFusionAttention
            width = blocks[name].width
            if options.per_task:
                attention = TaskFusionAttention(width, options.dropout, config.num_experts, len(table))
            else:
                attention = FusionAttention(width, options.dropout, config.num_experts)
            replaced[name] = BlockOutput(blocks[name].linear, FusedAdapters(bank, attention), name)
        return replaced, groups


def _linear(x_MK: Tensor, weight_GNK: Tensor, plan: Plan) -> Tensor:
    """One linear layer for all rows, or one for the rows of each task; computed in the dtype of the rows."""
    weight_GNK = weight_GNK.to(x_MK.dtype)
    if len(weight_GNK) == 1:
        return nn.functional.linear(x_MK, weight_GNK[0])
    return grouped_linear(x_MK, weight_GNK, None, range(len(weight_GNK)), plan)


def _nearly_identity(width: int) -> Tensor:
    return torch.full((width, width), OFF_DIAGONAL).fill_diagonal_(1.0)
