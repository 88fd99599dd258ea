"""The Hugging Face model of one task, as a copy that knows nothing of tasks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from taskmoe.moe.heads import TaskLinear
from taskmoe.moe.layer import SavedModule
from taskmoe.moe.model import TaskMoEModel, _embedding_hook
from taskmoe.moe.wrappers import inside


@torch.no_grad()
def plain_copy(model: TaskMoEModel, task: int, instead: Mapping[int, nn.Module]) -> nn.Module:
    """A copy of ``model.base_model``, all of it free to train, with the task's head and the saved modules.

    Args:
        instead: {id of a module: what stands in its place, not copied}.
    """
    memo: dict[int, Any] = dict(instead)  # what deepcopy takes for copied already
    for module in model.base_model.modules():
        if isinstance(module, TaskLinear):
            memo[id(module)] = module.of_task(task)
        elif isinstance(module, SavedModule):
            memo[id(module)] = _saved(module)
    plain = copy.deepcopy(model.base_model, memo)
    for module in plain.modules():
        for hook, function in list(module._forward_hooks.items()):
            if function is _embedding_hook:
                del module._forward_hooks[hook]
    for p in plain.parameters():
        p.requires_grad_(p.is_floating_point())
    _describe(inside(plain)[0], model, task)
    return plain


def _saved(module: SavedModule) -> nn.Module:
    """What was trained, in the dtype of the original."""
    trained = copy.deepcopy(module.saved)
    for p, original in zip(trained.parameters(), module.original.parameters(), strict=True):
        p.data = p.data.to(original.dtype)
    return trained


def _describe(plain: Any, model: TaskMoEModel, task: int) -> None:
    """Say in the config what a later ``from_pretrained`` must know."""
    labels = model.tasks[task].labels
    if labels and any(isinstance(m, TaskLinear) for m in model.base_model.modules()):
        plain.config.id2label = dict(enumerate(labels))
        plain.config.label2id = {label: i for i, label in enumerate(labels)}
        plain.num_labels = len(labels)
    tied = getattr(plain.config, "tie_word_embeddings", False)
    into, out = plain.get_input_embeddings(), getattr(plain, "get_output_embeddings", lambda: None)()
    if tied and out is not None and out.weight is not into.weight:
        # Of T5's kin the config knows no False, and the model scales its last states by what it reads there.
        parted = type(plain.config).from_dict({**plain.config.to_dict(), "tie_word_embeddings": False})
        plain.config.tie_word_embeddings = parted.tie_word_embeddings
