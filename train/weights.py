"""Weights as files and as dictionaries: the base's, and everything at once between two phases.

Under ZeRO-3 parameters must be gathered (``Engine.gathered``) while these run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from taskmoe.moe import StateError, TaskMoEModel
from taskmoe.moe.banks.base import Bank

BASE_WEIGHTS = "base_model.safetensors"  # in a checkpoint, where the base is not a model of the hub


def base_state(model: TaskMoEModel) -> dict[str, Tensor]:
    """The base model's parameters (tied ones once) and persistent buffers, on the CPU."""
    state = {n: p.detach().cpu().contiguous() for n, p in model.parameter_groups()["base"]}
    kept = model.state_dict().keys() - model.adapter_tensors().keys()
    state.update({n: b.detach().cpu().contiguous() for n, b in model.named_buffers() if n in kept})
    return state


def save_base(state: dict[str, Tensor], folder: Path) -> None:
    """Write :func:`base_state`."""
    save_file(state, folder / BASE_WEIGHTS, metadata={"format": "pt"})


def load_base(model: TaskMoEModel, folder: Path) -> None:
    """Load what :func:`save_base` wrote, where the folder has it.

    Raises:
        StateError: unreadable, or tensors that do not fit.
    """
    path = folder / BASE_WEIGHTS
    if not path.exists():
        return
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: not a readable safetensors file ({error})") from error
    load_base_state(model, state, str(path))


def load_base_state(model: TaskMoEModel, state: dict[str, Tensor], source: str) -> None:
    """Copy :func:`base_state` into a model of the same settings.

    Raises:
        StateError: a tensor is missing or has another shape.
    """
    own = {n: p.data for n, p in model.parameter_groups()["base"]}
    own.update(dict(model.named_buffers()))
    wrong = [n for n, t in state.items() if n not in own or own[n].shape != t.shape]
    missing = [n for n, _ in model.parameter_groups()["base"] if n not in state]
    if wrong or missing:
        raise StateError(
            f"{source}: {(wrong + missing)[0]} does not fit the model; were model settings changed?"
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def all_weights(model: TaskMoEModel) -> dict[str, Tensor]:
    """Copies of every parameter and persistent buffer, on the CPU."""
    state = {**base_state(model), **model.adapter_state_dict()}
    return {name: tensor.clone() for name, tensor in state.items()}


def load_all_weights(model: TaskMoEModel, state: dict[str, Tensor]) -> None:
    """Copy :func:`all_weights` into a model of the same settings."""
    adapters = {n: p for g, ps in model.parameter_groups().items() if g != "base" for n, p in ps}
    load_base_state(model, {n: t for n, t in state.items() if n not in adapters}, "the last phase")
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(state[name])


def refresh_saved_modules(model: TaskMoEModel) -> None:
    """Saved modules and module experts start again from their originals, which a phase without adapters may
    have trained."""
    for module in model.modules():
        if hasattr(type(module), "copies"):
            module.refresh()  # type: ignore[operator]


def fresh_weights(model: TaskMoEModel, groups: Sequence[str]) -> dict[str, Tensor]:
    """Copies of what training moves in some groups of a model that was just built: parameters, and buffers
    that a bank counts among them (not those that were given to it)."""
    fresh = {n: p.detach().clone() for g in groups for n, p in model.parameter_groups()[g]}
    for prefix, bank in model.named_modules():
        if isinstance(bank, Bank) and bank.kind in groups:
            fresh.update({f"{prefix}.{n}": bank.get_buffer(n).clone() for n in bank.moving})
    return fresh


def start_anew(model: TaskMoEModel, fresh: dict[str, Tensor], groups: Sequence[str]) -> None:
    """Copy :func:`fresh_weights` back; copies of the base's modules start from the base as it is now."""
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in fresh.items():
            own[name].copy_(value)
    for module in model.modules():
        if getattr(type(module), "copies", None) in groups:
            module.refresh()  # type: ignore[operator]
