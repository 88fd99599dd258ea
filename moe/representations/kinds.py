"""Representations of tasks by name: what a router that takes vectors knows of a task.

A representation is built from ``(config, tasks)``, has ``dim``, and gives [Tb, dim] for the ids of a batch's
tasks. ``task_dims`` names the axis of the tasks of its parameters; they are the group ``task_embedding``.
"""

from __future__ import annotations

from typing import Any

from taskmoe.moe.representations.learned import LearnedVectors

REPRESENTATIONS: dict[str, Any] = {
    "learned": LearnedVectors,
}
