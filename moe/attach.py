"""attach(): give a Hugging Face model experts and routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from taskmoe.moe.banks.base import Bank, prepare
from taskmoe.moe.banks.kinds import BANKS
from taskmoe.moe.choices import SEAMS, check_choices, check_methods, ignored
from taskmoe.moe.config import COMPOSE, NEW_ROWS, SCOPES, ConfigError, TaskMoEConfig
from taskmoe.moe.gates import GATES
from taskmoe.moe.layer import SavedModule
from taskmoe.moe.model import TaskMoEModel
from taskmoe.moe.regularisation import build_penalties
from taskmoe.moe.regularisers.kinds import read_regularisers
from taskmoe.moe.snapshot import build_recorder
from taskmoe.moe.targets import saved_modules
from taskmoe.moe.tasks import TaskTable


def check(config: TaskMoEConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: names the key, the value and what to do.
    """
    check_choices(config)
    for key, known in {"router_scope": SCOPES, "compose": COMPOSE, "new_task_rows": NEW_ROWS}.items():
        if getattr(config, key) not in known:
            raise ConfigError(f"moe.{key}: {getattr(config, key)!r} is unknown; known are {', '.join(known)}")
    counts = {
        k: getattr(config, k)
        for k in ("r", "num_experts", "num_heads", "task_embedding_dim", "router_hidden_dim")
    }
    for pattern in ("rank_pattern", "expert_pattern"):
        counts.update({f"{pattern}[{name!r}]": n for name, n in (getattr(config, pattern) or {}).items()})
    for key, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"moe.{key}: {count!r} must be a whole number, at least 1")
    if config.lora_alpha is not None and not config.lora_alpha > 0:
        raise ConfigError(
            f"moe.lora_alpha: {config.lora_alpha} must be above 0 (experts are scaled by lora_alpha / r)"
        )
    if config.num_heads > 1 and config.compose != "before":
        raise ConfigError(
            f"moe.num_heads: {config.num_heads} needs compose: before (heads average parameters)"
        )
    if not config.router_temperature > 0:
        raise ConfigError(f"moe.router_temperature: {config.router_temperature} must be above 0")
    if not 0 <= config.lora_dropout < 1:
        raise ConfigError(f"moe.lora_dropout: {config.lora_dropout} must be in [0, 1)")
    if ("top_k" not in ignored(config)) != (config.top_k is not None):
        raise ConfigError(
            f"moe.top_k: {config.top_k} with gate {config.gate!r}; set both gate: top_k and top_k, or neither"
        )
    if config.top_k is not None and not 2 <= config.top_k <= config.num_experts:
        raise ConfigError(
            f"moe.top_k: {config.top_k} must be between 2 and num_experts = {config.num_experts} "
            "(one renormalised expert has a constant gate: use gate: one_hot)"
        )
    check_methods(config)
    read_regularisers(config)
    router = SEAMS["router"][config.router]
    if getattr(router, "blind", False) != GATES[config.gate].blind:
        raise ConfigError(
            f"moe.router: {config.router!r} with gate {config.gate!r}; router: none goes with gate: uniform"
        )
    wanted = getattr(router, "gates", (config.gate,))
    if BANKS[config.bank].levels and config.gate not in wanted:
        raise ConfigError(
            f"moe.gate: {config.gate!r} with router {config.router!r}, which goes with gate "
            f"{' or '.join(wanted)} alone"
        )


def attach(
    model: nn.Module,
    config: TaskMoEConfig,
    tasks: TaskTable | Sequence[str] | int,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    dry_run: bool = True,
) -> TaskMoEModel:
    """Put experts into ``model``, in place, where the bank of ``config`` has them, and freeze the rest.

    Args:
        model: any Hugging Face model (banks beside linears take nn.Linear, GPT-2's Conv1D, and quantised ones
            with in_features and out_features).
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
    if any(isinstance(m, (Bank, SavedModule)) for m in model.modules()):
        raise ConfigError(
            f"this {type(model).__name__} carries experts already; attach once, to a fresh model"
        )
    saved = saved_modules(model, config)
    kind = BANKS[config.bank]
    placed = kind.place(model, config, table, example_inputs=example_inputs, dry_run=dry_run)
    replaced = dict(placed.replaced)
    replaced.update({n: SavedModule(model.get_submodule(n), n) for n in saved})
    for name, module in replaced.items():  # the first change: an error above leaves the model as it was
        _replace(model, name, module)
    attached = TaskMoEModel(model, config, table, placed.groups)
    prepare(kind, attached)
    attached.penalties = build_penalties(attached)
    attached.recorder = build_recorder(attached)
    attached.set_trainable(("experts", "router", "task_embedding", "heads", "saved"))
    attached.not_run = placed.not_run
    return attached


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
