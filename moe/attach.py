"""attach(): walk a Hugging Face model and give its linears banks of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from taskmoe.moe.banks.low_rank import LowRankBank
from taskmoe.moe.config import SCOPES, ConfigError, TaskMoEConfig
from taskmoe.moe.dry_run import executed_targets
from taskmoe.moe.gates import GATES
from taskmoe.moe.heads import TaskLinear
from taskmoe.moe.layer import MoELinear, SavedModule
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.routers import ROUTERS
from taskmoe.moe.siblings import family
from taskmoe.moe.targets import check_rank_pattern, features, find_targets, rank_of, routing_group
from taskmoe.moe.tasks import TaskTable


def check(config: TaskMoEConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: names the key, the value and what to do.
    """
    for key, known in (("router", ROUTERS), ("gate", GATES), ("router_scope", SCOPES)):
        value = getattr(config, key)
        if value not in known:
            raise ConfigError(f"moe.{key}: {value!r} is unknown; known are {', '.join(known)}")
    counts = {
        k: getattr(config, k)
        for k in ("r", "num_experts", "num_heads", "task_embedding_dim", "router_hidden_dim")
    }
    counts.update({f"rank_pattern[{name!r}]": rank for name, rank in (config.rank_pattern or {}).items()})
    for key, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"moe.{key}: {count!r} must be a whole number, at least 1")
    if config.lora_alpha is not None and not config.lora_alpha > 0:
        raise ConfigError(
            f"moe.lora_alpha: {config.lora_alpha} must be above 0 (experts are scaled by lora_alpha / r)"
        )
    if config.compose not in ("after", "before"):
        raise ConfigError(f"moe.compose: {config.compose!r} is unknown; known are after, before")
    if config.new_task_rows not in ("mean", "zero", "random"):
        raise ConfigError(
            f"moe.new_task_rows: {config.new_task_rows!r} is unknown; known are mean, zero, random"
        )
    if config.num_heads > 1 and config.compose != "before":
        raise ConfigError(
            f"moe.num_heads: {config.num_heads} needs compose: before (heads average parameters)"
        )
    if not config.router_temperature > 0:
        raise ConfigError(f"moe.router_temperature: {config.router_temperature} must be above 0")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"moe.lora_dropout: {config.lora_dropout} must be in [0, 1)")
    if (config.gate == "top_k") != (config.top_k is not None):
        raise ConfigError(
            f"moe.top_k: {config.top_k} with gate {config.gate!r}; set both gate: top_k and top_k, or neither"
        )
    if config.top_k is not None and not 2 <= config.top_k <= config.num_experts:
        raise ConfigError(
            f"moe.top_k: {config.top_k} must be between 2 and num_experts = {config.num_experts} "
            "(one renormalised expert has a constant gate: use gate: one_hot)"
        )
    if (config.router == "none") != (config.gate == "uniform"):
        raise ConfigError(
            f"moe.router: {config.router!r} with gate {config.gate!r}; router: none goes with gate: uniform"
        )


