"""Bottleneck adapters as experts: E of them behind each attention and feed-forward block, gated by task.

Legend: M rows, N width of the block's output, E experts, r bottleneck of one expert, s = r + 1, T tasks in
the batch, G 1 or T, k slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand, shrink
from taskmoe.moe.banks.base import Bank, Placement
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context
from taskmoe.moe.options import options_of
from taskmoe.moe.parts import by_row
from taskmoe.moe.sub_blocks import BLOCKS, BlockOutput, SubBlock, find_sub_blocks
from taskmoe.moe.targets import routing_group
from taskmoe.moe.tasks import TaskTable

# Rows, hidden units of all adapters, their second halves -> rows.
Fuse = Callable[[Tensor, Tensor, Tensor, Context, Plan], Tensor]
WHERE = ("target_modules", "exclude_modules", "layers_to_transform")  # what find_sub_blocks reads
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "silu": nn.functional.silu,
}

Blocks = Mapping[str, SubBlock]  # {name of the linear that ends a block: the block}


@dataclass(frozen=True)
class BlockOptions:
    """What all adapters behind blocks can be told."""

    behind: str = "both"  # which blocks: both | attention | ffn
    nonlinearity: str = "relu"  # relu | gelu | gelu_tanh | silu

    def __post_init__(self) -> None:
        one_of("behind", self.behind, BLOCKS)
        one_of("nonlinearity", self.nonlinearity, ACTIVATIONS)


def one_of(key: str, value: str, known: Collection[str]) -> None:
    """Raises:
    ConfigError: an option of the bank has a value that is none of the known ones.
    """
    if value not in known:
        raise ConfigError(f"moe.bank_options.{key}: {value!r} is unknown; known are {', '.join(known)}")


def bottleneck(
    y_MN: Tensor,
    down_GErN: Tensor,
    bias_GEr: Tensor,
    slots_Tk: Tensor | None,
    activate: Callable[[Tensor], Tensor],
    plan: Plan,
) -> Tensor:
    """``[M, k * s]``: the hidden units of the k adapters of each row, and a one after those of each adapter.

    What follows may then treat the adapters' second bias as one more row of their second weight.

    Args:
        y_MN: rows in the order of ``plan``, any floating dtype.
        down_GErN, bias_GEr: the first halves, with the task axis of :func:`taskmoe.kernels.split.shrink`.
        slots_Tk: int64 expert ids; None: slot ``j`` is expert ``j``.

    Returns:
        float32, or float64 for float64 rows.
    """
    h_MR = shrink(y_MN, [down_GErN], [slots_Tk], plan)[0]
    if slots_Tk is None:
        bias_TR = bias_GEr.flatten(1)
    elif len(bias_GEr) == 1:
        bias_TR = bias_GEr[0][slots_Tk].flatten(1)
    else:
        bias_TR = bias_GEr[torch.arange(len(bias_GEr), device=slots_Tk.device)[:, None], slots_Tk].flatten(1)
    h_Mkr = activate(h_MR + by_row(bias_TR, plan)).unflatten(1, (-1, bias_GEr.shape[2]))
    return torch.cat([h_Mkr, torch.ones_like(h_Mkr[..., :1])], dim=2).flatten(1)


class AdapterBank(Bank):
    """Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751), gated by task in output space.

    y + sum_j g[t, j] * (U_e(j)^T a(D_e(j) y + c_e(j)) + b_e(j)), y the block's output.

    down_ErN: [E, r, N], uniform in +-1 / sqrt(N); bias_Er: [E, r], zero; up_EsN: [E, r + 1, N], zero, so that
    step 0 is the base model; its last row is b. All float32.
    """

    splits: ClassVar[bool] = True

    def __init__(self, width: int, num_experts: int, r: int, nonlinearity: str, group: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.down_ErN = nn.Parameter(torch.empty(num_experts, r, width).uniform_(-bound, bound))
        self.bias_Er = nn.Parameter(torch.zeros(num_experts, r))
        self.up_EsN = nn.Parameter(torch.zeros(num_experts, r + 1, width))
        self.activate, self.group = ACTIVATIONS[nonlinearity], group

    def forward(self, y_MN: Tensor, context: Context, plan: Plan, fuse: Fuse | None = None) -> Tensor:
        """y_MN: [M, N] floating -> [M, N] in its dtype.

        fuse: what to make of the rows and all adapters instead of the gated sum; it runs in here because
        ZeRO-3 makes parameters whole for the call of their module alone.
        """
        down_GErN, bias_GEr, up_GEsN = context.factors(self.down_ErN, self.bias_Er, self.up_EsN)
        if fuse is not None:
            h_MR = bottleneck(y_MN, down_GErN, bias_GEr, None, self.activate, plan)
            return fuse(y_MN, h_MR, up_GEsN, context, plan)
        gate = context.gates[self.group]
        slots_Tk = None if gate.slots is None else gate.slots.squeeze(1)
        h_MR = bottleneck(y_MN, down_GErN, bias_GEr, slots_Tk, self.activate, plan)
        return expand(h_MR, y_MN, up_GEsN, gate.values.squeeze(1), slots_Tk, 1.0, plan)

    def extra_repr(self) -> str:
        e, r, n = self.down_ErN.shape
        return f"num_experts={e}, r={r}, width={n}"


class BehindBlocks:
    """A kind whose experts stand behind blocks: ``build(model, config, table, options, blocks)`` gives what
    takes the place of each block's last linear, and the routing groups."""

    @classmethod
    def place(
        cls,
        model: nn.Module,
        config: TaskMoEConfig,
        table: TaskTable,
        *,
        example_inputs: Mapping[str, Any] | None = None,
        dry_run: bool = True,
    ) -> Placement:
        """See :class:`taskmoe.moe.banks.base.BankKind` and :func:`taskmoe.moe.sub_blocks.find_sub_blocks`.

        Raises:
            ConfigError: an unknown option or value; no block is found.
            RowSpaceError: a block whose rows cannot be assigned to tasks, by name.
        """
        options = options_of("bank", config, cls)
        blocks, not_run = find_sub_blocks(
            model, config, options.behind, example_inputs=example_inputs, dry_run=dry_run
        )
        replaced, groups = cls.build(model, config, table, options, blocks)
        return Placement(replaced, groups, not_run)

    @classmethod
    def build(
        cls, model: nn.Module, config: TaskMoEConfig, table: TaskTable, options: Any, blocks: Blocks
    ) -> tuple[dict[str, nn.Module], list[str]]:
        """{name of a linear: what takes its place}, names of the routing groups."""
        raise NotImplementedError


