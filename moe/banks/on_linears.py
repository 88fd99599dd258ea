"""Banks that lie beside linear layers: which linears, and what each gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn

from taskmoe.moe.banks.base import Placement
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.dry_run import executed_targets
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.siblings import family
from taskmoe.moe.targets import (
    check_patterns,
    experts_of,
    features,
    find_targets,
    rank_of,
    routing_group,
    saved_modules,
)
from taskmoe.moe.tasks import TaskTable
from taskmoe.moe.token_routers.kinds import TOKEN_ROUTERS
from taskmoe.moe.token_routing import TokenRouting

TARGETS = (
    "target_modules", "exclude_modules", "layers_to_transform", "rank_pattern", "expert_pattern",
)  # fmt: skip


class OnLinears:
    """A kind whose experts lie beside linears: ``bank(config, d_in, d_out, r, tasks)`` for each of them."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank
        self.uses: tuple[str, ...] = (*bank.uses, *TARGETS)
        self.levels: tuple[str, ...] = bank.levels
        self.by_expert: tuple[str, ...] = bank.by_expert
        if hasattr(bank, "Options"):
            self.Options = bank.Options

    def check(self, config: TaskMoEConfig, options: Any) -> None:
        """See :class:`taskmoe.moe.banks.base.BankKind`; then what the bank itself refuses.

        Raises:
            ConfigError: numbers of experts or ``compose`` that do not go with the router; as ``bank.check``.
        """
        by_token = bool(self.levels) and config.router in TOKEN_ROUTERS
        if config.expert_pattern and not by_token:
            raise ConfigError(
                f"moe.expert_pattern: router {config.router!r} gives all layers as many gates; use a router "
                "of tokens, or leave it out"
            )
        for name, E in (config.expert_pattern or {}).items():
            if config.top_k is not None and config.top_k > E:
                raise ConfigError(
                    f"moe.expert_pattern: {E} experts of {name!r} are fewer than top_k {config.top_k}"
                )
        if by_token and "compose" in self.uses and config.compose != "after":
            raise ConfigError(
                f"moe.compose: {config.compose!r} averages parameters, which router {config.router!r} would "
                "do for every token; use compose: after"
            )
        if hasattr(self.bank, "check"):
            self.bank.check(config, options)

    def place(
        self,
        model: nn.Module,
        config: TaskMoEConfig,
        table: TaskTable,
        *,
        example_inputs: Mapping[str, Any] | None = None,
        dry_run: bool = True,
    ) -> Placement:
        """See :class:`taskmoe.moe.banks.base.BankKind`.

        Raises:
            ConfigError: a pattern that matches nothing (with the closest names); sizes that do not fit.
            RowSpaceError: a target whose rows cannot be assigned to tasks, by name.
        """
        targets = find_targets(model, config, saved_modules(model, config))
        check_patterns(list(targets), config)
        not_run: list[str] = []
        siblings: list[list[str]] = []
        if dry_run:
            executed, siblings = executed_targets(model, targets, example_inputs)
            not_run = [n for n in targets if n not in executed]
            targets = {n: m for n, m in targets.items() if n in executed}
            if not targets:
                raise ConfigError(f"moe.target_modules: a forward pass runs none of {', '.join(not_run[:4])}")
        named = {n: routing_group(n, config.router_scope) if self.levels else "" for n in targets}
        groups = list(dict.fromkeys(named.values()))
        linears = {
            n: self._linear(n, m, config, groups.index(named[n]) if self.levels else -1, table)
            for n, m in targets.items()
        }
        for names in siblings:
            together = family([linears[n] for n in names])
            for name in names:
                linears[name].siblings = together
        return Placement({**linears}, groups if self.levels else [], not_run)

    def _linear(
        self, name: str, linear: nn.Module, config: TaskMoEConfig, group: int, table: TaskTable
    ) -> MoELinear:
        shape = features(linear)
        assert shape is not None
        d_in, d_out = shape
        if d_in % config.num_heads or d_out % config.num_heads:
            raise ConfigError(
                f"moe.num_heads: {config.num_heads} does not divide {d_in} x {d_out} of {name}; choose a "
                "divisor"
            )
        if config.expert_pattern:
            config = replace(config, num_experts=experts_of(name, config))
        device = next(chain(linear.parameters(), linear.buffers())).device
        bank = self.bank(config, d_in, d_out, rank_of(name, config), table)
        routing = None
        if self.levels and config.router in TOKEN_ROUTERS:
            routing = TokenRouting(config, d_in, table, name).to(device)
        return MoELinear(linear, bank.to(device), name, group, routing)
