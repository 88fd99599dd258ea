"""Representations of tasks by name: what a router that takes vectors knows of a task.

A representation is built from ``(config, tasks)``, has ``dim``, and gives [Tb, dim] for the ids of a batch's
tasks. ``task_dims`` names the axis of the tasks of its parameters and buffers; parameters are the group
``task_embedding``. ``trains`` says that it has parameters (default). ``check`` and ``idle``: see
``moe/choices.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from taskmoe.moe.config import TaskMoEConfig
from taskmoe.moe.options import idle, options_of
from taskmoe.moe.representations.fisher import FisherVectors
from taskmoe.moe.representations.frozen import FrozenVectors, TextVectors
from taskmoe.moe.representations.learned import LearnedVectors
from taskmoe.moe.tasks import TaskTable

REPRESENTATIONS: dict[str, Any] = {
    "learned": LearnedVectors,
    "frozen": FrozenVectors,
    "text": TextVectors,
    "fisher": FisherVectors,
}


def vector_size(config: TaskMoEConfig, tasks: TaskTable) -> int:
    """D of the representation that ``config`` names, without building it."""
    with torch.device("meta"):
        return int(REPRESENTATIONS[config.representation](config, tasks).dim)


def with_vectors(config: TaskMoEConfig, path: str) -> TaskMoEConfig:
    """``config`` with a file of vectors, without the options that said how to make one."""
    kind, given = REPRESENTATIONS[config.representation], config.representation_options or {}
    made = replace(options_of("representation", config, kind), path=path)
    kept = {key: value for key, value in given.items() if key not in idle(kind, made)}
    return replace(config, representation_options={**kept, "path": path})
