"""Prompts as a kind of experts: where they go, how long they are and where they start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from taskmoe.moe.banks.base import Placement
from taskmoe.moe.banks.prompt.entry import NAME, Prompts
from taskmoe.moe.banks.prompt.layers import LayerPrompts, attentions, geometry
from taskmoe.moe.banks.prompt.per_task import PLACES, VECTORS, PromptOptions
from taskmoe.moe.banks.prompt.site import Site, find_site
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.context import Context, use
from taskmoe.moe.options import options_of
from taskmoe.moe.routers.kinds import ROUTERS
from taskmoe.moe.tasks import TaskTable

ENTRIES = dict(zip(PLACES, (Prompts, LayerPrompts), strict=True))
LAYER_STD = 0.02  # there is no token to start a key or a value from


class PromptKind:
    """A kind whose experts are prompts: ``bank(config, options, number of tasks, starts)``."""

    packs = False  # a row of several sequences has no one place for a prompt

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self.uses: tuple[str, ...] = bank.uses
        self.levels: tuple[str, ...] = bank.levels
        self.shares: bool = getattr(bank, "shares", True)
        self.Options = bank.Options

    def check(self, config: TaskMoEConfig, options: PromptOptions) -> None:
        """Raises ConfigError for a routing that is not one for the whole model; see :class:`BankKind`."""
        if not self.levels:
            return
        if config.num_heads > 1:
            raise ConfigError(
                f"moe.num_heads: {config.num_heads} with prompts; they are mixed whole, so leave it at 1"
            )
        if config.router_scope != TaskMoEConfig.router_scope:
            raise ConfigError(
                f"moe.router_scope: {config.router_scope!r} with prompts; a bank of prompts has one routing, "
                "so leave it out"
            )
        if getattr(ROUTERS[config.router], "over_groups", False):
            raise ConfigError(
                f"moe.router: {config.router!r} goes over several routing groups, and a bank of prompts has "
                "one; use another router"
            )

    def place(
        self,
        model: nn.Module,
        config: TaskMoEConfig,
        table: TaskTable,
        *,
        example_inputs: Mapping[str, Any] | None = None,
        dry_run: bool = True,
    ) -> Placement:
        """See :class:`taskmoe.moe.banks.base.BankKind`; one routing group, if the bank takes gates.

        Raises:
            ConfigError: options that cannot be used, a model that prompts cannot enter.
        """
        options = options_of("bank", config, self)
        site = find_site(model)
        owners = [getattr(hook, "__self__", None) for hook in site.body._forward_pre_hooks.values()]
        if any(isinstance(owner, Prompts) for owner in owners):
            raise ConfigError(
                f"this {type(model).__name__} carries prompts already; attach once, to a fresh model"
            )
        if options.where == "layers":
            attentions(site)
        longest = getattr(site.body.config, "max_position_embeddings", None)
        if longest is not None and options.length >= longest:
            raise ConfigError(
                f"moe.bank_options.length: {options.length} leaves no position of {longest} for the text; "
                "make it shorter"
            )
        return Placement({}, [NAME] if self.levels else [], [])

    def prepare(self, attached: Any) -> None:
        """Build the prompts, as ``attached.prompts``, and let them in.

        The model's config then describes them without the adapter from which they started.
        """
        config, site = attached.moe_config, find_site(attached.base_model)
        options = options_of("bank", config, self)

        def starts(count: int) -> Tensor:
            return _starts(site, options, count)

        bank = self.bank(config, options, len(attached.tasks), starts)
        device = next(site.body.get_input_embeddings().parameters()).device  # type: ignore[operator]
        attached.add_module(NAME, ENTRIES[options.where](bank.to(device), options.length, site))
        given = config.bank_options or {}
        kept = {name: value for name, value in given.items() if not name.startswith(VECTORS)}
        if kept != given:
            attached.moe_config = replace(config, bank_options=kept)


@torch.no_grad()
def _starts(site: Site, options: PromptOptions, count: int) -> Tensor:
    """The values at the start of ``count`` prompts: [count, l, W] float32 on the CPU."""
    std = options.start_std
    if options.where == "layers":
        layers, heads, size = geometry(site)
        std = LAYER_STD if std is None else std
        return torch.randn(count, options.length, layers * 2 * heads * size) * std
    embedding: Any = site.body.get_input_embeddings()  # type: ignore[operator]
    ids = torch.randint(embedding.num_embeddings, (count, options.length))
    device = next(embedding.parameters()).device
    with use(Context([0], enabled=False)):  # it may be one that trains, beside its original
        values = embedding(ids.to(device)).float().cpu()
    return values if std is None else torch.randn(values.shape) * std