def attach(
    model: nn.Module,
    config: TaskMoEConfig,
    tasks: TaskTable | Sequence[str] | int,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    dry_run: bool = True,
) -> TaskMoEModel:
    """Replace the targets of ``model`` by linears with experts, in place, and freeze the rest.

    Args:
        model: any Hugging Face model (its linears: nn.Linear, GPT-2's Conv1D, quantised ones with in_features
            and out_features).
        config: what to attach.
        tasks: the task table, or task names, or a number of tasks.
        example_inputs: keyword arguments of a forward pass of three examples, for the dry run; None: made
            from the model's config.
        dry_run: check, on three short sequences, that the rows of each target can be assigned to sequences,
            and leave out targets that a forward pass never runs (a tensor that never trains helps nobody).

    Returns:
        The wrapped model; ``model.trainable_names()`` is the exact list of what trains.

    Raises:
        ConfigError: settings that cannot be used; a pattern that matches nothing (with the closest names).
        RowSpaceError: a target whose rows cannot be assigned to tasks, by name.
    """
    check(config)
    if isinstance(tasks, int):
        tasks = [f"task-{i}" for i in range(tasks)]
    table = tasks if isinstance(tasks, TaskTable) else TaskTable.from_names(tasks)
    if not len(table):
        raise ConfigError("tasks: the table is empty; name at least one task")
    if any(isinstance(m, (MoELinear, SavedModule)) for m in model.modules()):
        raise ConfigError(
            f"this {type(model).__name__} carries experts already; attach once, to a fresh model"
        )
    saved = _saved_modules(model, config)
    targets = find_targets(model, config, saved)
    check_rank_pattern(list(targets), config)
    not_run: list[str] = []
    siblings: list[list[str]] = []
    if dry_run:
        executed, siblings = executed_targets(model, targets, example_inputs)
        not_run = [n for n in targets if n not in executed]
        targets = {n: m for n, m in targets.items() if n in executed}
        if not targets:
            raise ConfigError(f"moe.target_modules: a forward pass runs none of {', '.join(not_run[:4])}")
    names = list(targets)
    groups = list(dict.fromkeys(routing_group(n, config.router_scope) for n in names))
    numbers = {n: groups.index(routing_group(n, config.router_scope)) for n in names}
    linears = {n: _moe_linear(n, m, config, numbers[n]) for n, m in targets.items()}
    for names in siblings:
        together = family([linears[n] for n in names])
        for name in names:
            linears[name].siblings = together
    replaced: dict[str, nn.Module] = {**linears}
    replaced.update({n: SavedModule(model.get_submodule(n), n) for n in saved})
    for name, module in replaced.items():  # the first change: an error above leaves the model as it was
        _replace(model, name, module)
    attached = TaskMoEModel(model, config, table, groups)
    attached.set_trainable(("experts", "router", "task_embedding", "heads", "saved"))
    attached.not_run = not_run
    return attached


def _moe_linear(name: str, linear: nn.Module, config: TaskMoEConfig, group: int) -> MoELinear:
    shape = features(linear)
    assert shape is not None
    d_in, d_out = shape
    r = rank_of(name, config)
    if d_in % config.num_heads or d_out % config.num_heads:
        raise ConfigError(
            f"moe.num_heads: {config.num_heads} does not divide {d_in} x {d_out} of {name}; choose a divisor"
        )
    scale = (config.lora_alpha if config.lora_alpha is not None else r) / r
    bank = LowRankBank(d_in, d_out, config.num_experts, r, scale, config.compose, config.lora_dropout)
    device = next(chain(linear.parameters(), linear.buffers())).device
    return MoELinear(linear, bank.to(device), name, group)


def _saved_modules(model: nn.Module, config: TaskMoEConfig) -> list[str]:
    if isinstance(config.modules_to_save, str):
        raise ConfigError(
            f"moe.modules_to_save: {config.modules_to_save!r} is one string; give a list of names"
        )
    found: list[str] = []
    for wanted in config.modules_to_save or ():
        names = [n for n, _ in model.named_modules() if n == wanted or n.endswith("." + wanted)]
        if not names:
            leaves = ", ".join(sorted({n.rpartition(".")[2] for n, _ in model.named_modules() if n})[:20])
            raise ConfigError(f"moe.modules_to_save: {wanted!r} matches no module; names are {leaves}")
        found += [n for n in names if n not in found]
    for name in found:
        outer = [n for n in found if name.startswith(n + ".")]
        if outer:
            raise ConfigError(
                f"moe.modules_to_save: {name} lies inside {outer[0]}, which is saved whole; name one of them"
            )
        if any(isinstance(m, TaskLinear) for m in model.get_submodule(name).modules()):
            raise ConfigError(
                f"moe.modules_to_save: {name} is a head per task, which trains anyway; leave it out"
            )
    return found


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
