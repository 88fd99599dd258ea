"""HyperFormer: adapters whose weights a network generates from the task, the layer and the place in it.

Legend: M rows, N width of a block's output, r bottleneck, s = r + 1, T tasks of the batch, G 1 or T, D task
vector, I what the generators read, O what one of them gives, V = 2 N, L layers, P places in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from taskmoe.kernels.low_rank import without_autocast
from taskmoe.kernels.plan import Plan
from taskmoe.kernels.split import expand
from taskmoe.moe.banks.adapter import (
    ACTIVATIONS,
    WHERE,
    BehindBlocks,
    BlockOptions,
    Blocks,
    bottleneck,
    one_of,
)
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context
from taskmoe.moe.parts import by_row
from taskmoe.moe.representations.kinds import vector_size
from taskmoe.moe.sub_blocks import BlockOutput, SubBlock
from taskmoe.moe.targets import routing_group
from taskmoe.moe.tasks import TaskTable

if TYPE_CHECKING:
    from taskmoe.moe.model import TaskMoEModel

SHARES = ("model", "stack", "block")
EPSILON = 1e-6  # of the norms


class SharedLinear(Bank):
    """One linear layer for the vectors of all tasks: weight_IO [I, O], bias_O [O], float32."""

    splits: ClassVar[bool] = True

    def __init__(self, d_in: int, d_out: int, std: float | None) -> None:
        """std: of the normal start, 0 for zeros; None: uniform in +-1 / sqrt(I). The bias starts at zero."""
        super().__init__()
        weight = torch.empty(d_in, d_out)
        if std is None:
            weight.uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in))
        else:
            weight.normal_(0.0, std) if std > 0 else weight.zero_()
        self.weight_IO, self.bias_O = nn.Parameter(weight), nn.Parameter(torch.zeros(d_out))

    def forward(self, x_TI: Tensor, context: Context) -> Tensor:
        """x_TI: [T, I] -> [T, O]."""
        weight_GIO, bias_GO = context.factors(self.weight_IO, self.bias_O)
        return (x_TI.unsqueeze(1) @ weight_GIO).squeeze(1) + bias_GO


class Places(Bank):
    """Vectors of the layers and of the places in one: layer_LD [L, D], place_PD [P, D], from N(0, 1)."""

    splits: ClassVar[bool] = True

    def __init__(self, layers: int, places: int, dim: int) -> None:
        super().__init__()
        self.layer_LD = nn.Parameter(torch.randn(layers, dim))
        self.place_PD = nn.Parameter(torch.randn(places, dim))

    def forward(self, layer: int, place: int, context: Context) -> tuple[Tensor, Tensor]:
        """One vector of each, [G, D]."""
        layer_GLD, place_GPD = context.factors(self.layer_LD, self.place_PD)
        return layer_GLD[:, layer], place_GPD[:, place]


class Projector(Bank):
    """I = LN(W2 relu(W1 [task; layer; place])): what the generators read. scale_I, shift_I: of the norm."""

    splits: ClassVar[bool] = True

    def __init__(self, d_in: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.first, self.second = SharedLinear(d_in, hidden, None), SharedLinear(hidden, dim, None)
        self.scale_I, self.shift_I = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, parts: list[Tensor], context: Context) -> Tensor:
        """parts: [T or 1, D] each -> [T, I]."""
        rows = max(len(p) for p in parts)
        x_TD = torch.cat([p.expand(rows, -1) for p in parts], dim=1)
        out_TI = self.second(torch.relu(self.first(x_TD, context)), context)
        scale_GI, shift_GI = context.factors(self.scale_I, self.shift_I)
        return nn.functional.layer_norm(out_TI, out_TI.shape[1:], eps=EPSILON) * scale_GI + shift_GI


class Generators(nn.Module):
    """The linear layers that turn I into an adapter of width N: r * N, r, s * N and, with a norm, V numbers.

    All start from N(0, std); with ``zero`` the last of them, ``norm`` or else ``up``, starts at zero.
    """

    def __init__(self, dim: int, width: int, r: int, norm: bool, std: float, zero: bool) -> None:
        super().__init__()
        self.r = r
        self.down, self.bias = SharedLinear(dim, r * width, std), SharedLinear(dim, r, std)
        self.up = SharedLinear(dim, (r + 1) * width, 0.0 if zero and not norm else std)
        self.norm = SharedLinear(dim, 2 * width, 0.0 if zero else std) if norm else None

    def forward(self, x_TI: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x_TI: [T, I] -> down [T, r, N], bias [T, r], up [T, s, N], norm [T, V] or None."""
        down_TrN = self.down(x_TI, context).unflatten(1, (self.r, -1))
        up_TsN = self.up(x_TI, context).unflatten(1, (self.r + 1, -1))
        norm_TV = None if self.norm is None else self.norm(x_TI, context)
        return down_TrN, self.bias(x_TI, context), up_TsN, norm_TV


