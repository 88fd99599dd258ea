"""The kind ``module``: experts that are copies of a layer, of its attention, or of its FFN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from taskmoe.moe.banks.base import Placement
from taskmoe.moe.banks.module.experts import Deferred, LayerExperts, ModuleExperts, PairExperts
from taskmoe.moe.banks.module.stack import ModuleStack
from taskmoe.moe.banks.module.targets import PAIR, Pair, attends, find_modules
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.dry_run import executed_targets
from taskmoe.moe.options import options_of
from taskmoe.moe.targets import features, routing_group
from taskmoe.moe.tasks import TaskTable
from taskmoe.moe.token_routers.kinds import TOKEN_ROUTERS
from taskmoe.moe.token_routing import TokenRouting


class Module:
    """Copies of modules: layers (Ye, Zha, Ren 2022), FFNs by token (Gupta et al. 2022; JiuZhang 2.0, Zhao et
    al. 2023), attention or FFNs by a fixed map (SciMult, Zhang et al. 2023)."""

    uses: ClassVar[tuple[str, ...]] = ("num_experts",)
    levels: ClassVar[tuple[str, ...]] = ("task", "token")

    @dataclass(frozen=True)
    class Options:
        """Which modules, and how their copies start."""

        of: str = "layer"  # layer | attention | ffn, or a module's name, its end, or a regex on it
        first: int = 0  # number of the first layer of each stack that gets experts
        every: int = 1  # then every so many layers
        noise: float = 0.0  # standard deviation of what is added to each copy (Ye et al.: 1e-8)

        def __post_init__(self) -> None:
            for key, least in (("first", 0), ("every", 1), ("noise", 0)):
                value = getattr(self, key)
                if not value >= least:
                    raise ConfigError(f"moe.bank_options.{key}: {value} must be at least {least}")

    @staticmethod
    def check(config: TaskMoEConfig, options: Options) -> None:
        """Raises ConfigError for blocks of features, or tokens routed where they see each other."""
        if config.num_heads != 1:
            raise ConfigError(
                f"moe.num_heads: {config.num_heads} needs bank: low_rank; a module has no blocks"
            )
        if config.router in TOKEN_ROUTERS and options.of in ("layer", "attention"):
            raise _sees(options.of, f"each {options.of} of the model", config)

    @staticmethod
    def place(
        model: nn.Module,
        config: TaskMoEConfig,
        table: TaskTable,
        *,
        example_inputs: Mapping[str, Any] | None = None,
        dry_run: bool = True,
    ) -> Placement:
        """See :class:`taskmoe.moe.banks.base.BankKind`.

        Raises:
            ConfigError: no such modules (with the closest names); options that do not fit the model.
            RowSpaceError: a module whose rows cannot be assigned to sequences, by name.
        """
        options = options_of("bank", config, Module)
        found = find_modules(model, options.of, options.first, options.every)
        _check_saved(config, found)
        for name, module in found.items():
            if config.router in TOKEN_ROUTERS and attends(name, module):
                raise _sees(options.of, name, config)
            fixed = next((n for n, p in module.named_parameters() if not p.is_floating_point()), None)
            if fixed is not None:
                raise ConfigError(
                    f"moe.bank: {name}.{fixed} is quantised and cannot be copied into experts that train; "
                    "load the model without quantisation, or use bank: low_rank"
                )
        not_run: list[str] = []
        if dry_run:
            seen = {n: m.output if isinstance(m, Pair) else m for n, m in found.items()}
            executed, _ = executed_targets(model, seen, example_inputs)
            not_run = [n for n in found if n not in executed]
            found = {n: m for n, m in found.items() if n in executed}
            if not found:
                raise ConfigError(
                    f"moe.bank_options.of: a forward pass runs none of {', '.join(not_run[:4])}"
                )
        groups = list(dict.fromkeys(routing_group(n, config.router_scope) for n in found))
        numbers = [getattr(m, "layer_idx", None) for m in model.modules()]
        stride = 1 + max((i for i in numbers if isinstance(i, int)), default=0)
        replaced: dict[str, nn.Module] = {}
        for name, module in found.items():
            stack = ModuleStack(module, config.num_experts, options.noise, stride)
            routing = _token_routing(module, config, table, name) if config.router in TOKEN_ROUTERS else None
            group = groups.index(routing_group(name, config.router_scope))
            if isinstance(module, Pair):
                first = f"{name.rpartition('.')[0]}.{PAIR[0]}"
                replaced[first] = Deferred(module.intermediate, first)
            replaced[name] = _class_for(module)(module, stack, name, group, routing)
        return Placement(replaced, groups, not_run)


def _class_for(module: nn.Module) -> type[ModuleExperts]:
    if isinstance(module, Pair):
        return PairExperts
    return LayerExperts if isinstance(module, GradientCheckpointingLayer) else ModuleExperts


def _sees(of: str, name: str, config: TaskMoEConfig) -> ConfigError:
    return ConfigError(
        f"moe.bank_options.of: {of!r} is {name}, where tokens see each other, and router {config.router!r} "
        "routes them one by one; use of: ffn, or a router by task"
    )


def _check_saved(config: TaskMoEConfig, found: Mapping[str, nn.Module]) -> None:
    for saved in config.modules_to_save or ():
        for name, module in found.items():
            inside = [f"{name}.{n}" if n else name for n, _ in module.named_modules()]
            if any(n == saved or n.endswith("." + saved) for n in inside):
                raise ConfigError(
                    f"moe.modules_to_save: {saved!r} lies inside {name}, whose copies train as experts; "
                    "leave it out"
                )


def _token_routing(module: nn.Module, config: TaskMoEConfig, table: TaskTable, name: str) -> nn.Module:
    """A router for the rows that ``module`` reads; how wide they are is what its first linear takes."""
    d_in, _ = next(f for m in module.modules() if (f := features(m)) is not None)
    return TokenRouting(config, d_in, table, name).to(next(module.parameters()).device)
