"""Save and load adapters only: adapter_model.safetensors, adapter_config.json, task_map.json; beside them
task_vectors.safetensors, where vectors of tasks came from a file, and routing.safetensors, the gates of all
tasks (:mod:`taskmoe.moe.snapshot`), which only people read. The config's gate and temperature are those that
the model had when it was saved: in a run, those of the phase."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from taskmoe.moe.banks.base import Bank
from taskmoe.moe.config import ConfigError, TaskMoEConfig
from taskmoe.moe.layer import MoELinear
from taskmoe.moe.model import TaskMoEModel, task_dims
from taskmoe.moe.new_tasks import row_of_new_tasks, rule_of
from taskmoe.moe.representations.files import FILE as VECTORS
from taskmoe.moe.representations.files import write_vectors
from taskmoe.moe.representations.kinds import with_vectors
from taskmoe.moe.snapshot import FILE as ROUTING
from taskmoe.moe.snapshot import Snapshot, take
from taskmoe.moe.tasks import TaskTable

WEIGHTS, CONFIG, TASKS = "adapter_model.safetensors", "adapter_config.json", "task_map.json"
FORMAT = 1
GATE = {"gate", "gate_options", "top_k"}  # they belong together


class StateError(ValueError):
    """A saved adapter that cannot be read or does not fit the model."""


def save_adapter(
    model: TaskMoEModel,
    folder: str | Path,
    state: dict[str, Tensor] | None = None,
    routing: Snapshot | None = None,
) -> None:
    """Write the adapter of ``model``; ``state`` replaces its own tensors (gathered ones under ZeRO-3), and
    ``routing`` what its routers say, where all ranks must ask them together.

    Raises:
        StateError: a tensor is empty (a partitioned one that was not gathered), or the gate in force is one
            that could not be attached.
    """
    from taskmoe.moe.attach import check

    in_force = model.config_in_force()
    if in_force.gate != model.moe_config.gate:
        try:
            check(in_force)
        except ConfigError as error:
            raise StateError(f"{error}; the model gates so since use_gate, change that to save it") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.adapter_state_dict() if state is None else state
    empty = [n for n, t in state.items() if t.numel() == 0]
    if empty:
        raise StateError(f"{empty[0]} is empty; gather partitioned parameters before saving")
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    base = getattr(getattr(model.base_model, "config", None), "_name_or_path", None)
    config = {
        "peft_type": "TASKMOE",
        "format": FORMAT,
        "base_model_name_or_path": base,
        **in_force.to_dict(),
    }
    if any(m.frozen for m in model.modules() if isinstance(m, Bank)):
        config["frozen"] = True  # imported experts that do not train
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    model.tasks.save(folder / TASKS)
    (routing or take(model)).save(folder / ROUTING)
    if model.recorder is not None:
        model.recorder.save(folder)
    if (model.moe_config.representation_options or {}).get("path"):
        names = [f"routing.representation.{n}" for n in ("vectors_TD", "embedding_TD")]
        vectors_TD = next(state[n] for n in names if n in state)
        write_vectors(dict(zip(model.tasks.names, vectors_TD, strict=True)), folder / VECTORS)


def read_config(folder: str | Path) -> TaskMoEConfig:
    """The TaskMoEConfig of a saved adapter.

    Raises:
        StateError: adapter_config.json is missing, broken, or of another kind.
    """
    return _read_config(folder)[0]


def _read_config(folder: str | Path) -> tuple[TaskMoEConfig, bool]:
    """The settings, and whether the experts are frozen whatever is to train."""
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = (values.pop("peft_type", None), values.pop("format", None))
        if kind != ("TASKMOE", FORMAT):
            raise StateError(
                f"{path}: not a taskmoe adapter of format {FORMAT}, but peft_type {kind[0]}, format {kind[1]}"
            )
        values.pop("base_model_name_or_path", None)
        frozen = values.pop("frozen", False) is True
        return TaskMoEConfig.from_dict(values), frozen
    except StateError:
        raise
    except ConfigError as error:
        raise StateError(f"{path}: {error}") from error
    except (OSError, AttributeError, TypeError, ValueError) as error:  # ValueError: broken JSON, or not UTF-8
        raise StateError(
            f"{path}: not a readable adapter config ({type(error).__name__}: {error})"
        ) from error


def load_adapter(model: TaskMoEModel, folder: str | Path) -> None:
    """Load a saved adapter into an attached model whose task table starts with the adapter's.

    Rows of tasks that the adapter does not know follow ``moe_config.new_task_rows``: the mean of the known
    rows, zero, or what the model was initialised with (random). Where a file gives the tasks' vectors, a new
    task has its own.

    Raises:
        StateError: unreadable file; missing, unexpected or misshapen tensors.
        TaskError: the adapter's tasks are not the first tasks of the model's table; names those that differ.
    """
    folder = Path(folder)
    saved = TaskTable.load(folder / TASKS)
    saved.require_prefix_of(model.tasks)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from error
    own = model.adapter_tensors()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model does not"
        raise StateError(
            f"{folder / WEIGHTS} {what} ({len(missing)} missing, {len(extra)} unexpected): other settings?"
        )
    dims = task_dims(model)
    values: dict[str, Tensor] = {}
    for name, parameter in own.items():
        expected = list(parameter.shape)
        if name in dims:
            expected[dims[name]] = len(saved)
        if list(state[name].shape) != expected:
            raise StateError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(state[name].shape)}, the model needs "
                f"{tuple(expected)}: other settings?"
            )
        values[name] = state[name]
        if name in dims:
            rule = rule_of(model, name, parameter)
            values[name] = _grown(name, state[name], parameter, dims[name], rule)
    if model.recorder is not None:
        model.recorder.load(folder)
    with torch.no_grad():  # only now: an error leaves the model as it was
        for name, parameter in own.items():
            parameter.copy_(values[name])
    for layer in model.modules():
        if isinstance(layer, MoELinear) and layer.token_routing is not None:
            layer.token_routing.router.begin(layer.bank)  # type: ignore[union-attr,operator]


def _grown(name: str, value: Tensor, parameter: Tensor, axis: int, rule: str) -> Tensor:
    """``value`` with rows appended along ``axis`` up to the size of ``parameter``."""
    if value.shape[axis] == parameter.shape[axis]:
        return value
    new = parameter.detach().cpu().narrow(axis, value.shape[axis], parameter.shape[axis] - value.shape[axis])
    if rule != "random":
        new = row_of_new_tasks(name, value, axis, rule).expand_as(new)
    return torch.cat([value, new.to(value.dtype)], axis)


def with_saved_vectors(config: TaskMoEConfig, folder: str | Path) -> TaskMoEConfig:
    """``config`` with the vectors of tasks beside a saved adapter, where it names no file that is there."""
    path, beside = (config.representation_options or {}).get("path"), Path(folder) / VECTORS
    if (path is not None and Path(path).exists()) or not beside.exists():
        return config
    return with_vectors(config, str(beside))


def with_saved_gate(config: TaskMoEConfig, folder: str | Path, keep: Collection[str] = ()) -> TaskMoEConfig:
    """``config`` with the gate and temperature of a saved adapter, but for the keys in ``keep``.

    Raises:
        StateError: as :func:`read_config`.
    """
    saved = read_config(folder)
    gate = GATE if GATE.isdisjoint(keep) else ()
    return replace(config, **{key: getattr(saved, key) for key in {*gate, "router_temperature"} - {*keep}})


def load_model(
    base_model: nn.Module, folder: str | Path, tasks: TaskTable | None = None, **kwargs: Any
) -> TaskMoEModel:
    """Attach as the saved config says, then :func:`load_adapter`; ``tasks``: a longer table, if any."""
    from taskmoe.moe.attach import attach

    config, frozen = _read_config(folder)
    config = with_saved_vectors(config, folder)
    table = TaskTable.load(Path(folder) / TASKS) if tasks is None else tasks
    model = attach(base_model, config, table, **kwargs)
    load_adapter(model, folder)
    if frozen:
        model.freeze_experts()
    return model
