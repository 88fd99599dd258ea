"""Where a transformer's attention and feed-forward blocks end: the linears before the residual sum."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import current
from taskmoe.moe.dry_run import executed_targets
from taskmoe.moe.targets import features, find_targets, routing_group

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
BLOCKS = ("both", "attention", "ffn")


class SubBlock(NamedTuple):
    """The linear that ends a block. layer: name of the layer it is in; position: its place among the chosen
    blocks of that layer, from 0; width: of its output."""

    linear: nn.Module
    layer: str
    position: int
    width: int


def find_sub_blocks(
    model: nn.Module,
    config: TaskMoEConfig,
    behind: str,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    dry_run: bool = True,
) -> tuple[dict[str, SubBlock], list[str]]:
    """{name of a linear: block} in the order of the model, and the names that a forward pass never runs.

    Of each layer (a module with a number in its name), the last linear of an attention module ends that one,
    and the last of all others ends the feed-forward block, provided it is as wide as what the layer reads.
    What follows inside the block before the residual sum (dropout, a norm) comes after it. With
    ``target_modules`` the linears are those that it selects.

    Args:
        behind: ``both`` kinds of block, ``attention`` or ``ffn``.
        example_inputs, dry_run: as in :func:`taskmoe.moe.attach`.

    Raises:
        ConfigError: no block is found or left, or patterns that match nothing.
        RowSpaceError: a block whose rows cannot be assigned to tasks, by name.
    """
    pattern = config.target_modules
    if isinstance(pattern, str) and pattern.lower() == "all-linear":
        names = _ends(model)
        if not names:
            raise ConfigError(
                f"moe.bank: {config.bank!r} finds no attention or feed-forward block in "
                f"{type(model).__name__}; name the linears that end them in moe.target_modules"
            )
        config = replace(config, target_modules=tuple(names))
    targets = find_targets(model, config, config.modules_to_save or ())
    if behind != "both":
        targets = {n: m for n, m in targets.items() if bool(_attention(n)) == (behind == "attention")}
        if not targets:
            raise ConfigError(f"moe.bank_options.behind: {behind!r} leaves no block; use 'both'")
    not_run: list[str] = []
    if dry_run:
        executed, _ = executed_targets(model, targets, example_inputs)
        not_run = [n for n in targets if n not in executed]
        targets = {n: m for n, m in targets.items() if n in executed}
        if not targets:
            raise ConfigError(f"moe.target_modules: a forward pass runs none of {', '.join(not_run[:4])}")
    blocks: dict[str, SubBlock] = {}
    counts: dict[str, int] = {}
    for name, linear in targets.items():
        layer, shape = routing_group(name, "layer"), features(linear)
        assert shape is not None
        blocks[name] = SubBlock(linear, layer, counts.get(layer, 0), shape[1])
        counts[layer] = counts.get(layer, 0) + 1
    return blocks, not_run


def _attention(name: str) -> str | None:
    """The attention module that ``name`` is in, inside its layer."""
    layer = routing_group(name, "layer")
    parts = name[len(layer) :].split(".")
    for i, part in enumerate(parts):
        if ATTENTION.search(part):
            return layer + ".".join(parts[: i + 1])
    return None


def _ends(model: nn.Module) -> list[str]:
    layers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        layer = routing_group(name, "layer")
        if features(module) is not None and any(part.isdigit() for part in layer.split(".")):
            layers.setdefault(layer, []).append(name)
    chosen: set[str] = set()
    for layer, names in layers.items():
        width, last = _shape(model, names[0])[0], dict[str, str]()
        for name in names:
            if _shape(model, name)[1] == width:
                last[_attention(name) or layer] = name
        chosen.update(last.values())
    return [name for names in layers.values() for name in names if name in chosen]


def _shape(model: nn.Module, name: str) -> tuple[int, int]:
    shape = features(model.get_submodule(name))
    assert shape is not None
    return shape


class BlockOutput(nn.Module):
    """A frozen linear that ends a block, and what a bank makes of its output.

    ``bank(y_MN, context, plan)`` takes [M, N] rows and returns as many.
    """

    def __init__(self, base: nn.Module, bank: nn.Module, name: str) -> None:
        super().__init__()
        self.base, self.name = base, name
        self.bank = bank.to(next(chain(base.parameters(), base.buffers())).device)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: [..., K] floating -> [..., N], in the dtype of ``base(x)``."""
        y = self.base(x, *args, **kwargs)
        context = current(self.name)
        if not context.enabled:
            return y
        plan = context.plan(y.shape[:-1], self.name)
        return self.bank(y.reshape(plan.rows, -1), context, plan).view(y.shape)

    # Models look at the weight of their linears (its dtype, its device).
    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base, "bias", None)