def adapter_banks(
    config: TaskMoEConfig, options: BlockOptions, blocks: Blocks
) -> tuple[dict[str, AdapterBank], list[str]]:
    """A bank of adapters for each block, and the names of the routing groups."""
    groups = list(dict.fromkeys(routing_group(n, config.router_scope) for n in blocks))
    banks = {}
    for name, block in blocks.items():
        group = groups.index(routing_group(name, config.router_scope))
        banks[name] = AdapterBank(block.width, config.num_experts, config.r, options.nonlinearity, group)
    return banks, groups


class Adapters(BehindBlocks):
    """The kind ``adapter``. Under a fixed map and ``num_experts`` = tasks: independent adapters."""

    uses: ClassVar[tuple[str, ...]] = ("r", "num_experts", "router_scope", *WHERE)
    levels: ClassVar[tuple[str, ...]] = ("task",)

    Options = BlockOptions

    @classmethod
    def build(
        cls, model: nn.Module, config: TaskMoEConfig, table: TaskTable, options: Any, blocks: Blocks
    ) -> tuple[dict[str, nn.Module], list[str]]:
        """See :class:`BehindBlocks`."""
        banks, groups = adapter_banks(config, options, blocks)
        return {n: BlockOutput(blocks[n].linear, bank, n) for n, bank in banks.items()}, groups
