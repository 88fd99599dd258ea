"""A library that grows: more experts and tasks around saved ones, which go on as they are.

Legend: S routing groups, T tasks, H heads, E experts before, F experts after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from taskmoe.moe.attach import attach
from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.model import TaskMoEModel, task_dims
from taskmoe.moe.new_tasks import CLOSED, TABLE, is_open, row_of_new_tasks, rule_of
from taskmoe.moe.routing import Routing
from taskmoe.moe.state import TASKS, WEIGHTS, StateError, read_config
from taskmoe.moe.tasks import TaskTable


def grow(
    base_model: nn.Module,
    folder: str | Path,
    num_experts: int,
    tasks: TaskTable | None = None,
    *,
    router_options: dict | None = None,
    **kwargs: Any,
) -> TaskMoEModel:
    """Load a saved adapter into a model with more experts and tasks.

    The tasks that were there give what they gave: their gates on the new experts are zero. New experts start
    as the bank starts them (with nothing to add, where it is low-rank). A new task's row of a table follows
    ``new_task_rows`` on the old experts, and starts at the mean of those in use on each new one.

    Args:
        base_model: as it was when the adapter was attached.
        num_experts: F, at least as many as saved.
        tasks: a table that the saved one is a prefix of; None: the saved one.
        router_options: in place of the saved ones (the map of router ``fixed``, with the new tasks).
        kwargs: of :func:`attach`.

    Raises:
        ConfigError: routers, gates or banks under which more experts would change the old tasks.
        StateError: the folder is not readable, or does not fit.
        TaskError: the saved tasks are not the first ones.
    """
    folder = Path(folder)
    before = read_config(folder)
    saved = TaskTable.load(folder / TASKS)
    table = saved if tasks is None else tasks
    saved.require_prefix_of(table)
    if num_experts < before.num_experts:
        raise ConfigError(f"moe.num_experts: {num_experts} is less than the {before.num_experts} saved")
    options = before.router_options if router_options is None else router_options
    after = replace(before, num_experts=num_experts, router_options=options)
    model = attach(base_model, after, table, **kwargs)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from error
    own = model.adapter_tensors()
    different = sorted(own.keys() ^ state.keys())
    if different:
        raise StateError(f"{folder / WEIGHTS}: {different[0]} is not in both; was another base model saved?")
    axes = task_dims(model)
    closed = [n for n, m in model.named_modules() if isinstance(m, Bank) and m.weighs_all]
    if closed and num_experts > before.num_experts:
        raise ConfigError(
            f"moe.bank: {before.bank!r} weighs all experts in {closed[0]}, so that another would change the "
            "old tasks; train it anew around the larger library"
        )
    with torch.no_grad():
        for name, p in own.items():
            rule = rule_of(model, name, p)
            if name == TABLE:
                p.copy_(_table(p, state[name], rule))
            else:
                _copy(name, p, state[name], axes.get(name), rule)
    _check_routes(model, before, saved, state)
    return model


def _table(new_STHF: Tensor, old_STHE: Tensor, rule: str) -> Tensor:
    (_, T, _, E), grown = old_STHE.shape, new_STHF.detach().clone()
    grown[:, :T, :, :E] = old_STHE.to(grown)
    grown[:, :T, :, E:] = CLOSED
    if rule != "random":
        row_S1HE = row_of_new_tasks(TABLE, old_STHE, 1, rule)  # 0 where no task may go
        in_use_S1H1 = is_open(old_STHE).any(1, keepdim=True).sum(-1, keepdim=True).clamp_min(1)
        grown[:, T:, :, :E] = row_S1HE.to(grown)
        grown[:, T:, :, E:] = (row_S1HE.sum(-1, keepdim=True) / in_use_S1H1).to(grown)
    return grown


def _copy(name: str, p: Tensor, old: Tensor, axis: int | None, rule: str) -> None:
    """The old values come first on every axis; rows of new tasks follow the rule."""
    if old.dim() != p.dim() or any(o > n for o, n in zip(old.shape, p.shape, strict=True)):
        raise StateError(f"{name} has shape {tuple(old.shape)}, the model {tuple(p.shape)}: other settings?")
    if axis is not None and old.shape[axis] < p.shape[axis] and rule != "random":
        fresh = p.narrow(axis, old.shape[axis], p.shape[axis] - old.shape[axis])
        others = [slice(0, size) for size in old.shape]
        others[axis] = slice(None)
        fresh[tuple(others)] = row_of_new_tasks(name, old, axis, rule).to(p)
    p[tuple(slice(0, size) for size in old.shape)] = old.to(p)


def _check_routes(
    model: TaskMoEModel, before: TaskMoEConfig, saved: TaskTable, state: dict[str, Tensor]
) -> None:
    """The old tasks must have their old gates, and none on new experts: asked of the routers themselves."""
    E = before.num_experts
    if model.routing.router is None:
        if model.moe_config.num_experts > E:
            raise ConfigError(
                f"moe.router: {before.router!r} would send tokens of the old tasks to new experts; a library "
                "grows under a router by task"
            )
        return
    old = Routing(before, model.routing.groups, saved)
    own = {n.removeprefix("routing."): t for n, t in state.items() if n.startswith("routing.")}
    old.load_state_dict(own, strict=False)
    tasks = torch.arange(len(saved))
    with torch.no_grad():
        were_STHE = _dense(old.eval(), tasks, E)
        are_STHF = _dense(model.routing, tasks.to(model.device), model.moe_config.num_experts).cpu()
    same = torch.allclose(were_STHE, are_STHF[..., :E].to(were_STHE), rtol=1e-6, atol=1e-7)
    if not same or are_STHF[..., E:].any():
        raise ConfigError(
            f"moe.router: {before.router!r} with gate {before.gate!r} would change the old tasks' routes; a "
            "library grows under router fixed, or task_table with a gate that is zero for a very low logit "
            "and knows nothing of the number of experts"
        )


def _dense(routing: Routing, tasks: Tensor, experts: int) -> Tensor:
    values, slots = routing(tasks)
    if slots is None:
        return values
    return values.new_zeros(*values.shape[:-1], experts).scatter(-1, slots, values)


@torch.no_grad()
def merge_experts(model: TaskMoEModel, experts: Sequence[int], into: int) -> None:
    """Expert ``into`` of every bank becomes the mean of ``experts``, parameter by parameter (ELM's merge).

    Of low-rank experts that is the mean of A and the mean of B, not of their products.

    Raises:
        ConfigError: an expert that there is not, or a bank whose parameters do not lie by expert.
    """
    E = model.moe_config.num_experts
    for e in (*experts, into):
        if not 0 <= e < E:
            raise ConfigError(f"merge_experts: there is no expert {e}; they are numbered 0 to {E - 1}")
    if not experts:
        raise ConfigError("merge_experts: name the experts whose mean is taken")
    for name, bank in model.named_modules():
        for own, p in bank.named_parameters(recurse=False) if isinstance(bank, Bank) else ():
            if bank.kind != "experts":
                continue
            if len(p) != E:
                raise ConfigError(f"merge_experts: {name}.{own} is {tuple(p.shape)}, not by expert first")
            p[into] = p[list(experts)].mean(0)


@torch.no_grad()
def start_task(model: TaskMoEModel, task: str, experts: Sequence[int], closed: float = CLOSED) -> None:
    """Give ``task`` equal shares of ``experts`` and none of the others, in every group of a table.

    Args:
        closed: the logit of the others; a milder one (-10) lets the task learn its way back to them.

    Raises:
        ConfigError: the router is no ``task_table``, or there is no such expert.
        TaskError: an unknown task.
    """
    table = getattr(model.routing.router, "logits_STHE", None)
    if table is None:
        raise ConfigError(f"moe.router: {model.moe_config.router!r} has no rows of tasks; use task_table")
    missing = [e for e in experts if not 0 <= e < table.shape[-1]]
    if missing or not experts:
        raise ConfigError(f"start_task: experts {list(experts)} are not among the {table.shape[-1]} here")
    row = table[:, model.tasks.id(task)]
    row.fill_(closed)
    row[..., list(experts)] = 0.0