class HyperNetwork(nn.Module):
    """All that generates, shared by the adapters of a model: it stands beside the model, once.

    The vectors of the tasks are those of the model's representation (``context.task_vectors()``).
    """

    def __init__(
        self,
        config: TaskMoEConfig,
        options: Generated.Options,
        table: TaskTable,
        blocks: Mapping[str, SubBlock],
    ) -> None:
        super().__init__()
        self.share = options.share
        layers = list(dict.fromkeys(b.layer for b in blocks.values()))
        self.layers = {name: i for i, name in enumerate(layers)}
        places, d = max(b.position for b in blocks.values()) + 1, vector_size(config, table)
        self.places = None if options.share == "block" else Places(len(layers), places, d)
        d_in = d if self.places is None else 3 * d
        self.names = {n: self._name(n, b) for n, b in blocks.items()}
        self.projectors, self.generators = nn.ModuleDict(), nn.ModuleDict()
        zero = options.start == "zero"
        for name, block in blocks.items():
            projector, generator = self.names[name]
            if projector not in self.projectors:
                self.projectors[projector] = Projector(d_in, options.hidden, options.dim)
            if generator not in self.generators:
                self.generators[generator] = Generators(
                    options.dim, block.width, config.r, options.norm, options.init_std, zero
                )

    def _name(self, name: str, block: SubBlock) -> tuple[str, str]:
        """Which projector and which generators serve a block (a name in a ModuleDict has no dot)."""
        if self.share == "block":
            return "all", name.replace(".", "-")
        group = routing_group(name, self.share).replace(".", "-")
        return group, f"{group}-{block.width}"

    def forward(self, name: str, block: SubBlock, context: Context) -> Any:
        """The adapter of a block for each task of the batch, see :class:`Generators`."""
        parts = [context.task_vectors()]
        if self.places is not None:
            parts += self.places(self.layers[block.layer], block.position, context)
        projector, generator = self.names[name]
        return self.generators[generator](self.projectors[projector](parts, context), context)


class GeneratedAdapter(Bank):
    """y + LN(U_t^T a(D_t y + c_t) + b_t), the weights generated for each task of the batch.

    LN (with ``norm``) normalises the rows, then scales and shifts them by generated numbers.
    """

    def __init__(self, hyper: HyperNetwork, name: str, block: SubBlock, nonlinearity: str) -> None:
        super().__init__()
        self.name, self.block = name, block._replace(linear=nn.Identity())
        self.activate = ACTIVATIONS[nonlinearity]
        self.hyper = (hyper,)  # in a tuple: its parameters belong to the model, not to each block

    def forward(self, y_MN: Tensor, context: Context, plan: Plan) -> Tensor:
        """y_MN: [M, N] floating -> [M, N] in its dtype."""
        with without_autocast(y_MN):
            down_TrN, bias_Tr, up_TsN, norm_TV = self.hyper[0](self.name, self.block, context)
        own_T1 = torch.arange(len(down_TrN), device=y_MN.device).unsqueeze(1)
        h_Ms = bottleneck(y_MN, down_TrN[None], bias_Tr[None], own_T1, self.activate, plan)
        ones_T1 = h_Ms.new_ones(own_T1.shape)
        if norm_TV is None:
            return expand(h_Ms, y_MN, up_TsN[None], ones_T1, own_T1, 1.0, plan)
        z_MN = expand(h_Ms, None, up_TsN[None], ones_T1, own_T1, 1.0, plan)
        scale_MN, shift_MN = by_row(norm_TV, plan).chunk(2, dim=1)
        z_MN = nn.functional.layer_norm(z_MN, z_MN.shape[1:], eps=EPSILON) * scale_MN + shift_MN
        return y_MN + z_MN.to(y_MN.dtype)


class Generated(BehindBlocks):
    """The kind ``generated``: HyperFormer++ (Mahabadi et al. 2021, arXiv 2106.04489), and HyperFormer."""

    uses: ClassVar[tuple[str, ...]] = ("representation", "r", *WHERE)
    levels: ClassVar[tuple[str, ...]] = ()

    @dataclass(frozen=True)
    class Options(BlockOptions):
        """What a bank of this kind can be told."""

        nonlinearity: str = "gelu_tanh"  # relu | gelu | gelu_tanh | silu
        share: str = "stack"  # generators for each: model | stack | block (HyperFormer: from the task alone)
        hidden: int = 128  # width of the layer between task, layer, place and what the generators read
        dim: int = 64  # of what the generators read
        norm: bool = True  # a layer norm with generated scale and shift behind the adapter
        start: str = "zero"  # zero: the last generator is zero, so that step 0 is the base | normal (paper)
        init_std: float = 1e-2  # of the generators at the start

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("share", self.share, SHARES)
            one_of("start", self.start, ("zero", "normal"))
            for key in ("dim", "hidden"):
                if getattr(self, key) < 1:
                    raise ConfigError(f"moe.bank_options.{key}: {getattr(self, key)} must be at least 1")
            if not self.init_std > 0:
                raise ConfigError(f"moe.bank_options.init_std: {self.init_std} must be above 0")

    @classmethod
    def build(
        cls, model: nn.Module, config: TaskMoEConfig, table: TaskTable, options: Any, blocks: Blocks
    ) -> tuple[dict[str, nn.Module], list[str]]:
        """See :class:`taskmoe.moe.banks.adapter.BehindBlocks`."""
        hyper = HyperNetwork(config, options, table, blocks)
        hyper.to(next(model.parameters()).device)
        replaced: dict[str, nn.Module] = {
            n: BlockOutput(b.linear, GeneratedAdapter(hyper, n, b, options.nonlinearity), n)
            for n, b in blocks.items()
        }
        return replaced, []

    @staticmethod
    def prepare(attached: TaskMoEModel) -> None:
        """Put the one network that generates beside the model."""
        adapter = next(m for m in attached.modules() if isinstance(m, GeneratedAdapter))
        attached.hyper = adapter.hyper[0]
